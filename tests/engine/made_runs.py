"""For tests: real runs of the tiny recipe, with data that makes the loss leap, and held-out passes to be cut off."""

import json
from pathlib import Path

import tiny

from mage_ds.engine import process
from mage_ds.engine.run import Run
from mage_ds.tasks import pretrain

SPIKE = "report.spike={action: rewind, factor: 2.0, window: 4}"
OFTEN = "report.checkpoint_every={steps: 5}"
BATCH = 8


def opened(path: Path, numbers, engine, source: Path | None = None) -> Run:
    """A run, as training.begin opens it."""
    process.on_first(lambda: path.mkdir(exist_ok=True))
    run = Run(path, numbers, {"data": "made"}, steps=numbers.duration.steps, dataset=tiny.DATASET)
    run.resume({"mage": engine}, source)
    run.begin(flops_per_image=None, peak_flops=None)
    return run


def leaping(numbers, bad):
    """The real step, but the loss is told five times as large where bad(step, first position of the micro-batch)."""

    def step_fn(engines, batch, step):
        position = int(batch.epoch[0]) * tiny.DATASET + int(batch.index[0])
        for name, loss, logs in pretrain.step_fn(engines, batch, step, recipe=numbers, tokenize=tiny.tokenize):
            yield name, loss, logs | ({"loss": logs["loss"] * 5} if bad(step, position) else {})

    return step_fn


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def losses(path: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(path) if "loss" in record]


def held_out(path: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["val"]) for record in records(path) if "val" in record]


def evaluator(at=None, batches: int = 4):
    """A held-out pass of some batches: its figure is the sum of a weight; at(batch) is called before each."""

    def evaluate(engines, step):
        for batch in range(batches):
            if at:
                at(step, batch)
            process.stop_point()
        state = tiny.full_state(engines["mage"])
        return {"val": float(state["weight mlm_layer.fc.weight"].double().sum())}

    return evaluate


class LeftOut(tiny.Recorder):
    """Training on after samples were left out, for comparison: told, not found out."""

    left_out = 0

    @property
    def position(self) -> int:
        return self.step * self.batch + self.left_out
