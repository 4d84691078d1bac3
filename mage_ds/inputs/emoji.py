"""The emoji of Debian's colour font as pictures, in the classes of Unicode's list; nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mage_ds.errors import UserError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
_INSTALL = "as root on Debian or Ubuntu: apt-get install fonts-noto-color-emoji unicode-data"
_SIZE = 109  # the one size that the font's bitmaps have
# Drawn as what stands for a missing glyph: a code point that is in no font, and a flag of no country (a flag with "?").
_MISSING = "\U0010ffff", "\U0001f1e6\U0001f1e6"
# What tells the variants of one emoji apart: skin tones, the request for colour, "... and male", "... and female".
_VARIANT = re.compile("[\U0001f3fb-\U0001f3ff\ufe0f]|\u200d[\u2640\u2642]")
_PERSON = str.maketrans("\U0001f468\U0001f469", "\U0001f9d1" * 2)  # man, woman -> person


class Emoji(NamedTuple):
    name: str  # class and code points: "people-body/1f44b-1f3fd"
    text: str
    family: str  # equal for the variants of one emoji, which look alike


def listed() -> list[Emoji]:
    """Every emoji of Unicode's list that is fully qualified (RGI), in its order. Raises: UserError."""
    found, group = [], ""
    for line in _lines():
        if line.startswith("# group:"):
            group = "-".join(re.findall(r"[a-z0-9]+", line.split(":")[1].lower()))
        elif match := re.match(r"([0-9A-F]+(?: [0-9A-F]+)*) *; fully-qualified ", line):
            codes = match[1].lower().split()
            text = "".join(chr(int(code, 16)) for code in codes)
            found.append(Emoji(f"{group}/{'-'.join(codes)}", text, _VARIANT.sub("", text).translate(_PERSON)))
    if not found:
        raise UserError(f"{LIST}: lists no emoji; {_INSTALL.replace('install', 'install --reinstall')}")
    return found


def _lines() -> list[str]:
    try:
        return LIST.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sample emoji: no {LIST} that can be read; {_INSTALL}") from error


def pen() -> Callable:
    """The font as a function text -> RGB picture on a square white canvas, or None for what the font lacks.

    It lacks an emoji that is drawn as nothing, as the sign for a missing glyph or flag, or as several glyphs side by
    side (a sequence that is no picture of its own).
    Raises: UserError without the font, or without the text layout that joins a sequence into one glyph.
    """
    from PIL import Image, ImageDraw, ImageFont, features

    if not features.check("raqm"):
        raise UserError(
            "--sample emoji: this Pillow has no raqm layout, which flags and skin tones need; "
            "as root: apt-get install libfribidi0, or else `pip install --force-reinstall --only-binary=:all: pillow`"
        )
    try:
        font = ImageFont.truetype(FONT, _SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:  # not there, or without bitmaps of this size
        raise UserError(f"--sample emoji: no {FONT} with bitmaps of size {_SIZE}; {_INSTALL}") from error
    left, top, right, bottom = font.getbbox("\U0001f600")
    side = max(right - left, bottom - top)
    corner = (side - right - left) // 2, (side - bottom - top) // 2

    def ink(text: str):
        canvas = Image.new("RGB", (side, side), "white")
        ImageDraw.Draw(canvas).text(corner, text, font=font, embedded_color=True)
        return canvas

    nothing = [ink(text) for text in ("", *_MISSING)]

    def draw(text: str):
        drawn = ink(text)
        return None if font.getlength(text) > 1.5 * side or drawn in nothing else drawn

    return draw
