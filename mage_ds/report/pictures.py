"""A folder of generated pictures: loose PNG files, tar shards or one .npz, with tokens.npz, grid.png, manifests.

It grows tile by tile, by any number of processes at once, and can be continued after any death of them. `.tiles/`
keeps of each finished tile the tokens, checksums, and the pixels that the grid shows; for tar and npz also the
pictures themselves (`.png.npz`), until they are joined (report/joined.py). A tile's own file is published last, so it
says that the tile is whole. Half-written files lie in `.work/`, beside the claims (sampling/claims.py); it goes when
the set is complete. Nothing here is locked: what two processes do at once comes out the same.
"""

import hashlib
import io
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mage_ds.errors import UserError, refuse_differences
from mage_ds.report import joined

FORMATS = ("png", "tar", "npz")
MANY = 10_000  # pictures from which on loose files are a burden to file systems and people
_SHARD = 1000  # pictures of a tar, about: whole tiles
_FREE = ("num", "run", "complete", "versions", "classes")  # of the manifest: may differ when a folder is continued
_LAST = ("tokens.npz", "manifest.csv", "grid.png")  # what is made at the end, beside the pictures


class Pictures:
    """The files of one set: which are there, and where the others go.

    Args: form: one of FORMATS; batch: pictures of a tile; seed: what the noise began with; labels: picture i was
    asked to be the i-th of these, in turn; None: of no class.
    """

    def __init__(self, out: Path, form: str, batch: int, seed: int = 0, labels: Sequence[int] | None = None):
        self.out, self.form, self.batch, self.seed, self.labels = Path(out), form, batch, seed, labels
        whole = {"png": 1, "tar": max(1, _SHARD // batch), "npz": 2**40}[form]
        self.shard = whole * batch  # pictures of a joined file
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

    def missing(self, num: int, tiles: list) -> list:
        """The tiles (index arrays) of pictures below `num` that are not whole yet."""
        with writing(self.out):
            there = {self.out / ".tiles" / name for name in os.listdir(self.out / ".tiles")}
            if self.form == "png":
                there |= {self.out / name for name in os.listdir(self.out)}
        return [tile for tile in tiles if not self._whole(tile, num, there.__contains__)]

    def done(self, tile: np.ndarray, num: int) -> bool:
        """Whether one tile is whole by now."""
        return self._whole(tile, num, Path.exists)

    def _whole(self, tile: np.ndarray, num: int, exists: Callable[[Path], bool]) -> bool:
        start, stop = int(tile[0]), min(int(tile[-1]) + 1, num)
        if not exists(self.tile(start)):
            return False
        if self.form == "png":
            return all(exists(self.out / self.file(i)) for i in range(start, stop))
        at = start // self.shard * self.shard
        return exists(self.waiting(start)) or at + self.count(at) >= stop

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

    def due(self, num: int) -> list[int]:
        """First pictures of the joined files that are missing, or have become too short for `num`."""
        if self.form == "png":
            return []
        return [at for at in range(0, num, self.shard) if at + self.count(at) < min(at + self.shard, num)]

    def absent(self, num: int) -> list[str]:
        """Files of a complete set that are not there."""
        with writing(self.out):
            there = set(os.listdir(self.out))
        step = 1 if self.form == "png" else self.shard
        return [name for name in (*_LAST, *(self.file(i) for i in range(0, num, step))) if name not in there]

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
    def aside(self, path: Path) -> Iterator[io.BufferedWriter]:
        """A file that is written elsewhere, and at the end of the block takes the place `path` at once."""
        self.work.mkdir(exist_ok=True)
        part = self.work / f"{path.name}.{uuid.uuid4().hex[:12]}"
        try:
            with open(part, "wb") as file:
                yield file
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def publish(self, path: Path, data: bytes) -> None:
        try:
            with self.aside(path) as file:
                file.write(data)
        except FileNotFoundError:  # another process has just finished the set, and removed the folder
            with self.aside(path) as file:
                file.write(data)

    def _save(self, path: Path, **arrays) -> None:
        with self.aside(path) as file:
            np.savez(file, **arrays)

    # --- the whole -------------------------------------------------------------------------------------------

    def check_room(self, left: int, num: int, pixels: int) -> None:
        """UserError where the disk has no room for the `left` pictures of `num` that are missing, of `pixels` each.

        A PNG of a photograph takes about half of what its pixels take.
        """
        need = left * (pixels * 3 // 2 + (4096 if self.form == "png" else 0))
        need += num * pixels * 3 if self.form == "npz" and self.due(num) else 0
        try:
            free = shutil.disk_usage(self.out).free
        except OSError:
            return
        if need > free:
            wanted, there = (f"{number / 2**30:.1f} GiB" for number in (need, free))
            raise UserError(f"--out {self.out}: needs about {wanted}, {there} are free; make room, or choose another")

    def seal(self, num: int) -> None:
        """Writes the manifest's last word: the set is complete; not where it is to become larger meanwhile."""
        manifest = read_manifest(self.out)
        if manifest is not None and manifest["num"] <= num:  # smaller: another process overwrote what was asked for
            _write_manifest(self, manifest | {"num": num, "complete": True})

    def reopen(self) -> None:
        """Of a set that says it is complete, and is not."""
        _write_manifest(self, read_manifest(self.out) | {"complete": False})


def open_folder(book: Pictures, settings: dict, num: int) -> int:
    """Creates the folder, or checks that it holds pictures of the same settings; the number of pictures it will hold.

    Several processes may do so at once. Raises: UserError where it cannot be written or belongs to something else; the
    line says what differs.
    """
    out = book.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; choose a new folder")
    before = read_manifest(out)
    if before is None and out.is_dir() and any(not name.startswith(".") for name in os.listdir(out)):
        before = read_manifest(out)  # another process may have begun it between the two looks
        if before is None:
            raise UserError(f"--out {out}: holds files but no manifest.json of pictures; choose a new folder")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if before is None:
            before = _begin(book, {**settings, "num": num, "complete": False})
        refuse_differences(out, "pictures", before, settings, _brief, _FREE)
        (out / ".tiles").mkdir(exist_ok=True)
        if before["num"] >= num and (not before["complete"] or not book.absent(before["num"])):
            return before["num"]
        num = max(num, before["num"])
        _write_manifest(book, {**before, **settings, "num": num, "complete": False})
    return num


def read_manifest(out: Path) -> dict | None:
    """manifest.json of a folder of pictures, None where there is none. UserError where it is damaged."""
    path = Path(out) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        return manifest | {"num": int(manifest["num"]), "complete": bool(manifest["complete"])}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable as a manifest ({error!r}); choose another folder") from None


def read(out: Path, manifest: dict) -> Iterator[np.ndarray]:
    """The pictures of a complete set in the order of their index, uint8 (H, W, 3), one at a time, from any format.

    manifest: what `read_manifest` gave. Raises: UserError for a picture that is damaged or not there.
    """
    book = Pictures(out, manifest.get("format", "png"), manifest.get("batch", 1))
    again = "start the same `mage-ds sample` again"
    try:
        if book.form == "npz":
            yield from joined.pixels(book.out / "samples.npz", manifest["num"])
            return
        step = 1 if book.form == "png" else book.shard
        for at in range(0, manifest["num"], step):
            path, stop = book.out / book.file(at), min(at + step, manifest["num"])
            pngs = [path.read_bytes()] if book.form == "png" else joined.pngs(path, range(at, stop))
            for png in pngs:
                yield decoded(png, path)
    except (OSError, ValueError, KeyError, joined.Damaged) as error:
        raise UserError(f"{out}: {error}; {again}") from None


def decoded(data: bytes, path: Path) -> np.ndarray:
    """A picture file's bytes -> uint8 (H, W, 3). UserError, which names `path`, where they are none."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: is no readable picture ({error}); find all with `mage-ds prepare`") from None


@contextmanager
def writing(out: Path):
    """What the system refuses becomes one line. A file that is gone is another matter: another process may have been
    first, and whoever works on the folder looks again."""
    try:
        yield
    except FileNotFoundError:
        if Path(out).is_dir():
            raise
        raise UserError(f"--out {out}: is gone; start again") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {out}: cannot be written ({reason}); choose another folder or make room") from None


def in_grid(pictures: np.ndarray) -> int:
    """How many pictures the grid shows: 16 x 16 small ones, 8 x 8 large ones."""
    return 256 if max(pictures.shape[1:3]) <= 64 else 64


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def _begin(book: Pictures, manifest: dict) -> dict:
    """Writes the first manifest, and returns the one that is there: of two processes the first has its own way."""
    path = book.out / "manifest.json"
    book.work.mkdir(exist_ok=True)
    part = book.work / f"manifest.json.{uuid.uuid4().hex[:12]}"
    part.write_text(_text(manifest))
    try:
        os.link(part, path)
    except FileExistsError:
        return read_manifest(book.out)
    except OSError:  # a file system without hard links
        os.replace(part, path)
        return manifest
    part.unlink()
    return manifest


def _brief(value) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _write_manifest(book: Pictures, manifest: dict) -> None:
    book.publish(book.out / "manifest.json", _text(manifest).encode())


def _text(manifest: dict) -> str:
    return json.dumps(manifest, indent=1) + "\n"
