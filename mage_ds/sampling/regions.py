"""Regions of a picture to fill anew (paper section 5, Figures 1 and 5 to 7): masks of pixels and of tokens.

Masks are bool, True = to fill. H, W: pixels of the model's picture.
"""

import difflib

import numpy as np

from mage_ds.errors import UserError

_FORMS = {"inpaint": "inpaint[:x,y,w,h]", "outpaint": "outpaint[:fraction]", "uncrop": "uncrop[:fraction]"}
_KEPT = {"outpaint": 0.5, "uncrop": 0.25}


def is_region(text: str) -> bool:
    """Whether `text` begins with one of the words that `region` knows."""
    return text.partition(":")[0] in _FORMS


def region(text: str, high: int, wide: int) -> np.ndarray:
    """Pixel mask (H, W) of a region in words.

    `inpaint:x,y,w,h`: a rectangle of w x h pixels whose upper left one is (x, y), column and row from 0; without
    numbers the central half by half. `outpaint:fraction`, `uncrop:fraction`: all but a central rectangle that keeps
    this share of each side (0.5 and 0.25: an uncropped picture is mostly new).
    Raises: UserError for another word, or numbers that hide nothing or lie outside of the picture.
    """
    word, colon, numbers = text.partition(":")
    if word not in _FORMS:
        near = difflib.get_close_matches(word, [*_FORMS, "alpha"], 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"region {text}: is not known; {hint}give {', '.join(_FORMS.values())}, alpha, or a mask's file"
        )
    if word == "inpaint":
        left, top, across, down = _rectangle(text, numbers) if colon else _central(0.5, high, wide)
        if left < 0 or top < 0 or left + across > wide or top + down > high:
            raise UserError(f"region {text}: reaches out of the picture, which has {wide} x {high} pixels")
    else:
        fraction = _fraction(text, numbers) if colon else _KEPT[word]
        left, top, across, down = _central(fraction, high, wide)
    inside = np.zeros((high, wide), bool)
    inside[top : top + down, left : left + across] = True
    mask = inside if word == "inpaint" else ~inside
    if not mask.any():
        raise UserError(f"region {text}: is empty, there is nothing to fill; as {_FORMS[word]}")
    if word != "inpaint" and mask.all():
        raise UserError(f"region {text}: keeps no pixel of {wide} x {high}; give a larger fraction")
    return mask


def token_mask(mask, factor: int):
    """Which tokens a pixel mask hides: bool (..., H, W) -> (..., H / factor, W / factor), numpy or torch.

    A token is hidden if any of its pixels is: one that stays was made of known pixels only (up to the reach of the
    tokenizer's convolutions).
    """
    *lead, high, wide = mask.shape
    return mask.reshape(*lead, high // factor, factor, wide // factor, factor).any(-1).any(-2)


def shares(mask: np.ndarray, feather: int) -> np.ndarray:
    """How much of the new picture each pixel takes: float64 (H, W), the rest is the original's.

    0 at known pixels; within the region min(1, d / (feather + 1)), with d the distance to the nearest known pixel (1
    beside it): the border is blended inwards only, over `feather` pixels. A region thinner than twice that is nowhere
    wholly new.
    """
    if mask.all():
        return np.ones(mask.shape)
    from scipy.ndimage import distance_transform_edt  # takes a while to import

    return np.minimum(1, distance_transform_edt(mask) / (feather + 1))


def _rectangle(text: str, numbers: str) -> list[int]:
    try:
        left, top, across, down = (int(number) for number in numbers.split(","))
    except ValueError:
        raise UserError(f"region {text}: must be four whole numbers of pixels, as {_FORMS['inpaint']}") from None
    if across < 1 or down < 1:
        raise UserError(f"region {text}: is empty, width and height must be at least 1")
    return [left, top, across, down]


def _fraction(text: str, number: str) -> float:
    try:
        fraction = float(number)
    except ValueError:
        fraction = 0
    if not 0 < fraction < 1:
        raise UserError(f"region {text}: the fraction, the share of each side that is kept, must be between 0 and 1")
    return fraction


def _central(fraction: float, high: int, wide: int) -> tuple[int, int, int, int]:
    """(x, y, width, height) of a central rectangle."""
    down, across = round(fraction * high), round(fraction * wide)
    return (wide - across) // 2, (high - down) // 2, across, down
