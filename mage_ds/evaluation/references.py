"""What pictures are compared with: mean and covariance of the reference's features, read from other people's files too.

Read: ADM's npz (`mu`, `sigma`), those of pytorch-fid and clean-fid (`mu`, `sigma`), and ours, which adds n, the
extractor, the pictures' size, a fingerprint of the set, and rows of features for KID, precision and recall. They come
from strangers: only arrays of numbers are read, and those of other shapes than they must have are not.
"""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mage_ds import files, keyed
from mage_ds.errors import UserError
from mage_ds.evaluation.feature_set import FeatureSet

ROWS = 50_000  # of features that our own files keep at most: 400 MB of 2048 each
_WIDEST = 2**14  # features of a picture: a covariance of them takes 2 GiB
_SKEW = 1e-6  # of the largest entry: how far a covariance may be from symmetric (some are kept in float32)
_BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
_REMEDY = "make statistics of the pictures: mage-ds evaluate --make-reference DATA --out stats.npz"


class Statistics(NamedTuple):
    """mean float64 (D,); covariance float64 (D, D) with n - 1 in the denominator; n: pictures; extractor:
    {"extractor": its name, "weights": their hash, "width": D}; size: pixels of a side of the pictures; fingerprint: of
    the set; each None where the file does not say; origin: one line, what it is and where from; features: float32
    (m, D), m <= ROWS of the pictures drawn evenly at random, None where there are none."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int | None
    extractor: dict | None
    size: int | None
    origin: str
    features: np.ndarray | None
    fingerprint: str | None = None


def read_statistics(path: Path) -> Statistics:
    """Raises: UserError, one line, for a file that is no such statistics; nothing pickled is opened."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        if head[:1] == b"\x80":
            raise _pickled(path)
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {_REMEDY}") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: is no whole .npz ({_line(error)}); copy it again, or {_REMEDY}") from None
    except _BROKEN as error:
        raise UserError(f"{path}: not readable as statistics ({_line(error)}); copy it again, or {_REMEDY}") from None


def holds_pictures(path: Path) -> bool:
    """Whether an .npz has pictures (arr_0) and no statistics."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {*archive.namelist()}
            return "arr_0.npy" in names and "mu.npy" not in names
    except _BROKEN:
        return False


def _read(path: Path, archive: zipfile.ZipFile) -> Statistics:
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    if any(name.endswith("data.pkl") for name in names):
        raise _pickled(path)
    if not {"mu", "sigma"} <= set(names):
        listed = ", ".join(_plain(name) for name in names[:4]) or "nothing"
        what = "pictures" if "arr_0" in names else "no statistics"
        raise UserError(f"{path}: holds {what} ({listed}), and `mu` and `sigma` are needed; {_REMEDY}")
    mean = _numbers(path, archive, "mu", None)
    covariance = _numbers(path, archive, "sigma", (len(mean), len(mean)))
    skew, most = np.abs(covariance - covariance.T).max(), np.abs(covariance).max()
    if skew > _SKEW * most or np.diag(covariance).min() < -_SKEW * most:
        raise UserError(f"{path}: its sigma is no covariance (not symmetric, or of negative variances); {_REMEDY}")
    rows = None
    if "features" in names:
        rows = _numbers(path, archive, "features", (-1, len(mean)), np.float32)
    said = {
        name: _said(archive, name) for name in ("n", "extractor", "weights", "size", "fingerprint") if name in names
    }
    n, size = (int(said[name]) if said.get(name) else None for name in ("n", "size"))
    extractor = (
        {"extractor": said["extractor"], "weights": said["weights"], "width": len(mean)} if "weights" in said else None
    )
    by = extractor["extractor"] if extractor else f"{len(mean)} features of an extractor that it does not name"
    origin = f"{path.name}: {f'{n:,} pictures' if n else 'a number of pictures that it does not tell'}, {by}"
    return Statistics(
        mean, (covariance + covariance.T) / 2, n, extractor, size, origin, rows, said.get("fingerprint") or None
    )


def _numbers(path: Path, archive: zipfile.ZipFile, name: str, shape: tuple | None, kind=np.float64) -> np.ndarray:
    """A member's numbers, whose header must say this shape (-1: up to ROWS; None: a row) before they are read."""
    with archive.open(f"{name}.npy") as file:
        found, _, dtype = npy_header(file)
        if dtype.hasobject:
            raise _pickled(path)
        expected = {None: f"(D,) with D from 2 to {_WIDEST}"}.get(shape, str(shape).replace("-1", f"1 to {ROWS}"))
        if shape is None:
            fits = len(found) == 1 and 2 <= found[0] <= _WIDEST
        else:
            fits = len(found) == len(shape) and all(
                a == b or (b == -1 and 0 < a <= ROWS) for a, b in zip(found, shape, strict=True)
            )
        if not fits or dtype.kind != "f":
            raise UserError(f"{path}: {name} is {dtype} {found}, must be floating point {expected}; {_REMEDY}")
    with archive.open(f"{name}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False).astype(kind, copy=False)
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {name} holds values that are no numbers; {_REMEDY}")
    return array


def _said(archive: zipfile.ZipFile, name: str):
    """A single value, text of one line or a number."""
    with archive.open(f"{name}.npy") as file:
        shape, _, dtype = npy_header(file)
        if shape != () or dtype.kind not in "Ui" or dtype.itemsize > 4096:
            raise ValueError(f"{name} is {dtype} {shape}")
    with archive.open(f"{name}.npy") as file:
        value = np.lib.format.read_array(file, allow_pickle=False).item()
    return _plain(value) if isinstance(value, str) else value


def npy_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, dtype of an open .npy; then the file stands at its data. ValueError."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"npy version {version}")
    return readers[version](file)


def _pickled(path: Path) -> UserError:
    return UserError(f"{path}: is a pickle, such as torch-fidelity's cache, which may run code: not opened; {_REMEDY}")


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


def _line(error: Exception) -> str:
    return _plain(str(error).partition("\n")[0] or type(error).__name__)


def write_statistics(path: Path, statistics: Statistics) -> None:
    """In our layout, readable by whatever reads `mu` and `sigma`. UserError where it cannot be written."""
    path, given = Path(path), statistics
    arrays = {"mu": given.mean, "sigma": given.covariance}
    extractor = given.extractor or {}
    texts = {"fingerprint": given.fingerprint, **{name: extractor.get(name) for name in ("extractor", "weights")}}
    arrays |= {name: np.array(text) for name, text in texts.items() if text is not None}
    arrays |= {name: np.int64(value) for name, value in (("n", given.n), ("size", given.size)) if value is not None}
    if given.features is not None:
        arrays["features"] = given.features.astype(np.float32, copy=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.saved(path) as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror or error}); name another file") from None


def statistics_of(features: FeatureSet) -> Statistics:
    """Of a complete set, in one pass; memory does not grow with it beyond ROWS rows. UserError for fewer than 2
    pictures, and for a damaged tile."""
    import torch

    from mage_ds.evaluation.moments import Moments

    if features.n < 2:
        raise UserError(f"{features.folder}: {features.n} picture has no covariance; give 2 or more")
    width = features.settings["width"]
    kept = np.sort(keyed.permutation(0, "reference rows", 0, features.n)[:ROWS])
    rows, at = np.empty((len(kept), width), np.float32), 0
    moments = Moments(width)
    for index, some in features.chunks("index", "features"):
        moments.add(torch.from_numpy(some))
        chosen = kept[at : at + len(index)]
        chosen = chosen[chosen <= index[-1]]
        rows[at : at + len(chosen)] = some[chosen - index[0]]
        at += len(chosen)
    gaussian, known = moments.gaussian(), features.settings
    source = known.get("source", {})
    square = source.get("height") == source.get("width")
    return Statistics(
        gaussian.mean.numpy(),
        gaussian.covariance.numpy(),
        features.n,
        {name: known[name] for name in ("extractor", "weights", "width")},
        source.get("height") if square else None,
        f"{features.n:,} pictures of {source.get('source', features.folder)}, {known['extractor']}",
        rows,
        source.get("fingerprint"),
    )
