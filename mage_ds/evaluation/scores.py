"""Inception Score, KID, precision and recall of features, as torch-fidelity 0.4 defines them, or ADM's evaluator.

Sums are float64. Where ADM's evaluator (guided-diffusion's `evaluator.py`) differs:
- IS: its splits are contiguous runs of 5,000 pictures, not 10 of shuffled ones: files sorted by class score too low.
- precision and recall: the same definition, on squared distances in float16 (three digits), so that many are equal.
  Here they are rounded where it rounds them; its sums are the device's, so single pictures may still differ.
  Its reference has 10,000 pictures, and both figures depend on that number.
- KID: it has none.
"""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from mage_ds import keyed
from mage_ds.errors import UserError

SEED = 2020  # torch-fidelity's, of the IS shuffle and of KID's subsets
SPLITS, SUBSETS, SUBSET, K = 10, 100, 1000, 3  # its other values
ADM_SPLIT = 5000  # pictures
_LEAST_BLOCKS = 10  # of `kid_error`: from fewer no error can be told
_ROWS, _COLUMNS = 1024, 8192  # samples that are compared at once at most, with so many others


# --- Inception Score


class Splits:
    """Sums of an Inception Score: `total` float64 (splits, C + 2) adds up over batches and over processes. A row holds
    of a split's pictures sum p (C,), sum of sum p log p, and the number, with p the softmax of the logits."""

    def __init__(self, n: int, classes: int, definition: str = "torch-fidelity", splits: int = SPLITS):
        """n: pictures in all, which decides what split a picture is in; definition: torch-fidelity (`splits` of
        shuffled pictures) or adm (as many contiguous ones of 5,000 as there are)."""
        self.split = split_of(n, definition, splits)
        self.total = np.zeros((int(self.split.max(initial=0)) + 1, classes + 2))

    def add(self, index: np.ndarray, logits: np.ndarray) -> None:
        """index int64 (B,): which pictures; logits (B, C), without bias."""
        logs = torch.from_numpy(np.asarray(logits)).double().log_softmax(1)
        p = logs.exp()
        rows = torch.cat([p, (p * logs).sum(1, keepdim=True), torch.ones(len(p), 1).double()], dim=1).numpy()
        split = self.split[index]
        for each in np.unique(split):
            self.total[each] += rows[split == each].sum(axis=0)

    def score(self) -> tuple[float, float]:
        """Mean and (population) standard deviation over the splits. NaN while a split has no picture."""
        count = self.total[:, -1:]
        mean = self.total[:, :-2] / np.where(count, count, np.nan)
        entropy = torch.special.entr(torch.from_numpy(mean)).sum(1).numpy()
        scores = np.exp(self.total[:, -2] / count[:, 0].clip(1) + entropy)
        return float(scores.mean()), float(scores.std())


def split_of(n: int, definition: str = "torch-fidelity", splits: int = SPLITS) -> np.ndarray:
    """The split of each picture, int64 (n,)."""
    if definition == "adm":
        return np.arange(n) // ADM_SPLIT
    found = np.empty(n, dtype=np.int64)
    found[np.random.RandomState(SEED).permutation(n)] = np.searchsorted(
        [(i + 1) * n // splits for i in range(splits)], np.arange(n), side="right"
    )
    return found


def inception_score(
    chunks: Iterable[np.ndarray], n: int, definition: str = "torch-fidelity", splits: int = SPLITS
) -> tuple[float, float]:
    """Mean and standard deviation over the splits, of logits (B, C) of pictures 0 to n - 1 in order.

    Memory: a chunk and its probabilities in float64. Raises: UserError for fewer pictures than splits.
    """
    if n < splits and definition != "adm":
        raise UserError(f"IS of {n} pictures in {splits} splits: give {splits} pictures or more")
    sums, at = None, 0
    for logits in chunks:
        sums = sums or Splits(n, logits.shape[1], definition, splits)
        sums.add(np.arange(at, at + len(logits)), logits)
        at += len(logits)
    if at != n:
        raise ValueError(f"{at} pictures, not {n}")
    return sums.score()


# --- KID


class Kid(NamedTuple):
    """mean, std: over torch-fidelity's subsets, which share pictures: std says nothing of the mean's error; error: the
    mean's standard error, of disjoint blocks; blocks: how many, of `size` pictures or fewer."""

    mean: float
    std: float
    error: float
    blocks: int


def kid(
    a: np.ndarray, b: np.ndarray, subsets: int = SUBSETS, size: int = SUBSET, seed: int = SEED, advance=None
) -> Kid:
    """Kernel Inception Distance: unbiased, kernel (x y / D + 1)^3, mean over random subsets, drawn as torch-fidelity
    draws them.

    Args: a, b: samples, reference (n, D), arrays or memory maps; size: pictures of a subset; advance(1): called after
    each. Memory: 32 MB of kernel values and two subsets in float64 (65 MB at 1,000 of 2048).
    Raises: UserError where a set has fewer than `size` pictures.
    """
    if min(len(a), len(b)) < size:
        raise UserError(
            f"KID in subsets of {size:,} pictures: there are {len(a):,} and {len(b):,}; give --kid-subset "
            f"{min(len(a), len(b))} or less"
        )
    draw, found = np.random.RandomState(seed), []
    for _ in range(subsets):
        mine = a[draw.choice(len(a), size, replace=False)]
        found.append(_mmd(mine, b[draw.choice(len(b), size, replace=False)]))
        if advance:
            advance(1)
    error, blocks = kid_error(a, b, size)
    return Kid(float(np.mean(found)), float(np.std(found)), error, blocks)


def kid_error(a: np.ndarray, b: np.ndarray, size: int = SUBSET, seed: int = 0) -> tuple[float, int]:
    """Standard error, and the number of disjoint random blocks of both sets that it comes from: the spread of their own
    KIDs over the root of their number. Blocks have `size` pictures, or fewer, so that there are 10; NaN where one
    would have fewer than 2. It errs upwards: the mean over overlapping subsets uses more pairs of pictures."""
    n, names = min(len(a), len(b)), (("a", len(a)), ("b", len(b)))
    blocks = max(_LEAST_BLOCKS, n // size)
    if n // blocks < 2:
        return math.nan, blocks
    parts = (np.array_split(keyed.permutation(seed, f"kid {who}", 0, count), blocks) for who, count in names)
    found = [_mmd(a[np.sort(i[:size])], b[np.sort(j[:size])]) for i, j in zip(*parts, strict=True)]
    return float(np.std(found, ddof=1) / math.sqrt(blocks)), blocks


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KID's, (x y / D + 1)^3 of each pair: float64 (n, D), (m, D) -> (n, m)."""
    values = x @ y.T
    values /= x.shape[1]
    values += 1
    cubes = values * values  # half the time of a power
    cubes *= values
    return cubes


def _mmd(x: np.ndarray, y: np.ndarray) -> float:
    x, y = (np.asarray(each, dtype=np.float64) for each in (x, y))
    (n, width), m = x.shape, len(y)
    within = [kernel(each, each).sum() - ((np.square(each).sum(axis=1) / width + 1) ** 3).sum() for each in (x, y)]
    across = kernel(x, y).sum()
    return float(within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * across / (n * m))


# --- precision and recall


def precision_recall(
    a: np.ndarray, b: np.ndarray, k: int = K, definition: str = "torch-fidelity", advance=None
) -> tuple[float, float]:
    """Shares of the samples `a` within a ball of the reference `b`, and the reverse (Kynkaanniemi et al. 2019).

    A ball reaches from a picture to its k-th neighbour in its own set. The distances are torch-fidelity's, in float32,
    so that the same pictures count; definition "adm": see the head of this file.

    Args: a, b: float32 (n, D), arrays or memory maps; advance(1): called after each block of up to 1,024 pictures, of
    a, b, and a again. Memory: 200 MB and a block's features (75 MB at D = 2048), for any number of pictures.
    Raises: UserError for k pictures or fewer.
    """
    if min(len(a), len(b)) <= k:
        raise UserError(f"precision and recall with k = {k}: there are {len(a)} and {len(b)} pictures; give {k + 1}")
    apart = _half if definition == "adm" else torch.cdist
    radius_a, radius_b = (_radii(each, k, apart, advance) for each in (a, b))
    in_b, in_a = np.zeros(len(a), dtype=bool), np.zeros(len(b), dtype=bool)
    for mine in _blocks(len(a), _ROWS):
        for theirs in _blocks(len(b), _COLUMNS):
            distances = apart(_tensor(a[mine]), _tensor(b[theirs]))
            in_b[mine] |= (distances <= radius_b[theirs]).any(1).numpy()
            in_a[theirs] |= (distances <= radius_a[mine, None]).any(0).numpy()
        if advance:
            advance(1)
    return float(in_b.mean()), float(in_a.mean())


def steps(n: int, m: int) -> int:
    """How often `precision_recall` of n samples and m others advances."""
    return 2 * len(_blocks(n, _ROWS)) + len(_blocks(m, _ROWS))


def _radii(x: np.ndarray, k: int, apart, advance) -> torch.Tensor:
    """float32 (n,): distance of each to its k-th neighbour; itself is the 0th, at whatever rounding makes of it."""
    found = []
    for rows in _blocks(len(x), _ROWS):
        best = torch.empty(rows.stop - rows.start, 0)
        for columns in _blocks(len(x), _COLUMNS):
            best = torch.cat([best, apart(_tensor(x[rows]), _tensor(x[columns]))], dim=1)
            best = best.topk(min(k + 1, best.shape[1]), largest=False).values
        found.append(best[:, k])
        if advance:
            advance(1)
    return torch.cat(found)


def _blocks(n: int, most: int) -> list[slice]:
    """Of even sizes: a product of a few rows only takes another way, which rounds differently."""
    edges = np.linspace(0, n, -(-n // most) + 1).round().astype(int).tolist()
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x, dtype=np.float32))


def _half(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Squared distances (n, m), float32, each step's result rounded to float16; unrounded where one is out of range."""

    def apart(rounded):
        one, other = rounded(p), rounded(q)
        n, m = (rounded(rounded(each.square()).sum(1)) for each in (one, other))
        return rounded(rounded(n[:, None] - 2 * rounded(one @ other.T)) + m).clamp(min=0)

    found = apart(lambda value: value.half().float())
    return found if found.isfinite().all() else apart(lambda value: value)
