"""Crop boxes and flips of samples: numbers only, keyed by (seed, epoch, sample, view); DALI carries them out.

Random resized crop after torchvision's algorithm (paper.md section 4: the ranges arrive from the recipe).
"""

import numpy as np

from mage_ds import keyed

TRIES = 10  # torchvision's
LONGEST = 8  # a whole picture longer than 8:1 is cut to its middle first: its square centre is what is looked at


def boxes(sizes, *, epoch, index, view: int, seed: int, augmentation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Part of each picture that a view shows, in pixels of the upright picture.

    Args: sizes: int (B, 2), width and height; epoch, index: int (B,); augmentation: has scale (None = the whole
    picture), ratio (width to height) and flip.
    Returns: anchors int64 (B, 2) = left, top; shapes int64 (B, 2) = width, height; flips bool (B,).
    """
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    if augmentation.scale is None:
        anchors, shapes = whole(sizes)
    else:
        draws = keyed.uniform(seed, f"crop/{view}", index, epoch, 2 * TRIES + 2)
        anchors, shapes = _random_resized(sizes, draws, augmentation.scale, augmentation.ratio)
    flips = np.zeros(len(sizes), dtype=bool)
    if augmentation.flip:
        flips = keyed.uniform(seed, f"flip/{view}", index, epoch)[:, 0] < 0.5
    return anchors, shapes, flips


def _random_resized(sizes, draws, scale, ratio):
    """First of ten tries that fits, else the largest centred box within the ratios."""
    width, height = sizes[:, :1], sizes[:, 1:]
    area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[:, :TRIES])
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * draws[:, TRIES : 2 * TRIES])
    wide, tall = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    rows, first = np.arange(len(sizes)), fits.argmax(axis=1)
    shapes = np.stack([wide[rows, first], tall[rows, first]], axis=1).astype(np.int64)
    anchors = np.floor(draws[:, 2 * TRIES :] * (sizes - shapes + 1)).astype(np.int64)

    none = ~fits.any(axis=1)
    shapes[none] = _within(sizes[none], ratio)
    anchors[none] = (sizes[none] - shapes[none]) // 2
    return anchors, shapes


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
