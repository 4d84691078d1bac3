"""Crop boxes, flips, changes of colour: numbers only, keyed by (seed, epoch, sample, view); DALI carries them out.

Random resized crop after torchvision's algorithm, `tried`, or in one draw, `clamped`, as the authors' linear probe has
it (paper.md section 4: the ranges arrive from the recipe).
"""

import numpy as np

from mage_ds import keyed

TRIES = 10  # torchvision's
UNCHANGED = (1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0)  # a row of `colours` that changes nothing
LONGEST = 8  # a whole picture longer than 8:1 is cut to its middle first: its square centre is what is looked at


def boxes(
    sizes, *, epoch, index, view: int, seed: int, augmentation, crop: str = "tried"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Part of each picture that a view shows, in pixels of the upright picture.

    Args: sizes: int (B, 2), width and height; epoch, index: int (B,); augmentation: has scale (None = the whole
    picture), ratio (width to height) and flip; crop: tried or clamped, as in a recipe.
    Returns: anchors int64 (B, 2) = left, top; shapes int64 (B, 2) = width, height; flips bool (B,).
    """
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    if augmentation.scale is None:
        anchors, shapes = whole(sizes)
    else:
        draws = keyed.uniform(seed, f"crop/{view}", index, epoch, 2 * TRIES + 2)
        cut = {"tried": _first_that_fits, "clamped": _clamped}[crop]
        anchors, shapes = cut(sizes, draws, augmentation.scale, augmentation.ratio)
    flips = np.zeros(len(sizes), dtype=bool)
    if augmentation.flip:
        flips = keyed.uniform(seed, f"flip/{view}", index, epoch)[:, 0] < 0.5
    return anchors, shapes, flips


def _first_that_fits(sizes, draws, scale, ratio):
    """First of ten tries that fits, else the largest centred box within the ratios."""
    shapes = _tries(sizes, draws, scale, ratio)
    fits = ((shapes > 0) & (shapes <= sizes[:, None])).all(axis=2)
    shapes = shapes[np.arange(len(sizes)), fits.argmax(axis=1)]
    anchors = _placed(sizes, draws, shapes)

    none = ~fits.any(axis=1)
    shapes[none] = _within(sizes[none], ratio)
    anchors[none] = (sizes[none] - shapes[none]) // 2
    return anchors, shapes


def _clamped(sizes, draws, scale, ratio):
    """The first try, cut to the picture where it is wider or taller: its ratio may then be any."""
    shapes = np.clip(_tries(sizes, draws, scale, ratio)[:, 0], 1, sizes)
    return _placed(sizes, draws, shapes), shapes


def _tries(sizes, draws, scale, ratio) -> np.ndarray:
    """Width and height of ten boxes for each picture, int64 (B, TRIES, 2); some may not fit into it."""
    area = sizes.prod(axis=1, keepdims=True) * (scale[0] + (scale[1] - scale[0]) * draws[:, :TRIES])
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * draws[:, TRIES : 2 * TRIES])
    return np.rint(np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], axis=2)).astype(np.int64)


def _placed(sizes, draws, shapes) -> np.ndarray:
    """Left and top, int64 (B, 2), of boxes (B, 2), each place within the picture as likely as another."""
    return np.floor(draws[:, 2 * TRIES :] * (sizes - shapes + 1)).astype(np.int64)


def _within(sizes, ratio) -> np.ndarray:
    """Largest boxes (B, 2) in pictures (B, 2) whose width to height lies within the ratios."""
    width = np.minimum(sizes[:, 0], np.rint(sizes[:, 1] * ratio[1]))
    height = np.minimum(sizes[:, 1], np.rint(sizes[:, 0] / ratio[0]))
    return np.maximum(np.stack([width, height], axis=1), 1).astype(np.int64)


def whole(sizes) -> tuple[np.ndarray, np.ndarray]:
    """The whole picture: anchors and shapes, int64 (B, 2); very long ones lose their ends."""
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    shapes = np.minimum(sizes, LONGEST * sizes.min(axis=1, keepdims=True))
    return (sizes - shapes) // 2, shapes


def centre(shapes, resize: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Short side to `resize`, then the centre of size x size, with torchvision's rounding.

    Args: shapes: int (B, 2), width and height. Returns: resized int64 (B, 2) = width, height; start int64 (B, 2) =
    left, top of the square in the resized picture.
    """
    shapes = np.asarray(shapes, dtype=np.int64).reshape(-1, 2)
    resized = resize * shapes // shapes.min(axis=1, keepdims=True)
    return resized, np.rint((resized - size) / 2).astype(np.int64)


def colours(colour, size: int, *, epoch, index, view: int = 0, seed: int = 0) -> np.ndarray:
    """SimCLR's changes of colour of each picture of a view, for `dali_colour`.

    The order of jitter is fixed, brightness, contrast, saturation, hue, as SimCLR's paper writes it down; torchvision
    draws one for each picture, which in a graph for all pictures would be 24 graphs.

    Args: colour: the recipe's section, None: nothing changes; size: side of the pictures; epoch, index: int (B,).
    Returns: float64 (B, 7): factors of brightness, contrast and saturation; turn of the hue, in circles; share of
    colour that stays, 0 or 1; the blur's sigma and its window, in pixels, 1 where there is none.
    """
    rows = np.tile(np.array(UNCHANGED), (len(index), 1))
    if colour is None:
        return rows
    draws = keyed.uniform(seed, f"colour/{view}", index, epoch, 8)
    ranges = np.array([colour.brightness, colour.contrast, colour.saturation, colour.hue])
    jitter, grey, blur = (draws[:, 4:7] < [colour.jitter, colour.grey, colour.blur]).T
    rows[jitter, :4] += ((2 * draws[:, :4] - 1) * ranges)[jitter]
    rows[grey, 4] = 0.0
    low, high = colour.sigma
    rows[blur, 5] = (low + (high - low) * draws[:, 7])[blur]
    # SimCLR's window is a tenth of the picture; what of it lies beyond 4 sigma weighs 1e-4 and would cost time.
    radius = np.minimum(max(1, size // 10 // 2), np.ceil(4 * rows[:, 5]))
    rows[blur, 6] = (2 * radius + 1)[blur]
    return rows
