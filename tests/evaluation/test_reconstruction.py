"""Figures of reconstructions against scikit-image and plain loops; sums that do not depend on how a stream is split."""

import math

import numpy as np
import pytest
import torch
from skimage import metrics

from mage_ds.evaluation.reconstruction import Sums, Worst, l1, perplexity, psnr, ssim

CODES = 16


def pictures(count=5, high=24, wide=32, seed=0, dtype=torch.float32):
    """Originals in [0, 1] and noisy drawings of them, some of whose pixels lie outside."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, high, wide, generator=rng, dtype=torch.float64)
    return x.to(dtype), (x + 0.3 * torch.randn(x.shape, generator=rng, dtype=torch.float64)).to(dtype)


def skimage_ssim(x, y):
    return metrics.structural_similarity(
        x,
        y,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        channel_axis=0,
    )


@pytest.mark.parametrize("size", [(24, 32), (11, 11), (64, 12)], ids=str)
def test_figures_are_those_of_scikit_image(size):
    x, y = pictures(4, *size)
    pairs = list(zip(x.double().numpy(), y.double().clamp(0, 1).numpy(), strict=True))
    assert np.allclose(ssim(x, y), [skimage_ssim(*pair) for pair in pairs], rtol=0, atol=1e-14)
    assert np.allclose(psnr(x, y), [metrics.peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs], rtol=1e-14)
    assert np.allclose(l1(x, y), [np.abs(a - b).mean() for a, b in pairs], rtol=1e-14)


def test_figures_of_a_perfect_and_of_a_16_bit_reconstruction():
    x, y = pictures()
    assert psnr(x, x).tolist() == [100.0] * 5 and torch.allclose(ssim(x, x), torch.ones(5, dtype=torch.float64))
    half = y.to(torch.bfloat16)
    assert torch.equal(psnr(x, half), psnr(x, half.double()))  # what is given counts, not how it is added


def test_pictures_below_the_window_have_no_ssim():
    x, y = pictures(2, 10, 32)
    assert ssim(x, y).isnan().all()
    sums = Sums(CODES)
    sums.add(x, y, torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, dtype=torch.bool))
    assert "ssim" not in sums.figures() and sums.figures()["psnr"] > 0


def added(parts, lpips=True):
    """Sums of each part of 12 pictures, the last of which does not count."""
    x, y = pictures(12)
    tokens = torch.randint(0, 9, (12, 6), generator=torch.Generator().manual_seed(2))
    counts = torch.arange(12) < 11
    totals = []
    for part in parts:
        sums = Sums(CODES)
        given = torch.arange(12.0)[part] if lpips else None
        sums.add(x[part], y[part], tokens[part], counts[part], given)
        totals.append(sums)
    return totals, (x[:11], y[:11], tokens[:11])


def test_sums_are_means_over_what_counts():
    (sums,), (x, y, tokens) = added([slice(0, 12)])
    figures = sums.figures()
    assert figures["n"] == 11 and figures["lpips"] == pytest.approx(5.0, abs=1e-12)
    for name, function in {"l1": l1, "psnr": psnr, "ssim": ssim}.items():
        assert figures[name] == pytest.approx(float(np.mean([function(x[i : i + 1], y[i : i + 1]) for i in range(11)])))
    counted = np.bincount(tokens.flatten(), minlength=CODES)
    assert sums.histogram.tolist() == counted.tolist()
    p = counted[counted > 0] / counted.sum()
    assert figures["codes_used"] == (counted > 0).sum() / CODES
    assert figures["perplexity"] == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)))


def test_sums_merge_in_any_order():
    (whole,), _ = added([slice(0, 12)])
    parts, _ = added([slice(0, 1), slice(1, 7), slice(7, 12)])
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = Sums(CODES)
        for i in order:
            merged.total += parts[i].total
        assert merged.figures() == pytest.approx(whole.figures(), rel=1e-12)


def test_without_lpips_and_without_pictures():
    (sums,), _ = added([slice(0, 12)], lpips=False)
    assert "lpips" not in sums.figures()
    assert Sums(CODES).figures() == {"n": 0}


def test_what_does_not_count_may_be_nan():
    x, y = pictures(2)
    y[1] = math.nan
    sums = Sums(CODES)
    each = sums.add(x, y, torch.zeros(2, 4, dtype=torch.int64), torch.tensor([True, False]))
    assert math.isfinite(sums.figures()["psnr"]) and each["psnr"][1].isnan()


def test_perplexity_counts_codes_in_even_use():
    assert perplexity(torch.tensor([5.0, 5.0, 0.0, 5.0, 5.0])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0])) == pytest.approx(1)


@pytest.mark.parametrize("split", [[30], [1, 12, 17], [29, 1]], ids=str)
def test_worst_of_a_stream(split):
    error = np.random.default_rng(0).integers(0, 12, 30).astype(float)  # with equal ones
    error[4], index = math.nan, np.arange(30)
    index[7] = -1  # padding
    worst, start = Worst(5), 0
    for size in split:
        part = slice(start, start + size)
        worst.add(index[part], torch.tensor(error[part]), 10 * index[part])
        start += size
    error[4] = math.inf
    plain = sorted((i for i in range(30) if i != 7), key=lambda i: (-error[i], i))[:5]
    assert [kept.index for kept in worst.kept] == plain
    assert [kept.things for kept in worst.kept] == [(10 * i,) for i in plain]


def test_worst_of_two_streams():
    one, other, both = Worst(3), Worst(3), Worst(3)
    one.add([0, 1, 2, 3], [4, 1, 3, 9])
    other.add([4, 5], [5, 4])
    both.add(range(6), [4, 1, 3, 9, 5, 4])
    one.merge(other.kept)
    assert one.kept == both.kept
