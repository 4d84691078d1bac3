"""A listing kept on the disk, so that the second start over a million files reads one file instead of listing them.

The file lies in the data folder (`.mage_ds_listing`), or in the user's cache folder where the data folder is read-only.
It is used if its digest is right and nothing that it lists has changed: the names in the data folder itself, the times
of every sub folder, the times and size of every tar. A picture overwritten in place under its old name is not noticed
(no folder changes): it is read as it is now, while its size, which only the fingerprint uses, is the old one.
Whoever may write the file may as well put links into the data folder, so it is not a way around anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mage_ds.inputs import listing as listings
from mage_ds.inputs.listing import Listing
from mage_ds.inputs.tars import ENDINGS

NAME = ".mage_ds_listing"
WORTH = 10_000  # pictures: fewer are listed as quickly, and their folder stays as it is
SETTLED = 2_000_000_000  # ns: a folder that changed later may change again within the same tick of its clock
RULES = [1, *ENDINGS]  # what a name is listed by; another version's file is not used
_ARRAYS = {"offsets": "<i8", "sizes": "<i8", "begin": "<i8", "first": "<i4", "numbers": "<i4", "shard": "<i4"}
_FACTS = ("firsts", "shards", "root", "stamps", "skipped", "fingerprint")
_DIGEST = 128  # hexadecimal digits of blake2b, then a line feed
_ALIGN = 64


def listing(root: Path, part: str | None = None, fresh: bool = False) -> Listing:
    """What `listing.walk` returns, from the cache where that is up to date; else listed, and cached if it is large.

    Args: fresh: list anew whatever the cache says. Raises: as `listing.walk`.
    """
    if not fresh and (found := _load_any(root, part)):
        return found
    begin = time.monotonic_ns()
    made = listings.walk(root, part)
    if made.n >= WORTH and not made.damaged:
        _save_any(root, part, made, time.monotonic_ns() - begin)
    return made


def places(root: Path, part: str | None) -> list[Path]:
    """Where a folder's cache may lie, the best place first."""
    name = f"{NAME}_{part}" if part else NAME
    found = [root / name]
    with contextlib.suppress(RuntimeError):  # no home
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        key = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
        found.append(Path(cache) / "mage_ds" / f"{key}{name}")
    return found


# --- reading


def _load_any(root: Path, part: str | None) -> Listing | None:
    for place in places(root, part):
        # Whatever is wrong with the file, the data can be listed instead.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = _load(place)
            if found is not None and _up_to_date(root, found):
                return found
    return None


def _load(path: Path) -> Listing | None:
    with open(path, "rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # ranks of a host share its pages
    digest = bytes(view[:_DIGEST]).decode("ascii")
    if digest != hashlib.blake2b(view[_DIGEST + 1 :]).hexdigest():
        return None
    size = int(bytes(view[_DIGEST + 1 : _DIGEST + 17]), 16)
    at = _DIGEST + 18
    head = json.loads(bytes(view[at : at + size]))
    if head["rules"] != RULES:
        return None
    arrays, at = {}, _padded(at + size)
    for name, kind in _ARRAYS.items():
        count = head["counts"][name]
        arrays[name] = np.frombuffer(view, dtype=kind, count=count, offset=at)
        at = _padded(at + arrays[name].nbytes)
    return Listing(names=view[at:], **arrays, **{name: head[name] for name in _FACTS})


def _up_to_date(root: Path, found: Listing) -> bool:
    names = list(found.stamps)
    with ThreadPoolExecutor(listings.THREADS) as pool:
        if any(
            now != found.stamps[name]
            for name, now in zip(names, pool.map(lambda name: _stamp(root / name), names), strict=True)
        ):
            return False
    return listings.look(root).digest == found.root


def _stamp(path: Path) -> list[int] | None:
    try:
        return listings.stamp(path)
    except OSError:
        return None


def _padded(at: int) -> int:
    return -(-at // _ALIGN) * _ALIGN


# --- writing


def _save_any(root: Path, part: str | None, made: Listing, took: int) -> None:
    for place in places(root, part):
        with contextlib.suppress(OSError):  # read-only, full: the next place, or none
            if place.parent != root:
                place.parent.mkdir(parents=True, exist_ok=True)
            _save(place, made, took)
            return


def _save(place: Path, made: Listing, took: int) -> None:
    """Writes aside and publishes whole; ranks that start together may all do so, a reader sees one or another."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = _load(place)  # another rank's, since this one began to list
        if found is not None and (found.fingerprint, found.stamps) == (made.fingerprint, made.stamps):
            return
    partial = place.with_name(f"{place.name}.{os.getpid()}.{time.time_ns()}")
    try:
        with open(partial, "xb") as file:
            begin = os.fstat(file.fileno()).st_mtime_ns - took  # by the clock of the file system
            if any(begin - max(times) < SETTLED for *times, _ in made.stamps.values()):
                return
            _write(file, made)
        with contextlib.suppress(FileNotFoundError):
            # A run on another host may have mapped it: where NFS loses a file, reading its pages kills the process.
            place.replace(place.with_name(f"{place.name}.old"))
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def _write(file, made: Listing) -> None:
    arrays = {name: np.ascontiguousarray(getattr(made, name), dtype=kind) for name, kind in _ARRAYS.items()}
    facts = {name: getattr(made, name) for name in _FACTS}
    head = json.dumps({"rules": RULES, "counts": {k: len(v) for k, v in arrays.items()}, **facts}).encode()
    digest, at = hashlib.blake2b(), _DIGEST + 1
    file.write(b"\0" * at)

    def put(data) -> None:
        nonlocal at
        digest.update(data)
        file.write(data)
        at += len(data)

    put(b"%016x\n" % len(head))
    put(head)
    for data in (*(array.tobytes() for array in arrays.values()), made.names):
        put(bytes(_padded(at) - at))
        put(data)
    file.seek(0)
    file.write(digest.hexdigest().encode() + b"\n")
