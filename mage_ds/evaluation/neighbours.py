"""The nearest real pictures of samples in feature space: which are copies, and which lie where no real picture does?"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

K = 3  # real pictures that are looked for; the distance to the last of them stands for density
_BLOCK = 1024  # samples that are compared at once
_ROWS = 8192  # with so many real pictures at least: products of larger matrices are faster
_SPARE = 3  # candidates of a float32 product that are measured exactly, beyond those that are wanted


class Nearest(NamedTuple):
    """Of each sample the k nearest real pictures, the nearest first: distances float64 (n, k), index int64 (n, k)."""

    distances: np.ndarray
    index: np.ndarray


def nearest(
    samples: np.ndarray, real: Iterable[tuple], k: int = K, itself: np.ndarray | None = None, advance=None
) -> Nearest:
    """Args: samples: float32 (n, D); real: chunks of (index int64 (B,), features float32 (B, D)); itself: int64 (n,),
    the index that a sample has among the real pictures, where it is one of them: it is no neighbour of its own;
    advance(real pictures): called as they are done.

    Candidates come from float32 products, the distances from float64 differences: so that copies have distance 0.
    Memory: 8 K a sample, and 100 MB.
    """
    n = len(samples)
    found = Nearest(np.full((n, k), np.inf), np.full((n, k), -1, dtype=np.int64))
    middle = samples.mean(axis=0, dtype=np.float64).astype(np.float32) if n else 0  # products of small numbers
    centred = torch.from_numpy(np.asarray(samples - middle, dtype=np.float32))
    for index, rows in _grouped(real):
        other = torch.from_numpy(np.asarray(rows - middle, dtype=np.float32))
        lengths = other.square().sum(1)
        for at in range(0, n, _BLOCK):
            block = centred[at : at + _BLOCK]
            near = (lengths - 2 * block @ other.T).topk(min(k + _SPARE, len(rows)), largest=False).indices.numpy()
            apart = np.asarray(samples[at : at + _BLOCK, None], dtype=np.float64) - rows[near]
            distances, names = np.sqrt(np.square(apart).sum(2)), index[near]
            if itself is not None:
                distances[names == itself[at : at + _BLOCK, None]] = np.inf
            _merge(found, slice(at, at + len(block)), distances, names)
        if advance:
            advance(len(rows))
    return found


def _grouped(real: Iterable[tuple]):
    """The same chunks, in larger ones."""
    held: list[tuple] = []
    for chunk in real:
        held.append(chunk)
        if sum(len(index) for index, _ in held) >= _ROWS:
            yield tuple(np.concatenate(parts) for parts in zip(*held, strict=True))
            held = []
    if held:
        yield tuple(np.concatenate(parts) for parts in zip(*held, strict=True))


def _merge(found: Nearest, part: slice, distances: np.ndarray, names: np.ndarray) -> None:
    distances = np.concatenate([found.distances[part], distances], axis=1)
    names = np.concatenate([found.index[part], names], axis=1)
    # Equal distances in the order of the index, so that nothing depends on how the chunks were cut.
    order = np.lexsort((names, distances), axis=1)[:, : found.distances.shape[1]]
    found.distances[part] = np.take_along_axis(distances, order, axis=1)
    found.index[part] = np.take_along_axis(names, order, axis=1)


class Memorisation(NamedTuple):
    """share: of the samples whose nearest real picture is nearer than the median distance of a real picture to its
    nearest other one; median: that distance; n, asked: samples, real pictures that the median is taken over.

    Were samples as good as more pictures of the same kind, the share would be about a half; copies push it to 1, and so
    do samples that keep to the densest regions.
    """

    share: float
    median: float
    n: int
    asked: int


def memorised(of_samples: Nearest, of_real: Nearest) -> Memorisation:
    """of_real: of real pictures, each without itself."""
    median = float(np.median(of_real.distances[:, 0]))
    first = of_samples.distances[:, 0]
    return Memorisation(float((first < median).mean()), median, len(first), len(of_real.distances))


def by_density(found: Nearest) -> np.ndarray:
    """int64 (n,): samples in order, those in the densest region of real pictures first."""
    return np.argsort(found.distances[:, -1], kind="stable")
