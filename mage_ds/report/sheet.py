"""The picture sheet beside a score: samples as they come, their nearest real pictures, the best and the worst.

Figures say how far two sets are apart; whether the samples are copies, and of what the distance is made, is seen.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mage_ds.report import grids

COLUMNS = 8  # pictures of a row
RANDOM = 32  # samples shown as they come
NEAREST = 3  # real pictures beneath a sample


def save(
    path: Path,
    *,
    random: np.ndarray,
    best: tuple[np.ndarray, Sequence[str]] | None = None,
    worst: tuple[np.ndarray, Sequence[str]] | None = None,
    samples: np.ndarray | None = None,
    nearest: Sequence[tuple[np.ndarray, Sequence[str]]] = (),
) -> None:
    """Writes the sheet as PNG, whole or not at all. Pictures are uint8 (n, H, W, 3) of one size, n <= COLUMNS but for
    `random`; shorter rows are filled with white.

    Args: random: any samples; best, worst: samples in dense and in empty regions of the reference, and a text for each
    (its distance to the third nearest real picture); samples: those whose neighbours follow; nearest: rows of reference
    pictures, the nearest first: what stands beneath each of `samples`, and its distance as text.
    """
    entries = [("samples" if not at else "", random[at : at + COLUMNS], None) for at in range(0, len(random), COLUMNS)]
    if samples is not None:
        entries.append(("eight of them", samples, None))
        entries += [(_NTH[i], images, texts) for i, (images, texts) in enumerate(nearest)]
    entries += [(name, *row) for name, row in (("densest", best), ("emptiest", worst)) if row is not None]
    grids.save(grids.rows([_filled(*entry) for entry in entries]), path)


_NTH = ("nearest real", "second nearest", "third nearest")


def _filled(caption: str, images: np.ndarray, texts: Sequence[str] | None) -> tuple:
    missing = COLUMNS - len(images)
    padded = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=255)
    return caption, padded, None if texts is None else [*texts, *[""] * missing]
