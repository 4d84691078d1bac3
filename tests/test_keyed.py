"""keyed.py against scipy's distributions, and against numbers written down once."""

import numpy as np
import pytest
from scipy import stats

from mage_ds import keyed

GOLDEN_UNIFORM = [
    [0.9326132236043209, 0.8387329738583534],
    [0.9518836004683856, 0.03644969671388998],
    [0.9936486608685654, 0.6820062125374037],
]
GOLDEN_SEED = 5433418907947689134
GOLDEN_PERMUTATION = [2, 5, 3, 7, 4, 0, 1, 6]


def test_golden_values():
    """A change here changes every crop, mask and picture of every run: resumed runs would no longer agree."""
    got = keyed.uniform(0, "mask", [0, 1, 2**40], [0, 3, 7], size=2)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, GOLDEN_UNIFORM)
    assert keyed.seed_of(0, "block", 3) == GOLDEN_SEED
    assert keyed.permutation(5, "order", 1, 8).tolist() == GOLDEN_PERMUTATION


@pytest.mark.parametrize("varied", ["index", "step", "size"])
def test_uniform_distribution(varied):
    n = 20_000
    one, many = np.zeros(1, int), np.arange(n)
    index, step, size = {"index": (many, 0, 1), "step": (one.repeat(n), many, 1), "size": (one, 0, n)}[varied]
    got = keyed.uniform(3, "noise", index, step, size=size).ravel()
    assert got.shape == (n,)
    assert got.min() > 0 and got.max() < 1
    assert stats.kstest(got, "uniform").pvalue > 1e-3
    lagged = np.corrcoef(got[:-1], got[1:])[0, 1]
    assert abs(lagged) < 4 / np.sqrt(n)


def test_streams_are_independent():
    """Another seed, purpose, index or step gives numbers that have nothing to do with each other."""
    n = 4096
    streams = [
        keyed.uniform(seed, purpose, [index], step, size=n)[0]
        for seed, purpose, index, step in [
            (0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1), (0, "a", -1, 0),
            (10, "a", 0, 0), (0, "a", 2**62, 0),
        ]
    ]  # fmt: skip
    correlations = np.corrcoef(streams)[np.triu_indices(len(streams), 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(n)


def test_independent_of_the_order_and_grouping_of_calls():
    index, step = np.array([7, 3, 900_000_000_000]), np.array([2, 0, 5])
    together = keyed.uniform(1, "crop", index, step, size=5)
    order = [2, 0, 1]
    np.testing.assert_array_equal(keyed.uniform(1, "crop", index[order], step[order], size=5), together[order])
    for row, (i, s) in enumerate(zip(index, step, strict=True)):
        np.testing.assert_array_equal(keyed.uniform(1, "crop", i, s, size=5)[0], together[row])
    # More numbers of an index begin with the same ones, so a draw may be added at the end of a list.
    np.testing.assert_array_equal(keyed.uniform(1, "crop", index, step, size=9)[:, :5], together)
    assert keyed.uniform(1, "crop", [], size=3).shape == (0, 3)


@pytest.mark.parametrize("n", [0, 1, 2, 1797])
def test_permutation_is_one(n):
    got = keyed.permutation(0, "order", 4, n)
    assert got.dtype == np.int64
    assert sorted(got.tolist()) == list(range(n))


def test_permutations_are_uniform_and_differ():
    n, draws = 5, 6000
    firsts = [keyed.permutation(0, "order", epoch, n)[0] for epoch in range(draws)]
    assert stats.chisquare(np.bincount(firsts, minlength=n)).pvalue > 1e-3
    # A shuffle leaves no trace of the order before it.
    long = keyed.permutation(0, "order", 0, 2000)
    assert abs(stats.spearmanr(long, np.arange(2000)).statistic) < 0.1
    assert not np.array_equal(long, keyed.permutation(0, "order", 1, 2000))


def test_seeds():
    seeds = {keyed.seed_of(seed, name, step) for seed in range(10) for name in "ab" for step in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert keyed.seed_of(0, "ab", "c") != keyed.seed_of(0, "a", "bc")
