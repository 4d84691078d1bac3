"""How sure an FID is, and what it would be of endlessly many pictures.

The interval is the infinitesimal jackknife's (the delta method): by how much each picture moves the FID is known in
closed form, and the spread of that over the pictures is the standard error. It needs one more pass over the features
and no second FID, and the difference of two FIDs of the same seeds has its own error, from the difference picture by
picture. It holds for FIDs of n pictures each, whose mean lies above the FID of endlessly many: see `infinity`. The
reference counts as given, as it does in everybody's figures.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from mage_ds import keyed
from mage_ds.evaluation.moments import Collected, Few, Gaussian, frechet, more_than_rounding, root_of

ENOUGH = 10_000  # pictures: an FID of fewer is too high by a share that matters
SIZES = 15  # subsets of `infinity`, as published
_LEAST = 20  # pictures that `infinity` needs


def collected(chunks: Iterable[np.ndarray], dimensions: int) -> Gaussian | Few:
    """Of features (B, D) each, in one pass. Memory: a chunk and 16 D^2 bytes. ValueError for fewer than 2."""
    found = Collected(dimensions)
    for features in chunks:
        found.add(torch.from_numpy(np.asarray(features)))
    return found.gaussian()


def influence(
    chunks: Iterable[np.ndarray], sample: Gaussian | Few, reference: Gaussian | Few, root: torch.Tensor | None = None
) -> np.ndarray:
    """float64 (n,): n times what each picture adds to the FID of `sample`, to first order; the mean is 0.

    With z = x - m, B = R R^T and M = R^T A R it is 2 (m - m_ref) z + |z|^2 - z^T R M^(-1/2) R^T z, without its mean:
    the derivative of the distance along a step of (m, A) towards the picture.

    Args: chunks: the features (B, D) that `sample` was collected from; root: `moments.root_of(reference)`, if known.
    Memory: a chunk and 40 D^2 bytes (170 MB at D = 2048).
    """
    root = root_of(reference) if root is None else root
    if isinstance(sample, Few):
        inner = (sample.root @ root).T @ (sample.root @ root)
    else:
        inner = root.T @ sample.covariance @ root
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    kept = more_than_rounding(values)
    halfway = root @ (vectors[:, kept] * values[kept] ** -0.25)
    found = []
    for features in chunks:
        z = torch.from_numpy(np.asarray(features)).double() - sample.mean
        along = 2 * z @ (sample.mean - reference.mean)
        found.append((along + z.square().sum(1) - (z @ halfway).square().sum(1)).numpy())
    each = np.concatenate(found)
    return each - each.mean()


def standard_error(influences: np.ndarray) -> float:
    """Of an FID, from `influence` (n,). Of the difference of two FIDs with the same seeds, from the difference of
    theirs."""
    return float(np.std(influences, ddof=1) / math.sqrt(len(influences)))


class Infinity(NamedTuple):
    """value: the FID of endlessly many pictures; error: its standard error; slope: value + slope / N is the line;
    sizes, fids: the points that it was fitted to."""

    value: float
    error: float
    slope: float
    sizes: list[int]
    fids: list[float]


def infinity(
    chunks: Iterable[np.ndarray],
    n: int,
    reference: Gaussian | Few,
    error: float,
    *,
    seed: int = 0,
    root: torch.Tensor | None = None,
    advance=None,
) -> Infinity:
    """FID-infinity (Chong and Forsyth 2020): FIDs of 15 random subsets of n/10 to n pictures, a line in 1/N, its
    value at 0. Every subset holds the smaller ones, so that one pass and one eigenvalue problem each are enough.

    Args: chunks: features (B, D) of pictures 0 to n - 1 in order; error: standard error of the FID of all n
    (`standard_error`), which is carried to the line's end, by how often each picture counts in it; seed: which pictures
    are in which subset; advance(1): called after each FID.
    Memory: a chunk and 130 D^2 bytes (0.55 GB at D = 2048), however large n is.
    Raises: ValueError for fewer than 20 pictures, or another number than n.
    """
    if n < _LEAST:
        raise ValueError(f"{n} pictures: FID-infinity needs {_LEAST}")
    sizes = np.linspace(n / 10, n, SIZES).round().astype(int)
    rank = np.empty(n, dtype=np.int64)
    rank[keyed.permutation(seed, "fid-infinity", 0, n)] = np.arange(n)
    ring = np.searchsorted(sizes, rank, side="right")  # the smallest subset that a picture is in
    parts, at = [Collected(len(reference.mean)) for _ in sizes], 0
    for features in chunks:
        features = torch.from_numpy(np.asarray(features))
        here = ring[at : at + len(features)]
        at += len(features)
        for k in np.unique(here):
            parts[k].add(features[torch.from_numpy(here == k)])
    if at != n:
        raise ValueError(f"{at} pictures, not {n}")
    if root is None and not isinstance(reference, Few):
        root = root_of(reference)
    whole, fids = Collected(len(reference.mean)), []
    for k in range(SIZES):
        whole.merge(parts[k])
        parts[k] = None
        fids.append(frechet(whole.gaussian(), reference, root))
        if advance:
            advance(1)
    weights = np.linalg.pinv(np.stack([np.ones(SIZES), 1 / sizes], axis=1))
    value, slope = weights @ np.array(fids)
    # Each FID is a mean over its pictures, to first order, so the line's end is a weighted sum over all pictures; what
    # is not of first order shows as distance of the points from the line.
    counted = np.cumsum((weights[0] / sizes)[::-1])[::-1]  # of a picture of each ring
    carried = error**2 * n * float((np.bincount(ring, minlength=SIZES) * counted**2).sum())
    around = np.square(np.array(fids) - value - slope / sizes).sum() / (SIZES - 2) * np.square(weights[0]).sum()
    return Infinity(float(value), math.sqrt(carried + around), float(slope), sizes.tolist(), fids)


def remarks(n: int, width: int, value: float, infinite: Infinity | None = None) -> list[str]:
    """What a reader of an FID `value` of n pictures, of features of this width, must know: a line each, or none."""
    lines = []
    if n < ENOUGH:
        how = "set it beside FIDs of as many pictures only"
        if infinite is not None:
            how = f"about {value - infinite.value:.3g} of it is that (FID-infinity {infinite.value:.4g}); {how}"
        lines.append(f"FID {value:.4g} of {n:,} pictures is biased upwards (fewer than {ENOUGH:,}): {how}")
    if n <= width:
        lines.append(f"{n:,} pictures for {width:,} features: most directions were never seen; KID says more")
    elif infinite is not None and n < 10 * width:
        lines.append(
            f"FID-infinity of {n:,} pictures is rough: its subsets begin at {infinite.sizes[0]:,}, fewer than the "
            f"{width:,} features, where FID does not lie on a line"
        )
    return lines
