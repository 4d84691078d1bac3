"""Mean and covariance of a stream of feature vectors, and the Frechet distance of two such (FID, rFID).

Everything is float64: sums in float32 would show in the third digit of an FID (and bf16 features in the first).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_SMALL = 1024  # rank: up to it singular values are as fast as eigenvalues
_BLOCKS = 4  # a block has so small a share of as many vectors as there are dimensions
_LEAST_PIVOT = 1e-9  # of the largest: with less a covariance counts as singular, and its Cholesky factor as inexact


class Gaussian(NamedTuple):
    """mean float64 (D,), covariance float64 (D, D) with n - 1 in the denominator."""

    mean: Tensor
    covariance: Tensor


class Moments:
    """Sums of D-dimensional vectors in one float64 tensor: `total`, which adds up over batches and over ranks."""

    def __init__(self, dimensions: int, device="cpu"):
        # A row for each dimension: sums of products, then the sum; and below it the sums again, and the number.
        self.total = torch.zeros(dimensions + 1, dimensions + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """features (B, D), of any B."""
        rows = torch.cat([features.double(), features.new_ones(len(features), 1).double()], dim=1)
        self.total.addmm_(rows.T, rows)

    @property
    def n(self) -> int:
        return round(float(self.total[-1, -1]))

    def gaussian(self) -> Gaussian:
        """ValueError for fewer than 2 vectors: they have no covariance."""
        n = self.n
        if n < 2:
            raise ValueError(f"{n} vectors have no covariance")
        mean = self.total[-1, :-1] / n
        covariance = (self.total[:-1, :-1] - n * torch.outer(mean, mean)) / (n - 1)
        return Gaussian(mean, (covariance + covariance.T) / 2)


class Few(NamedTuple):
    """The same of fewer vectors than dimensions, without their covariance: n x D numbers say all.

    mean float64 (D,), root float64 (n, D): the vectors without their mean over the square root of n - 1, so that the
    covariance is root^T root.
    """

    mean: Tensor
    root: Tensor

    @property
    def covariance(self) -> Tensor:
        """float64 (D, D), of rank n - 1 at most."""
        return self.root.T @ self.root


class Collected:
    """Vectors of a stream as what a Frechet distance needs of them: the rows themselves while they are D or fewer, from
    then on their Moments, to which they are added in blocks: a product of a few rows at a time takes ten times as long.
    32 D^2 bytes at most (128 MiB at D = 2048), however many there are."""

    def __init__(self, dimensions: int):
        self.dimensions, self.n, self._held = dimensions, 0, 0
        self._rows: list[Tensor] = []
        self._moments: Moments | None = None

    def add(self, features: Tensor) -> None:
        """features (B, D), of any B."""
        self.n += len(features)
        self._held += len(features)
        self._rows.append(features.double())
        if self._held > (self.dimensions if self._moments is None else self.dimensions // _BLOCKS):
            self._sum()

    def _sum(self) -> None:
        self._moments = self._moments or Moments(self.dimensions)
        if self._rows:
            self._moments.add(torch.cat(self._rows))
        self._rows, self._held = [], 0

    def merge(self, other: "Collected") -> None:
        """Takes in the vectors of another one, which stays as it is."""
        for rows in other._rows:
            self.add(rows)
        if other._moments is not None:
            self._sum()
            self._moments.total += other._moments.total
            self.n += other.n - other._held

    def gaussian(self) -> Gaussian | Few:
        """ValueError for fewer than 2 vectors: they have no covariance."""
        if self._moments is not None:
            self._sum()
            return self._moments.gaussian()
        if self.n < 2:
            raise ValueError(f"{self.n} vectors have no covariance")
        rows = torch.cat(self._rows)
        mean = rows.mean(0)
        return Few(mean, (rows - mean) / math.sqrt(self.n - 1))


def frechet(a: Gaussian | Few, b: Gaussian | Few, root: Tensor | None = None) -> float:
    """|m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)), 0 or more.

    With A = R_a R_a^T and B likewise the last term is the nuclear norm of R_a^T R_b, which is exact where a covariance
    is singular (fewer vectors than dimensions: that makes a matrix square root of A B fail) and as small as the lesser
    rank. root: R_b, where it is known (`root_of`).
    """
    root_a, root_b = root_of(a), root_of(b) if root is None else root
    inner = root_a.T @ root_b if root_a.shape[1] <= root_b.shape[1] else root_b.T @ root_a
    if len(inner) <= _SMALL:
        crossed = torch.linalg.svdvals(inner).sum()
    else:  # a third of the time; what rounding makes of a zero is 1e-8 of the largest here
        crossed = torch.linalg.eigvalsh(inner @ inner.T).clamp(min=0).sqrt().sum()
    apart = (a.mean - b.mean).square().sum()
    return max(0.0, float(apart + _variance(a) + _variance(b) - 2 * crossed))


def root_of(b: Gaussian | Few) -> Tensor:
    """R float64 (D, r) with the covariance R R^T. Where it is singular, r is its rank: what is rounding is left out."""
    if isinstance(b, Few):
        return b.root.T
    found = torch.linalg.cholesky_ex(b.covariance)
    pivots = found.L.diagonal().square()
    if not int(found.info) and pivots.min() > _LEAST_PIVOT * pivots.max():
        return found.L
    values, vectors = torch.linalg.eigh(b.covariance)  # ten times as long, and right for any rank
    kept = more_than_rounding(values)
    return vectors[:, kept] * values[kept].sqrt()


def _variance(a: Gaussian | Few) -> Tensor:
    return a.root.square().sum() if isinstance(a, Few) else a.covariance.trace()


def more_than_rounding(values: Tensor) -> Tensor:
    """bool (D,): which eigenvalues of a covariance are not zeros that rounding has moved."""
    least = torch.finfo(values.dtype).eps * len(values)
    return values > (values.max() * least if len(values) else 0.0)
