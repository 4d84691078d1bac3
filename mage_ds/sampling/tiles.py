"""Which pictures are computed together, and by whom.

Float results depend on the batch, so a picture is always computed in the same company: tile k holds the
indices [k B, (k + 1) B), whole even where fewer pictures are wanted. Any number of workers then makes the same
files.
"""

import numpy as np


def tiles(num: int, batch: int) -> list[np.ndarray]:
    """Index arrays int64 (batch,) that cover 0..num-1; the last may run past `num` (its padding)."""
    return [np.arange(start, start + batch) for start in range(0, num, batch)]


def mine(tiles: list, rank: int, world: int) -> list:
    """The tiles of one worker: every world-th."""
    return tiles[rank::world]
