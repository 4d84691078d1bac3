"""`mage-ds prepare`: make a sample data set, or check pictures or tars and split them into train/ and val/."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mage_ds import keyed
from mage_ds.errors import UserError
from mage_ds.inputs import emoji
from mage_ds.inputs.catalog import Catalog, open_catalog
from mage_ds.inputs.quarantine import Unreadable, picture_size
from mage_ds.inputs.tars import shown

DONE = "prepared.json"  # lies in a finished data folder and says what was asked for
SAMPLE_VAL, FOLDER_VAL = 0.2, 0.1  # held-out share where none is given
READERS, CHUNK = 8, 4096
SHOWN = 10  # classes and broken files printed by name
PHOTOS = {
    "skimage/data": (
        "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg"
    ),
    "sklearn/datasets/images": "china.jpg flower.jpg",
}
CROPS, CROP_SIDES = 24, (256, 320)  # of each photograph; pixels


def prepare(src=None, sample=None, out=None, val_fraction=None, verify: str = "quick") -> None:
    """Makes or checks a data set; prints what it found. With several ranks rank 0 works alone.

    Args: src: a folder of pictures or tars, checked in place; sample: "digits", "photos" or "emoji" instead, pictures
    out of installed packages; out: where train/ and val/ are made (hard links or copies of the readable pictures of
    src; files where src holds tars); val_fraction: share of val/, picked by the hash of the path (of emoji: of what
    variants share); verify: "quick" looks at headers and ends, "full" decodes every picture.
    Raises: UserError.
    """
    if int(os.environ.get("RANK", "0")):
        return
    if (src is None) == (sample is None):
        raise UserError(f"prepare: name a folder SRC or --sample {'|'.join(SAMPLES)}, one of the two")
    if sample is not None and sample not in SAMPLES:
        raise UserError(f"--sample {sample}: no such sample; choose one of {', '.join(SAMPLES)}")
    if sample is not None and out is None:
        raise UserError(f"--sample {sample}: needs --out DATA, the folder to make")
    if val_fraction is not None and (out is None or not 0 <= val_fraction < 1):
        raise UserError(f"--val-fraction {val_fraction:g}: needs --out and a number of 0 <= F < 1")
    if verify not in ("quick", "full"):
        raise UserError(f"--verify {verify}: choose quick or full")
    out = Path(os.path.abspath(out)) if out is not None else None
    if sample is not None:
        _sample(sample, out, SAMPLE_VAL if val_fraction is None else val_fraction)
    else:
        _folder(Path(src), out, val_fraction, verify)


def _progress(items, what: str, total: int):
    from tqdm import tqdm

    return tqdm(items, desc=what, total=total, unit=" pictures", disable=None)  # None: silent without a terminal


# --- samples


class Sample(NamedTuple):
    n: int  # pictures, at most
    pictures: Iterable[tuple]  # (name, image, what decides between train/ and val/), made one by one
    notes: list[str]  # to be printed when all pictures are made


def _sample(sample: str, out: Path, val: float) -> None:
    request = {"sample": sample, "val_fraction": val}
    if _is_done(out, request):
        return
    n, pictures, notes = SAMPLES[sample]()
    with _published(out, request) as folder:
        for name, image, key in _progress(pictures, sample, n):
            path = folder / _split(key, val) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=95)
    _say_made(out)
    for note in notes:
        print(f"  {note}")


def _digits() -> Sample:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 greys, enlarged to 32x32."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"--sample digits: {error}; `pip install scikit-learn`") from error
    from PIL import Image

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    names = [f"{label}/{i:04d}.jpg" for i, label in enumerate(digits.target)]
    pictures = (Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in grey)
    return Sample(len(names), zip(names, pictures, names, strict=True), [])


def _photos() -> Sample:
    """Crops of the photographs inside scikit-image's and scikit-learn's packages; nothing is downloaded."""
    files = _photo_files()
    note = "crops of one photograph overlap, so val/ is not independent of train/: fine for trying things out"
    return Sample(len(files) * CROPS, _crops(files), [note])


def _crops(files: list[Path]) -> Iterator[tuple]:
    from PIL import Image

    for path in files:
        photo = Image.open(path).convert("RGB")
        draws = keyed.uniform(0, f"photo crops/{path.stem}", np.arange(CROPS), size=3)
        for k, (side, left, top) in enumerate(draws):
            low, high = CROP_SIDES
            side = int(low + side * (min(high, *photo.size) - low + 1))
            left, top = int(left * (photo.width - side + 1)), int(top * (photo.height - side + 1))
            name = f"{path.stem}/{k:02d}.jpg"
            yield name, photo.crop((left, top, left + side, top + side)), name


def _photo_files() -> list[Path]:
    files = []
    for folder, names in PHOTOS.items():
        package = importlib.util.find_spec(folder.split("/")[0])  # found, not imported: skimage takes a second
        if package is None:
            raise UserError(
                "--sample photos: `pip install scikit-image scikit-learn` first, they bring the photographs"
            )
        root = Path(package.origin).parent.parent / folder
        files += [root / name for name in names.split() if (root / name).is_file()]
    return files


def _emoji() -> Sample:
    """Emoji of Debian's font, 136x136; variants of one (skin tone, gender) are all in train/ or all in val/."""
    found, draw, notes = emoji.listed(), emoji.pen(), []
    return Sample(len(found), _drawn(found, draw, notes), notes)


def _drawn(found: list[emoji.Emoji], draw, notes: list[str]) -> Iterator[tuple]:
    seen, lacking, doubles = set(), 0, 0
    for name, text, family in found:
        image = draw(text)
        if image is None:
            lacking += 1
        elif (digest := hashlib.sha256(image.tobytes()).digest()) in seen:
            doubles += 1
        else:
            seen.add(digest)
            yield f"{name}.jpg", image, family
    notes.append(f"left out: {lacking:,} that the font lacks, {doubles:,} that look exactly like another")
    if not seen:
        raise UserError(f"{emoji.FONT}: none of {len(found):,} emoji is in it; reinstall fonts-noto-color-emoji")


SAMPLES = {"digits": _digits, "photos": _photos, "emoji": _emoji}


# --- a user's own folder


def _folder(src: Path, out: Path | None, val: float | None, verify: str) -> None:
    catalogs = _catalogs(src)
    if len(catalogs) > 1 and val is not None:
        raise UserError(f"--val-fraction {val:g}: {src} has its own val/; leave it out, or name the pictures to split")
    if val is None and catalogs[0].split is None:
        val = FOLDER_VAL
    if out is not None:
        if out.resolve().is_relative_to(src.resolve()):
            raise UserError(f"{out}: lies within {src}; choose an --out outside of it")
        request = {"src": str(src.resolve()), "fingerprint": [c.fingerprint for c in catalogs], "verify": verify}
        if val is not None:
            request["val_fraction"] = val
        if _is_done(out, request):
            return
    found = [_check(catalog, verify) for catalog in catalogs]
    for catalog, results in zip(catalogs, found, strict=True):
        _say_found(catalog, results, verify)
    if out is None:
        return
    good = [
        (c, i)
        for c, results in zip(catalogs, found, strict=True)
        for i, r in enumerate(results)
        if isinstance(r, tuple)
    ]
    if not good:
        raise UserError(f"{src}: no readable picture in it, nothing to put into {out}")
    with _published(out, request) as folder:
        for catalog, i in _progress(good, "make", len(good)):
            _put(catalog, i, folder / _place(catalog, i, val))
        _make_classes(folder / "train", catalogs[0])
    _say_made(out)


def _catalogs(src: Path) -> list[Catalog]:
    """Training and held-out pictures where the folder tells them apart, else all as one. Listed anew."""
    val = open_catalog(src, "val", check=True) if src.is_dir() else None
    if val is None and not (src / "train").is_dir():
        return [open_catalog(src, check=True)]
    train = open_catalog(src, "train", check=True)
    return [train] if val is None else [train, val]


def _check(catalog: Catalog, verify: str) -> list:
    """For each picture its (width, height), or the reason why it is unreadable as a string."""

    def look(i: int):
        try:
            data = catalog.read(i)
            size = picture_size(data)
            if verify == "full":
                _decode(data)
            return size
        except Unreadable as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"

    with ThreadPoolExecutor(READERS) as pool:  # in chunks: a million waiting jobs would take gigabytes
        starts = range(0, catalog.n, CHUNK)
        results = (r for start in starts for r in pool.map(look, range(start, min(start + CHUNK, catalog.n))))
        return list(_progress(results, f"check {catalog.split or catalog.root.name}", catalog.n))


def _decode(data: bytes) -> None:
    from PIL import Image

    try:
        Image.open(io.BytesIO(data)).load()
    except Exception as error:  # Pillow's decoders raise anything on garbage
        raise Unreadable(f"cannot be decoded: {error}") from None


def _place(catalog: Catalog, i: int, val: float | None) -> str:
    """train/ or val/, for a label out of a tar the folder of its class, then the name."""
    name = catalog.name(i)
    relative = name.removeprefix(f"{catalog.split}/") if catalog.split else name
    split = catalog.split if val is None else _split(relative, val)
    if catalog.numbered:
        label = catalog.label(i)
        relative = f"{_class_folder(catalog, label)}/{relative}" if label >= 0 else relative.replace("/", "_")
    return f"{split}/{relative}"


def _class_folder(catalog: Catalog, label: int) -> str:
    return f"{label:0{len(str(len(catalog.classes) - 1))}d}"  # as many digits for all, so that names sort like numbers


def _make_classes(train: Path, catalog: Catalog) -> None:
    """A folder for every number up to the largest: a class without pictures keeps its place."""
    if catalog.numbered and train.is_dir():
        for label in range(len(catalog.classes)):
            (train / _class_folder(catalog, label)).mkdir(exist_ok=True)


def _put(catalog: Catalog, i: int, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if catalog.shards:
        with open(target, "xb") as file:
            file.write(catalog.read(i))
        return
    source = catalog.path(i)
    try:
        os.link(os.path.realpath(source), target)  # the file, not a link to it
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


# --- what both share


def _split(name: str, val: float) -> str:
    """ "train" or "val", by the path alone: a picture stays where it is when others are added."""
    share = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64
    return "val" if share < val else "train"


def _is_done(out: Path, request: dict) -> bool:
    """True if `out` was finished for the same request. Raises: UserError if something else is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    with contextlib.suppress(OSError, ValueError):
        if json.loads((out / DONE).read_text()) == request:
            print(f"{out}: already prepared, nothing to do")
            return True
    raise UserError(f"{out}: holds something else already; choose another --out or remove it first")


@contextlib.contextmanager
def _published(out: Path, request: dict) -> Iterator[Path]:
    """A folder beside `out` that takes its name once it is filled; removed if anything goes wrong."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():  # of a process that was killed
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
        if not (partial / "train").is_dir():
            raise UserError(f"{out}: nothing is left to train on; choose a smaller --val-fraction")
        (partial / DONE).write_text(json.dumps(request, indent=1) + "\n")
        os.rename(partial, out)
    except OSError as error:
        where = f" ({error.filename})" if error.filename and Path(error.filename) != partial else ""
        reason = error.strerror or error
        raise UserError(f"{out}: cannot be made: {reason}{where}; choose an --out in a folder of yours") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _say_made(out: Path) -> None:
    for split in ("train", "val"):
        if not (out / split).is_dir():
            print(f"  {out / split}: none; a larger --val-fraction holds some pictures out")
            continue
        made = open_catalog(out, split)
        print(f"  {out / split}: {made.n:,} pictures, {_classes(made)}, {made.sizes.sum() / 1e6:.1f} MB")


def _classes(catalog: Catalog) -> str:
    if not catalog.classes:
        return "no classes"
    counts = Counter(catalog.classes[label] if label >= 0 else "(none)" for label in catalog.labels)
    names = sorted(counts)
    shown = ", ".join(f"{name} {counts[name]:,}" for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{len(catalog.classes):,} classes ({shown}{more})"


def _say_found(catalog: Catalog, results: list, verify: str) -> None:
    sizes = sorted((r for r in results if isinstance(r, tuple)), key=lambda size: (min(size), size))
    broken = [(catalog.name(i), r) for i, r in enumerate(results) if isinstance(r, str)]
    where = f" in {len(catalog.shards) - len(catalog.damaged):,} tars" if catalog.shards else ""
    name = f"{catalog.root} ({catalog.split})" if catalog.split and catalog.shards else catalog.root
    print(f"{name}: {catalog.n:,} pictures{where}, {catalog.sizes.clip(0).sum() / 1e6:.1f} MB")
    print(f"  classes  {_classes(catalog)}")
    if sizes:
        small, middle, large = ("{} x {}".format(*sizes[k]) for k in (0, len(sizes) // 2, -1))
        print(f"  sizes    {small} smallest, {middle} median, {large} largest, by their short sides")
    how = "every picture decoded" if verify == "full" else "headers and ends; --verify full decodes every picture"
    print(f"  broken   {len(broken):,} ({len(broken) / catalog.n:.2%}; {how})")
    _say_some(broken)
    if catalog.damaged:
        print(f"  tars     {len(catalog.damaged):,} damaged, left out; training refuses to start beside them")
        _say_some(sorted(catalog.damaged.items()))
    for reason, count in sorted(catalog.skipped.items()):
        print(f"  skipped  {count:,} {reason} in tars")


def _say_some(named: list[tuple[str, str]]) -> None:
    for name, reason in named[:SHOWN]:
        print(f"           {shown(name)}: {reason}")
    if len(named) > SHOWN:
        print(f"           and {len(named) - SHOWN:,} more")
