"""The files that finished tiles of a set of pictures are joined into (report/pictures.py): tar shards, samples.npz,
tokens.npz, manifest.csv, grid.png. One tile is in memory at a time, whatever the size of the set; the bytes are a
function of the pictures, so two processes that join at once write the same.
"""

import io
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import numpy as np

from mage_ds.report import grids

_GRID_CLASSES = 16  # at most so many have rows of their own in the grid
_BROKEN = (ValueError, KeyError, EOFError, zipfile.BadZipFile, tarfile.TarError)


class Damaged(Exception):
    """The file `path` does not hold what was written; start: the first picture of its tile, where it is one's."""

    def __init__(self, path, reason, start: int | None = None):
        super().__init__(f"{path}: damaged ({reason})")
        self.path, self.start = path, start


# --- reading -------------------------------------------------------------------------------------------------


def count(path) -> int:
    """Pictures in a joined file; 0 where it is damaged, so that it is joined anew."""
    try:
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                return sum(name.endswith(".png") for name in tar.getnames())
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            return _shape(file)[0]
    except _BROKEN:
        return 0


def rows(out) -> dict[str, int]:
    """Pictures in tokens.npz and manifest.csv of the folder `out`; 0 where one is damaged or not there."""
    found = {"tokens.npz": 0, "manifest.csv": 0}
    with (
        suppress(*_BROKEN, FileNotFoundError),
        zipfile.ZipFile(out / "tokens.npz") as archive,
        archive.open("tokens.npy") as file,
    ):
        found["tokens.npz"] = _shape(file)[0]
    with suppress(FileNotFoundError), open(out / "manifest.csv", "rb") as file:
        found["manifest.csv"] = sum(1 for _ in file) - 1
    return found


def pngs(path, index: Iterable[int]) -> Iterator[bytes]:
    """PNG bytes of pictures in a tar."""
    try:
        with tarfile.open(path) as tar:
            for i in index:
                yield tar.extractfile(f"{i:06d}.png").read()
    except _BROKEN as error:
        raise Damaged(path, error) from None


def pixels(path, num: int) -> Iterator[np.ndarray]:
    """The first `num` pictures of samples.npz, uint8 (H, W, 3)."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            there, *shape = _shape(file)
            for _ in range(min(num, there)):
                yield np.frombuffer(file.read(int(np.prod(shape))), np.uint8).reshape(shape)
    except _BROKEN as error:
        raise Damaged(path, error) from None


def _shape(file) -> tuple[int, ...]:
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)[0]


def _tile(book, start: int, path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except _BROKEN as error:
        raise Damaged(path, error, start) from None


def _waiting(book, start: int) -> list[bytes]:
    """PNG bytes of a tile's pictures."""
    path = book.waiting(start)
    part = _tile(book, start, path)
    try:
        data, ends = part["png"].tobytes(), part["ends"]
        return [data[low:high] for low, high in zip([0, *ends[:-1]], ends, strict=True)]
    except KeyError as error:
        raise Damaged(path, error, start) from None


# --- pictures ------------------------------------------------------------------------------------------------


def join(book, at: int, num: int) -> None:
    """Writes the joined file that begins with picture `at`, of pictures below `num`, and removes what waited for it.

    What an earlier, shorter one of its name holds is taken from there. Raises: FileNotFoundError where another process
    has joined and removed it meanwhile; Damaged; Outgrown, as `Pictures.aside`.
    """
    stop = min(at + book.shard, num)
    path = book.out / book.file(at)
    with book.aside(path, lasting=True, num=num if stop < at + book.shard else None) as file:
        (_write_tar if book.form == "tar" else _write_npz)(book, file, path, at, stop)
    for start in range(at, stop, book.batch):
        book.waiting(start).unlink(missing_ok=True)


def _write_tar(book, file, path, at: int, stop: int) -> None:
    """WebDataset's names; of every owner and time nothing is told, so that equal pictures make equal bytes."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for start, last in _spans(book, at, stop):
            index = np.arange(start, last)
            for i, label, png in zip(index, book.labels_of(index), _tile_pngs(book, path, start, last), strict=True):
                _add(tar, f"{i:06d}.png", png)
                if label >= 0:
                    _add(tar, f"{i:06d}.cls", str(label).encode())


def _tile_pngs(book, path, start: int, last: int) -> Iterable[bytes]:
    if book.waiting(start).exists():
        return _waiting(book, start)[: last - start]
    return pngs(path, range(start, last))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _write_npz(book, file, path, at: int, stop: int) -> None:
    """ADM's layout: arr_0 uint8 (N, H, W, 3), and labelled ones arr_1 int64 (N,)."""
    spans, before = [*_spans(book, at, stop)], book.count(at)
    earlier = pixels(path, before)
    shape = next(pixels(path, 1)).shape if before else _pixels(_waiting(book, at)[0]).shape
    rows = (row.tobytes() for span in spans for row in _tile_pixels(book, earlier, before, *span))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        write_npy(archive, "arr_0", np.uint8, (stop, *shape), rows)
        if book.labels is not None:
            labels = (book.labels_of(np.arange(*span)).tobytes() for span in spans)
            write_npy(archive, "arr_1", np.int64, (stop,), labels)


def _tile_pixels(book, earlier: Iterator[np.ndarray], before: int, start: int, last: int) -> Iterator[np.ndarray]:
    """Pixels of a tile: of the file that was there, which is read from its begin on, or of what waits."""
    if last <= before:
        for _ in range(start, last):
            yield next(earlier)
        return
    for png in _waiting(book, start)[: last - start]:
        yield _pixels(png)


def _pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


def write_npy(archive: zipfile.ZipFile, name: str, kind, shape: tuple, chunks: Iterable[bytes]) -> None:
    """An array as a member of an .npz, from chunks of its bytes: it is never whole in memory."""
    head = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, head)
        for chunk in chunks:
            file.write(chunk)


def _spans(book, at: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first picture, the one behind the last) of the tiles."""
    for start in range(at, stop, book.batch):
        yield start, min(start + book.batch, stop)


# --- what lies beside them -----------------------------------------------------------------------------------


def finish(book, num: int, names: Sequence[str]) -> None:
    """tokens.npz (tokens uint16 (num, N), index int64 (num,)), manifest.csv, grid.png; names: of the classes.

    Raises: Damaged, FileNotFoundError, Outgrown as `join`.
    """
    from PIL import Image

    sheet = _grid(book, num, names)
    with book.aside(book.out / "grid.png", lasting=True, num=num) as file:
        Image.fromarray(sheet).save(file, format="PNG")
    width = _tile(book, 0, book.tile(0))["tokens"].shape[1:]
    with (
        book.aside(book.out / "tokens.npz", lasting=True, num=num) as tokens,
        zipfile.ZipFile(tokens, "w", zipfile.ZIP_STORED) as archive,
        book.aside(book.out / "manifest.csv", lasting=True, num=num) as table,
    ):
        table.write(b"index,label,seed,file,sha256\n")
        write_npy(archive, "tokens", np.uint16, (num, *width), _rows(book, num, table))
        spans = (np.arange(*span).tobytes() for span in _spans(book, 0, num))
        write_npy(archive, "index", np.int64, (num,), spans)


def tidy(book, num: int) -> None:
    """Of a complete set: removes what a process published that was late."""
    if book.form == "png":
        return
    for start in range(0, num, book.batch):
        at = start // book.shard * book.shard
        if at + book.count(at) >= min(start + book.batch, num):
            book.waiting(start).unlink(missing_ok=True)


def _rows(book, num: int, table) -> Iterator[bytes]:
    """The tokens of each tile; on the way its lines of manifest.csv are written."""
    for start, last in _spans(book, 0, num):
        part = _tile(book, start, book.tile(start))
        index = np.arange(start, last)
        for i, label, digest in zip(index, book.labels_of(index), part["sha256"], strict=False):
            table.write(f"{i},{label},{book.seed},{book.file(i)},{digest.tobytes().hex()}\n".encode())
        yield part["tokens"][: last - start].tobytes()


def _grid(book, num: int, names: Sequence[str]) -> np.ndarray:
    """The first pictures; of a few classes in turn a row for each."""
    shown = []
    for start, last in _spans(book, 0, num):
        part = _tile(book, start, book.tile(start))["pictures"][: last - start]
        if not len(part):
            break
        shown.append(part)
    shown = np.concatenate(shown)
    kinds = len(book.labels or [])
    if not 2 <= kinds <= _GRID_CLASSES or len(shown) < kinds:
        return grids.grid(shown)
    across = min(len(shown) // kinds, 16 if max(shown.shape[1:3]) <= 64 else 8)
    rows = shown[: across * kinds].reshape(across, kinds, *shown.shape[1:])
    return grids.rows([(name, rows[:, k]) for k, name in enumerate(names)])
