"""The judge against plain loops, and on digits, noise and mixtures."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mage_ds.evaluation import readable


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's digits as 32 px pictures, half to learn from, half held out."""
    data = load_digits()
    grey = (data.images / 16 * 255).round().astype(np.uint8)
    pictures = grey.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3)
    order = np.random.default_rng(0).permutation(len(grey))
    half = len(grey) // 2
    learn, test = order[:half], order[half:]
    return readable.fit(pictures[learn], data.target[learn]), pictures[test], data.target[test]


def plain_area_average(grey):
    """8 x 8 area means of a 2-D array by loops over pixels, split at the edges of the cells."""
    height, width = grey.shape
    out = np.zeros((8, 8))
    for i in range(8):
        for j in range(8):
            top, bottom, left, right = i * height / 8, (i + 1) * height / 8, j * width / 8, (j + 1) * width / 8
            total = 0.0
            for y in range(height):
                for x in range(width):
                    tall = max(0.0, min(y + 1, bottom) - max(y, top))
                    wide = max(0.0, min(x + 1, right) - max(x, left))
                    total += grey[y, x] * tall * wide
            out[i, j] = total / ((bottom - top) * (right - left))
    return out


@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (21, 13), (5, 40), (1, 1)])
def test_pictures_are_averaged_by_area(shape):
    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    grey = (0.299 * picture[..., 0] + 0.587 * picture[..., 1] + 0.114 * picture[..., 2]) / 255
    assert np.allclose(readable.seen([picture]).reshape(8, 8), plain_area_average(grey), atol=1e-12)


def test_white_is_one_and_sizes_may_differ():
    seen = readable.seen([np.full((32, 32, 3), 255, np.uint8), np.zeros((9, 50, 3), np.uint8)])
    assert seen.shape == (2, 64) and np.allclose(seen[0], 1) and (seen[1] == 0).all()


def test_real_digits_are_readable_and_judged_right(digits):
    classifier, pictures, labels = digits
    said = readable.readable(classifier, pictures)
    assert (said.label == labels).mean() > 0.97
    assert 0.85 < said.readable.mean() < 0.97  # about nine in ten
    assert (said.readable == (said.confidence > 0.8)).all() and said.confidence.max() <= 1


def test_noise_and_mixtures_are_not(digits):
    classifier, pictures, _ = digits
    rng = np.random.default_rng(2)
    noise = rng.integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    one, other = (pictures[rng.integers(0, len(pictures), 300)] for _ in range(2))
    mixed = ((one.astype(int) + other) // 2).astype(np.uint8)
    assert readable.readable(classifier, noise).readable.mean() < 0.02
    assert readable.readable(classifier, mixed).readable.mean() < 0.4


def test_the_judge_is_the_same_each_time(digits):
    data = load_digits()
    pictures = data.images[:300, ..., None].repeat(3, axis=3).astype(np.uint8)
    first, second = (readable.readable(readable.fit(pictures, data.target[:300]), pictures) for _ in range(2))
    assert (first.confidence == second.confidence).all()


def test_summary_counts_every_picture():
    said = readable.Judgement(np.array([0.9, 0.8, 0.95, 0.1]), np.array([0, 2, 2, 3]))
    assert said.summary(5, np.array([0, 1, 2, 3])) == {
        "pictures": 4,
        "readable": 0.5,  # 0.8 itself is not above 0.8
        "right": 0.75,
        "classes": [0.25, 0.0, 0.5, 0.25, 0.0],
    }
    assert "right" not in said.summary(5)


def test_copies():
    known = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.int64)
    made = np.array([[4, 5, 6], [1, 2, 4], [1, 2, 3], [3, 2, 1]], dtype=np.uint16)
    assert readable.share_copied(made, known) == 0.5
    assert readable.share_copied(made[1:2], known) == 0.0
