"""`mage-ds prepare`: make a sample data set, or check a folder of pictures and split it into train/ and val/."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mage_ds import keyed
from mage_ds.errors import UserError
from mage_ds.inputs.catalog import Catalog, open_catalog
from mage_ds.inputs.quarantine import Unreadable, picture_size

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

    Args: src: a folder of pictures, checked in place; sample: "digits" or "photos" instead, pictures out of installed
    packages; out: where train/ and val/ are made (hard links or copies of the readable pictures of src);
    val_fraction: share of val/, picked by the hash of the path; verify: "quick" looks at headers and ends, "full"
    decodes every picture.
    Raises: UserError.
    """
    if int(os.environ.get("RANK", "0")):
        return
    if (src is None) == (sample is None):
        raise UserError("prepare: name a folder SRC or --sample digits|photos, one of the two")
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
        _folder(Path(src), out, FOLDER_VAL if val_fraction is None else val_fraction, verify)


def _progress(items, what: str, total: int):
    from tqdm import tqdm

    return tqdm(items, desc=what, total=total, unit=" pictures", disable=None)  # None: silent without a terminal


# --- samples


def _sample(sample: str, out: Path, val: float) -> None:
    request = {"sample": sample, "val_fraction": val}
    if _is_done(out, request):
        return
    pictures = SAMPLES[sample]()
    with _published(out, request) as folder:
        for name, image in _progress(pictures, sample, len(pictures)):
            path = folder / _split(name, val) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=95)
    _say_made(out)
    if sample == "photos":
        print("  crops of one photograph overlap, so val/ is not independent of train/: fine for trying things out")


def _digits() -> list:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 greys, enlarged to 32x32."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"--sample digits: {error}; `pip install scikit-learn`") from error
    from PIL import Image

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return [
        (f"{label}/{i:04d}.jpg", Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
        for i, (label, image) in enumerate(zip(digits.target, grey, strict=True))
    ]


def _photos() -> list:
    """Crops of the photographs inside scikit-image's and scikit-learn's packages; nothing is downloaded."""
    from PIL import Image

    pictures = []
    for path in _photo_files():
        photo = Image.open(path).convert("RGB")
        draws = keyed.uniform(0, f"photo crops/{path.stem}", np.arange(CROPS), size=3)
        for k, (side, left, top) in enumerate(draws):
            low, high = CROP_SIDES
            side = int(low + side * (min(high, *photo.size) - low + 1))
            left, top = int(left * (photo.width - side + 1)), int(top * (photo.height - side + 1))
            pictures.append((f"{path.stem}/{k:02d}.jpg", photo.crop((left, top, left + side, top + side))))
    return pictures


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


SAMPLES = {"digits": _digits, "photos": _photos}


# --- a user's own folder


def _folder(src: Path, out: Path | None, val: float, verify: str) -> None:
    catalogs = _catalogs(src)
    if out is not None:
        if out.resolve().is_relative_to(src.resolve()):
            raise UserError(f"{out}: lies within {src}; choose an --out outside of it")
        request = {"src": str(src.resolve()), "fingerprint": [c.fingerprint for c in catalogs], "verify": verify}
        if catalogs[0].split is None:
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
        for catalog, i in _progress(good, "link", len(good)):
            name = catalog.name(i)
            _link(catalog.path(i), folder / (name if catalog.split else f"{_split(name, val)}/{name}"))
    _say_made(out)


def _catalogs(src: Path) -> list[Catalog]:
    """The folder's train/ and val/ where it has them, else the folder as one."""
    if not any((src / split).is_dir() for split in ("train", "val")):
        return [open_catalog(src)]
    both = [open_catalog(src, split) for split in ("train", "val")]
    return [catalog for catalog in both if catalog is not None]


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


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
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
        where = error.filename or out
        raise UserError(f"{where}: {error.strerror or error}; choose an --out that can be written") from error
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
    print(f"{catalog.root}: {catalog.n:,} pictures, {catalog.sizes.clip(0).sum() / 1e6:.1f} MB")
    print(f"  classes  {_classes(catalog)}")
    if sizes:
        small, middle, large = ("{} x {}".format(*sizes[k]) for k in (0, len(sizes) // 2, -1))
        print(f"  sizes    {small} smallest, {middle} median, {large} largest, by their short sides")
    how = "every picture decoded" if verify == "full" else "headers and ends; --verify full decodes every picture"
    print(f"  broken   {len(broken):,} ({len(broken) / catalog.n:.2%}; {how})")
    for name, reason in broken[:SHOWN]:
        print(f"           {name}: {reason}")
    if len(broken) > SHOWN:
        print(f"           and {len(broken) - SHOWN:,} more")
