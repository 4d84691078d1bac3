"""Classifiers: drop path, initial values, and a probe's head as one linear layer."""

import pytest
import torch
from timm.layers import DropPath

from mage_ds.models import Classifier, PixelViT, ProbeHead, initialize
from mage_ds.models.classifier import folded
from mage_ds.models.mage import class_id

ENCODER = {"depth": 4, "width": 24, "heads": 2}


def classifier(**more) -> Classifier:
    numbers = {"encoder": ENCODER, "tokens": 16, "vocabulary": 34, "class_id": class_id(34), "classes": 7}
    return Classifier(**numbers, dropout=0.0, **more)


def test_drop_path_rises_in_a_line():
    model = classifier(drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert all(isinstance(block.drop_path2, DropPath) for block in model.blocks[1:])
    pixels = PixelViT(encoder=ENCODER, image_size=16, patch=4, classes=7, drop_path=0.3)
    assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in pixels.blocks] == pytest.approx(rates)


@pytest.mark.parametrize(
    "make", [classifier, lambda **more: PixelViT(encoder=ENCODER, image_size=16, patch=4, classes=7, **more)]
)
def test_initial_values_from_scratch(make):
    model = make(head_std=2e-5)
    initialize(model, lambda name: torch.Generator().manual_seed(sum(map(ord, name))))
    for name, value in model.state_dict().items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif value.ndim == 1:
            assert bool((value == 1).all()), name
        elif name == "head.weight":
            assert 1e-5 < float(value.std()) < 3e-5
            assert float(value.abs().max()) < 2  # truncated
        elif value.numel() > 300:
            assert float(value.std()) == pytest.approx(0.02, rel=0.15), name


def test_a_folded_head_gives_the_scores_of_the_unfolded():
    torch.manual_seed(0)
    head = ProbeHead(width=12, classes=5, head_std=0.01)
    initialize(head, lambda name: torch.Generator().manual_seed(3))
    for _ in range(20):
        head(torch.randn(64, 12) * torch.arange(1, 13) + 5)
    head.eval()
    x = torch.randn(6, 12) * torch.arange(1, 13) + 5
    one = folded(head.state_dict())
    with torch.no_grad():
        scaled = (x.double() - head.norm.running_mean.double()) / (head.norm.running_var.double() + 1e-6).sqrt()
        plain = scaled @ head.linear.weight.double().T + head.linear.bias.double()
        torch.testing.assert_close(head(x).double(), plain, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.nn.functional.linear(x, **one).double(), plain, rtol=1e-5, atol=1e-6)


def test_the_class_word_is_the_published_one_in_the_published_vocabulary():
    assert (class_id(2025), class_id(1026)) == (1100, 1024)
