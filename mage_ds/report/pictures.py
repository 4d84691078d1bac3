"""A folder of generated pictures: loose PNG files, tar shards or one .npz, with tokens.npz, grid.png, manifests.

It grows tile by tile, by any number of processes at once, and can be continued after any death of them. `.tiles/`
keeps of each finished tile the tokens, checksums, and the pixels that the grid shows; for tar and npz also the
pictures themselves (`.png.npz`), until they are joined (report/joined.py). A tile's own file is published last, so it
says that the tile is whole. Half-written files lie in `.work/`, beside the claims (sampling/claims.py); it goes when
the set is complete. Nothing here is locked: what two processes do at once comes out the same.

Joined files and manifests are on the disk before they have their names: others are removed for them. The thousands of
pictures and tiles are not waited for, each of which would cost a turn of the disk: what a machine that loses power has
not written yet is an empty file, and empty ones count as missing.
"""

import hashlib
import io
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mage_ds.errors import UserError
from mage_ds.report import joined, manifest
from mage_ds.report.manifest import read_manifest, writing

FORMATS = ("png", "tar", "npz")
MANY = 10_000  # pictures from which on loose files are a burden to file systems and people
_SHARD = 1000  # pictures of a tar, about: whole tiles
_UNREADABLE = (OSError, ValueError, SyntaxError)  # what PIL raises of a file that is no picture
_LAST = ("tokens.npz", "manifest.csv", "grid.png")  # what is made at the end, beside the pictures


class Outgrown(Exception):
    """A file that was joined of a smaller set than the folder holds by now: another process wants more."""


class Pictures:
    """The files of one set: which are there, and where the others go.

    Args: form: one of FORMATS; batch: pictures of a tile; seed: what the noise began with; labels: picture i was
    asked to be the i-th of these, in turn; None: of no class.
    """

    def __init__(self, out: Path, form: str, batch: int, seed: int = 0, labels: Sequence[int] | None = None):
        self.out, self.form, self.batch, self.seed, self.labels = Path(out), form, batch, seed, labels
        whole = {"png": 1, "tar": max(1, _SHARD // batch), "npz": 2**40}[form]
        self.shard = whole * batch  # pictures of a joined file
        self.mark = ""  # of this process, in the names of half-written files
        self._counts: dict[int, tuple] = {}

    def labels_of(self, index: np.ndarray) -> np.ndarray:
        """int64, -1: none."""
        if self.labels is None:
            return np.full(len(index), -1)
        return np.asarray(self.labels, dtype=np.int64)[np.asarray(index) % len(self.labels)]

    # --- where things are ------------------------------------------------------------------------------------

    @property
    def work(self) -> Path:
        return self.out / ".work"

    def tile(self, start: int) -> Path:
        return self.out / ".tiles" / f"{start:06d}.npz"

    def waiting(self, start: int) -> Path:
        """The pictures of a tile, while they are not joined."""
        return self.out / ".tiles" / f"{start:06d}.png.npz"

    def file(self, i: int) -> str:
        """The name of the file that picture i is in at the end."""
        names = {"png": f"{i:06d}.png", "tar": f"{i // self.shard:05d}.tar", "npz": "samples.npz"}
        return names[self.form]

    # --- what is there ---------------------------------------------------------------------------------------

    def left(self, num: int) -> int:
        """Pictures below `num` whose tiles are not there: a count of names, which costs next to nothing."""
        with writing(self.out):
            names = os.listdir(self.out / ".tiles")
        there = sum(name.removesuffix(".npz").isdecimal() for name in names)  # not those that wait, .png.npz
        return max(0, num - there * self.batch)

    def missing(self, num: int) -> list[int]:
        """The first pictures of the tiles below `num` that are not whole: a look at every file."""
        with writing(self.out):
            tiles = _filled(self.out / ".tiles")
            pngs = _filled(self.out) if self.form == "png" else set()
        there = (tiles.__contains__, pngs.__contains__)
        return [start for start in range(0, num, self.batch) if not self._whole(start, num, *there)]

    def done(self, start: int, num: int) -> bool:
        """Whether one tile is whole by now."""
        return self._whole(
            start, num, *(lambda name, at=at: _size(at / name) for at in (self.out / ".tiles", self.out))
        )

    def _whole(self, start: int, num: int, tile_there: Callable, png_there: Callable) -> bool:
        stop = min(start + self.batch, num)
        if not tile_there(self.tile(start).name):
            return False
        if self.form == "png":
            return all(png_there(self.file(i)) for i in range(start, stop))
        at = start // self.shard * self.shard
        return tile_there(self.waiting(start).name) or at + self.count(at) >= stop

    def count(self, at: int) -> int:
        """Pictures in the joined file that begins with picture `at`; 0 where there is none, or it is damaged."""
        path = self.out / self.file(at)
        try:
            state = path.stat()
            known, mark = self._counts.get(at, (0, None)), (state.st_mtime_ns, state.st_size)
            if known[1] != mark:
                known = self._counts[at] = (joined.count(path), mark)
            return known[0]
        except FileNotFoundError:
            return 0
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{path}: cannot be read ({reason}); give yourself the right to, or remove it") from None

    def due(self, num: int) -> list[int]:
        """First pictures of the joined files that are missing, or have become too short for `num`."""
        if self.form == "png":
            return []
        return [at for at in range(0, num, self.shard) if at + self.count(at) < min(at + self.shard, num)]

    def absent(self, num: int) -> list[str]:
        """Files of a complete set that are not there, or empty, or of fewer pictures."""
        with writing(self.out):
            there = _filled(self.out)
            names = [name for name in _LAST if name not in there]
            names += [name for name, rows in joined.rows(self.out).items() if rows != num and name not in names]
        if self.form == "png":
            return names + [name for name in map(self.file, range(num)) if name not in there]
        return names + [self.file(at) for at in self.due(num)]

    # --- a tile ----------------------------------------------------------------------------------------------

    def write(self, tile: np.ndarray, num: int, tokens: np.ndarray, pictures: np.ndarray, apply=map) -> None:
        """Publishes a tile: index (B,), tokens int (B, N), pictures uint8 (B, H, W, 3); from `num` on it is padding.

        apply: as `map`, in threads perhaps: PNG is slow to write.
        """
        start = int(tile[0])
        with writing(self.out):
            data = list(apply(_png, pictures))
            if self.form == "png":
                for i, png in zip(tile, data, strict=True):
                    if i < num:
                        self.publish(self.out / self.file(i), png)
            else:
                ends = np.cumsum([len(png) for png in data])
                self._save(self.waiting(start), png=np.frombuffer(b"".join(data), np.uint8), ends=ends)
            exact = (picture.tobytes() for picture in pictures) if self.form == "npz" else data
            sums = np.stack([np.frombuffer(hashlib.sha256(each).digest(), np.uint8) for each in exact])
            shown = pictures[: max(0, in_grid(pictures) - start)]
            self._save(self.tile(start), tokens=tokens.astype(np.uint16), sha256=sums, pictures=shown)

    def discard(self, path: Path, start: int | None) -> None:
        """A file that turned out damaged, of the tile that begins with `start`, if of one: it is made again."""
        for each in [path] if start is None else [self.tile(start), self.waiting(start)]:
            each.unlink(missing_ok=True)

    @contextmanager
    def aside(self, path: Path, lasting: bool = False, num: int | None = None) -> Iterator[io.BufferedWriter]:
        """A file that is written elsewhere, and at the end of the block takes the place `path` at once.

        lasting: it is on the disk by then; num: it is joined of the pictures below: Outgrown where the set has become
        larger meanwhile, so that a process that was stopped for long does not overwrite a longer file.
        """
        self.work.mkdir(exist_ok=True)
        part = self.work / f"{path.name}.{uuid.uuid4().hex[:12]}~{self.mark}"
        try:
            with open(part, "wb") as file:
                yield file
                if lasting:
                    file.flush()
                    os.fsync(file.fileno())
            if num is not None and (now := read_manifest(self.out)) is not None and now["num"] > num:
                raise Outgrown(path)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def publish(self, path: Path, data: bytes, lasting: bool = False) -> None:
        try:
            with self.aside(path, lasting) as file:
                file.write(data)
        except FileNotFoundError:  # another process has just finished the set, and removed the folder
            with self.aside(path, lasting) as file:
                file.write(data)

    def _save(self, path: Path, **arrays) -> None:
        with self.aside(path) as file:
            np.savez(file, **arrays)

    # --- the whole -------------------------------------------------------------------------------------------

    def check_room(self, num: int, pixels: int) -> None:
        """UserError where the disk has no room for those of `num` pictures that are missing, of `pixels` each.

        A PNG of a photograph takes about half of what its pixels take. The folder need not be there yet.
        """
        left = self.left(num) if (self.out / ".tiles").is_dir() else num
        need = left * (pixels * 3 // 2 + (4096 if self.form == "png" else 0))
        need += num * pixels * 3 if self.form == "npz" and self.due(num) else 0
        try:
            there = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
            disk = shutil.disk_usage(there)
        except OSError:
            return
        if need > disk.free and disk.total:  # a place like /proc has no size
            wanted, there = (f"{number / 2**30:.3g} GiB" for number in (need, disk.free))
            raise UserError(f"--out {self.out}: needs about {wanted}, {there} are free; make room, or choose another")

    def untouched(self) -> bool:
        """Whether nothing has been made yet: the folder holds a manifest, and no more."""
        with writing(self.out):
            visible = {name for name in os.listdir(self.out) if not name.startswith(".")}
            return visible == {"manifest.json"} and not any(os.scandir(self.out / ".tiles"))

    def seal(self, num: int) -> None:
        """Writes the manifest's last word: the set is complete; not where it is to become larger meanwhile."""
        before = read_manifest(self.out)
        if before is not None and before["num"] <= num:  # smaller: another process overwrote what was asked for
            manifest.write(self, before | {"num": num, "complete": True})

    def reopen(self) -> None:
        """Of a set that says it is complete, and is not."""
        manifest.write(self, read_manifest(self.out) | {"complete": False})


def open_folder(book: Pictures, settings: dict, num: int, pixels: int, busy: Callable[[], bool] = lambda: False) -> int:
    """Creates the folder, or checks that it holds pictures of the same settings; the number of pictures it will hold.

    Several processes may do so at once. Nothing is written before there is room for all pictures, of `pixels` each; and
    settings of which nothing has been made (a batch that did not fit into memory) give way to others, unless somebody
    is `busy` with them. Raises: UserError where it cannot be written or belongs to something else; the line says what
    differs.
    """
    out = book.out
    before = _found(out)
    if before is None:
        book.check_room(num, pixels)
        with writing(out):
            _create(out)
            before = manifest.begin(book, {**settings, "num": num, "complete": False})
    with writing(out):
        (out / ".tiles").mkdir(exist_ok=True)
    if manifest.differs(before, settings) and book.untouched() and not busy():
        book.check_room(num, pixels)
        _begin_anew(book, {**settings, "num": num, "complete": False})
        return num
    manifest.refuse(out, before, settings)
    if before["num"] >= num and not (before["complete"] and book.absent(before["num"])):
        return before["num"]
    num = max(num, before["num"])
    book.check_room(num, pixels)
    with writing(out):
        beside = {name: before[name] for name in ("device", "versions") if name in before}
        manifest.write(book, {**before, **settings, **beside, "num": num, "complete": False})
    return num


def _found(out: Path) -> dict | None:
    """The manifest of the folder; None where there is none, and nothing else either."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; choose a new folder")
    before = read_manifest(out)
    with writing(out):
        if before is None and out.is_dir() and any(not name.startswith(".") for name in os.listdir(out)):
            before = read_manifest(out)  # another process may have begun it between the two looks
            if before is None:
                raise UserError(f"--out {out}: holds files but no manifest.json of pictures; choose a new folder")
    return before


def _create(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # what the system says of places like /proc
        raise UserError(f"--out {out}: no folder can be made there; choose another place") from None


def _begin_anew(book: Pictures, settings: dict) -> None:
    """Other settings in the place of those that nothing was made of.

    A process of the old ones, if there is one after all, looks at the manifest after it has written its first tile; if
    it wrote that before, the tile is seen here.
    """
    with writing(book.out):
        manifest.write(book, settings)
        for entry in os.scandir(book.out / ".tiles"):
            Path(entry.path).unlink(missing_ok=True)


def read(out: Path, facts: dict) -> Iterator[np.ndarray]:
    """The pictures of a complete set in the order of their index, uint8 (H, W, 3), one at a time, from any format.

    facts: what `read_manifest` gave. Raises: UserError for a picture that is damaged or not there.
    """
    book = Pictures(out, facts.get("format", "png"), facts.get("batch", 1))
    path = book.out / "samples.npz"
    try:
        if book.form == "npz":
            yield from joined.pixels(path, facts["num"])
            return
        step = 1 if book.form == "png" else book.shard
        for at in range(0, facts["num"], step):
            path, stop = book.out / book.file(at), min(at + step, facts["num"])
            pngs = [path.read_bytes()] if book.form == "png" else joined.pngs(path, range(at, stop))
            for png in pngs:
                yield _decode(png)
    except (*_UNREADABLE, KeyError, joined.Damaged) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); {_remedy(book, facts)}") from None


def _remedy(book: Pictures, facts: dict) -> str:
    """For a file of a set that is damaged or lost: the model makes it again, if it is still there."""
    run = facts.get("run")
    if run is None or not Path(run).exists():
        return f"`mage-ds sample` can make it again from {run or 'its model'}, which is not here; copy the folder again"
    return f"remove it if it is there, and start the same `mage-ds sample {run} --out {book.out}` again"


def decoded(data: bytes, path: Path) -> np.ndarray:
    """A picture file's bytes -> uint8 (H, W, 3). UserError, which names `path`, where they are none."""
    try:
        return _decode(data)
    except _UNREADABLE as error:
        raise UserError(f"{path}: is no readable picture ({error}); find all with `mage-ds prepare`") from None


def _decode(data: bytes) -> np.ndarray:
    from PIL import Image

    with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
        warnings.simplefilter("ignore")
        return np.asarray(image.convert("RGB"))


def in_grid(pictures: np.ndarray) -> int:
    """How many pictures the grid shows: 16 x 16 small ones, 8 x 8 large ones."""
    return 256 if max(pictures.shape[1:3]) <= 64 else 64


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def _filled(folder: Path) -> set[str]:
    """Names of the files in a folder that are not empty."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if _size(entry)}


def _size(entry: os.DirEntry | Path) -> int:
    """Bytes of a file; 0 where it is gone."""
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return 0
