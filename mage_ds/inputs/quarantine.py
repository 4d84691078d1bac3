"""Unreadable pictures: found by cheap looks at their bytes, listed, counted."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import threading
import warnings
from pathlib import Path

from PIL import Image

from mage_ds.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_ORIENTATION, _WIDTH, _HEIGHT = 0x0112, 0x0100, 0x0101  # EXIF and TIFF tags
_QUARTER_TURNS = range(5, 9)
# Large photographs and odd EXIF are no news. Once and for all: warnings' contexts are not safe in reading threads.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Corrupt EXIF data")


class Unreadable(Exception):
    """Why the bytes are no picture; the message is a short clause."""


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height of the upright picture from its header; nothing is decoded.

    Finds empty files, foreign formats, broken headers, and JPEG, PNG and WebP without their end (bytes after the
    end are no error). Damage inside is the decoder's to find. Raises: Unreadable.
    """
    if not data:
        raise Unreadable("empty file")
    stream = io.BytesIO(data)
    try:
        image = Image.open(stream, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise Unreadable(f"no JPEG, PNG, WebP, BMP or TIFF that opens: starts with {data[:8]!r}") from None
    except Exception as error:  # Pillow's parsers raise anything on garbage
        raise Unreadable(f"broken header: {error}") from None
    if _cut_off(image.format, data, stream.tell()):
        raise Unreadable(f"truncated: {image.format} without its end")
    return _upright(image)


def _cut_off(kind: str, data: bytes, scan: int) -> bool:
    """Whether the end is missing; `scan` is where the reader stopped, in a JPEG its start of scan."""
    if kind in ("JPEG", "MPO"):
        return data.rfind(b"\xff\xd9", scan) < 0  # an embedded preview has its own end marker, before the scan
    if kind == "PNG":
        return data.rfind(b"IEND") < 0
    return kind == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little")


def _upright(image: Image.Image) -> tuple[int, int]:
    """Size after the rotation that DALI applies: EXIF's, but not XMP's, which Pillow's getexif() mixes in."""
    if image.format == "TIFF":  # its size is upright in new versions of Pillow only
        tags = image.tag_v2
        width, height, orientation = tags[_WIDTH], tags[_HEIGHT], tags.get(_ORIENTATION, 1)
    else:
        (width, height), orientation = image.size, 1
        with contextlib.suppress(Exception):  # a damaged EXIF block does not turn the picture
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            orientation = exif.get(_ORIENTATION, 1)
    return (height, width) if orientation in _QUARTER_TURNS else (width, height)


class Quarantine:
    """List of unreadable pictures, one JSON line {"name", "reason"} each, shared by all ranks through its file.

    path: quarantine.jsonl, or None to count only; limit: share of `total` that may be unreadable.
    """

    def __init__(self, path: Path | str | None, limit: float, total: int):
        self.path = Path(path) if path is not None else None
        self.limit, self.total = limit, total
        self._names: set[str] = set()
        self._read = 0  # bytes of the file whose names are known
        self._lock = threading.Lock()  # training and evaluation streams have a thread each
        if self.path and self.path.exists():
            with open(self.path, "rb") as file:
                self._catch_up(file)

    @property
    def count(self) -> int:
        """Different pictures found so far, by any rank as far as this one has seen."""
        return len(self._names)

    def add(self, name: str, reason: str) -> None:
        """Lists a picture once. Raises: UserError when more than limit x total pictures are listed."""
        with self._lock:
            if name not in self._names:
                self._append(name, reason)
            if self.count > self.limit * self.total:
                raise UserError(self._message(name, reason))

    def _message(self, name: str, reason: str) -> str:
        where = f"{self.path} lists them" if self.path else f"the last one: {name}: {reason}"
        return (
            f"{self.count} of {self.total} pictures are unreadable, more than inputs.broken_limit={self.limit:g} "
            f"allows ({where}); `mage-ds prepare DATA --verify full --out GOOD` finds all and makes a data set "
            "without them, or raise the limit"
        )

    def _append(self, name: str, reason: str) -> None:
        if self.path is None:
            self._names.add(name)
            return
        with open(self.path, "a+b") as file:
            with contextlib.suppress(OSError):  # file systems without locks: a name may be listed twice
                fcntl.flock(file, fcntl.LOCK_EX)
            ends_well = self._catch_up(file)
            if name not in self._names:
                line = json.dumps({"name": name, "reason": reason}) + "\n"
                os.write(file.fileno(), (line if ends_well else "\n" + line).encode())
                self._names.add(name)

    def _catch_up(self, file) -> bool:
        """Reads lines that other ranks have added; False if the last one was cut off by a crash."""
        file.seek(self._read)
        *lines, rest = file.read().split(b"\n")
        self._read += sum(len(line) + 1 for line in lines)
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._names.add(json.loads(line)["name"])
        return not rest
