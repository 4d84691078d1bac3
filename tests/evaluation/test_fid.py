"""An FID's standard error and its value of endlessly many pictures, where both are known."""

import numpy as np
import pytest
import torch

from mage_ds.evaluation import fid
from mage_ds.evaluation.moments import Collected, Few, Gaussian, frechet, root_of

D = 16


def mixing(d=D, seed=5):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(d, d)) / np.sqrt(d)
    return a, a + 0.3 * rng.normal(size=(d, d)) / np.sqrt(d)


def gaussian(a):
    return Gaussian(torch.full((len(a),), 0.1).double(), torch.from_numpy(a @ a.T + 0.02 * np.eye(len(a))))


def drawn(n, a, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, len(a))) @ a.T + np.sqrt(0.02) * rng.normal(size=(n, len(a))) + 0.2


def cut(x, step=100):
    return (x[i : i + step] for i in range(0, len(x), step))


def measured(x, reference):
    sample = fid.collected(cut(x), x.shape[1])
    each = fid.influence(cut(x), sample, reference)
    return frechet(sample, reference), each


@pytest.mark.parametrize("n", [12, 40, 500])
def test_rows_or_moments_give_the_same(n):
    """From 17 vectors of 16 dimensions on there are moments; merging what came in pieces changes nothing."""
    x, reference = drawn(n, mixing()[0], 1), gaussian(mixing()[1])
    direct = Gaussian(torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x, rowvar=False)))
    for step in (1, 5, 30, 1000):
        found = fid.collected(cut(x, step), D)
        assert isinstance(found, Few) == (n <= D)
        assert torch.allclose(found.covariance, direct.covariance, rtol=1e-9, atol=1e-12)
        for other in (reference, direct):
            assert frechet(found, other) == pytest.approx(frechet(direct, other), rel=1e-7, abs=1e-6)
        parts = [Collected(D), Collected(D)]
        for rows in cut(x, step):
            parts[0 if parts[0].n < n / 3 else 1].add(torch.from_numpy(rows))
        parts[0].merge(parts[1])
        assert parts[0].n == n
        assert torch.allclose(parts[0].gaussian().covariance, found.covariance, rtol=1e-9, atol=1e-12)


def test_a_root_of_any_rank():
    x = drawn(500, mixing()[0], 1)
    few = fid.collected([x[:10]], D)
    singular = Gaussian(few.mean, few.covariance)
    for covariance, rank in ((few, 10), (singular, 9), (fid.collected([x], D), D)):
        root = root_of(covariance)
        assert root.shape == (D, rank)
        assert torch.allclose(root @ root.T, covariance.covariance, atol=1e-12)


@pytest.mark.parametrize("n", [13, 60, 400])
def test_the_influence_is_the_derivative(n):
    """Weighing one picture a little more changes the FID by its influence, whether n is below D or above."""
    x, reference = drawn(n, mixing()[0], 1), gaussian(mixing()[1])
    _, each = measured(x, reference)
    assert len(each) == n and each.mean() == pytest.approx(0, abs=1e-9)

    def weighed(i, step):
        weights = np.full(n, (1 - step) / n)
        weights[i] += step
        mean = weights @ x
        z = (x - mean) * np.sqrt(weights * n / (n - 1))[:, None]
        if n <= D:
            return frechet(Few(torch.from_numpy(mean), torch.from_numpy(z)), reference)
        return frechet(Gaussian(torch.from_numpy(mean), torch.from_numpy(z.T @ z)), reference)

    step = 1e-5
    slopes = np.array([(weighed(i, step) - weighed(i, -step)) / (2 * step) for i in range(10)])
    # The closed form has n - 1 where the weights have n in the trace terms, and no mean.
    assert np.diff(slopes) == pytest.approx(np.diff(each[:10]), rel=0.15, abs=0.05 * each.std())


def coverage(n, d, trials):
    """Share of the intervals of 95 % that hold the mean of all FIDs of n pictures, and error / true spread."""
    a, b = mixing(d)
    reference, found = gaussian(b), []
    for trial in range(trials):
        value, each = measured(drawn(n, a, 1000 + trial), reference)
        found.append((value, fid.standard_error(each)))
    values, errors = np.array(found).T
    return float((np.abs(values - values.mean()) < 1.96 * errors).mean()), float(errors.mean() / values.std())


def test_the_error_is_the_spread_over_new_samples():
    held, ratio = coverage(300, D, 150)
    assert held > 0.9 and 0.85 < ratio < 1.35


@pytest.mark.full
@pytest.mark.parametrize("n, d", [(2000, 32), (200, 32), (40, 32), (24, 32)])
def test_calibrated_for_few_and_many(n, d):
    """95 % of the intervals, and somewhat more where n is near D: there the error errs upwards."""
    held, ratio = coverage(n, d, 600)
    assert 0.93 < held <= 1 and 0.95 < ratio < 1.5


def test_a_paired_difference_is_surer_than_its_parts():
    """Two settings that share their noise: the error of the difference is the spread of differences."""
    a, b = mixing()
    reference, found = gaussian(b), []
    for trial in range(100):
        x = drawn(300, a, trial)
        (one, influence_one), (other, influence_other) = measured(x, reference), measured(x * 1.05, reference)
        found.append(
            (one - other, fid.standard_error(influence_one - influence_other), fid.standard_error(influence_one))
        )
    differences, errors, single = np.array(found).T
    assert 0.8 < errors.mean() / differences.std() < 1.3
    assert errors.mean() < single.mean() / 2


def test_infinity_is_the_distance_of_the_populations():
    a, b = mixing()
    truth, reference = frechet(gaussian(a)._replace(mean=torch.full((D,), 0.2).double()), gaussian(b)), gaussian(b)
    found = []
    for trial in range(60):
        x = drawn(600, a, 5000 + trial)
        value, each = measured(x, reference)
        infinite = fid.infinity(cut(x, 77), 600, reference, fid.standard_error(each), seed=trial)
        assert infinite.fids[-1] == pytest.approx(value, rel=1e-9) and infinite.sizes[0] == 60
        found.append((value, infinite.value, infinite.error))
    values, infinite, errors = np.array(found).T
    assert values.mean() - truth > 5 * values.std() / np.sqrt(60)  # biased upwards, by far
    assert abs(infinite.mean() - truth) < (values.mean() - truth) / 4
    assert 0.75 < errors.mean() / infinite.std() < 1.35


def test_infinity_does_not_depend_on_chunks():
    x, reference = drawn(100, mixing()[0], 1), gaussian(mixing()[1])  # its smallest subsets have fewer than D
    one, other = (fid.infinity(cut(x, step), 100, reference, 1.0, seed=3) for step in (1, 1000))
    assert one.fids == pytest.approx(other.fids, rel=1e-9) and one.value == pytest.approx(other.value, rel=1e-9)
    assert one.value != fid.infinity(cut(x), 100, reference, 1.0, seed=4).value
    with pytest.raises(ValueError, match="FID-infinity needs 20"):
        fid.infinity(cut(x[:19]), 19, reference, 1.0)
    with pytest.raises(ValueError, match="99 pictures, not 100"):
        fid.infinity(cut(x[:99]), 100, reference, 1.0)


def test_remarks():
    assert fid.remarks(10_000, 2048, 5.0) == []
    (line,) = fid.remarks(5000, 192, 12.0, fid.Infinity(9.5, 0.1, 1.0, [500], []))
    assert "5,000 pictures is biased upwards" in line and "about 2.5 of it" in line and "FID-infinity 9.5" in line
    assert len(fid.remarks(500, 2048, 12.0)) == 2
    few = fid.remarks(5000, 2048, 12.0, fid.Infinity(9.5, 0.1, 1.0, [500], []))
    assert "begin at 500, fewer than the 2,048 features" in few[1] and len(few) == 2
