"""Scores of features against torch-fidelity's own functions on the same features, and against plain loops."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from mage_ds.errors import UserError
from mage_ds.evaluation import fid, scores
from mage_ds.evaluation.moments import frechet


def made(n, d, seed, shift=0.0):
    """Features float32 (n, d) that are correlated, 0 or more, and far from the origin."""
    rng, mixing = np.random.default_rng(seed), np.random.default_rng(99)
    x = rng.normal(size=(n, 20)) @ mixing.normal(size=(20, d)) * 0.06 + rng.normal(size=(n, d)) * 0.3 + shift
    return np.abs(x * 0.5 + 1).astype(np.float32)


def cut(x, step):
    return (x[i : i + step] for i in range(0, len(x), step))


PAIRS = [(61, 99, 64), (101, 130, 96), (257, 300, 64)]  # fewer vectors than dimensions, about as many, more


@pytest.mark.parametrize("n, m, d", PAIRS)
def test_fid_is_torch_fidelitys(n, m, d):
    a, b = made(n, d, 1), made(m, d, 2, 0.1)
    one, other = (fid_features_to_statistics(torch.from_numpy(x.astype(np.float64))) for x in (a, b))
    expected = fid_statistics_to_metric(one, other, False)["frechet_inception_distance"]
    for step in (7, 1000):
        got = frechet(fid.collected(cut(a, step), d), fid.collected(cut(b, step), d))
        assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n, splits", [(11, 10), (1003, 10), (1003, 3)])
def test_is_is_torch_fidelitys_however_it_is_cut(n, splits):
    logits = np.random.default_rng(0).normal(size=(n, 50)).astype(np.float32) * 3
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=splits)
    expected = (theirs["inception_score_mean"], theirs["inception_score_std"])
    for step in (1, 64, 2000):
        assert scores.inception_score(cut(logits, step), n, splits=splits) == pytest.approx(expected, rel=1e-9)


def test_is_of_several_workers_adds_up():
    logits = np.random.default_rng(0).normal(size=(505, 30)) * 3
    expected = scores.inception_score([logits], 505)
    parts = [scores.Splits(505, 30) for _ in range(3)]
    for i in range(505):
        parts[i % 3].add(np.array([i]), logits[i : i + 1])
    for other in parts[1:]:
        parts[0].total += other.total
    assert parts[0].score() == pytest.approx(expected, rel=1e-12)


def test_is_as_adm_takes_contiguous_splits(monkeypatch):
    monkeypatch.setattr(scores, "ADM_SPLIT", 100)
    logits = np.random.default_rng(0).normal(size=(250, 30)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    each = []
    for part in (p[:100], p[100:200], p[200:]):  # the loop of guided-diffusion's evaluator
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        each.append(np.exp(kl.sum(1).mean()))
    got = scores.inception_score(cut(logits, 33), 250, definition="adm")
    assert got == pytest.approx((np.mean(each), np.std(each)), rel=1e-12)
    assert got[0] != pytest.approx(scores.inception_score([logits], 250)[0], rel=1e-4)


def test_is_of_certain_and_of_impossible_classes():
    certain = np.full((100, 10), -2000.0)
    certain[np.arange(100), np.arange(100) % 10] = 0
    assert scores.inception_score([certain], 100, splits=1) == pytest.approx((10, 0))
    assert scores.inception_score([np.zeros((100, 10))], 100) == pytest.approx((1, 0))


def theirs_kid(a, b, subsets, size):
    return kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=subsets, kid_subset_size=size, rng_seed=2020,
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0,
        verbose=False,
    )  # fmt: skip


@pytest.mark.parametrize("n, m, d", PAIRS)
def test_kid_is_torch_fidelitys(n, m, d):
    a, b = made(n, d, 1), made(m, d, 2, 0.1)
    got = scores.kid(a, b, 20, 50)
    exact = theirs_kid(a.astype(np.float64), b.astype(np.float64), 20, 50)  # the same formula in float64
    assert got.mean == pytest.approx(exact["kernel_inception_distance_mean"], rel=1e-9)
    assert got.std == pytest.approx(exact["kernel_inception_distance_std"], rel=1e-7)
    assert got.mean == pytest.approx(theirs_kid(a, b, 20, 50)["kernel_inception_distance_mean"], abs=1e-6)


def test_kids_error_is_the_spread_over_new_samples():
    found = [scores.kid(made(400, 32, 2 * i), made(400, 32, 2 * i + 1, 0.3), 100, 40) for i in range(60)]
    spread = np.std([each.mean for each in found], ddof=1)
    assert all(each.blocks == 10 for each in found)
    assert 0.7 < np.mean([each.error for each in found]) / spread < 1.5
    long = made(3000, 8, 0)
    assert scores.kid_error(long, made(9000, 8, 1), 100)[1] == 30
    assert np.isnan(scores.kid_error(long[:19], long)[0])


def theirs_prc(a, b, k=3):
    found = prc_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), prc_neighborhood=k, prc_batch_size=10000, save_cpu_ram=False,
        verbose=False,
    )  # fmt: skip
    return round(found["precision"] * len(a)), round(found["recall"] * len(b))


def counts(found, a, b):
    pictures = (found[0] * len(a), found[1] * len(b))
    assert pictures == pytest.approx([round(each) for each in pictures], abs=1e-9)
    return tuple(round(each) for each in pictures)


@pytest.mark.parametrize("n, m, d", [*PAIRS, (1501, 1203, 64)])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_torch_fidelitys_in_any_blocks(n, m, d, k, monkeypatch):
    a, b = made(n, d, 1), made(m, d, 2, 0.1)
    expected = theirs_prc(a, b, k)
    assert 0 < expected[0] < n and 0 < expected[1] < m
    assert counts(scores.precision_recall(a, b, k), a, b) == expected
    monkeypatch.setattr(scores, "_ROWS", 37)
    monkeypatch.setattr(scores, "_COLUMNS", 50)
    assert counts(scores.precision_recall(a, b, k), a, b) == expected


def by_a_loop(a, b, k):
    """The definition in exact numbers: for points of whole numbers, whose distances are often equal."""

    def apart(x, y):
        return np.square(x[:, None].astype(np.int64) - y[None].astype(np.int64)).sum(2)

    radii = [np.sort(apart(x, x), axis=1)[:, k] for x in (a, b)]
    return (apart(a, b) <= radii[1]).any(1).sum(), (apart(b, a) <= radii[0]).any(1).sum()


@pytest.mark.parametrize("far", [0, 1000])
def test_equal_distances_count_as_within(far):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 4, size=(n, 5)).astype(np.float32) + far for n in (200, 150))
    a[:4], b[3:6] = a[0], b[0]  # balls of radius 0 among them
    for k in (1, 2, 3):
        expected = by_a_loop(a, b, k)
        assert counts(scores.precision_recall(a, b, k), a, b) == expected


def as_adm(a, b, k):
    """Every operation in float16, as numpy rounds it; only the sums within one have more digits, as on a device."""

    def apart(x, y):
        x, y = x.astype(np.float16), y.astype(np.float16)
        n, m = (np.square(z).astype(np.float32).sum(1).astype(np.float16) for z in (x, y))
        product = (x.astype(np.float32) @ y.astype(np.float32).T).astype(np.float16)
        return np.maximum(n[:, None] - np.float16(2) * product + m[None], 0)

    radii = [np.sort(apart(x, x), axis=1)[:, k] for x in (a, b)]
    between = apart(a, b)
    return (between <= radii[1]).any(1).sum(), (between <= radii[0][:, None]).any(0).sum()


def test_precision_and_recall_as_adm(monkeypatch):
    a, b = made(601, 64, 1), made(500, 64, 2, 0.05)
    expected = as_adm(a, b, 3)
    got = counts(scores.precision_recall(a, b, definition="adm"), a, b)
    assert np.abs(np.subtract(got, expected)).max() <= 1  # a sum in float32 may round to the other side
    assert got != counts(scores.precision_recall(a, b), a, b)
    monkeypatch.setattr(scores, "_ROWS", 100)
    monkeypatch.setattr(scores, "_COLUMNS", 90)
    assert counts(scores.precision_recall(a, b, definition="adm"), a, b) == pytest.approx(got, abs=1)
    # Beyond the range of float16 it takes float32.
    assert counts(scores.precision_recall(a * 1e4, b * 1e4, definition="adm"), a, b) == theirs_prc(a, b)


def test_memory_maps(tmp_path):
    for name, x in (("a", made(700, 64, 1)), ("b", made(600, 64, 2))):
        np.save(tmp_path / name, x)
    a, b = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "ab")
    done = []
    assert counts(scores.precision_recall(a, b, advance=done.append), a, b) == theirs_prc(np.array(a), np.array(b))
    assert sum(done) == scores.steps(700, 600) == 3
    assert scores.kid(a, b, 3, 100) == scores.kid(np.array(a), np.array(b), 3, 100)


def test_too_few_pictures_are_said():
    few = made(3, 8, 0)
    with pytest.raises(UserError, match="--kid-subset 3 or less"):
        scores.kid(few, made(50, 8, 1), size=10)
    with pytest.raises(UserError, match="give 4"):
        scores.precision_recall(few, made(50, 8, 1))
    with pytest.raises(UserError, match="give 10 pictures or more"):
        scores.inception_score([few], 3)
    with pytest.raises(ValueError, match="3 pictures, not 20"):
        scores.inception_score([few], 20)
