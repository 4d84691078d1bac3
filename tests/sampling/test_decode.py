"""Decoding against a plain loop over one picture at a time, written from the specification alone."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from mage_ds.sampling import decode, tiles

CODES = 11


def predictor(codes=CODES, seed=0, dtype=torch.float32, scale=2.0):
    """Logits that depend on every known token and on the mask, for pictures independently."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(64, codes + 1, codes, generator=generator) * scale

    def predict(tokens, masked, keep=None):
        ids = torch.where(masked, codes, tokens)
        known = torch.stack([weights[i, ids[:, i]] for i in range(ids.shape[1])], dim=1)
        return (known + known.mean(dim=1, keepdim=True).roll(1, dims=2)).to(dtype)

    return predict


def plain_decode(predict, tokens, masked, steps, temperature, noise):
    """One picture: tokens list[int], masked list[bool], noise(t) -> two lists; all in Python floats."""
    tokens, masked = list(tokens), list(masked)
    start = sum(masked)
    for t in range(1, steps + 1):
        uniform, uniform_confidence = noise(t)
        logits = predict(torch.tensor([tokens]), torch.tensor([masked]))[0].double().tolist()
        confidence = [math.inf] * len(tokens)
        for i in range(len(tokens)):
            if not masked[i]:
                continue
            top = max(logits[i])
            weights = [math.exp(x - top) for x in logits[i]]
            total, cumulated, code = sum(weights), 0.0, None
            for code, w in enumerate(weights):  # noqa: B007
                cumulated += w / total
                if cumulated > uniform[i]:
                    break
            tokens[i] = code
            gumbel = -math.log(-math.log(uniform_confidence[i]))
            confidence[i] = math.log(weights[code] / total) + temperature * (1 - t / steps) * gumbel
        if t == steps or start == 0:
            continue
        n = math.floor(start * math.cos(math.pi / 2 * (t / steps)))
        n = max(1, min(sum(masked) - 1, n))
        order = sorted(range(len(tokens)), key=lambda i: (confidence[i], i))
        masked = [i in order[:n] for i in range(len(tokens))]
    return tokens


def start(rng, pictures, n):
    """Pictures with unlike numbers of masked tokens, none and all among them."""
    tokens = torch.from_numpy(rng.integers(0, CODES, (pictures, n)))
    masked = torch.zeros(pictures, n, dtype=torch.bool)
    for i in range(pictures):
        masked[i, torch.from_numpy(rng.permutation(n)[: [n, 0, 1, n // 2, n - 1, 3][i % 6]])] = True
    return tokens, masked


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_one_picture_at_a_time(steps, temperature, dtype):
    rng = np.random.default_rng(steps)
    tokens, masked = start(rng, 12, 16)
    index = rng.permutation(1000)[:12]
    noise = decode.keyed_noise(5, index, 16)
    predict = predictor(dtype=dtype)
    made = decode.decode(predict, tokens, masked, steps=steps, temperature=temperature, noise=noise)
    for i in range(12):
        alone = plain_decode(
            predict,
            tokens[i].tolist(),
            masked[i].tolist(),
            steps,
            temperature,
            lambda t, i=i: [noise(t, purpose)[i].tolist() for purpose in ("token", "confidence")],
        )
        assert made[i].tolist() == alone, i
    assert (made[~masked] == tokens[~masked]).all()
    assert made.dtype == torch.int64 and (made < CODES).all()


def test_every_position_becomes_final_exactly_once():
    tokens, masked = start(np.random.default_rng(1), 12, 24)
    seen = [masked]
    noise = decode.keyed_noise(0, np.arange(12), 24)
    states = []
    made = decode.decode(
        predictor(),
        tokens,
        masked,
        steps=20,
        temperature=1.0,
        noise=noise,
        on_step=lambda t, now, left: (seen.append(left.clone()), states.append((t, now.clone()))),
    )
    assert [t for t, _ in states] == list(range(1, 21)) and (states[-1][1] == made).all()
    for (before, after), (_, now) in zip(pairwise(seen), states, strict=True):
        assert (before | ~after).all()  # never masked again once final
        assert (now[~after] == made[~after]).all()  # a final token keeps its value
    finals = torch.stack([before & ~after for before, after in pairwise(seen)]).sum(0)
    assert (finals == masked.long()).all()  # each masked one exactly once, known ones never
    assert not seen[-1].any()


def test_a_single_token_is_sampled_again_until_the_last_step():
    tokens, masked = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[False, True, False, False]])
    left = []

    def flat(tokens, masked, keep):
        return torch.zeros(1, 4, CODES)

    def noise(step, purpose):
        return torch.full((1, 4), (step - 0.5) / CODES if purpose == "token" else 0.5)

    def watch(t, now, masked_now):
        left.append((int(now[0, 1]), int(masked_now.sum())))

    decode.decode(flat, tokens, masked, steps=5, temperature=1.0, noise=noise, on_step=watch)
    assert left == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 0)]


def test_ties_go_by_position():
    def flat(tokens, masked, keep):
        return torch.zeros(*tokens.shape, 4)

    same = torch.full((2, 6), 0.3)
    masked = torch.tensor([[True] * 6, [False, True, True, False, True, True]])
    left = []
    decode.decode(
        flat,
        torch.zeros(2, 6, dtype=torch.int64),
        masked,
        steps=4,
        temperature=2.0,
        noise=lambda t, purpose: same,
        on_step=lambda t, now, m: left.append(m.long().tolist()),
    )
    # floor(6 cos) = 5, 4, 2; floor(4 cos) = 3, 2, 1: of equal confidences the first are masked again
    assert [row[0] for row in left] == [[1] * 5 + [0], [1] * 4 + [0] * 2, [1] * 2 + [0] * 4, [0] * 6]
    assert [row[1] for row in left] == [[0, 1, 1, 0, 1, 0], [0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6]


def test_one_step_is_one_draw_at_every_position():
    predict, noise = predictor(), decode.keyed_noise(3, np.arange(4), 16)
    tokens, masked = torch.zeros(4, 16, dtype=torch.int64), torch.ones(4, 16, dtype=torch.bool)
    made = decode.decode(predict, tokens, masked, steps=1, temperature=6.0, noise=noise)
    p = torch.softmax(predict(tokens, masked).double(), -1).numpy()
    u = noise(1, "token").numpy()
    expected = (p.cumsum(-1) <= u[..., None]).sum(-1)
    assert (made.numpy() == expected).all()


def test_nothing_masked_returns_the_picture_unchanged():
    tokens = torch.randint(0, CODES, (3, 16))
    made = decode.decode(
        predictor(),
        tokens,
        torch.zeros(3, 16, dtype=torch.bool),
        steps=7,
        temperature=1.0,
        noise=decode.keyed_noise(0, [0, 1, 2], 16),
    )
    assert (made == tokens).all()


def test_draw_follows_the_distribution():
    logits = torch.tensor([0.0, 1.0, -2.0, 3.0, -torch.inf, 0.5, -torch.inf])
    u = torch.from_numpy(np.random.default_rng(0).random(40_000))
    tokens, logp = decode.draw(logits.expand(len(u), 7), u)
    p = torch.softmax(logits.double(), 0)
    counts = torch.bincount(tokens, minlength=7)
    assert counts[4] == counts[6] == 0
    possible = p > 0
    assert stats.chisquare(counts[possible].numpy(), (p[possible] * len(u)).numpy()).pvalue > 1e-3
    assert torch.allclose(logp, p.log()[tokens], atol=1e-12)


def test_draw_at_the_edges_stays_among_possible_codes():
    logits = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    u = torch.tensor([2.0**-53, 0.5 - 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert decode.draw(logits.expand(4, 4), u)[0].tolist() == [1, 1, 2, 2]


def test_noise_belongs_to_the_picture_not_to_the_batch():
    noise, purposes = decode.keyed_noise(7, np.arange(10), 16), ("token", "confidence", "drop", "order")
    together = {purpose: noise(3, purpose) for purpose in purposes}
    for purpose, values in together.items():
        for i in range(10):
            assert (values[i] == decode.keyed_noise(7, [i], 16)(3, purpose)[0]).all()
    assert len({float(values[0, 0]) for values in together.values()}) == len(purposes)
    assert not (together["token"] == noise(4, "token")).any()
    assert not (together["token"] == decode.keyed_noise(8, np.arange(10), 16)(3, "token")).any()
    predict = predictor()
    made = {}
    for batch in (5, 64):
        rows = []
        for index in tiles.tiles(70, batch):
            tokens, masked = (
                torch.zeros(batch, 16, dtype=torch.int64),
                torch.ones(batch, 16, dtype=torch.bool),
            )
            noise = decode.keyed_noise(7, index, 16)
            rows.append(decode.decode(predict, tokens, masked, steps=6, temperature=1.0, noise=noise))
        made[batch] = torch.cat(rows)[:70]
    assert (made[5] == made[64]).all()


def test_the_loop_reads_nothing_back():
    """A read waits for the device: there is one before the loop and none in it."""

    class Counted(torch.Tensor):
        reads = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.reads += func in (
                torch.Tensor.item,
                torch.Tensor.cpu,
                torch.Tensor.tolist,
                torch.Tensor.__bool__,
            )
            return super().__torch_function__(func, types, args, kwargs or {})

    tokens = torch.zeros(2, 16, dtype=torch.int64).as_subclass(Counted)
    masked = torch.ones(2, 16, dtype=torch.bool).as_subclass(Counted)
    noise = decode.keyed_noise(0, [0, 1], 16)
    decode.decode(predictor(), tokens, masked, steps=9, temperature=1.0, noise=noise)
    assert Counted.reads == 1  # the number of masked tokens, before the loop


def test_pixels_are_truncated_or_rounded():
    values = [-0.5, 0.0, 0.999 / 255, 1.6 / 255, 254.5 / 255, 1.0, 1.7]
    images = torch.tensor(values).reshape(1, 1, 1, 7).expand(2, 3, 1, 7)
    expected = [0, 0, 0, 1, 254, 255, 255]
    shown = decode.pixels(images)
    assert shown.shape == (2, 1, 7, 3) and shown.dtype == np.uint8
    assert shown[1, 0, :, 2].tolist() == expected
    assert decode.pixels(images, rounded=True)[0, 0, :, 0].tolist() == [0, 0, 1, 2, 254, 255, 255]
    channels = torch.arange(3).reshape(1, 3, 1, 1) / 255 + 0.1 / 255
    assert decode.pixels(channels)[0, 0, 0].tolist() == [0, 1, 2]


def test_tiles_do_not_depend_on_the_workers_nor_on_num():
    whole = tiles.tiles(130, 64)
    assert [(t[0], t[-1], len(t)) for t in whole] == [(0, 63, 64), (64, 127, 64), (128, 191, 64)]
    assert all((a == b).all() for a, b in zip(whole, tiles.tiles(500, 64), strict=False))
    for world in (1, 2, 3, 5):
        shares = [tiles.mine(whole, rank, world) for rank in range(world)]
        assert sorted(t[0] for share in shares for t in share) == [0, 64, 128]
    assert len(tiles.tiles(1, 64)) == len(tiles.tiles(64, 64)) == 1
