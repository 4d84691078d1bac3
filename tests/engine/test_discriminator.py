"""The discriminator as a DeepSpeed engine: in every stage and number format that it trains in, saved and continued."""

import pytest
import tiny
import torch

from mage_ds.engine import checkpoint, wrap
from mage_ds.models import PatchGAN
from mage_ds.models.adversary import hinge

MODES = [
    (2, "float32", 0),
    (1, "bf16", 1),
    *(pytest.param(*mode, marks=pytest.mark.full) for mode in ((0, "float32", 2), (1, "float32", 1), (2, "bf16", 2))),
]


def recipe(norm: str):
    """Spectral norm learns this task in a step where batch norm takes three."""
    rate = 0.02 if norm == "batch" else 0.006
    return tiny.recipe("machine.micro_batch=8", f"optimizer.base_lr={rate}", "optimizer.min_lr=0.0")


def engine_of(me, norm: str, stage: int, precision: str):
    numbers = recipe(norm)
    model = PatchGAN(8, 2, norm)
    wrap.initialize_weights(model, 0)
    return wrap.wrap(model, numbers, tiny.config_of(numbers, stage, precision), me.device)


def train_step(engine, step: int) -> float:
    """Real pictures are brighter. One of the two forwards is not the engine's, as in training."""
    generator = torch.Generator().manual_seed(step)
    dtype = engine.module.main[0].bias.dtype
    real, fake = (shift + torch.rand(4, 3, 32, 32, generator=generator) / 2 for shift in (0.5, 0.0))
    loss = hinge(engine.module(real.to(dtype)), engine(fake.to(dtype))).mean()
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def plain_losses(norm: str, steps: int) -> list[float]:
    numbers, model, losses = recipe(norm), PatchGAN(8, 2, norm), []
    wrap.initialize_weights(model, 0)
    groups = [
        {"params": [p for n, p in model.named_parameters() if p.ndim > 1]},
        {"params": [p for n, p in model.named_parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    settings = numbers.optimizer
    adam = torch.optim.AdamW(
        groups, numbers.effective_lr(), settings.betas, settings.eps, weight_decay=settings.weight_decay
    )
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        real, fake = (shift + torch.rand(4, 3, 32, 32, generator=generator) / 2 for shift in (0.5, 0.0))
        loss = hinge(model(real), model(fake)).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        adam.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("norm", ["batch", "spectral"])
@pytest.mark.parametrize(("stage", "precision", "next_stage"), MODES)
def test_trains_as_a_plain_loop_does_and_continues(me, tmp_path, norm, stage, precision, next_stage):
    expected = plain_losses(norm, 6)
    assert 0.1 < expected[-1] < 0.9 * expected[0]
    engine = engine_of(me, norm, stage, precision)
    losses = [train_step(engine, step) for step in range(4)]
    checkpoint.save(tmp_path, 4, {"discriminator": engine}, {}, keep=1)
    kept, buffers = tiny.full_state(engine), {name: b.clone() for name, b in engine.module.named_buffers()}
    end = [train_step(engine, step) for step in (4, 5)]
    assert tiny.worst(losses + end, expected) < (1e-4 if precision == "float32" else 0.04)
    again = engine_of(me, norm, next_stage, precision)
    checkpoint.load(checkpoint.find(tmp_path), {"discriminator": again})
    assert tiny.equal(tiny.full_state(again), kept)
    assert tiny.equal(dict(again.module.named_buffers()), buffers) and bool(buffers) == (norm == "spectral")
    parts = [train_step(again, step) for step in (4, 5)]
    assert parts == end if next_stage == stage else tiny.worst(parts, end) < 1e-5
