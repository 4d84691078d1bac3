"""MAGE-C's contrast against plain loops in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_mage_reference import sample_inputs, tiny

from mage_ds.models import ContrastiveEncoder, MageC, initialize
from mage_ds.models.contrastive import BatchNorm, info_nce

PROJECTION = {"hidden": 10, "hidden_layers": 2, "out": 6}


def alone(x):
    return x


def made_views(pictures: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(2 * pictures, 6, generator=generator, dtype=torch.float64)
    return F.normalize(views, dim=1).requires_grad_()


def plain_info_nce(views, counted, temperature: float):
    """One view at a time: its other view among the other views of all counted pictures."""
    pictures = len(counted)
    losses, right = [], []
    for place in range(2 * pictures):
        if not counted[place % pictures]:
            continue
        others = [o for o in range(2 * pictures) if o != place and counted[o % pictures]]
        partner = (place + pictures) % (2 * pictures)
        scores = {other: views[place] @ views[other] / temperature for other in others}
        losses.append(-(scores[partner] - torch.stack(list(scores.values())).logsumexp(0)))
        right.append(max(scores, key=scores.get) == partner)
    return sum(losses) / len(losses), sum(right) / len(right)


@pytest.mark.parametrize("counted", [[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0]])
def test_info_nce_equals_the_plain_loop(counted):
    views, plain = made_views(5), made_views(5)
    loss, top1, pairs = info_nce(views, torch.tensor(counted).double(), temperature=0.2, gathered=alone)
    expected, right = plain_info_nce(plain, counted, 0.2)
    assert float(loss) == pytest.approx(float(expected), abs=1e-12)
    assert float(top1) == pytest.approx(right) and int(pairs) == sum(counted)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(views.grad, plain.grad, rtol=0, atol=1e-12)


def test_views_that_are_alike_and_unlike_all_others():
    axes = torch.eye(6)[:4].repeat(2, 1)
    loss, top1, _ = info_nce(axes, torch.ones(4), temperature=0.2, gathered=alone)
    assert float(loss) == pytest.approx(math.log(1 + 6 * math.exp(-5)), rel=1e-6) and float(top1) == 1


def test_without_pairs_the_loss_is_0_and_has_gradients():
    views = made_views(3)
    loss, top1, pairs = info_nce(views, torch.zeros(3).double(), temperature=0.2, gathered=alone)
    loss.backward()
    assert float(loss) == float(top1) == float(pairs) == 0
    assert views.grad.abs().sum() == 0


def test_batch_norm_is_that_of_the_samples_that_count():
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 100
    counted = torch.tensor([1, 1, 0, 1, 0, 1, 1.0], dtype=torch.float64)
    ours, theirs = BatchNorm(5, shift=True).double(), torch.nn.BatchNorm1d(5).double()
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(torch.randn(5))
            other.copy_(mine)
    x.requires_grad_()
    made, expected = ours(x, counted, alone)[counted > 0], theirs(x[counted > 0])
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-9)
    for one, two in zip(
        torch.autograd.grad(made.square().sum(), [x, *ours.parameters()]),
        torch.autograd.grad(expected.square().sum(), [x, *theirs.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


def mage_c(model, kind=MageC):
    """`model`, a Mage, with a projection head, or its encoder with one."""
    numbers = {"encoder": {"depth": 2, "width": 16, "heads": 2}, "tokens": 9, "codes": 11, "vocabulary": 13}
    if kind is MageC:
        numbers |= {"decoder": {"depth": 2, "width": 24, "heads": 4}, "padding": "cls"}
    made = kind(projection=PROJECTION, dropout=0.0, **numbers)
    initialize(made, lambda name: torch.Generator().manual_seed(len(name)))
    missing, _ = made.double().load_state_dict(model.state_dict(), strict=False)
    assert all(name.startswith("projection.") for name in missing)
    return made


@pytest.mark.parametrize("kind", [MageC, ContrastiveEncoder])
def test_what_is_projected_is_the_mean_over_the_tokens(kind):
    model, (tokens, masked, keep) = tiny(), sample_inputs(4)
    made = mage_c(model, kind)
    head = torch.nn.Sequential(
        *(torch.nn.Linear(16, 10, bias=False), torch.nn.BatchNorm1d(10), torch.nn.ReLU()),
        *(torch.nn.Linear(10, 10, bias=False), torch.nn.BatchNorm1d(10), torch.nn.ReLU()),
        *(torch.nn.Linear(10, 6, bias=False), torch.nn.BatchNorm1d(6)),
    ).double()
    layers = [module for module in head if not isinstance(module, torch.nn.ReLU)]
    with torch.no_grad():
        for theirs, ours in zip(
            layers,
            [m for pair in zip(made.projection.layers, made.projection.norms, strict=True) for m in pair],
            strict=True,
        ):
            theirs.weight.copy_(ours.weight)
    out = made(tokens, masked, keep, torch.ones(4).double(), alone)
    logits, views = out if kind is MageC else (None, out)
    means = super(type(model), model).forward(tokens, masked, keep)[:, 1:].mean(dim=1)
    expected = head(means)
    torch.testing.assert_close(views, expected / expected.norm(dim=1, keepdim=True), rtol=0, atol=1e-10)
    if kind is MageC:
        assert torch.equal(logits, model(tokens, masked, keep))
        assert torch.equal(made(tokens, masked, keep), logits)
