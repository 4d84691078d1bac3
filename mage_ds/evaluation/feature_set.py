"""Features of a set of pictures in a folder that grows tile by tile, by any number of processes at once.

    features.json     what the features depend on, how many are wanted, pictures of a tile
    tiles/000000.npz  of each finished tile: features, logits, labels, checksums and sizes of its pictures
    .work/            half-written files, and the claims of whoever is at work (engine/extracting.py)

A tile is published by a rename: it is whole or not there. Nothing is locked: a tile that two processes make comes out
the same, and so the folder does not depend on who made it. Figures are passes over the tiles in order of index.
"""

import json
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from mage_ds import files
from mage_ds.errors import UserError, refuse_differences

ARRAYS = ("features", "logits", "labels", "sums", "sizes")  # of a tile
# Settings that may differ when a folder is continued: where the pictures lie, what is told of them beside, and what the
# program is made of.
_FREE = ("versions", *(f"source.{name}" for name in ("source", "origin", "classes", "manifest", "formats")))
_BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class Damaged(Exception):
    """Tile file `path`, whose pictures begin with `start`, does not hold what was written."""

    _SAID = "damaged ({})"

    def __init__(self, path: Path, start: int, reason):
        super().__init__(f"{path}: {self._SAID.format(reason)}")
        self.path, self.start = path, start


class Short(Damaged):
    """The tile is whole, and holds fewer pictures than are wanted by now."""

    _SAID = "{}"


class FeatureSet:
    """Opens such a folder: UserError where it is none.

    settings: what features.json says that they depend on; n: pictures 0..n-1 are wanted; batch: pictures of a tile.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        book = _read(self.folder)
        if book is None:
            raise UserError(f"{self.folder}: holds no features (no features.json); name a folder of `mage-ds evaluate`")
        self.settings, self.n, self.batch = book["settings"], book["n"], book["batch"]

    @classmethod
    def begin(cls, folder: Path, settings: dict, n: int, batch: int) -> "FeatureSet":
        """Creates the folder, or continues one of the same settings; several processes may do so at once.

        Args: settings: JSON values that the features depend on (see `extracting.settings_of`); n: a larger number than
        before adds pictures, a smaller one looks at the first n of them.
        Raises: UserError where it cannot be written or belongs to something else; the line says what differs.
        """
        folder, settings = Path(folder), json.loads(json.dumps(settings))
        for path in (folder, *folder.parents):
            if path.exists() and not path.is_dir():
                raise UserError(f"--out {path}: is a file; choose a folder")
        with files.writing(folder):
            book = _read(folder)
            if book is None:
                folder.mkdir(parents=True, exist_ok=True)
                book = {"n": n, "batch": batch, "settings": settings}
                if not files.begin(folder / "features.json", _text(book), folder / ".work"):
                    book = _read(folder)
            before, now = _flat(book), _flat({"settings": settings, "batch": batch})
            refuse_differences(folder, "features", before, now, free=_FREE)
            for name in ("tiles", ".work"):
                (folder / name).mkdir(exist_ok=True)
            found = cls(folder)
            found.n = n
            found.claim_size()
        return found

    # --- what is there -------------------------------------------------------------------------------------------

    @property
    def work(self) -> Path:
        """Where half-written files and claims lie."""
        return self.folder / ".work"

    def path(self, start: int) -> Path:
        """The file of the tile whose first picture is `start`."""
        return self.folder / "tiles" / f"{start:06d}.npz"

    def tiles(self) -> list[np.ndarray]:
        """Index arrays int64 (batch,) that cover 0..n-1; the last may run past n."""
        return [np.arange(start, start + self.batch) for start in range(0, self.n, self.batch)]

    def missing(self) -> list[np.ndarray]:
        """The tiles that are not there yet."""
        with files.writing(self.folder):
            there = set(os.listdir(self.folder / "tiles"))
        return [tile for tile in self.tiles() if self.path(int(tile[0])).name not in there]

    def done(self, tile: np.ndarray) -> bool:
        """Whether one tile is there by now."""
        return self.path(int(tile[0])).exists()

    def claim_size(self) -> None:
        """Has features.json say that at least n pictures are wanted."""
        book = _read(self.folder)
        if book is not None and book["n"] < self.n:
            with self._aside(self.folder / "features.json") as file:
                file.write(_text(book | {"n": self.n}))

    # --- a tile --------------------------------------------------------------------------------------------------

    def write(self, tile: np.ndarray, *, features, logits, labels, sums, sizes) -> None:
        """Publishes a tile of indices (B,).

        Args: features: float32 (R, D) of the first R of them, the pictures that there are; logits: float32 (R, L), or
        None where the extractor has none; labels: int64 (R,), -1 = none; sums: uint8 (R, 32), SHA-256 of the pictures'
        pixels; sizes: int32 (R, 2), height and width of the pictures in their files, before any Resize.
        Raises: UserError for values that are no numbers, and where it cannot be written.
        """
        arrays = {
            "features": np.asarray(features, dtype=np.float32),
            "labels": np.asarray(labels, dtype=np.int64),
            "sums": np.asarray(sums, dtype=np.uint8),
            "sizes": np.asarray(sizes, dtype=np.int32),
        }
        if logits is not None:
            arrays["logits"] = np.asarray(logits, dtype=np.float32)
        if not all(np.isfinite(arrays[name]).all() for name in ("features", "logits") if name in arrays):
            raise UserError(
                f"pictures {tile[0]} to {tile[-1]}: the extractor gives values that are no numbers; check its weights"
            )
        with files.writing(self.folder):
            try:
                self._save(self.path(int(tile[0])), arrays)
            except FileNotFoundError:  # another process has just finished, and removed .work
                self._save(self.path(int(tile[0])), arrays)

    def _save(self, path: Path, arrays: dict) -> None:
        with self._aside(path) as file:
            np.savez(file, **arrays)

    def read(self, tile: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of a tile as `write` took them; no "logits" where there are none.

        Raises: Damaged, also where the file is not there, or holds fewer pictures than are wanted by now.
        """
        start = int(tile[0])
        path, wanted = self.path(start), min(self.batch, self.n - start)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in ARRAYS if name in file.files}
            rows = {len(arrays[name]) for name in ARRAYS if name != "logits" or name in arrays}
            if len(rows) != 1 or not 1 <= min(rows) <= self.batch:
                raise ValueError(f"{'/'.join(map(str, sorted(rows)))} pictures, {wanted} are wanted")
        except _BROKEN as error:
            raise Damaged(path, start, error) from None
        if (count := rows.pop()) < wanted:
            raise Short(path, start, f"was the last of fewer pictures: has {count}, {wanted} are wanted")
        return arrays

    def chunks(self, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """Tile by tile in order of index the arrays of these names (of ARRAYS, and "index": int64), pictures below n
        only. One tile is in memory at a time.

        Raises: UserError for a damaged or missing tile: the file is removed, so that it is made again; KeyError for
        logits where the extractor has none.
        """
        for tile in self.tiles():
            arrays = self._sound(tile) | {"index": tile}
            real = int((tile < self.n).sum())
            yield tuple(arrays[name][:real] for name in names)

    def rows(self, index: np.ndarray, name: str) -> np.ndarray:
        """One array's rows of pictures `index` (K,), K > 0, in that order. Raises: as `chunks`."""
        index, found = np.asarray(index, dtype=np.int64), {}
        for start in np.unique(index // self.batch) * self.batch:
            array = self._sound(np.arange(start, start + self.batch))[name]
            found |= {int(i): array[i - start] for i in index[index // self.batch * self.batch == start]}
        return np.stack([found[int(i)] for i in index])

    def _sound(self, tile: np.ndarray) -> dict[str, np.ndarray]:
        """As `read`, for whoever takes it that all are there."""
        try:
            return self.read(tile)
        except Damaged as error:
            self.discard(error)
            raise UserError(f"{error}; start the same command again: it makes this tile anew") from None

    def discard_damaged(self) -> list[str]:
        """Reads every tile that is there, and removes those that are damaged, or short: a line about each."""
        said, missing = [], {int(tile[0]) for tile in self.missing()}
        for tile in self.tiles():
            if int(tile[0]) not in missing:
                try:
                    self.read(tile)
                except Damaged as error:
                    self.discard(error)
                    said.append(str(error))
        return said

    def discard(self, damaged: Damaged) -> None:
        damaged.path.unlink(missing_ok=True)

    @contextmanager
    def _aside(self, path: Path):
        """A file that is written in .work, and at the end of the block takes the place `path` at once."""
        self.work.mkdir(exist_ok=True)
        part = self.work / f"{path.name}.{uuid.uuid4().hex[:12]}"
        try:
            with open(part, "wb") as file:
                yield file
            os.replace(part, path)
        finally:
            with suppress(OSError):
                part.unlink()


def _read(folder: Path) -> dict | None:
    """features.json, None where there is none. UserError where it is damaged."""
    path = folder / "features.json"
    try:
        book = json.loads(files.begun(path))
        n, batch, settings = int(book["n"]), int(book["batch"]), dict(book["settings"])
        if n < 1 or batch < 1:
            raise ValueError(f"n {n}, batch {batch}")
        return {"n": n, "batch": batch, "settings": settings}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable as a list of settings ({error!r}); choose another folder") from None


def _flat(book: dict) -> dict:
    """The settings and the batch as one table: those of a section as "section.name"."""
    found = {"batch": book["batch"]}
    for key, value in book["settings"].items():
        found |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return {key: value for key, value in found.items() if key.partition(".")[0] not in _FREE}


def _text(book: dict) -> bytes:
    return (json.dumps(book, indent=1) + "\n").encode()
