"""What a data folder holds, as arrays: a walk by many threads over folders of pictures, or the indexes of tars."""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mage_ds.errors import UserError
from mage_ds.inputs import tars

THREADS = 16  # they wait for the file system; a local one is as quick with one
_CHUNK = 1 << 16
_TAIL = 9  # bytes of a sorted row behind the name
NOT_A_FILE = -1  # size of a folder, a broken link or a pipe that is named like a picture
_WORDS = {"train": ("train", "training"), "val": ("val", "validation", "valid")}


@dataclass
class Listing:
    """Pictures of a folder in the order of their names' bytes; n of them.

    names, offsets: all names in one buffer, since a million strings take 100 MB; sizes: int64 (n,) bytes; first:
    int32 (n,), index of the name's first folder in `firsts`, -1 = none. In tars also: numbers: int32 (n,), what
    `.cls` says, -1 = nothing; shard: int32 (n,), index in `shards`; begin: int64 (n,); else they are empty.
    root: digest of the names directly in the folder; stamps: {relative folder or shard: its times and size};
    damaged: {shard: why it is left out}; skipped: members of tars that are not read, counted by reason.
    """

    names: bytes | memoryview
    offsets: np.ndarray
    sizes: np.ndarray
    first: np.ndarray
    numbers: np.ndarray
    shard: np.ndarray
    begin: np.ndarray
    firsts: list[str]
    shards: list[str]
    root: str
    stamps: dict[str, list[int]]
    damaged: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def n(self) -> int:
        return len(self.sizes)


def walk(root: Path, part: str | None = None) -> Listing:
    """Lists a folder anew.

    Args: part: "train" or "val": of tars those that are named after it (see `part_of`).
    Raises: UserError for a folder that cannot be listed, or one that holds both pictures and tars.
    """
    folders = _scan_all(root)
    scan = next((scan for scan in folders.values() if len(scan.sizes)), None)
    shards = sorted(shard for scan in folders.values() for shard in scan.tars)
    shards = [shard for shard in shards if part is None or (part_of(shard) == "val") == (part == "val")]
    if scan and shards:
        picture, shard = tars.shown(scan.names[: scan.lengths[0]]), tars.shown(shards[0])
        raise UserError(f"{root}: holds both pictures ({picture}) and tars ({shard}); keep them in different folders")
    stamps = {os.fsdecode(prefix): list(scan.stamp) for prefix, scan in folders.items() if prefix}
    listing = _of_tars(root, shards) if shards else _of_folders(folders)
    listing.root, listing.stamps = folders[b""].digest, {**stamps, **listing.stamps}
    listing.fingerprint = _fingerprint(listing)
    return listing


def part_of(shard: bytes) -> str | None:
    """ "train" or "val", by a word of a shard's file name: `imagenet-val-0003.tar`."""
    words = os.fsdecode(shard.rpartition(b"/")[2]).lower().replace("_", "-").replace(".", "-").split("-")
    return next((part for part, names in _WORDS.items() if any(word in names for word in words)), None)


def stamp(path) -> list[int]:
    """Times of change of a folder or shard, and a shard's size: what the cache is checked against."""
    state = os.stat(path)
    size = state.st_size if stat.S_ISREG(state.st_mode) else 0
    return [state.st_mtime_ns, state.st_ctime_ns, size]


class Top(NamedTuple):
    """What lies directly in a folder, hidden things aside."""

    folders: list[str]
    tars: list[bytes]
    digest: str


def look(folder: Path) -> Top:
    """Raises: UserError if the folder cannot be listed."""
    folders, shards, total = [], [], 0
    with _opened(os.fsencode(folder)) as found:
        for entry in found:
            if entry.name[:1] != b".":
                total += _mark(entry.name)
                lower = entry.name.lower()
                if lower.endswith(b".tar") and os.path.isfile(entry.path):
                    shards.append(entry.name)
                elif not lower.endswith(tars.PICTURES) and os.path.isdir(entry.path):
                    folders.append(os.fsdecode(entry.name))
    return Top(sorted(folders, key=os.fsencode), shards, f"{total:x}")


def _mark(name: bytes) -> int:
    """Summed over a folder's names: a digest that needs neither their order nor a list of a million."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")


def _fingerprint(listing: Listing) -> str:
    """sha256 over relative names and sizes, and labels that are not in the names."""
    digest = hashlib.sha256()
    numbered = bool((listing.numbers >= 0).any())
    for start in range(0, listing.n, _CHUNK):  # a million Python numbers at once would take 100 MB
        rows = slice(start, start + _CHUNK)
        ends, sizes = listing.offsets[start : start + _CHUNK + 1].tolist(), listing.sizes[rows].tolist()
        names = [listing.names[a:b] for a, b in itertools.pairwise(ends)]
        lines = [b"%s\0%d\n" % each for each in zip(names, sizes, strict=True)]
        if numbered:
            lines += [b"%d\n" % number for number in listing.numbers[rows].tolist()]
        digest.update(b"".join(lines))
    return digest.hexdigest()


# --- rows: a name and a number in one bytes object, sorted by the name. A million pairs would take 200 MB more


def _row(name: bytes, number: int) -> bytes:
    return name + b"\0" + number.to_bytes(_TAIL - 1, "big")


def _number(row: bytes) -> int:
    return int.from_bytes(row[1 - _TAIL :], "big")


def _numbers(rows: list[bytes]) -> np.ndarray:
    return np.fromiter(map(_number, rows), dtype=np.int64, count=len(rows))


def _lengths(rows: list[bytes]) -> np.ndarray:
    return np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)) - _TAIL


def _joined(rows: list[bytes], prefix: bytes) -> bytes:
    """All names, with the prefix before each."""
    starts = range(0, len(rows), _CHUNK)  # join() lists what it joins
    return b"".join(b"".join(prefix + row[:-_TAIL] for row in rows[k : k + _CHUNK]) for k in starts)


# --- folders


class _Folder(NamedTuple):
    path: bytes
    prefix: bytes
    parents: tuple


@dataclass
class _Scan:
    """One folder: its pictures' relative names in order, its sub folders with their place among them."""

    stamp: list[int]
    digest: str
    names: bytes
    lengths: np.ndarray
    sizes: np.ndarray
    tars: list[bytes]
    folders: list[tuple[int, _Folder]]


def _scan_all(root: Path) -> dict[bytes, _Scan]:
    """{relative name with a slash at its end: what is in it}, level by level."""
    found, level = {}, [_Folder(os.fsencode(root), b"", ())]
    with ThreadPoolExecutor(THREADS) as pool:
        while level:
            scans = list(pool.map(_scan, level))
            found.update(zip((folder.prefix for folder in level), scans, strict=True))
            level = [folder for scan in scans for _, folder in scan.folders]
    return found


def _opened(path: bytes):
    try:
        return os.scandir(path)
    except OSError as error:
        raise UserError(f"{os.fsdecode(path)}: cannot be listed ({error.strerror}); check its permissions") from error


def _scan(folder: _Folder) -> _Scan:
    try:
        state, when = os.stat(folder.path), stamp(folder.path)  # before the names: later changes make them stale
    except OSError as error:
        raise UserError(f"{os.fsdecode(folder.path)}: cannot be listed ({error.strerror})") from error
    me = (state.st_dev, state.st_ino)
    if me in folder.parents:  # a link to a folder above
        return _Scan(when, "", b"", _whole([]), _whole([]), [], [])
    pictures, shards, folders, total = [], [], [], 0
    with _opened(folder.path) as found:
        for entry in found:
            name = entry.name
            if name[:1] == b".":
                continue
            if not folder.prefix:
                total += _mark(name)
            lower = name.lower()
            if lower.endswith(tars.PICTURES):
                pictures.append(_row(name, _size(entry) - NOT_A_FILE))
            elif lower.endswith(b".tar") and os.path.isfile(entry.path):
                shards.append(folder.prefix + name)
            elif os.path.isdir(entry.path):  # False, not an error, for a link to itself
                folders.append(name + b"/")
    pictures.sort()
    parents = (*folder.parents, me)
    return _Scan(
        stamp=when,
        digest=f"{total:x}",
        names=_joined(pictures, folder.prefix),
        lengths=_lengths(pictures) + len(folder.prefix),
        sizes=_numbers(pictures) + NOT_A_FILE,
        tars=shards,
        folders=[
            (
                bisect_left(pictures, name),
                _Folder(os.path.join(folder.path, name[:-1]), folder.prefix + name, parents),
            )
            for name in sorted(folders)
        ],
    )


def _size(entry: os.DirEntry) -> int:
    try:
        state = entry.stat()
    except OSError:
        return NOT_A_FILE
    return state.st_size if stat.S_ISREG(state.st_mode) else NOT_A_FILE


def _whole(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def _of_folders(folders: dict[bytes, _Scan]) -> Listing:
    """Puts the folders' pictures into one order: a sub folder's stand where its name with a slash would."""
    firsts = sorted({prefix.partition(b"/")[0] for prefix, scan in folders.items() if prefix and len(scan.sizes)})
    number = {first: k for k, first in enumerate(firsts)}
    names, lengths, sizes, labels = [], [], [], []
    for prefix, scan, begin, end in _pieces(folders, b""):
        at, to = scan.lengths[:begin].sum(), scan.lengths[:end].sum()
        names.append(scan.names[at:to])
        lengths.append(scan.lengths[begin:end])
        sizes.append(scan.sizes[begin:end])
        labels.append(np.full(end - begin, number.get(prefix.partition(b"/")[0], -1), dtype=np.int32))
    nothing = np.zeros(0, dtype=np.int32)
    return Listing(
        names=b"".join(names),
        offsets=_offsets(np.concatenate(lengths)),
        sizes=np.concatenate(sizes),
        first=np.concatenate(labels),
        numbers=nothing,
        shard=nothing,
        begin=_whole([]),
        firsts=[os.fsdecode(first) for first in firsts],
        shards=[],
        root="",
        stamps={},
    )


def _pieces(folders: dict[bytes, _Scan], prefix: bytes) -> Iterator[tuple[bytes, _Scan, int, int]]:
    scan, begin = folders[prefix], 0
    for place, folder in scan.folders:
        if place > begin:
            yield prefix, scan, begin, place
        begin = place
        yield from _pieces(folders, folder.prefix)
    yield prefix, scan, begin, len(scan.sizes)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([_whole([0]), np.cumsum(lengths, dtype=np.int64)])


# --- tars


def _of_tars(root: Path, shards: list[bytes]) -> Listing:
    """A shard's pictures are named as if it were unpacked where it lies: the order does not depend on the packing."""
    stamps, damaged, skipped = {}, {}, Counter()
    rows, columns, places = [], [np.zeros((5, 0), dtype=np.int64)], {}
    with ThreadPoolExecutor(THREADS) as pool:
        for k, (when, found) in enumerate(pool.map(lambda shard: _indexed(root / os.fsdecode(shard)), shards)):
            if isinstance(found, str):
                damaged[os.fsdecode(shards[k])] = found
                continue
            stamps[os.fsdecode(shards[k])] = when
            skipped += found.skipped
            names = [shards[k][: shards[k].rfind(b"/") + 1] + name for name in found.names]
            rows += [_row(name, i) for i, name in enumerate(names, len(rows))]
            first = [places.setdefault(n.partition(b"/")[0], len(places)) if b"/" in n else -1 for n in names]
            columns.append(_whole([found.begins, found.sizes, found.numbers, first, [k] * len(names)]))
    begin, sizes, numbers, first, shard = np.concatenate(columns, axis=1)
    rows.sort()
    if any(a[:-_TAIL] == b[:-_TAIL] for a, b in itertools.pairwise(rows)):
        rows = [_row(_within(shards[shard[_number(row)]], row[:-_TAIL]), _number(row)) for row in rows]
        rows.sort()
    picked = _numbers(rows)
    firsts = sorted(places)
    rank = {name: k for k, name in enumerate(firsts)}
    return Listing(
        names=_joined(rows, b""),
        offsets=_offsets(_lengths(rows)),
        sizes=sizes[picked],
        first=np.array([*(rank[name] for name in places), -1], dtype=np.int32)[first[picked]],
        numbers=numbers[picked].astype(np.int32),
        shard=shard[picked].astype(np.int32),
        begin=begin[picked],
        firsts=[os.fsdecode(name) for name in firsts],
        shards=[os.fsdecode(name) for name in shards],
        root="",
        stamps=stamps,
        damaged=damaged,
        skipped=dict(skipped),
    )


def _within(shard: bytes, name: bytes) -> bytes:
    """The name under a folder of the shard's name, for shards that use the same names."""
    return shard + name[shard.rfind(b"/") :] if b"/" in shard else shard + b"/" + name


def _indexed(path: Path) -> tuple[list[int], tars.Shard | str]:
    """The shard's stamp and its pictures, or why there are none."""
    try:
        return stamp(path), tars.index(path)
    except tars.Damaged as error:
        return [], str(error)
    except OSError as error:
        return [], f"cannot be read: {error.strerror or error}"
