"""Where the pictures come from that an evaluation looks at: folders, tars, arrays, sets that `sample` made.

Decoding and resizing are Pillow's, in threads, since those are what published figures are made with (torchvision's
Resize and torch-fidelity's reader call it). DALI's antialiased resize differs from it by up to 7 levels of 255, and is
no faster on a CPU, where it was measured.
"""

import hashlib
import io
import math
import os
import threading
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mage_ds import files
from mage_ds.errors import UserError
from mage_ds.evaluation.references import npy_header
from mage_ds.inputs import augment, tars
from mage_ds.inputs.catalog import Catalog, open_catalog
from mage_ds.report.manifest import read_manifest
from mage_ds.report.pictures import FORMATS, Pictures
from mage_ds.sampling import labels as asked

_LARGEST = 1 << 30  # bytes of one picture's file
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # Pillow's, of 8 bits a colour
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # no others, whatever a file's name says: some start programs
_TOLD = 100_000  # files whose endings are counted
_MANY_CLASSES = 2**31


class Source(NamedTuple):
    """Pictures 0..n-1 that can be read in any order, from any thread, always the same.

    size: pixels of a side, None where they are not square; labels: int64 (n,), -1 = none, or None; facts: what is
    known of the set, JSON values: "source" (where it lies), "kind" (folder, tars, npz, sample), "fingerprint", "split",
    "files" (another one where they are written over), "height", "width" (of what `read` gives), "resized" (pixels of
    the short side, None: as they are), "formats" ({".jpg": number of files}), "classes" (their names), of a `sample`
    folder "manifest"; read(index int64 (B,)) -> uint8 (B, H, W, 3), black from n on; name(i): what to call a picture in
    a message; sizes(index) -> int32 (B, 2), height and width in the files, before any Resize; None: as `read` gives
    them; ahead: whether `read` may run in a thread beside the extractor (False for pictures that a network paints).
    """

    n: int
    size: int | None
    labels: np.ndarray | None
    facts: dict
    read: Callable[[np.ndarray], np.ndarray]
    name: Callable[[int], str] = str
    sizes: Callable[[np.ndarray], np.ndarray] | None = None
    ahead: bool = True


def open_source(path: Path, size: int | None = None, split: str | None = None) -> Source:
    """Pictures of a class folder or flat folder, of tars, of an .npz in ADM's layout (arr_0 uint8 (N, H, W, 3), labels
    arr_1), or of a folder that `sample` made, in any of its formats.

    Args: size: short side to so many pixels (bilinear, with antialiasing), then the centre square, as the paper's
    protocol does with reference pictures; None: pictures as they are, all of one size; split: "train" or "val" of a
    data set, where `DATA:val` does not say which; by default val where it has one.
    Raises: UserError here for what is no such thing; from `read`, naming the file, for a broken picture, and for one
    of another size than the first.
    """
    path, given = _place(Path(path))
    if not path.exists():
        raise UserError(f"{path}: no such folder of pictures or tars, .npz, or model that draws some; see the spelling")
    if path.is_file() and path.suffix == ".tar":
        raise UserError(f"{path}: is a single tar; give the folder that it lies in, of which all tars are read")
    if size is not None and not 1 <= size <= 2**14:
        raise UserError(f"--size {size}: must be from 1 to {2**14} pixels")
    if path.is_file() and given is None:
        raw = _npz(path)
    elif path.is_dir() and given is None and (manifest := read_manifest(path)) is not None:
        raw = _sample(path, manifest)
    else:
        raw = _catalog(path, given or split)
    return _source(path, raw, size)


def _place(path: Path) -> tuple[Path, str | None]:
    """DATA:val -> (DATA, "val"), where no file has that name."""
    head, colon, tail = str(path).rpartition(":")
    if colon and tail in ("train", "val") and not path.exists():
        return Path(head), tail
    return path, None


class _Raw(NamedTuple):
    """Pictures as they lie there. n, labels, name, facts: as in Source; image(i): a picture of Pillow, opened and not
    decoded where it is a file's."""

    n: int
    labels: np.ndarray | None
    facts: dict
    name: Callable[[int], str]
    image: Callable[[int], object]


def _source(path: Path, raw: _Raw, size: int | None) -> Source:
    first = np.asarray(_decoded(raw, 0) if size is None else _fitted(_decoded(raw, 0), size))
    shape = high, wide = first.shape[:2]
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "decode")
    seen: dict[int, tuple[int, int]] = {}  # sizes of what was read, until they are asked for

    def one(i: int) -> np.ndarray:
        image = _decoded(raw, i)
        if size is not None:
            seen[i] = image.size
            return np.asarray(_fitted(image, size))
        if image.size != (wide, high):
            raise UserError(
                f"{raw.name(i)} is {image.width} x {image.height}, {raw.name(0)} is {wide} x {high}: pictures of "
                "unlike sizes make no figure; resize them all to one size"
            )
        return np.asarray(image)

    def read(index: np.ndarray) -> np.ndarray:
        made = np.zeros((len(index), *shape, 3), np.uint8)
        real = [(row, int(i)) for row, i in enumerate(index) if i < raw.n]
        for (row, _), picture in zip(real, pool.map(one, [i for _, i in real]), strict=True):
            made[row] = picture
        return made

    def sizes(index: np.ndarray) -> np.ndarray:
        known = [seen.pop(int(i), None) or raw.image(int(i)).size for i in index]
        return np.array(known, dtype=np.int32).reshape(-1, 2)[:, ::-1]

    facts = {"source": str(path.resolve()), **raw.facts, "height": high, "width": wide, "resized": size}
    side = high if high == wide else None
    return Source(raw.n, side, raw.labels, facts, read, raw.name, None if size is None else sizes)


def _decoded(raw: _Raw, i: int):
    """A picture of Pillow in RGB, as torchvision's and torch-fidelity's readers make it: neither EXIF's rotation nor
    transparency counts. UserError that names its file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = raw.image(i)
            if image.mode not in _MODES:
                raise UserError(f"{raw.name(i)}: is of Pillow's mode {image.mode}, not of 8 bits a colour; convert it")
            return image.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # Pillow's parsers raise anything on garbage
        said = "".join(c if c.isprintable() else "?" for c in str(error))[:200]
        raise UserError(
            f"{raw.name(i)}: is no readable picture ({said}); mend or remove it: `mage-ds prepare SRC` finds all such"
        ) from None


def _fitted(image, size: int):
    """torchvision's Resize(size) and CenterCrop(size) of a picture of Pillow."""
    from PIL import Image

    (resized,), ((left, top),) = augment.centre([image.size], size, size)
    if image.size != tuple(resized):
        image = image.resize(tuple(map(int, resized)), Image.Resampling.BILINEAR)
    return image.crop((int(left), int(top), int(left) + size, int(top) + size))


def _opened(data: bytes):
    from PIL import Image

    return Image.open(io.BytesIO(data), formats=_FORMATS)


# --- folders and tars ------------------------------------------------------------------------------------------------


def _catalog(path: Path, split: str | None) -> _Raw:
    found = open_catalog(path, split) if split else open_catalog(path, "val") or open_catalog(path, "train")
    if found is None:
        raise UserError(f"{path}: has no {split}/; leave the split out, or name the folder of the pictures itself")
    facts = {
        "kind": "tars" if found.shards else "folder",
        "fingerprint": found.fingerprint,
        "files": _stamp(found),
        "split": found.split,
        "formats": _endings(found),
        "classes": found.classes,
    }
    numbers = np.asarray(found.labels, dtype=np.int64)
    given = numbers if (numbers >= 0).any() else None
    return _Raw(found.n, given, facts, lambda i: str(found.path(i)), lambda i: _opened(found.read(i)))


def _stamp(catalog: Catalog) -> str:
    """Of the files' sizes and times: features of files that were written over since are not theirs."""
    shards = [catalog.root / shard for shard in catalog.shards]
    digest = hashlib.sha256()
    for path in shards or map(catalog.path, range(catalog.n)):
        with suppress(OSError):  # whoever reads it says so
            state = os.stat(path)
            digest.update(f"{state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _endings(catalog: Catalog) -> dict[str, int]:
    """Of the files' names, of the first _TOLD of them."""
    return dict(Counter(Path(catalog.name(i)).suffix.lower() for i in range(min(catalog.n, _TOLD))))


# --- what `sample` made ----------------------------------------------------------------------------------------------


def _sample(folder: Path, manifest: dict) -> _Raw:
    if not manifest["complete"]:
        raise UserError(f"{folder}: its pictures are not complete; start the same `mage-ds sample` again")
    form, num, word = manifest.get("format", "png"), manifest["num"], manifest.get("class_label")
    counts = (num, manifest.get("batch", 1))
    if form not in FORMATS or not all(isinstance(n, int) and n > 0 for n in counts) or not isinstance(word, str | None):
        raise UserError(f"{folder}/manifest.json: is not as `mage-ds sample` writes it; name a folder of its pictures")
    given = None if word is None else asked.parse(word, _MANY_CLASSES)
    book = Pictures(folder, form, manifest.get("batch", 1), manifest.get("seed", 0), given)
    try:
        # The table lists the checksums of all pictures.
        facts = {"kind": "sample", "fingerprint": files.sha256(folder / "manifest.csv"), "split": None}
    except OSError as error:
        raise UserError(f"{folder}/manifest.csv: {error.strerror}; start the same `mage-ds sample` again") from None
    names = manifest.get("classes") or []
    facts |= {"formats": {".png": num}, "classes": names, "manifest": manifest}
    numbers = None if given is None else book.labels_of(np.arange(num))
    if form == "npz":
        raw = _npz(folder / "samples.npz")
        if raw.n < num:
            raise UserError(f"{folder}/samples.npz: holds {raw.n} pictures of {num}; sample them again")
        return raw._replace(n=num, labels=numbers, facts=facts)
    name = lambda i: str(folder / book.file(i))  # noqa: E731
    if form == "png":
        return _Raw(num, numbers, facts, name, lambda i: _opened((folder / book.file(i)).read_bytes()))
    places = _places(folder, book, num)
    name = lambda i: f"{folder / book.file(i)}/{i:06d}.png"  # noqa: E731
    return _Raw(num, numbers, facts, name, lambda i: _opened(_slice(folder / book.file(i), *places[i])))


def _places(folder: Path, book: Pictures, num: int) -> np.ndarray:
    """Where each picture lies in its tar: int64 (num, 2), begin and bytes."""
    places = np.full((num, 2), -1)
    for at in range(0, num, book.shard):
        path = folder / book.file(at)
        try:
            shard = tars.index(path)
        except (tars.Damaged, OSError) as error:
            raise UserError(f"{path}: {error}; start the same `mage-ds sample` again") from None
        for name, begin, size in zip(shard.names, shard.begins, shard.sizes, strict=True):
            stem = name.removesuffix(b".png")
            if stem.isdigit() and at <= int(stem) < min(at + book.shard, num):
                places[int(stem)] = begin, size
    if (missing := np.flatnonzero(places[:, 0] < 0)).size:
        path = folder / book.file(int(missing[0]))
        raise UserError(f"{path}: lacks {missing[0]:06d}.png; start the same `mage-ds sample` again")
    return places


def _slice(path: Path, begin: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), min(int(size), _LARGEST), int(begin))


# --- arrays ----------------------------------------------------------------------------------------------------------


def _npz(path: Path) -> _Raw:
    """ADM's layout: pictures are read from the file as they are asked for, memory-mapped where they are not packed."""
    remedy = "an .npz with arr_0 uint8 (N, H, W, 3), a folder of pictures or a folder of tars is needed"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "arr_0.npy" not in names:
                raise UserError(f"{path}: holds {', '.join(names[:4]) or 'nothing'} and no arr_0; {remedy}")
            member = archive.getinfo("arr_0.npy")
            with archive.open(member) as file:
                shape, columns, dtype = npy_header(file)
                head = file.tell()
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or columns or not all(shape):
                raise UserError(f"{path}: arr_0 is {dtype} {shape}; {remedy}{_why(dtype, shape)}")
            numbers = _labels(path, archive, shape[0]) if "arr_1.npy" in names else None
            sums = [archive.getinfo(name).CRC for name in ("arr_0.npy", "arr_1.npy") if name in names]
            if member.file_size < head + math.prod(shape):
                raise UserError(f"{path}: arr_0 is shorter than it says; copy the file again")
        if member.compress_type == zipfile.ZIP_STORED:
            rows = np.memmap(path, np.uint8, "r", _data(path, member) + head, shape)
            get = rows.__getitem__
        else:
            get = _Packed(path, shape[1:]).row
    except (OSError, ValueError, KeyError, EOFError, zlib.error, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not readable as an .npz ({error}); {remedy}") from None
    fingerprint = hashlib.sha256(f"{shape} {member.file_size} {sums}".encode()).hexdigest()
    facts = {"kind": "npz", "fingerprint": fingerprint, "split": None, "formats": {".npz": shape[0]}, "classes": []}
    return _Raw(shape[0], numbers, facts, lambda i: f"{path}[{i}]", partial(_picture, get))


def _why(dtype: np.dtype, shape: tuple) -> str:
    if dtype.kind == "f":
        return ": floating point values have no agreed range; save (255 * x).round() as uint8, x from 0 to 1"
    return ": colours come last" if len(shape) == 4 and shape[1] == 3 else ""


def _labels(path: Path, archive: zipfile.ZipFile, n: int) -> np.ndarray:
    with archive.open("arr_1.npy") as file:
        shape, _, dtype = npy_header(file)
    if shape != (n,) or dtype.kind not in "iu":
        raise UserError(f"{path}: arr_1 is {dtype} {shape}, must be {n} labels, whole numbers; leave it out")
    with archive.open("arr_1.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False).astype(np.int64)


def _data(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin, behind a header of its own whose length the table of contents does not tell."""
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError("damaged header")
    return member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _picture(get: Callable[[int], np.ndarray], i: int):
    from PIL import Image

    return Image.fromarray(np.array(get(i)))


class _Packed:
    """Rows of a compressed arr_0, which can be read in one direction only: those that it passed last are kept, and it
    begins anew for an earlier one."""

    _KEPT = 256

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self._path, self._shape, self._lock = path, shape, threading.Lock()
        self._file, self._next, self._rows = None, 0, OrderedDict()

    def row(self, i: int) -> np.ndarray:
        with self._lock:
            if i not in self._rows:
                if self._file is None or i < self._next:
                    self._begin()
                while self._next <= i:
                    self._rows[self._next] = np.frombuffer(self._file.read(math.prod(self._shape)), np.uint8)
                    self._next += 1
                    if len(self._rows) > self._KEPT:
                        self._rows.popitem(last=False)
            return self._rows[i].reshape(self._shape)

    def _begin(self) -> None:
        self._file = zipfile.ZipFile(self._path).open("arr_0.npy")  # noqa: SIM115 (read on from where it stands)
        npy_header(self._file)
        self._next = 0
        self._rows.clear()
