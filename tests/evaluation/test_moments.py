"""Streaming moments and the Frechet distance against numpy, scipy's square root of a matrix, and exact cases."""

import numpy as np
import pytest
import scipy.linalg
import torch

from mage_ds.evaluation.moments import Gaussian, Moments, frechet


def features(n, d, seed=0, scale=1.0):
    """Vectors with correlations and means like those of features, float64 (n, d)."""
    rng = np.random.default_rng(seed)
    return np.abs(rng.normal(size=(n, d)) @ rng.normal(size=(d, d))) * scale + 0.5


def moments(x, *splits, dtype=torch.float64):
    found = Moments(x.shape[1])
    for part in np.split(x, splits):
        found.add(torch.from_numpy(part).to(dtype))
    return found


def by_numpy(x, y):
    """With scipy's square root: for covariances of full rank."""
    (m, a), (n, b) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x, y))
    crossed = scipy.linalg.sqrtm(a @ b)
    return float(((m - n) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(crossed).real)


def by_nuclear_norm(x, y):
    """Exact for any rank: the trace term is the sum of the singular values of X1 X2^T, centred and scaled."""
    (m, p), (n, q) = ((z.mean(0), (z - z.mean(0)) / np.sqrt(len(z) - 1)) for z in (x, y))
    crossed = np.linalg.svd(p @ q.T, compute_uv=False).sum()
    return float(((m - n) ** 2).sum() + (p**2).sum() + (q**2).sum() - 2 * crossed)


def test_moments_are_those_of_numpy_in_any_order():
    x = features(500, 20)
    whole = moments(x).gaussian()
    assert np.allclose(whole.mean, x.mean(0), rtol=1e-12)
    assert np.allclose(whole.covariance, np.cov(x, rowvar=False), rtol=1e-10)
    parts = [moments(part) for part in np.split(x[::-1].copy(), [3, 100, 101])]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        merged = Moments(20)
        for i in order:
            merged.total += parts[i].total
        assert merged.n == 500
        for got, expected in zip(merged.gaussian(), whole, strict=True):
            assert torch.allclose(got, expected, rtol=1e-10)


def test_float32_features_are_summed_in_float64():
    x = features(4000, 8).astype(np.float32)
    got = moments(x, 1000, 2000, dtype=torch.float32).gaussian()
    assert np.allclose(got.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_frechet_of_full_rank():
    x, y = features(400, 30), features(300, 30, seed=1, scale=1.2)
    got = frechet(moments(x).gaussian(), moments(y).gaussian())
    assert got == pytest.approx(by_numpy(x, y), rel=1e-9)
    assert got == pytest.approx(by_nuclear_norm(x, y), rel=1e-9)
    assert got == pytest.approx(frechet(moments(y).gaussian(), moments(x).gaussian()), rel=1e-9)


@pytest.mark.parametrize("n, m", [(10, 12), (10, 500), (500, 10), (2, 2)])
def test_frechet_with_fewer_vectors_than_dimensions(n, m):
    x, y = features(n, 60), features(m, 60, seed=1)
    got = frechet(moments(x).gaussian(), moments(y).gaussian())
    assert got == pytest.approx(by_nuclear_norm(x, y), rel=1e-6)


def test_frechet_of_gaussians_that_are_known():
    eye = torch.eye(3, dtype=torch.float64)
    a, b = Gaussian(torch.zeros(3).double(), 4 * eye), Gaussian(torch.ones(3).double(), 9 * eye)
    assert frechet(a, b) == pytest.approx(3 + 3 * (2 - 3) ** 2)
    nothing = Gaussian(torch.zeros(3).double(), 0 * eye)
    assert frechet(nothing, b) == pytest.approx(3 + 27) and frechet(nothing, nothing) == 0


def test_small_directions_count():
    """Variances over twelve decades: none of them is taken for rounding, by either way to the singular values."""
    scales = np.logspace(0, -6, 60)
    x, y = features(300, 60) * scales, features(300, 60, seed=1) * scales
    assert frechet(moments(x).gaussian(), moments(y).gaussian()) == pytest.approx(by_nuclear_norm(x, y), rel=1e-8)


@pytest.mark.parametrize("n, m", [(10, 500), (100, 500), (400, 500)])
def test_both_ways_agree(n, m, monkeypatch):
    x, y = moments(features(n, 60)).gaussian(), moments(features(m, 60, seed=1)).gaussian()
    expected = frechet(x, y)
    monkeypatch.setattr("mage_ds.evaluation.moments._SMALL", 0)
    assert frechet(x, y) == pytest.approx(expected, rel=1e-7)


def test_frechet_of_equals_is_zero():
    x = moments(features(20, 60)).gaussian()
    assert 0 <= frechet(x, x) < 1e-6 * float(x.covariance.trace())


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_vectors(n):
    with pytest.raises(ValueError, match=f"{n} vectors"):
        moments(features(5, 4)[:n]).gaussian()
