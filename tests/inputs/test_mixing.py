"""mixup and cutmix of a micro-batch: timm's own, and the formula written out."""

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup

from mage_ds import keyed
from mage_ds.inputs.mixing import mixed
from mage_ds.recipes.sections import Mix

CLASSES, SMOOTHING = 5, 0.1
BOTH = Mix(mixup=0.8, cutmix=1.0, probability=1.0, switch=0.5)


def batch(count: int = 6):
    torch.manual_seed(0)
    return torch.rand(count, 3, 16, 16), torch.arange(count) % CLASSES


def mix(pictures, labels, numbers, key=(0, 0, 0)):
    return mixed(pictures.clone(), labels, mix=numbers, classes=CLASSES, smoothing=SMOOTHING, key=key)


def smoothed(label: int) -> torch.Tensor:
    target = torch.full((CLASSES,), SMOOTHING / CLASSES, dtype=torch.float64)
    target[label] += 1 - SMOOTHING
    return target


def test_without_mix_targets_are_smoothed_labels_of_any_number_of_pictures():
    pictures, labels = batch(5)
    same, targets = mix(pictures, labels, None)
    assert torch.equal(same, pictures)
    torch.testing.assert_close(targets.double(), torch.stack([smoothed(int(label)) for label in labels]))
    logits = torch.randn(5, CLASSES)
    mine = torch.nn.functional.cross_entropy(logits, targets)
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
    torch.testing.assert_close(mine, theirs)
    assert mixed(None, labels, mix=None, classes=CLASSES, smoothing=0.0, key=(0, 0, 0))[0] is None


def test_it_is_timms_with_a_seed_of_the_first_sample():
    pictures, labels = batch()
    for index in range(8):
        seed = keyed.seed_of(3, "mix", 2, index) % 2**32
        np.random.seed(seed)
        theirs = Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, label_smoothing=SMOOTHING, num_classes=CLASSES)
        expected = theirs(pictures.clone(), labels)
        found = mix(pictures, labels, BOTH, (3, 2, index))
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_it_is_the_formula_and_both_ways_occur():
    """A pixel is its own, or lambda of its own and the rest of its partner's, in the shares of the labels."""
    pictures, labels = batch()
    kinds = set()
    for index in range(12):
        found, targets = mix(pictures, labels, BOTH, (0, 1, index))
        other = pictures.flip(0)
        # Picture 0 and its partner 5 share a label, of 1 and 4 the weight is seen.
        weight = ((targets[1, 1] - SMOOTHING / CLASSES) / (1 - SMOOTHING)).item()
        for row, pair in zip(targets, zip(labels, labels.flip(0), strict=True), strict=True):
            expected = weight * smoothed(int(pair[0])) + (1 - weight) * smoothed(int(pair[1]))
            torch.testing.assert_close(row.double(), expected, atol=1e-6, rtol=0)
        kept = (found == pictures).all(dim=1)[1]
        if kept.float().mean().item() == pytest.approx(weight, abs=1e-6):  # a box of the other's
            kinds.add("cut")
            assert torch.equal(found[1][:, ~kept], other[1][:, ~kept])
        else:
            kinds.add("mixed")
            torch.testing.assert_close(found, weight * pictures + (1 - weight) * other)
    assert kinds == {"cut", "mixed"}


def test_it_depends_on_the_key_alone_and_leaves_numpys_generator_as_it_was():
    pictures, labels = batch()
    np.random.seed(5)
    expected = np.random.rand(3)
    np.random.seed(5)
    one = mix(pictures, labels, BOTH, (0, 1, 7))
    assert np.array_equal(np.random.rand(3), expected)
    np.random.rand(11)
    two, three = mix(pictures, labels, BOTH, (0, 1, 7)), mix(pictures, labels, BOTH, (0, 2, 7))
    assert torch.equal(one[0], two[0]) and not torch.equal(one[0], three[0])


def test_a_share_of_the_micro_batches_is_not_mixed():
    pictures, labels = batch()
    half = BOTH.model_copy(update={"probability": 0.5})
    alike = [torch.equal(mix(pictures, labels, half, (0, 0, index))[0], pictures) for index in range(200)]
    assert 0.38 < np.mean(alike) < 0.62
