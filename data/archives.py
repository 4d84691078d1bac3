"""What the scripts of this folder share: a public archive, as it is published, becomes class folders of pictures.

    python data/NAME.py ARCHIVE ... --out DATA     ->  DATA/train/CLASS/PICTURE  DATA/val/CLASS/PICTURE

An archive is read from front to back and nothing is unpacked by the names it holds: what is written is what the data
set's own lists of its splits name. A folder beside DATA is filled and takes its name when it is whole; started again
after a kill, a script leaves the pictures that are there.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mage_ds.errors import EXIT_USER, UserError

DONE = "prepared.json"  # in a finished folder: what it was made of
_TEXT = 1 << 26  # bytes that a list of pictures may have
_COPIED = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"BM": ".bmp", b"RIFF": ".webp"}  # first bytes: as they are
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error)


class Picture(NamedTuple):
    """split: "train" or "val", "" where the folder is one split; label: the class; name: of the file, without its
    ending; data: the file's bytes."""

    split: str
    label: str
    name: str
    data: bytes


class DataSet(NamedTuple):
    """name; archives: file name -> MD5, in the order in which the command line takes them; pictures(files): how many
    there are, and the pictures."""

    name: str
    archives: Mapping[str, str]
    pictures: Callable[[list[Path]], tuple[int, Iterable[Picture]]]


def main(data: DataSet, about: str) -> None:
    """The command line of a script; ends the process with 0, or 2 and one line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for number, name in enumerate(data.archives):
        parser.add_argument(f"file{number}", metavar=name, type=Path, help="as it was downloaded")
    parser.add_argument("--out", metavar="DATA", type=Path, required=True, help="folder to make")
    given = vars(parser.parse_args())
    try:
        make(data, [given[f"file{number}"] for number in range(len(data.archives))], given["out"])
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER)


def make(data: DataSet, files: list[Path], out: Path) -> None:
    """Makes `out` of these files. Raises: UserError, one line."""
    out = Path(os.path.abspath(out))
    request = {"data": data.name, "archives": dict(data.archives)}
    if _is_done(out, request):
        return
    for file, (name, expected) in zip(files, data.archives.items(), strict=True):
        _verify(file, name, expected)
    with _published(out, request) as folder:
        number, pictures = data.pictures(files)
        counts, names = Counter(), {}
        for picture in _bar(pictures, number, "pictures", data.name):
            label = safe(picture.label)
            if names.setdefault(label, picture.label) != picture.label:
                raise UserError(f"{files[0]}: classes {names[label]!r} and {picture.label!r} have one folder name")
            _write(folder / picture.split / label, safe(picture.name), picture.data)
            counts[picture.split] += 1
        request |= {"classes": len(names), "pictures": {split or "all": n for split, n in sorted(counts.items())}}
    for split, n in sorted(counts.items()):
        print(f"{out / split}: {n:,} pictures of {len(names):,} classes")


def safe(name: str) -> str:
    """A class in the data set's own spelling as the name of a folder: what no name may hold, and a dot in front, which
    would hide it, become "_"."""
    text = "".join("_" if c in "/\\" or not c.isprintable() else c for c in unicodedata.normalize("NFC", name)).strip()
    return "_" + text[1:] if text[:1] in (".", "") else text


# --- reading ---------------------------------------------------------------------------------------------------------


def texts(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The bytes of these members. UserError where one is not there."""
    left, found = set(names), {}
    for name, read in _members(path):
        if name in left:
            found[name] = read(_TEXT)
            left.remove(name)
        if not left:
            return found
    raise UserError(f"{path}: holds no {sorted(left)[0]}; it is not the archive that this script is for")


def picked(path: Path, wanted: Mapping[str, tuple[str, str]], within: str | None = None) -> Iterator[Picture]:
    """The pictures of a tar: member -> (split, class). UserError, at the end, where one was not there.

    within: the tar lies in a zip, under this name."""
    left = dict(wanted)
    for name, read in _members(path, within):
        if name in left:
            split, label = left.pop(name)
            yield Picture(split, label, PurePosixPath(name).stem, read())
    if left:
        raise UserError(f"{path}: lacks {min(left)} and {len(left) - 1:,} more pictures of its lists")


def by_lists(
    path: Path, lists: Mapping[str, str], place: Callable[[str], tuple[str, str]]
) -> dict[str, tuple[str, str]]:
    """What `picked` takes, by the data set's own lists. lists: member -> split; place(line): the picture's member and
    its class."""
    found, wanted = texts(path, lists), {}
    for name, split in lists.items():
        for line in lines(found[name]):
            member, label = place(line)
            wanted[member] = (split, label)
    return wanted


def lines(data: bytes) -> list[str]:
    """Those of a list of pictures, without empty ones."""
    return [line for line in map(str.strip, data.decode("utf-8", "replace").splitlines()) if line]


def listed(path: Path, within: str | None = None) -> list[str]:
    """The names of all members."""
    return [name for name, _ in _members(path, within)]


def png(picture) -> bytes:
    """A picture of Pillow, or uint8 (H, W, 3), as PNG."""
    from PIL import Image

    made = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(made, "png")
    return made.getvalue()


def matlab(path: Path, data: bytes, name: str):
    """A variable of a MATLAB file, of one dimension; nothing in it is run."""
    import numpy as np
    from scipy.io import loadmat

    try:
        return np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True, variable_names=[name])[name])
    except Exception as error:  # the reader meets garbage with whatever Python raises
        raise UserError(f"{path}: is no MATLAB file with {name} ({type(error).__name__})") from None


def _members(path: Path, within: str | None = None) -> Iterator[tuple[str, Callable]]:
    """(name, read(most bytes)) of the plain files of a tar, packed or not, in their order."""
    with _readable(path), _opened(path, within) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise UserError(f"{path}: holds {member.name!r}, which leads out of its folder; nothing was made of it")
            if member.isreg():
                yield str(name), lambda most=-1, member=member: _read(path, archive, member, most)


@contextmanager
def _readable(path: Path):
    """What tarfile raises becomes one line."""
    try:
        yield
    except _BROKEN as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); download it again") from None


@contextmanager
def _opened(path: Path, within: str | None):
    if within is None:
        with open(path, "rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as outer:
        try:
            file = outer.open(within)
        except KeyError:
            raise UserError(f"{path}: holds no {within}; it is not the archive that this script is for") from None
        with file:
            yield file


def _read(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    if 0 <= most < member.size:
        raise UserError(f"{path}: {member.name} has {member.size:,} bytes, more than a list of pictures")
    with _readable(path):
        return archive.extractfile(member).read()


def _verify(path: Path, name: str, expected: str) -> None:
    """UserError where a file is not the published one."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open(path, "rb") as file:
            blocks = iter(lambda: file.read(1 << 22), b"")
            for block in _bar(blocks, -(-path.stat().st_size >> 22), "blocks", f"check {name}"):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the file {name}") from None
    if digest.hexdigest() != expected:
        raise UserError(
            f"{path}: is not {name} as it is published: its MD5 is {digest.hexdigest()}, not {expected}; download it "
            "again"
        )


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(folder: Path, name: str, data: bytes) -> None:
    """A picture's file, where it is not there already; what is no picture that Pillow, DALI and browsers know by its
    first bytes (a GIF that is named .jpg) becomes PNG."""
    ending = next((ending for first, ending in _COPIED.items() if data.startswith(first)), None)
    path = folder / f"{name}{ending or '.png'}"
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{path.name}.part"
    part.write_bytes(data if ending else _as_png(path, data))
    os.replace(part, path)


def _as_png(path: Path, data: bytes) -> bytes:
    from PIL import Image

    try:
        return png(Image.open(io.BytesIO(data)).convert("RGB"))
    except Exception as error:  # Pillow's parsers raise anything on garbage
        raise UserError(f"{path.parent.name}/{path.stem}: is no picture ({type(error).__name__})") from None


def _is_done(out: Path, request: dict) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        done = json.loads((out / DONE).read_text())
        if all(done[key] == value for key, value in request.items()):
            print(f"{out}: is there already, nothing to do")
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{out}: holds something else already; choose another --out or remove it first")


@contextmanager
def _published(out: Path, request: dict) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end; it stays where a process is killed, and goes after an error
    in what the archives hold."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    partial = out.with_name(f".{out.name}.{digest}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        (partial / DONE).write_text(json.dumps(request, indent=1) + "\n")
        if out.exists():
            out.rmdir()  # an empty one
        os.rename(partial, out)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); make room, or choose another --out") from None


def _bar(items, total: int, unit: str, what: str):
    from tqdm import tqdm

    return tqdm(items, desc=what, total=total, unit=f" {unit}", disable=None)  # None: silent without a terminal
