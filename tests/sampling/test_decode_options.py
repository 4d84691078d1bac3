"""Decoding's options: Halton order, temperature of the tokens, drop, guidance. Each against a plain loop over one
picture at a time, written from the specification alone."""

import math
import zlib
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from mage_ds.models import Mage
from mage_ds.sampling import decode

CODES, N = 11, 16


def predictor(seed=0, scale=2.0):
    """predict(tokens, masked, keep): logits of a picture that depend on its mask and on every token that is kept."""
    weights = torch.randn(64, CODES + 1, CODES, generator=torch.Generator().manual_seed(seed)) * scale

    def predict(tokens, masked, keep=None):
        ids = torch.where(masked, CODES, tokens)
        every = torch.stack([weights[i, ids[:, i]] for i in range(ids.shape[1])], dim=1)
        seen = torch.ones_like(masked) if keep is None else torch.zeros_like(masked).scatter(1, keep, True)
        return every + (every * seen[..., None]).mean(dim=1, keepdim=True).roll(1, dims=2)

    return predict


def batch(*numbers, n=N, seed=0):
    """Random tokens of len(numbers) pictures, of which so many are masked in each."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(0, CODES, (len(numbers), n)))
    masked = torch.zeros(len(numbers), n, dtype=torch.bool)
    for i, number in enumerate(numbers):
        masked[i, torch.from_numpy(rng.permutation(n)[:number])] = True
    return tokens, masked


def plain_counts(start: int, steps: int) -> list[int]:
    """Masked tokens before the first step and after each."""
    left = [start]
    for t in range(1, steps):
        wanted = math.floor(start * math.cos(math.pi / 2 * (t / steps)))
        left.append(max(1, min(left[-1] - 1, wanted)) if start else 0)
    return [*left, 0]


def plain_decode(predict, tokens, masked, steps, noise, *, temperature=0.0, heat=1.0, turns=None, keeps=None):
    """One picture: tokens list[int], masked list[bool], noise(t, purpose) -> list of uniform numbers.

    heat: of the tokens; turns: when a token becomes final, in place of its confidence; keeps[t - 1]: what is kept.
    """
    tokens, masked = list(tokens), list(masked)
    left = plain_counts(sum(masked), steps)
    for t in range(1, steps + 1):
        keep = keeps[t - 1] if keeps else None
        logits = predict(
            torch.tensor([tokens]), torch.tensor([masked]), None if keep is None else torch.tensor([keep])
        )[0].tolist()
        score = {}
        for i in [i for i in range(len(tokens)) if masked[i]]:
            tokens[i] = plain_draw(logits[i], noise(t, "token")[i], heat)
            weights = [math.exp(x) for x in logits[i]]
            score[i] = math.log(weights[tokens[i]] / sum(weights))
            score[i] += temperature * (1 - t / steps) * -math.log(-math.log(noise(t, "confidence")[i]))
            if turns is not None:
                score[i] = -turns[i]
        masked = [i in sorted(score, key=score.get)[: left[t]] for i in range(len(tokens))]
    return tokens


def plain_draw(logits, u, heat):
    """The first code whose cumulated probability exceeds u; the likeliest where heat is 0."""
    if heat == 0:
        return max(range(len(logits)), key=lambda code: logits[code])
    weights = [math.exp(x / heat) for x in logits]
    total = 0.0
    for code, weight in enumerate(weights):  # noqa: B007
        total += weight / sum(weights)
        if total > u:
            break
    return code


def lists(noise, i):
    """The noise of picture i of a batch as lists."""
    return lambda t, purpose: noise(t, purpose)[i].tolist()


# ---- Halton order


def mirrored(number: int, base: int) -> Fraction:
    """The radical inverse, exactly: digit k of `number` (from the lowest, k = 1) stands for 1 / base^k."""
    digits = []
    while number:
        digits.append(number % base)
        number //= base
    return sum((Fraction(digit, base**k) for k, digit in enumerate(digits, 1)), Fraction(0))


def exact_turns(side: int) -> dict[tuple[int, int], int]:
    """(row, column) -> the rank of the first point of the Halton sequence that lies in this cell."""
    first, number = {}, 1
    while len(first) < side * side:
        cell = math.floor(mirrored(number, 2) * side), math.floor(mirrored(number, 3) * side)
        first.setdefault(cell, number)
        number += 1
    return {cell: rank for rank, cell in enumerate(sorted(first, key=first.get))}


@pytest.mark.parametrize("side", [1, 2, 4, 16])
def test_halton_visits_every_cell_once_in_the_order_of_the_exact_sequence(side):
    turns = decode.halton(side)
    assert sorted(turns.ravel().tolist()) == list(range(side * side))
    assert {(i, j): int(turns[i, j]) for i in range(side) for j in range(side)} == exact_turns(side)


def test_halton_by_hand():
    # Points 1, 2, 4 and 5 are new: (1/2, 1/3), (1/4, 2/3), (1/8, 4/9), (5/8, 7/9); 3 is (3/4, 1/9), in the first's cell
    assert decode.halton(2).tolist() == [[2, 1], [0, 3]]


def test_halton_spreads_early_turns_over_the_picture():
    turns = torch.from_numpy(decode.halton(16))
    quarters = turns.lt(32).reshape(4, 4, 4, 4).sum(dim=(1, 3))
    assert quarters.min() == 1 and quarters.max() == 3  # 32 of 256 tokens: about two in each of 16 regions


def test_the_shift_goes_around_the_grid():
    side = 4
    shifts = [(down, right) for down in range(side) for right in range(side)]
    u = torch.full((len(shifts), side * side), 0.9, dtype=torch.float64)  # the others say nothing
    u[:, :2] = torch.tensor([[(down + 0.5) / side, (right + 0.5) / side] for down, right in shifts])
    order, turns = decode.halton_order(side * side, u), exact_turns(side)
    assert order.shape == (16, 16) and order.dtype == torch.float64
    for (down, right), found in zip(shifts, order, strict=True):
        expected = [turns[(i + down) % side, (j + right) % side] for i in range(side) for j in range(side)]
        assert found.tolist() == expected
    edges = torch.tensor([[2.0**-53, 1 - 2.0**-53, *[0.5] * 14]], dtype=torch.float64)
    assert decode.halton_order(16, edges)[0].tolist() == order[shifts.index((0, 3))].tolist()


def test_the_shift_belongs_to_the_picture():
    noise = decode.keyed_noise(3, np.arange(40), 256)
    together = decode.halton_order(256, noise(0, "order").double())
    assert len({tuple(row) for row in together.tolist()}) > 30  # 256 shifts: 40 draws hardly ever give fewer
    for i in (0, 7, 39):
        alone = decode.halton_order(256, decode.keyed_noise(3, [i], 256)(0, "order").double())
        assert (alone[0] == together[i]).all()
    other = decode.halton_order(256, decode.keyed_noise(4, np.arange(40), 256)(0, "order").double())
    assert (other != together).any()


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_halton_equals_one_picture_at_a_time(steps):
    tokens, masked = batch(16, 0, 1, 8, 15, 3, 16)
    index, predict = [5, 900, 31, 8, 77, 2, 41], predictor()
    noise, asked, seen = decode.keyed_noise(9, index, N), set(), [masked]

    def listened(t, purpose):
        asked.add(purpose)
        return noise(t, purpose)

    def watch(t, now, left):
        seen.append(left.clone())
        assert (now[~masked] == tokens[~masked]).all()

    made = decode.decode(
        predict, tokens, masked, noise=listened, steps=steps, temperature=6.0, order="halton", on_step=watch
    )
    assert "confidence" not in asked
    side, turns = math.isqrt(N), exact_turns(math.isqrt(N))
    for i in range(len(index)):
        down, right = (int(float(u) * side) for u in noise(0, "order")[i, :2])
        mine = [turns[(row + down) % side, (column + right) % side] for row in range(side) for column in range(side)]
        alone = plain_decode(predict, tokens[i].tolist(), masked[i].tolist(), steps, lists(noise, i), turns=mine)
        assert made[i].tolist() == alone, i
        assert [int(left[i].sum()) for left in seen] == plain_counts(int(masked[i].sum()), steps)
    finals = torch.stack([before & ~after for before, after in pairwise(seen)]).sum(0)
    assert (finals == masked.long()).all()  # each masked one exactly once, known ones never


def test_another_order_draws_the_same_first_tokens():
    """The order decides which tokens stay, not what is drawn."""
    tokens, masked = batch(16, 9)
    first = {}
    for order in ("confidence", "halton"):
        noise = decode.keyed_noise(1, [0, 1], N)
        states = []
        decode.decode(
            predictor(),
            tokens,
            masked,
            noise=noise,
            steps=6,
            temperature=2.0,
            order=order,
            on_step=lambda t, now, left, states=states: states.append((now.clone(), left.clone())),
        )
        first[order] = states[0]
    assert (first["confidence"][0] == first["halton"][0]).all()
    assert (first["confidence"][1] != first["halton"][1]).any()


# ---- temperature of the tokens


@pytest.mark.parametrize("heat", [0.0, 0.3, 1.0, 2.5])
def test_token_temperature_equals_the_plain_formula(heat):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, CODES, generator=generator) * 3
    u = torch.rand(200, generator=generator, dtype=torch.float64)
    tokens, logp = decode.draw(logits, u, heat)
    exact = logits.double()
    for row, number, token, confidence in zip(exact.tolist(), u.tolist(), tokens.tolist(), logp.tolist(), strict=True):
        assert token == plain_draw(row, number, heat)
        total = sum(math.exp(x) for x in row)
        assert confidence == pytest.approx(math.log(math.exp(row[token]) / total), abs=1e-12)  # at temperature 1
    if heat == 0:
        assert (tokens == logits.argmax(dim=1)).all()
    if heat == 1:
        assert all((a == b).all() for a, b in zip(decode.draw(logits, u), (tokens, logp), strict=True))


def test_token_temperature_follows_the_distribution():
    logits = torch.tensor([0.0, 1.0, -2.0, 3.0, -torch.inf, 0.5])
    u = torch.from_numpy(np.random.default_rng(5).random(40_000))
    tokens, _ = decode.draw(logits.expand(len(u), 6), u, 1.7)
    weights = [math.exp(x / 1.7) for x in logits.tolist()]
    expected = np.array([weight / sum(weights) * len(u) for weight in weights])
    counts = torch.bincount(tokens, minlength=6).numpy()
    assert counts[4] == 0
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


@pytest.mark.parametrize("heat", [0.0, 0.4, 3.0])
def test_decoding_with_a_token_temperature_equals_one_picture_at_a_time(heat):
    tokens, masked = batch(16, 5, 11, 0)
    noise, predict = decode.keyed_noise(2, np.arange(4), N), predictor()
    made = decode.decode(predict, tokens, masked, noise=noise, steps=7, temperature=1.5, token_temperature=heat)
    for i in range(4):
        mine = (predict, tokens[i].tolist(), masked[i].tolist(), 7, lists(noise, i))
        assert made[i].tolist() == plain_decode(*mine, temperature=1.5, heat=heat)


# ---- drop


class Recorder:
    """A predictor that remembers what it was called with."""

    def __init__(self):
        self.predict, self.calls = predictor(), []

    def __call__(self, tokens, masked, keep=None, *condition):
        self.calls.append((masked.clone(), keep, condition))
        return self.predict(tokens, masked, keep)


@pytest.mark.parametrize("drop, dropped", [(0.5, 8), (0.4, 7), (0.05, 1), (0.9, 15)])
@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_drop_leaves_out_masked_tokens_while_every_picture_has_enough(drop, dropped, order):
    numbers = (16, 15, 16, 11)
    tokens, masked = batch(*numbers)
    noise, predict = decode.keyed_noise(6, np.arange(4), N), Recorder()
    made = decode.decode(predict, tokens, masked, noise=noise, steps=8, temperature=2.0, drop=drop, order=order)
    fewest = [min(counts) for counts in zip(*(plain_counts(number, 8) for number in numbers), strict=True)]
    assert [keep is not None for _, keep, _ in predict.calls] == [fewest[t] >= dropped for t in range(8)]
    keeps = []
    for t, (left, keep, _) in enumerate(predict.calls, 1):
        keeps.append([None] * 4 if keep is None else keep.tolist())
        if keep is None:
            continue
        assert keep.dtype == torch.int64 and keep.shape == (4, N - dropped)
        for i, row in enumerate(keep.tolist()):
            u = noise(t, "drop")[i].tolist()
            candidates = [place for place in range(N) if left[i, place]]
            out = sorted(candidates, key=lambda place, u=u: u[place])[:dropped]
            assert row == [place for place in range(N) if place not in out]  # ascending
    if order == "confidence":  # and it is these that the logits were computed from
        for i in range(4):
            mine = (predict.predict, tokens[i].tolist(), masked[i].tolist(), 8, lists(noise, i))
            assert made[i].tolist() == plain_decode(*mine, temperature=2.0, keeps=[keep[i] for keep in keeps])


def test_without_drop_all_tokens_enter():
    tokens, masked = batch(16, 16)
    predict, asked = Recorder(), Counter()
    noise = decode.keyed_noise(6, np.arange(2), N)

    def listened(t, purpose):
        asked[purpose] += 1
        return noise(t, purpose)

    decode.decode(predict, tokens, masked, noise=listened, steps=8, temperature=2.0)
    assert [(keep, condition) for _, keep, condition in predict.calls] == [(None, ())] * 8
    assert asked == {"token": 8, "confidence": 8}


def test_a_known_token_is_never_dropped():
    masked = torch.tensor([[True, False, True, True, False, True]])
    u = torch.tensor([[0.9, 0.0, 0.2, 0.8, 0.1, 0.3]], dtype=torch.float64)
    assert decode.kept(masked, u, 2).tolist() == [[0, 1, 3, 4]]
    assert decode.kept(masked, u, 4).tolist() == [[1, 4]]


# ---- labels and guidance


@pytest.mark.parametrize(
    "schedule, scales",
    [
        ("constant", [3.0, 3.0, 3.0, 3.0]),
        ("linear", [0.75, 1.5, 2.25, 3.0]),
        # (1 - cos(pi s)) / 2 of s = (1/4)^4, (1/2)^4, (3/4)^4, 1, times 3
        ("power-cosine", [0.0001129472, 0.0288220794, 0.6820125177, 3.0]),
    ],
)
def test_guidance_follows_its_schedule(schedule, scales):
    tokens, masked = batch(16, 4, 16)
    predict, labels = Recorder(), torch.tensor([2, -1, 0])
    noise = decode.keyed_noise(0, np.arange(3), N)
    common = {"noise": noise, "steps": 4, "temperature": 1.0, "labels": labels, "drop": 0.25}
    decode.decode(predict, tokens, masked, **common, guidance=3.0, guidance_schedule=schedule)
    given = [condition for _, _, condition in predict.calls]
    assert all(passed is labels for passed, _ in given)
    assert all(scale.shape == () and scale.is_floating_point() for _, scale in given)
    assert [float(scale) for _, scale in given] == pytest.approx(scales, rel=1e-6)
    predict.calls.clear()
    decode.decode(predict, tokens, masked, **common, guidance=0.0, guidance_schedule=schedule)
    assert [condition for _, _, condition in predict.calls] == [(labels, None)] * 4


def tiny_mage():
    model = Mage(
        encoder={"depth": 2, "width": 24, "heads": 2},
        decoder={"depth": 1, "width": 16, "heads": 2},
        tokens=N,
        codes=CODES,
        vocabulary=CODES + 2,
        dropout=0.1,
        padding="cls",
        classes=3,
    )
    for name, parameter in model.named_parameters():  # initial values would make all logits alike
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        with torch.no_grad():
            parameter.normal_(0, 0.5, generator=generator)
    return model.eval()


@pytest.mark.parametrize("guidance, seen", [(0.0, 3), (2.0, 6)])
@pytest.mark.parametrize("drop, length", [(0.0, 1 + N), (0.5, 1 + N // 2)])
def test_the_encoder_runs_once_a_step(guidance, seen, drop, length):
    model, shapes = tiny_mage(), {"encoder": [], "decoder": []}
    for name, block in (("encoder", model.blocks[0]), ("decoder", model.decoder_blocks[0])):
        block.register_forward_pre_hook(lambda block, args, name=name: shapes[name].append(tuple(args[0].shape)))
    tokens, masked = batch(N, N, N)
    noise = decode.keyed_noise(0, np.arange(3), N)
    labels = torch.tensor([0, 1, 2])
    settings = {"noise": noise, "steps": 5, "temperature": 1.0, "drop": drop, "labels": labels, "guidance": guidance}
    decode.decode(model, tokens, masked, **settings)
    # 16 tokens, then floor(16 cos(pi/2 (t/5))) = 15, 12, 9, 4 of them masked: 8 can be dropped in four steps of five
    assert shapes["encoder"] == [(3, length, 24)] * 4 + [(3, 1 + N, 24)]
    assert shapes["decoder"] == [(seen, 2 + N, 16)] * 5  # with the label's token; twice where it is guided


def test_guided_decoding_equals_two_forwards_combined_by_hand():
    # The label is one of 17 tokens that this model attends to: it moves logits by a hundredth of their spread.
    model, labels, scale = tiny_mage(), torch.tensor([0, 1, 2, 1]), 60.0
    tokens, masked = batch(N, 7, N, 3)
    noise = decode.keyed_noise(4, np.arange(4), N)

    def by_hand(tokens, masked, keep, labels, guidance):
        given = model(tokens, masked, keep, labels).double()
        free = model(tokens, masked, keep, torch.full_like(labels, -1)).double()
        return given + float(guidance) * (given - free)

    common = {"noise": noise, "steps": 6, "temperature": 1.0, "labels": labels}
    common |= {"guidance": scale, "guidance_schedule": "linear"}
    made = decode.decode(model, tokens, masked, **common)
    assert (made == decode.decode(by_hand, tokens, masked, **common)).all()
    plain = decode.decode(model, tokens, masked, **common | {"guidance": 0.0})
    other = decode.decode(model, tokens, masked, **common | {"labels": labels.roll(1)})
    assert (plain != made).any() and (other != made).any()  # both matter
