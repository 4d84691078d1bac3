"""What people give a model: pictures (PIL, numpy, torch, DLPack) -> tensors, one picture at a time; and numbers."""

import math
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mage_ds.errors import UserError

_HAIR = 1e-3  # how far float arithmetic may carry a value out of [0, 1]; a quarter of an 8-bit level
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


def pictures(given) -> tuple[int | None, Iterator[Tensor]]:
    """How many pictures these are (None: an iterator does not say), and each as uint8 or float in [0, 1], (3, H, W).

    Args: given: one picture, a batch, or any iterable of pictures, which is read no further than it is used. A picture
    is a PIL image (EXIF orientation applied, transparency on white), or a tensor, numpy array or DLPack object with
    its colours on the first or last axis, uint8 in 0..255 or floating in [0, 1]; such arrays may have an axis of
    pictures in front.
    Raises: UserError for anything else, when the picture's turn comes.
    """
    if isinstance(given, str | bytes | Path):
        raise UserError(f"{given!r}: a picture is needed, not its name; open it: PIL.Image.open({given!r})")
    if isinstance(given, Image.Image):
        given = [given]
    elif isinstance(given, Tensor | np.ndarray) or hasattr(given, "__dlpack__"):
        given = given if isinstance(given, np.ndarray) else tensor(given, "pictures")
        if given.ndim not in (3, 4):
            raise UserError(f"pictures of shape {tuple(given.shape)}: must be (B, 3, H, W) or (B, H, W, 3)")
        given = given[None] if given.ndim == 3 else given
    elif not isinstance(given, Iterable) or isinstance(given, dict):
        raise UserError(f"{type(given).__name__}: no pictures; give a tensor, a numpy array, or a list of PIL images")
    count = len(given) if hasattr(given, "__len__") else None
    return count, (_picture(each, f"picture {i}") for i, each in enumerate(given))


def tensor(given, name: str) -> Tensor:
    """Tokens, a mask or a picture out of a tensor, numpy array (uint16 and memory maps too), DLPack object or nested
    list. Raises UserError with `name` for anything else."""
    try:
        if isinstance(given, np.ndarray):
            return torch.from_numpy(np.array(given, order="C"))
        if not isinstance(given, Tensor) and hasattr(given, "__dlpack__"):
            given = torch.from_dlpack(given)
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError, BufferError) as error:  # ragged, None, objects, dates
        why = str(error).partition("\n")[0]
        raise UserError(f"{name}: a {type(given).__name__} that makes no tensor ({why})") from None
    if found.layout != torch.strided or found.is_nested or found.is_meta:
        raise UserError(f"{name}: is a sparse, nested or meta tensor; give a plain one: x.to_dense()")
    return found


def whole(name: str, value, low: int) -> int:
    """A whole number from `low` on, numpy's too; UserError for anything else."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise UserError(f"{name} {brief(value)}: must be a whole number, at least {low}")
    return int(value)


def real(name: str, value, low: float) -> float:
    """A finite number from `low` on, numpy's too; UserError for anything else."""
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= value < math.inf:
        raise UserError(f"{name} {brief(value)}: must be a finite number of at least {low}")
    return float(value)


def numbers(name: str, given, count: int) -> Tensor:
    """int64 (count,): one whole number for all of `count` pictures, or one for each. UserError for anything else."""
    found = tensor(given, name)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.ndim > 1:
        raise UserError(f"{name} {brief(given)}: must be one whole number, or one for each picture")
    if found.ndim and len(found) != count:
        raise UserError(f"{name}: {len(found)} are given for {count} picture(s)")
    return found.cpu().to(torch.int64).expand(count)


def brief(value) -> str:
    """Anything, in a line of a message."""
    return " ".join(repr(value).split())[:60]


def _picture(given, name: str) -> Tensor:
    if isinstance(given, Image.Image):
        given = upright(given, name)
    if not isinstance(given, Tensor | np.ndarray) and not hasattr(given, "__dlpack__"):
        raise UserError(f"{name}: is a {type(given).__name__}; give a PIL image, a numpy array or a tensor")
    x = tensor(given, name)
    if x.ndim != 3 or 3 not in (x.shape[0], x.shape[2]) or not x.numel():
        raise UserError(f"{name}: has shape {tuple(x.shape)}; must be (3, H, W) or (H, W, 3), three colours")
    x = x if x.shape[0] == 3 else x.movedim(2, 0)
    if x.is_floating_point():
        _in_range(x, name)
    elif x.dtype != torch.uint8:
        kind = str(x.dtype).removeprefix("torch.")
        raise UserError(f"{name}: is {kind}; give uint8 (0 to 255) or floating point (0 to 1)")
    return x


def upright(image: Image.Image, name: str) -> np.ndarray:
    """uint8 (H, W, 3) of a PIL image: EXIF orientation applied, transparency on white. UserError with its `name`."""
    if image.mode not in _MODES:
        raise UserError(f"{name}: is of PIL's mode {image.mode}, whose scale is not known; convert it to RGB")
    try:
        image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name}: cannot be read ({error}); leave it out") from None


def _in_range(x: Tensor, name: str) -> None:
    low, high = (float(value) for value in x.aminmax())
    if low >= -_HAIR and high <= 1 + _HAIR:
        return
    if low != low or high != high:
        remedy = "it holds NaN"
    elif low >= 0 and 2 < high <= 255:
        remedy = "it looks like 0 to 255: divide by 255, or give uint8"
    elif -1.001 <= low < -0.5 and high <= 1.001:
        remedy = "it looks like -1 to 1: (x + 1) / 2"
    else:
        remedy = "no mean and deviation is taken off for this model; after a bicubic resize: x.clamp(0, 1)"
    raise UserError(f"{name}: values from {low:.4g} to {high:.4g}, must be from 0 (black) to 1 (white); {remedy}")
