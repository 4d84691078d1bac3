"""Pictures inside tar shards: where the bytes of each lie. Only headers are read; nothing is unpacked or followed.

A member's name is text, never a path that is opened: what is read later is a range of bytes of the shard itself.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # of pictures, in folders and tars
PICTURES = tuple(ending.encode() for ending in ENDINGS)
_BLOCK = 512
_ADLER = 65521
_END = bytes(_BLOCK)
_LONGEST = 1 << 20  # bytes of a long name or of pax records
_LABEL_BYTES, LABELS = 32, 1_000_000  # of a .cls; its number lies below
_FILES, _PLAIN = (b"0", b"\0", b"7"), b"0"
_NOTES = {b"L": "name", b"K": "link", b"x": "pax", b"g": "common"}  # headers that describe the next member, or all
_NO_DATA = {b"1": "links", b"2": "links", b"3": "devices", b"4": "devices", b"5": "", b"6": "devices"}
_SPARSE = b"S"
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Damaged(Exception):
    """Why a shard cannot be used; the message is a short clause."""


class Header(NamedTuple):
    """One member: kind is tar's type flag (regular files are all b"0"), begin and size its bytes in the shard."""

    kind: bytes
    name: bytes
    begin: int
    size: int


@dataclass
class Shard:
    """Pictures of one shard in the order of their names' bytes; `skipped` counts what was left out, by reason.

    numbers: the labels that `.cls` members give, -1 = none.
    """

    names: list[bytes] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)


def index(path) -> Shard:
    """Reads a shard's headers and `.cls` members. Raises: Damaged; OSError if it cannot be read."""
    shard, labels, samples = Shard(), {}, {}
    with open(path, "rb", buffering=0, opener=_opener) as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise Damaged("not a file")
        for member in headers(file.fileno(), state.st_size):
            name = member.name if member.kind == _PLAIN else b""
            if name[:1] == b"/" or b"\0" in name or (b".." in name and b".." in name.split(b"/")):
                shard.skipped["unsafe names"] += 1
                continue
            if member.kind != _PLAIN:
                shard.skipped[_NO_DATA.get(member.kind, "sparse or foreign members")] += 1
                continue
            name, ending = _clean(name), name[-5:].lower()
            if not name:
                continue
            if ending.endswith(b".cls"):
                labels[name[:-4]] = member
            elif ending.endswith(PICTURES):
                samples.setdefault(_key(name), {})[name] = member  # a name that comes twice: the last, as `tar` does
        _choose(shard, samples)
        for name in shard.names:
            label = labels.get(name[: name.rindex(b".")])
            shard.numbers.append(_label(file.fileno(), label) if label else -1)
    del shard.skipped[""]
    return shard


def shown(name: bytes | str) -> str:
    """A foreign name for one line of a terminal: without control characters and what no terminal can show."""
    name = os.fsdecode(name)
    return name if name.isprintable() else ascii(name)[1:-1]


def _opener(path, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # or opening a pipe would wait forever


def _clean(name: bytes) -> bytes:
    """Relative name without "." parts; empty for hidden files, AppleDouble files and such."""
    if b"/" not in name and name[:1] != b".":
        return name
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    return b"" if any(part[:1] == b"." for part in parts) else b"/".join(parts)


def _key(name: bytes) -> bytes:
    """WebDataset's: up to the first dot of the last part."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.partition(b".")[0]


def _choose(shard: Shard, samples: dict) -> None:
    """One picture a key: the first of ENDINGS. Names with more dots are pictures of their own, else parts of it."""
    chosen = []
    for key, members in samples.items():
        names = list(members)
        if len(names) > 1:
            own = [name for name in names if name[len(key) :].lower() in PICTURES]
            names = sorted(own, key=lambda name: PICTURES.index(name[len(key) :].lower()))[:1] or names
            shard.skipped["second pictures of a key"] += len(members) - len(names)
        chosen += [(name, members[name]) for name in names]
    for name, member in sorted(chosen):
        shard.names.append(name)
        shard.begins.append(member.begin)
        shard.sizes.append(member.size)


def _label(file: int, member: Header) -> int:
    text = os.pread(file, min(member.size, _LABEL_BYTES + 1), member.begin).strip()
    if len(text) > _LABEL_BYTES or not text.isdigit() or int(text) >= LABELS:
        what = f"a label is a whole number below {LABELS:,} in digits"
        raise Damaged(f"{shown(member.name)}: {what}, not {text[:16]!r}")
    return int(text)


# --- the format: ustar, with GNU's and pax's long names and sizes


def headers(file: int, total: int) -> Iterator[Header]:
    """Members of a tar in the order they are stored; folders, links and devices too.

    Args: file: descriptor; total: the file's size in bytes.
    Raises: Damaged where the file is no tar, has no end mark, or a header's sum is wrong.
    """
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # or reading ahead would fetch the pictures too
    at, notes = 0, {}
    while (block := os.pread(file, _BLOCK, at)) != _END:
        _check(block, at)
        kind, size, begin = block[156:157], _number(block[124:136]), at + _BLOCK
        if kind in _NOTES:
            text = _text(file, begin, size, at)
            notes[_NOTES[kind]] = _records(text) if kind in b"xg" else text.partition(b"\0")[0]
            at = begin + _padded(size)
            continue
        member = _member(block, kind, begin, size, notes)
        if kind == _SPARSE:
            member = member._replace(begin=_after_map(file, block, begin))
        if member.begin + member.size > total:
            raise Damaged(f"truncated: {shown(member.name)} ends behind the file's end")
        yield member
        at = member.begin + _padded(member.size)
        if notes:
            notes = {"common": notes["common"]} if "common" in notes else {}


def _member(block: bytes, kind: bytes, begin: int, size: int, notes: dict) -> Header:
    records = {**notes.get("common", {}), **notes.get("pax", {})} if notes else {}
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    name = records.get(b"path", notes.get("name", name))
    if b"size" in records:
        size = _decimal(records[b"size"])
    if kind in _FILES:
        kind = b"5" if kind == b"\0" and name.endswith(b"/") else _PLAIN  # before ustar a folder was a name with "/"
    if kind in _NO_DATA:
        size = 0
    if records and any(key.startswith(b"GNU.sparse") for key in records):
        kind = b"sparse"
    return Header(kind, name, begin, size)


def _check(block: bytes, at: int) -> None:
    if len(block) < _BLOCK:
        packed = [kind for mark, kind in _PACKED.items() if at == 0 and block.startswith(mark)]
        raise Damaged(f"compressed ({packed[0]})" if packed else "truncated: no end mark of a tar")
    # The sum of all bytes, its own place as blanks. zlib has it, modulo a prime, much sooner than sum().
    total = zlib.adler32(block[:148] + b" " * 8 + block[156:]) & 0xFFFF
    try:
        good = (_number(block[148:156]) + 1) % _ADLER == total
    except Damaged:
        good = False
    if not good and at:
        raise Damaged(f"damaged at byte {at:,}: no header of a member")
    if not good:
        packed = [kind for mark, kind in _PACKED.items() if block.startswith(mark)]
        raise Damaged(f"compressed ({packed[0]})" if packed else "no tar")


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 for 8 GB and more."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip()
    try:
        return int(text, 8) if text.isdigit() else _none(text)
    except ValueError:
        raise Damaged(f"damaged: {field!r} is no number") from None


def _none(text: bytes) -> int:
    if text:
        raise ValueError
    return 0


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise Damaged(f"damaged: {text[:20]!r} is no size")
    return int(text)


def _text(file: int, begin: int, size: int, at: int) -> bytes:
    if size > _LONGEST:
        raise Damaged(f"damaged at byte {at:,}: a name of {size:,} bytes")
    text = os.pread(file, size, begin)
    if len(text) < size:
        raise Damaged("truncated: ends within a header")
    return text


def _records(text: bytes) -> dict[bytes, bytes]:
    """pax: lines "LENGTH KEY=VALUE", LENGTH counts the line."""
    found, at = {}, 0
    while at < len(text) and text[at]:
        blank = text.find(b" ", at, at + 8)
        end = at + _decimal(text[at:blank]) if blank > 0 else 0
        key, equal, value = text[blank + 1 : end - 1].partition(b"=")
        if not blank < end <= len(text) or not equal:
            raise Damaged("damaged: broken pax records")
        found[key], at = value, end
    return found


def _after_map(file: int, block: bytes, begin: int) -> int:
    """Where the data of an old GNU sparse member begins: its map may go on in blocks of its own."""
    more = block[482]
    while more:
        block = os.pread(file, _BLOCK, begin)
        if len(block) < _BLOCK:
            raise Damaged("truncated: ends within a header")
        more, begin = block[504], begin + _BLOCK
    return begin


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
