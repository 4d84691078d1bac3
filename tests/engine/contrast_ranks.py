"""A contrast over two ranks: each rank writes what it saw to FOLDER/rank_N.json.

Started by test_contrast_ranks.py with the environment that a launcher gives: python contrast_ranks.py FOLDER
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import tiny
import torch

from mage_ds.engine import ds_config, gather, loop, made, process, wrap
from mage_ds.inputs.batch import Batch
from mage_ds.tasks import pretrain

STEPS, MODES = 6, [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bf16"), (3, "bf16")]
CONTRAST = (
    "contrastive={weight: 0.7, temperature: 0.2, images: 8, highest: 0.8, hidden: 9, hidden_layers: 2, out: 6}",
    "model.dropout=0.0",
    "machine.micro_batch=auto",
    "optimizer.base_lr=0.1",
    "batch=16",
)


def numbers_of(objective: str, *more: str):
    return tiny.recipe(f"objective={objective}", *CONTRAST, *more)


def batch_at(positions: np.ndarray) -> Batch:
    """tiny's pictures; their second view has some other tokens. Every ninth place has no picture."""
    batch = tiny.batch_at(positions)
    other = (batch.images + torch.from_numpy(positions % 3)[:, None, None]) % tiny.CODES
    valid = torch.from_numpy(positions % 9 != 4).float()
    return Batch(
        batch.labels, batch.index, batch.epoch, valid, images=torch.stack([batch.images, other], dim=1)[:, :, 0]
    )


class Stream(tiny.Stream):
    batch_of = staticmethod(batch_at)

    def __init__(self, numbers, rank, world, position):
        super().__init__(numbers, rank, world, position)
        self.micro = ds_config.share(numbers, world, 0).micro_batch


def engine_of(numbers, stage: int, precision: str = "float32"):
    config = tiny.config_of(numbers, stage, precision)
    model = wrap.build(lambda: made.model_of(numbers), numbers.seed, config)
    return wrap.wrap(model, numbers, config, process.start().device)


def train(engine, numbers) -> list[dict]:
    me, run = process.start(), tiny.Recorder(numbers)
    loop.train(
        {"mage": engine},
        lambda position: Stream(numbers, me.rank, me.world, position),
        partial(pretrain.contrast_fn, recipe=numbers, tokenize=tiny.tokenize),
        {"mage": tiny.schedule_of(numbers)},
        run,
        loop.Limits(STEPS, numbers.batch // numbers.contrastive.images, numbers.report.max_skipped),
    )
    return [{key: figures[key] for key in ("loss", "contrast", "pairs", "grad_norm")} for figures in run.figures]


def gradients(objective: str, world: int, rank: int) -> dict:
    """Of one contrast in float64, without DeepSpeed: the loss and every gradient, as the mean over the ranks."""
    numbers = numbers_of(objective)
    model = made.model_of(numbers)
    wrap.initialize_weights(model, 3)
    model.double()
    each = numbers.contrastive.images // world
    batch = batch_at(np.arange(rank * each, (rank + 1) * each))
    batch.valid = batch.valid.double()
    [(_, loss, logs)] = pretrain.contrast_fn({"mage": model}, batch, 0, recipe=numbers, tokenize=tiny.tokenize)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        "loss": process.sum_over_ranks(loss.detach().clone()).item() / world,
        "top1": process.sum_over_ranks(logs["contrast_top1"].detach().clone().double()).item() / world,
        "pairs": float(logs["pairs"]),
        "gradients": {name: (process.sum_over_ranks(g.clone()) / world).tolist() for name, g in found.items()},
    }


def gathering(me) -> dict:
    """What the functions give, and their gradients, where the ranks weigh the results unlike."""
    x = torch.arange(6.0, dtype=torch.float64).view(3, 2) + 10 * me.rank
    x.requires_grad_()
    everyone = gather.gathered(x)
    weights = torch.arange(12.0, dtype=torch.float64).view(6, 2) * (1 + me.rank)
    (everyone * weights).sum().backward()
    return {"everyone": everyone.tolist(), "gradient": x.grad.tolist()}


def main() -> None:
    me, folder = process.start(threads=1), Path(sys.argv[1])
    found = {
        "gathering": gathering(me),
        "gradients": {objective: gradients(objective, me.world, me.rank) for objective in ("both", "contrastive")},
        "trained": {f"{s} {p}": train(engine_of(numbers_of("both"), s, p), numbers_of("both")) for s, p in MODES},
    }
    (folder / f"rank_{me.rank}.json").write_text(json.dumps(found))
    process.leave(0)


if __name__ == "__main__":
    main()
