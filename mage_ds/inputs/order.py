"""The global order of samples: position k of the endless stream is one sample of one epoch, for every world size."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from mage_ds import keyed


@lru_cache(maxsize=2)  # a batch may span two epochs; ImageNet's permutation is 10 MB
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    order = keyed.permutation(seed, "order", epoch, n)
    order.flags.writeable = False
    return order


def sample_at(position, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples at positions of the stream over a data set of n samples.

    Args: position: int array (B,), >= 0. Returns: (epoch, index), int64 (B,) each; every run of n positions that
    starts at a multiple of n holds every index exactly once.
    """
    position = np.atleast_1d(np.asarray(position, dtype=np.int64))
    epoch, place = np.divmod(position, n)
    index = np.empty_like(place)
    for one in np.unique(epoch):
        rows = epoch == one
        index[rows] = _permutation(seed, int(one), n)[place[rows]]
    return epoch, index


def plans(n, *, seed, position, batch, micro_batch, rank, world) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless (epoch, index) of this rank's micro-batches; step s covers positions [position + s * batch, + batch).

    Micro-batch a of a step holds the positions from (a * world + rank) * micro_batch of it.
    Raises: ValueError where the batch does not divide.
    """
    if batch % (micro_batch * world):
        raise ValueError(f"batch {batch} is not a multiple of micro batch {micro_batch} x world {world}")
    return _plans(n, seed, position, batch, micro_batch, rank, world)


def _plans(n, seed, position, batch, micro_batch, rank, world):
    while True:
        for first in range(position + rank * micro_batch, position + batch, micro_batch * world):
            yield sample_at(np.arange(first, first + micro_batch), n, seed)
        position += batch
