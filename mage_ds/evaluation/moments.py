"""Mean and covariance of a stream of feature vectors, and the Frechet distance of two such (FID, rFID).

Everything is float64: sums in float32 would show in the third digit of an FID (and bf16 features in the first).
"""

from typing import NamedTuple

import torch
from torch import Tensor


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


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)), 0 or more.

    The last term comes from the eigenvalues of R^T B R with A = R R^T, which are real and >= 0. Those of A that are
    rounding only are left out: so it stays exact where a covariance is singular (fewer vectors than dimensions),
    which makes a matrix square root of A B fail.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    kept = _more_than_rounding(values)
    root = vectors[:, kept] * values[kept].sqrt()
    inner = root.T @ b.covariance @ root
    values = torch.linalg.eigvalsh((inner + inner.T) / 2)
    crossed = values[_more_than_rounding(values)].sqrt().sum()
    apart = (a.mean - b.mean).square().sum()
    return max(0.0, float(apart + a.covariance.trace() + b.covariance.trace() - 2 * crossed))


def _more_than_rounding(values: Tensor) -> Tensor:
    least = torch.finfo(values.dtype).eps * len(values)
    return values > (values.max() * least if len(values) else 0.0)
