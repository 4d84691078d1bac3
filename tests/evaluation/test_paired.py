"""The paired comparison: how often it is wrong about two that are equally good, and how often it finds the better one.

Made features: picture i of both comes from the same noise.
"""

import numpy as np
import pytest
import torch

from mage_ds.evaluation import fid, paired, scores
from mage_ds.evaluation.moments import Gaussian, frechet

D = 16


def noise(n, trial, d=D):
    rng = np.random.default_rng(trial)
    return rng.normal(size=(n, d)), rng.normal(size=(n, d))


class Equal:
    """Two of the same FID by symmetry, beside a reference N(0, 1): the one is the other turned."""

    def __init__(self, d=D):
        rng = np.random.default_rng(0)
        self.spread = np.linspace(0.5, 1.6, d)
        self.turn = np.linalg.qr(np.eye(d) + 0.2 * rng.normal(size=(d, d)))[0]

    def __call__(self, n, trial):
        common, own = noise(n, trial)
        return (common * self.spread + 0.2) @ np.eye(len(self.turn)), (
            (0.9 * common + np.sqrt(0.19) * own) * self.spread + 0.2
        ) @ self.turn


class Narrow:
    """Two of the same FID, of which the first varies less, so that few pictures raise its FID less."""

    def __init__(self, d=48, spread=0.25):
        self.d, self.spread = d, spread
        self.shift = np.sqrt(0.2)
        self.wide = np.sqrt((d * (1 - spread) ** 2 + self.shift**2) / d)  # of a mean that is as far away

    def __call__(self, n, trial):
        common, _ = noise(n, trial, self.d)
        return common * self.spread + self.shift / np.sqrt(self.d), common + self.wide


def reference(d):
    return Gaussian(torch.zeros(d).double(), torch.eye(d).double())


def figure(x, real):
    return paired.fid_of(lambda: (x[i : i + 200] for i in range(0, len(x), 200)), len(x), real)


def comparison(draw, trial, most=4000, inside=paired.compared):
    """What a user gets: (who is better, pictures of each)."""
    a, b = draw(most, trial)
    real, made = reference(a.shape[1]), []
    while n := paired.following(made, most):
        made.append(n)
        found = inside(figure(a[:n], real), figure(b[:n], real), len(made))
        if which := paired.better(found):
            return which, n
    return None, most


def naive(a, b, look):
    """1.96 standard errors at every look, and no thought of few pictures."""
    found = paired.compared(a, b, look)
    reach = 1.96 * found["error"]
    return found | {"interval": [found["difference"] - reach, found["difference"] + reach]}


def share(draw, trials, **how):
    return sum(comparison(draw, trial, **how)[0] is not None for trial in range(trials)) / trials


# --- pure numbers


def test_false_alarms_of_all_looks_add_up():
    spent = [2 * (1 - torch.special.ndtr(torch.tensor(paired.sigmas(k)).double())) for k in range(1, 200)]
    assert float(sum(spent)) == pytest.approx(0.05 * (1 - 1 / 200), rel=1e-6)
    assert paired.sigmas(1) == pytest.approx(2.2414, abs=1e-3) and paired.sigmas(2) > paired.sigmas(1)


def test_looks():
    def all_of(most, batch=1, made=()):
        made = list(made)
        while n := paired.following(made, most, batch):
            made.append(n)
        return made

    assert all_of(5000) == [500, 1000, 2000, 4000, 5000]
    assert all_of(5000, 64) == [512, 1024, 2048, 4096, 5000]
    assert all_of(100) == [100] and all_of(500) == [500]
    assert all_of(9000, made=[500, 1000, 1500]) == [500, 1000, 1500, 3000, 6000, 9000]  # 1,500 were asked for before
    assert all_of(700, made=[500, 1000]) == [500, 1000]


@pytest.mark.parametrize("n", [9, 10, 41, 300])
def test_a_figure_is_that_of_the_plain_functions(n):
    """FID, influence, and what few pictures do: halves are cut within chunks, n lies below D and above."""
    x = noise(n, 1)[0].astype(np.float32)
    real = reference(D)
    found = paired.fid_of(lambda: (x[i : i + 7] for i in range(0, n, 7)), n, real)
    whole = fid.collected([x], D)
    halves = [frechet(fid.collected([part], D), real) for part in (x[: n // 2], x[n // 2 :])]
    assert found.value == pytest.approx(frechet(whole, real), rel=1e-9)
    assert found.few == pytest.approx(np.mean(halves) - found.value, rel=1e-6)
    assert found.influence == pytest.approx(fid.influence([x], whole, real), abs=1e-6)


def test_kid_is_a_loop_over_all_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1030, D)).astype(np.float32), rng.normal(size=(1100, D)) + 0.3
    found = paired.kid_of(x[:40], y[:30], paired.kernel_within(y[:30]))

    def kernel(p, q):
        return (float(np.dot(p.astype(np.float64), q.astype(np.float64))) / D + 1) ** 3

    def kid(a, b):
        inside = [np.mean([kernel(p, q) for i, p in enumerate(s) for j, q in enumerate(s) if i != j]) for s in (a, b)]
        return sum(inside) - 2 * np.mean([kernel(p, q) for p in a for q in b])

    assert found.value == pytest.approx(kid(x[:40], y[:30]), rel=1e-9)
    # The picture left out changes KID by its share: the jackknife, to first order.
    left = np.array([kid(np.delete(x[:40], i, axis=0), y[:30]) for i in range(12)])
    assert np.diff((found.value - left) * 39) == pytest.approx(np.diff(found.influence[:12]), rel=0.1, abs=1e-6)
    large = paired.kid_of(x, y, paired.kernel_within(y))  # several blocks
    assert large.value == pytest.approx(scores.kid(x[:1000], y[:1000], subsets=1, size=1000).mean, abs=0.01)


def test_the_verdict_in_words():
    n, names = 1000, ("steps=16", "steps=8")
    x, y = noise(n, 3)
    real = reference(D)
    one, other = figure(x, real), figure(1.2 * x, real)
    said = paired.verdict("fid", paired.compared(one, other, 2), 2, n, names)
    assert said["better"] == "a" and said["over"] == "difference"
    assert said["text"].startswith("steps=16 is better than steps=8 after 1,000 pictures of each, 2 looks: FID 0.0")
    turned = paired.verdict("fid", paired.compared(other, one, 1), 1, n, names)
    assert turned["better"] == "b" and turned["text"].startswith("steps=8 is better than steps=16")
    found = paired.compared(one, figure(y, real), 1)
    said = paired.verdict("fid", found, 1, n, names)
    assert said["better"] is None and said["over"] is None and "cannot be told apart" in said["text"]
    assert said["visible"] == pytest.approx((2.2414 + 0.8416) * found["error"] + abs(found["few"]), rel=1e-3)
    same = paired.verdict("fid", paired.compared(one, one, 1), 1, n, names)
    assert same["over"] == "equal" and "not one of 1,000 differs" in same["text"]


# --- simulated comparisons


def test_common_noise_cancels():
    """Two that differ by a little: the paired error is a fraction of the unpaired one, and the better one is found."""
    x, _ = noise(2000, 4)
    found = paired.compared(figure(1.1 * x, reference(D)), figure(1.13 * x, reference(D)), 1)
    assert found["error"] < 0.25 * np.hypot(found["a_error"], found["b_error"])
    assert [comparison(lambda n, t: (noise(n, t)[0] * 1.1, noise(n, t)[0] * 1.13), t)[0] for t in range(10)] == [
        "a"
    ] * 10


def test_few_false_alarms_in_short():
    assert share(Equal(), 60, most=2000) <= 0.1


@pytest.mark.full
def test_false_alarms_over_all_looks():
    """Of comparisons of two that are equally good 5 % at most end with a winner; 1.96 standard errors at every look
    end with one twice as often or more."""
    trials = 600
    most = 0.05 + 2 * np.sqrt(0.05 * 0.95 / trials)
    assert share(Equal(), trials, most=8000) <= most
    assert share(Equal(), 200, most=8000, inside=naive) > 0.08


@pytest.mark.full
def test_nobody_wins_by_varying_less():
    """Few pictures flatter whoever varies less: without a thought of it he nearly always wins."""
    trials = 300
    wins = [comparison(Narrow(), trial) for trial in range(trials)]
    assert sum(which is not None for which, _ in wins) / trials <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / trials)
    assert share(Narrow(), 60, inside=naive) > 0.3


@pytest.mark.full
def test_the_better_one_is_found_and_large_differences_early():
    def better(by):
        return lambda n, t: (Equal()(n, t)[0], Equal()(n, t)[1] * by)

    small = [comparison(better(1.015), trial, most=16000) for trial in range(60)]
    large = [comparison(better(1.1), trial, most=16000) for trial in range(60)]
    assert {which for which, _ in large} == {"a"} == {which for which, _ in small} - {None}
    assert {n for _, n in large} == {500} and np.mean([n for _, n in small]) > 1500
