"""The few-shot classifier beside scikit-learn's, and the draws."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mage_ds.evaluation import few_shot

CLASSES, WIDTH = 4, 12


def blobs(number, seed, width=WIDTH, spread=1.5):
    """Features around a middle for each class: (n, width), labels (n,). Features are of unlike size and mean."""
    rng = np.random.default_rng(seed)
    middles = np.random.default_rng(7).normal(size=(CLASSES, width))
    labels = np.arange(number) % CLASSES
    size = np.geomspace(0.1, 30, width)
    return ((middles[labels] + rng.normal(size=(number, width)) * spread) * size + 5).astype(np.float32), labels


def sklearns(strength):
    return LogisticRegression(C=strength, tol=1e-12, max_iter=100_000)


@pytest.mark.parametrize("strength", [0.1, 1.0, 100.0])
def test_the_fit_is_scikit_learns(strength, monkeypatch):
    monkeypatch.setattr(few_shot, "_FLAT", 1e-11)
    x, y = blobs(40, 0)
    x = (x - x.mean(0)) / x.std(0)
    theirs = sklearns(strength).fit(x.astype(np.float64), y)
    weight, bias = few_shot.fit(torch.from_numpy(x).double(), torch.from_numpy(y), CLASSES, strength)
    assert weight.dtype == torch.float64
    largest = np.abs(theirs.coef_).max()
    assert np.abs(weight.numpy().T - theirs.coef_).max() < 1e-5 * largest
    # A number added to all intercepts changes no answer.
    ours, other = (each - each.mean() for each in (bias.numpy(), theirs.intercept_))
    assert np.abs(ours - other).max() < 1e-5 * largest


def plain(shown, pictures, labels):
    """The protocol by scikit-learn in all dimensions: (top-1, strength)."""
    classes, shots, width = shown.shape
    flat = shown.reshape(-1, width).astype(np.float64)
    scale = np.sqrt((flat.var(0) + 1e-6) * width)
    x, seen = (flat - flat.mean(0)) / scale, (pictures - flat.mean(0)) / scale
    y = np.repeat(np.arange(classes), shots)
    best = (None, None, 10.0)
    if shots > 1:
        held = np.tile(np.arange(shots) >= shots - max(1, shots // 5), classes)
        tried = []
        for strength in (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0):
            model = sklearns(strength).fit(x[~held], y[~held])
            chance = model.predict_proba(x[held])[np.arange(held.sum()), y[held]]
            tried.append((-model.score(x[held], y[held]), -np.log(chance).mean(), strength))
        best = min(tried)
    return sklearns(best[2]).fit(x, y).score(seen, labels), best[2]


@pytest.mark.parametrize("shots, width", [(1, 12), (2, 30), (5, 12), (11, 12)])  # fewer pictures than features, or more
def test_the_protocol_beside_scikit_learn(shots, width):
    x, y = blobs(400, 1, width)
    pictures, labels = blobs(300, 2, width)
    drawn = few_shot.draw(y, CLASSES, shots, trial=0, seed=3)
    ours = few_shot.answer(torch.from_numpy(x[drawn]), torch.from_numpy(pictures), torch.from_numpy(labels))
    top1, strength = plain(x[drawn], pictures, labels)
    assert ours.strength == strength
    assert ours.top1 == pytest.approx(top1, abs=1.01 / 300)  # one picture on the border
    assert 0.3 < top1 < 1
    assert len(ours.held) == (0 if shots == 1 else 6)


def test_features_that_do_not_vary_are_no_matter():
    x, y = blobs(80, 1)
    pictures, labels = blobs(300, 2)
    drawn = few_shot.draw(y, CLASSES, 10, 0, 0)
    with_constant = [np.concatenate([each, np.full((len(each), 1), 3, np.float32)], 1) for each in (x, pictures)]
    one, two = (
        few_shot.answer(torch.from_numpy(a[drawn]), torch.from_numpy(b), torch.from_numpy(labels))
        for a, b in ((x, pictures), with_constant)
    )
    assert two.top1 == pytest.approx(one.top1, abs=0.02) and two.top1 > 0.5
    same = np.ones((CLASSES, 5, 3), np.float32)
    alike = few_shot.answer(torch.from_numpy(same), torch.ones(8, 3), torch.arange(8) % CLASSES)
    assert alike.top1 == 1 / CLASSES


def test_draws_are_balanced_nested_and_differ_by_trial_and_seed():
    labels = np.random.default_rng(0).integers(0, CLASSES, 200)
    drawn = few_shot.draw(labels, CLASSES, 10, 1, 5)
    assert drawn.shape == (CLASSES, 10) and len(np.unique(drawn)) == 10 * CLASSES
    assert (labels[drawn] == np.arange(CLASSES)[:, None]).all()
    assert (few_shot.draw(labels, CLASSES, 3, 1, 5) == drawn[:, :3]).all()
    assert (few_shot.draw(labels, CLASSES, 10, 2, 5) != drawn).any()
    assert (few_shot.draw(labels, CLASSES, 10, 1, 6) != drawn).any()
    every = np.concatenate([few_shot.draw(labels, CLASSES, 5, trial, 0)[0] for trial in range(200)])
    counts = np.bincount(every, minlength=200)[labels == 0]
    assert counts.min() > 0 and counts.max() < 3 * counts.mean()
    with pytest.raises(ValueError, match="has 0 pictures, 1 are drawn"):
        few_shot.draw(labels, CLASSES + 1, 1, 0, 0)
