"""What LARS and the average of the weights do on two ranks: each writes what it saw to FOLDER/rank_N.json."""

import json
import sys
from pathlib import Path

import tiny
import torch

from mage_ds.engine import checkpoint, process, state
from mage_ds.tasks import pretrain

FOLDER, DECAY = Path(sys.argv[-1]), 0.8
# One stage and precision, and the one that goes on with its checkpoint.
MOVES = {
    "0 float32": (0, 3, "float32"),
    "1 float32": (1, 2, "float32"),
    "2 float32": (2, 1, "float32"),
    "3 float32": (3, 0, "float32"),
    "1 bf16": (1, 3, "bf16"),
    "2 bf16": (2, 1, "bf16"),
    "3 bf16": (3, 2, "bf16"),
}
AWAY = {"2 float32": ("optimizer",), "3 bf16": ("optimizer", "param")}  # kept in the host's memory, before the move
# The large eps keeps Adam from taking whole steps along gradients that are zero but for rounding: of the keys' biases.
LAYERS = ("batch=16", "optimizer.layer_decay=0.5", "optimizer.eps=1.0e-3", "warmup.steps=0", "model.dropout=0.0")
LAYERED = ("0 float32", "1 float32", "2 float32", "3 float32", "1 bf16")


def weights(engine) -> dict[str, torch.Tensor]:
    return {name: state.get_full(engine, p).cpu().clone() for name, p in state.parameters(engine).items()}


def average(engine) -> dict[str, torch.Tensor]:
    return {name: state.get_full(engine, p, "ema").cpu().clone() for name, p in state.parameters(engine).items()}


def by_formula(series: list[dict]) -> dict[str, torch.Tensor]:
    """The average of weights after each update, float64, begun with those before the first."""
    found = {name: value.double() for name, value in series[0].items()}
    for later in series[1:]:
        found = {name: DECAY * value + (1 - DECAY) * later[name].double() for name, value in found.items()}
    return found


def off(one: dict, two: dict) -> float:
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


def save(path: Path, step: int, engine) -> None:
    checkpoint.save(path, step, {"mage": engine}, {"position": 16 * step, "skipped": 0}, keep=5)


def logits(forward) -> torch.Tensor:
    batch = tiny.batch_at(torch.arange(4).numpy())
    tokens = tiny.tokenize(batch.images[:, 0])
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[:, ::2] = True
    with torch.no_grad():
        return forward(tokens, masked).float()


def averaged(first: int, second: int, precision: str, name: str) -> dict:
    """Three updates in one stage, saved and gone on with in another; the average is looked at on the way."""
    numbers = tiny.recipe("batch=16", f"optimizer.ema={DECAY}", "warmup.steps=0", "optimizer.min_lr=0.01")
    engine = tiny.engine_of(numbers, first, precision, AWAY.get(name, ()))
    series = [weights(engine)]
    tiny.train(engine, numbers, 3, tiny.Recorder(numbers, hook=lambda each: series.append(weights(each))))
    path = FOLDER / name
    save(path, 3, engine)
    before, kept = tiny.full_state(engine), average(engine)
    engine.eval()
    plain = tiny.Mage(**numbers.model.model_dump()).eval()
    plain.load_state_dict(kept)
    with state.averaged(engine):
        seen = logits(engine)
    inside = float((seen - logits(plain)).abs().max())
    outside = float((logits(engine) - seen).abs().max())
    engine.train()
    undisturbed = tiny.equal(before, tiny.full_state(engine)) and off(kept, average(engine)) == 0
    steps = tiny.train(engine, numbers, 6, tiny.Recorder(numbers, 3)).losses

    other = tiny.engine_of(numbers, second, precision)
    checkpoint.load(checkpoint.find(path), {"mage": other})
    moved = off(kept, average(other))
    run = tiny.Recorder(numbers, 3, hook=lambda each: series.append(weights(each)))
    tiny.train(other, numbers, 6, run)
    save(path, 6, other)
    return {
        "formula": off(average(other), by_formula(series)),
        "far": off(average(other), series[-1]),
        "moved": moved,
        "inside": inside,
        "outside": outside,
        "undisturbed": undisturbed,
        "losses": [steps, run.losses],
    }


def skipped() -> dict:
    """The average of three steps of which the second has no finite gradient."""
    numbers = tiny.recipe("batch=16", f"optimizer.ema={DECAY}", "warmup.steps=0")
    engine = tiny.engine_of(numbers, 1)
    series = [weights(engine)]

    def step_fn(engines, batch, step):
        for name, loss, logs in pretrain.step_fn(engines, batch, step, recipe=numbers, tokenize=tiny.tokenize):
            yield name, loss * (torch.nan if step == 1 else 1.0), logs

    tiny.train(engine, numbers, 3, tiny.Recorder(numbers, hook=lambda each: series.append(weights(each))), step_fn)
    updated = [series[0], series[1], series[3]]
    return {"formula": off(average(engine), by_formula(updated))}


def lars() -> dict:
    """Four updates by LARS with two micro-batches a step on each rank, gone on with from step 2 in a new engine."""
    numbers = tiny.recipe(*LARS)
    engine = tiny.engine_of(numbers, 0)
    series = [weights(engine)]
    run = tiny.train(engine, numbers, 4, tiny.Recorder(numbers, hook=lambda each: series.append(weights(each))))
    half = tiny.engine_of(numbers, 0)
    tiny.train(half, numbers, 2)
    save(FOLDER / "lars", 2, half)
    other = tiny.engine_of(numbers, 0)
    checkpoint.load(checkpoint.find(FOLDER / "lars"), {"mage": other})
    rest = tiny.train(other, numbers, 4, tiny.Recorder(numbers, 2))
    torch.save(series, FOLDER / f"lars_{process.start().rank}.pt")
    return {"losses": run.losses, "rest": rest.losses, "same end": off(weights(other), series[-1])}


def layers(first: int, second: int, precision: str, name: str) -> dict:
    """Four updates with layer-wise learning rates; from a checkpoint of the second the others once more."""
    numbers = tiny.recipe(*LAYERS)
    engine = tiny.engine_of(numbers, first, precision)
    run = tiny.train(engine, numbers, 2)
    path = FOLDER / f"layers {name}"
    save(path, 2, engine)
    rest = tiny.train(engine, numbers, 4, tiny.Recorder(numbers, 2))
    other = tiny.engine_of(numbers, second, precision)
    checkpoint.load(checkpoint.find(path), {"mage": other})
    again = tiny.train(other, numbers, 4, tiny.Recorder(numbers, 2))
    save(path, 4, other)
    return {"losses": run.losses + rest.losses, "again": again.losses}


LARS = (
    "batch=16",
    "optimizer={name: lars, base_lr: 0.3, min_lr: 0.0, weight_decay: 0.0, momentum: 0.9, trust: 0.001, clip: null}",
    "warmup.steps=0",
)


def main() -> None:
    me = process.start(threads=1)
    found = {name: averaged(*move, name) for name, move in MOVES.items()}
    found |= {f"layers {name}": layers(*MOVES[name], name) for name in LAYERED}
    found |= {"skipped": skipped(), "lars": lars()}
    (FOLDER / f"rank_{me.rank}.json").write_text(json.dumps(found))
    process.leave(0)


if __name__ == "__main__":
    main()
