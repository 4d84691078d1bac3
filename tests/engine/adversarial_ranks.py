"""A tokenizer and its discriminator on some ranks: each rank writes what it saw to FOLDER/rank_N.json.

Started by test_adversarial.py with the environment that a launcher gives; in its own process for one rank. Given a
stage and precision as well ("2 bf16"), it only continues runs in that mode.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiny
import torch

from mage_ds import recipes
from mage_ds.engine import checkpoint, loop, process, state, wrap
from mage_ds.inputs.batch import Batch
from mage_ds.models import PatchGAN, Vqgan
from mage_ds.tasks.train_tokenizer import Step

MODES = [(0, "float32"), (1, "float32"), (2, "float32"), (1, "bf16"), (2, "bf16")]
START, STEPS, SIZE = 2, 6, 16
# No norm whose statistics are a rank's own, so that ranks equal one process over the joined batch.
NUMBERS = [
    f"duration={{steps: {STEPS}}}",
    "batch=8",
    "warmup={steps: 0}",
    "optimizer={base_lr: 0.1, min_lr: 0.0, weight_decay: 0.0, betas: [0.5, 0.9], eps: 1.0e-2, clip: null}",
    f"inputs={{image_size: {SIZE}, augmentation: none, interpolation: linear, evaluation_resize: {SIZE}, "
    "broken_limit: 0.5}",
    "model={channels: 8, multipliers: [1, 2, 2], blocks: 1, code_dim: 5, codes: 23}",
    "loss={l1: 1.0, codebook: 1.0, commitment: 0.25, perceptual: 0.5}",
    f"adversary={{start: {{steps: {START}}}, weight: 0.8, most: 100.0, layers: 2, channels: 8, norm: spectral}}",
    "machine.micro_batch=2",
    "codebook_init=uniform",
]


def recipe(*overrides: str):
    return recipes.load_recipe("digits_tokenizer", [*NUMBERS, *overrides])


def numbers_of(precision: str):
    """In bf16 smaller steps: a code that is chosen otherwise because of a rounding leads elsewhere in large ones."""
    return recipe(*(["optimizer.base_lr=0.01"] if precision == "bf16" else []))


def images_at(positions) -> torch.Tensor:
    """uint8 (n, 3, SIZE, SIZE): a smooth picture for each position of the stream."""
    u, v = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="ij")
    waves = [
        torch.stack([torch.sin((k % 7 + c) * u * 3 + k) * torch.cos((k % 5) * v * 2 + c) for c in range(3)])
        for k in map(int, positions)
    ]
    return (127.5 + 127 * torch.stack(waves)).to(torch.uint8)


class Stream(tiny.Stream):
    def __next__(self) -> Batch:
        inside = self.begun * self.micro * self.world + self.rank * self.micro
        step, offset = divmod(inside, self.batch)
        self.begun += 1
        positions = self.position + step * self.batch + offset + np.arange(self.micro)
        valid = torch.from_numpy((positions % 11 != 5).astype(np.float32))  # some are placeholders
        none = torch.full((len(positions),), -1)
        return Batch(none, positions, positions * 0, valid, images=images_at(positions)[:, None])


class Recorder(tiny.Recorder):
    def end_of_step(self, step, engines, figures, evaluate, pictures) -> None:
        self.step = step
        self.figures.append({key: value for key, value in figures.items() if key != "waited"})


class Distance(torch.nn.Module):
    """In the place of LPIPS, of its interface: (x, y) -> (B,), through a frozen convolution."""

    def __init__(self):
        super().__init__()
        self.filters = torch.nn.Conv2d(3, 6, 3)
        self.requires_grad_(False)
        generator = torch.Generator().manual_seed(5)
        for value in self.parameters():
            value.normal_(0.0, 0.3, generator=generator)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.filters(x).relu() - self.filters(y).relu()).square().flatten(1).mean(1)


def critic_of(numbers) -> PatchGAN:
    return PatchGAN(**numbers.adversary.model_dump(include={"channels", "layers", "norm"}))


def opened(numbers, stage: int, precision: str = "float32"):
    """Engines with their initial values, and the step that they take."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = tiny.config_of(numbers, stage, precision)
    models = {"tokenizer": Vqgan(**numbers.model.model_dump()), "discriminator": critic_of(numbers)}
    for model in models.values():
        wrap.initialize_weights(model, numbers.seed)
    plan = SimpleNamespace(recipe=numbers, dtype=dtype, dataset=1000)
    step = Step(plan, models["tokenizer"], Distance() if numbers.loss.perceptual else None)
    device = process.start().device
    return {name: wrap.wrap(model, numbers, config, device) for name, model in models.items()}, step


def train(engines, step, numbers, steps: int = STEPS, run=None) -> Recorder:
    me, run = process.start(), run or Recorder(numbers)
    lr = dict.fromkeys(engines, lambda step: numbers.effective_lr())
    loop.train(
        engines,
        lambda position: Stream(numbers, me.rank, me.world, position),
        step,
        lr,
        run,
        loop.Limits(steps, numbers.batch // numbers.machine.micro_batch // me.world, numbers.report.max_skipped),
        after_step=step.after,
    )
    return run


def weights(engines) -> dict[str, torch.Tensor]:
    """Weights, moments and buffers of both engines by name. All ranks call it."""
    found = {}
    for name, engine in engines.items():
        found |= {f"{name} {key}": value for key, value in tiny.full_state(engine).items()}
        found |= {f"{name} buffer {key}": value.clone() for key, value in engine.module.named_buffers()}
    return found


def modes(me, folder: Path) -> dict:
    found = {}
    for stage, precision in MODES:
        numbers = numbers_of(precision)
        engines, step = opened(numbers, stage, precision)
        run = train(engines, step, numbers)
        if me.first:
            torch.save(weights(engines), folder / f"{stage} {precision}.pt")
        else:
            weights(engines)
        updates = {name: state.updates(engine) for name, engine in engines.items()}
        found[f"{stage} {precision}"] = {"figures": run.figures, "updates": updates}
    return found


def continued(me, folder: Path, stage: int, precision: str) -> dict:
    """Saved before, at and after the discriminator's start, and gone on from there with new engines."""
    numbers, found = recipe("reseed_after=2", "adversary.norm=batch", "loss.perceptual=0.0"), {}
    engines, step = opened(numbers, stage, precision)
    whole = train(engines, step, numbers)
    end = weights(engines)
    for at in (START - 1, START, START + 2):
        path = folder / f"continued {stage} {precision} {at}"
        engines, step = opened(numbers, stage, precision)
        first = train(engines, step, numbers, at)
        checkpoint.save(path, at, engines, {"position": first.position, "skipped": 0}, keep=1)
        engines, step = opened(numbers, stage, precision)
        checkpoint.load(checkpoint.find(path), engines)
        updates = {name: state.updates(engine) for name, engine in engines.items()}
        second = train(engines, step, numbers, run=Recorder(numbers, at))
        same = first.figures + second.figures == whole.figures
        found[at] = {"same": same, "same end": tiny.equal(weights(engines), end), "updates": updates}
    return found


def poisoned(me, folder: Path) -> dict:
    """At step START + 1 on the last rank the discriminator's loss alone is not finite; before its start nothing is."""
    numbers, found = recipe("loss.perceptual=0.0"), {}
    for stage in (0, 1):
        engines, step = opened(numbers, stage)

        def spoiled(engines, batch, number, step=step):
            for name, loss, logs in step(engines, batch, number):
                bad = name == "discriminator" and number == START + 1 and me.rank == me.world - 1
                yield name, loss * torch.nan if bad else loss, logs

        spoiled.after = step.after
        run = train(engines, spoiled, numbers)
        updates = {name: state.updates(engine) for name, engine in engines.items()}
        norms = ["discriminator_grad_norm" in figures for figures in run.figures]
        found[stage] = {"skipped": run.skipped, "updates": updates, "norms": norms}
    return found


def main() -> None:
    me, folder = process.start(threads=1), Path(sys.argv[1])
    if sys.argv[2:]:
        stage, precision = sys.argv[2].split()
        found = {f"continued {sys.argv[2]}": continued(me, folder, int(stage), precision)}
    else:
        found = {"modes": modes(me, folder), "poisoned": poisoned(me, folder)}
        found["continued 1 float32"] = continued(me, folder, 1, "float32")
    (folder / f"rank_{me.rank}.json").write_text(json.dumps(found))
    process.leave(0)


if __name__ == "__main__":
    main()
