"""Nearest real pictures, against a plain loop in float64; copies are found, however the real ones are cut."""

import numpy as np
import pytest

from mage_ds.evaluation import neighbours


@pytest.fixture(scope="module")
def sets():
    """Samples, and real pictures, far from the origin; samples 3 and 7 are copies, real picture 5 is there twice."""
    rng = np.random.default_rng(0)
    real = (rng.normal(size=(300, 40)) + 100).astype(np.float32)
    samples = (rng.normal(size=(90, 40)) + 100).astype(np.float32)
    samples[3], samples[7], real[250] = real[17], real[5], real[5]
    return samples, real


def cut(real, *at):
    return zip(np.split(np.arange(len(real)), at), np.split(real, at), strict=True)


def by_a_loop(samples, real, k):
    apart = np.sqrt(((samples[:, None].astype(float) - real[None]) ** 2).sum(2))
    order = np.argsort(apart, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(apart, order, axis=1), order


@pytest.mark.parametrize("at", [(), (1, 150, 151)])
def test_nearest(sets, at, monkeypatch):
    monkeypatch.setattr(neighbours, "_ROWS", 100)
    monkeypatch.setattr(neighbours, "_BLOCK", 37)
    samples, real = sets
    found = neighbours.nearest(samples, cut(real, *at), 3)
    distances, order = by_a_loop(samples, real, 3)
    assert (found.index == order).all()
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)
    assert found.distances[3, 0] == 0 and (found.index[7, :2] == [5, 250]).all()


def test_a_real_picture_is_not_its_own_neighbour(sets):
    _, real = sets
    asked = np.array([5, 0, 299])
    found = neighbours.nearest(real[asked], cut(real, 100), 2, itself=asked)
    assert not (found.index == asked[:, None]).any()
    assert found.index[0, 0] == 250 and found.distances[0, 0] == 0  # the other one of two equal pictures


def test_memorised_and_dense(sets):
    samples, real = sets
    of_real = neighbours.nearest(real, cut(real), 1, itself=np.arange(len(real)))
    fresh = neighbours.memorised(neighbours.nearest(samples, cut(real)), of_real)
    assert 0.3 < fresh.share < 0.7 and fresh.n == 90 and fresh.asked == 300
    copied = neighbours.memorised(neighbours.nearest(real[:50] + np.float32(1e-3), cut(real)), of_real)
    assert copied.share == 1
    far = np.concatenate([samples, samples[:1] + 50])
    order = neighbours.by_density(neighbours.nearest(far, cut(real)))
    assert order[-1] == 90 and sorted(order) == [*range(91)]
