"""Mask ratios against scipy's truncated normal, masks against a plain loop."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from mage_ds.models.masking import mask_ratio, masks

PAPER = {"mean": 0.55, "std": 0.25, "low": 0.5, "high": 1.0}


def loop_masks(noise, ratio, drop):
    """Masked and kept positions of one sample, by repeated search for the smallest noise."""
    count = len(noise)
    left, order = list(range(count)), []
    while left:
        smallest = left[0]
        for position in left:
            if noise[position] < noise[smallest]:
                smallest = position
        order.append(smallest)
        left.remove(smallest)
    masked = set(order[: math.ceil(ratio * count)])
    dropped = set(order[: math.ceil(drop * count)])
    return [p in masked for p in range(count)], [p for p in range(count) if p not in dropped]


def test_ratios_follow_the_truncated_normal():
    truth = stats.truncnorm(-0.2, 1.8, loc=0.55, scale=0.25)
    drawn = mask_ratio(torch.tensor(np.random.default_rng(0).random(20_000)), **PAPER)
    assert drawn.dtype == torch.float64
    assert stats.kstest(drawn.numpy(), truth.cdf).pvalue > 0.05
    assert drawn.min() >= 0.5 and drawn.max() <= 1.0
    assert drawn.mean().item() == pytest.approx(0.694, abs=0.003)
    assert (drawn < 0.6).double().mean().item() == pytest.approx(0.292, abs=0.01)


def test_ratio_is_the_inverse_cdf():
    u = np.linspace(1e-9, 1 - 1e-9, 1001)
    expected = stats.truncnorm(-0.2, 1.8, loc=0.55, scale=0.25).ppf(u)
    np.testing.assert_allclose(mask_ratio(torch.tensor(u), **PAPER).numpy(), expected, rtol=0, atol=1e-12)
    capped = mask_ratio(torch.tensor(u), mean=0.55, std=0.25, low=0.5, high=0.6).numpy()
    expected = stats.truncnorm(-0.2, 0.2, loc=0.55, scale=0.25).ppf(u)
    np.testing.assert_allclose(capped, expected, rtol=0, atol=1e-12)


def test_float32_uniforms_stay_inside_the_interval():
    ratio = mask_ratio(torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24, 1.0]), **PAPER)
    assert ratio.dtype == torch.float64
    torch.testing.assert_close(ratio[[0, -1]], torch.tensor([0.5, 1.0], dtype=torch.float64))
    assert ((ratio >= 0.5) & (ratio <= 1.0)).all()


@pytest.mark.parametrize("count", [16, 17])
@pytest.mark.parametrize("drop", [0.5, 0.0, 0.3])
def test_masks_equal_a_plain_loop(count, drop):
    rng = np.random.default_rng(count)
    noise = rng.random((40, count))
    noise[20:] = rng.integers(0, 4, (20, count)) / 4  # many ties
    ratio = rng.uniform(0.5, 1.0, 40)
    ratio[:3] = 0.5, 0.75, 1.0
    masked, keep = masks(torch.tensor(noise), torch.tensor(ratio), drop)
    assert masked.dtype == torch.bool and masked.shape == (40, count)
    assert keep.dtype == torch.int64 and keep.shape == (40, count - math.ceil(drop * count))
    for i in range(40):
        expected_masked, expected_keep = loop_masks(noise[i], ratio[i], drop)
        assert masked[i].tolist() == expected_masked
        assert keep[i].tolist() == expected_keep


def test_paper_size():
    """ceil(m_r 256) masked, exactly 128 dropped, all of them masked, whatever m_r."""
    rng = np.random.default_rng(5)
    ratio = mask_ratio(torch.tensor(rng.random(64)), **PAPER)
    masked, keep = masks(torch.tensor(rng.random((64, 256))), ratio, 0.5)
    assert masked.sum(1).tolist() == [math.ceil(r * 256) for r in ratio.tolist()]
    assert keep.shape == (64, 128)
    dropped = torch.ones(64, 256, dtype=torch.bool).scatter(1, keep, False)
    assert dropped.sum(1).tolist() == [128] * 64
    assert (dropped & ~masked).sum() == 0


def test_static_shapes():
    compiled = torch.compile(masks, fullgraph=True, backend="eager")
    noise, ratio = torch.rand(3, 16), torch.full((3,), 0.7, dtype=torch.float64)
    for got, expected in zip(compiled(noise, ratio, 0.5), masks(noise, ratio, 0.5), strict=True):
        assert torch.equal(got, expected)
    masked, keep = masks(noise.to("meta"), mask_ratio(torch.rand(3, device="meta"), **PAPER), 0.5)
    assert masked.shape == (3, 16) and keep.shape == (3, 8)
