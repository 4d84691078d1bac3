"""What a world of ranks does with dead codes: each rank writes what it saw to FOLDER/rank_N.json."""

import json
import sys
from pathlib import Path

import tiny
import torch

from mage_ds.engine import codebook, process, wrap
from mage_ds.models import Vqgan

MODES = [(0, "float32"), (1, "float32"), (2, "float32"), (1, "bf16"), (2, "bf16")]
CODES, WIDTH = 23, 5  # on two ranks a shard ends in the middle of a code
DEAD = [0, 11, 12, 20, 22]
AFTER = 7


def recipe():
    sizes = f"{{channels: 8, multipliers: [1, 1, 1, 1], blocks: 1, code_dim: {WIDTH}, codes: {CODES}}}"
    return tiny.recipe(f"tokenizer={sizes}", f"model.codes={CODES}", "optimizer.weight_decay=0.0")


def engine_of(stage: int, precision: str, usage: codebook.Usage, whole: bool = False):
    """whole: all of it learns; else the codebook and biases: then the first group's shards are of the codebook."""
    numbers = recipe()
    model = Vqgan(**numbers.tokenizer.model_dump())
    wrap.initialize_weights(model, 0)
    with torch.no_grad():
        model.quantize.embedding.weight.mul_(CODES)  # as far apart as what the encoder says
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(whole or name.startswith("quantize") or name.endswith("bias"))
    usage.attach(model)
    return wrap.wrap(model, numbers, tiny.config_of(numbers, stage, precision), process.start().device)


def images_of(step: int) -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(10 * step + process.start().rank))


def train_step(engine, step: int, factor: float = 1.0) -> torch.Tensor:
    """Two micro-batches; returns the last tokens."""
    while True:
        dtype = engine.module.quantize.embedding.weight.dtype
        drawn, tokens, near, commitment = engine(images_of(step).to(dtype))
        engine.backward(factor * (drawn.float().square().mean() + near.mean() + commitment.mean()))
        boundary = engine.is_gradient_accumulation_boundary()
        engine.step()
        if boundary:
            return tokens


def points_of(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Forty points, two of them no numbers, and their squared distances, one of them 0."""
    points = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(rank))
    points[3, 2], points[8] = torch.nan, torch.inf
    return points, torch.linspace(0, 3, 40)


def reseeded(stage: int, precision: str) -> dict:
    """Three steps, five codes declared dead and reseeded, then a step without a gradient."""
    me, usage = process.start(), codebook.Usage(CODES, "cpu")
    engine = engine_of(stage, precision, usage)
    for step in range(3):
        train_step(engine, step)
    before = tiny.full_state(engine)
    usage.unused.fill_(AFTER - 3)
    usage.unused[DEAD] = AFTER
    count = codebook.reseed(engine, usage, lambda: points_of(me.rank), seed=1, step=3, after=AFTER)
    after = tiny.full_state(engine)
    train_step(engine, 3, factor=0.0)
    end = tiny.full_state(engine)
    name = "quantize.embedding.weight"
    alive = [code for code in range(CODES) if code not in DEAD]
    rows = after[f"weight {name}"][DEAD]
    moments = [after[f"{key} {name}"] for key in ("exp_avg", "exp_avg_sq")]
    computes = engine.module.quantize.embedding.weight.detach().float()
    return {
        "count": count,
        "rows": rows.tolist(),
        "moments before": [float(before[f"{key} {name}"].abs().sum()) for key in ("exp_avg", "exp_avg_sq")],
        "moments of dead": [float(moment[DEAD].abs().sum()) for moment in moments],
        "others kept": all(
            torch.equal(before[key][alive], after[key][alive]) if name in key else torch.equal(before[key], after[key])
            for key in before
        ),
        "there after a step": torch.equal(end[f"weight {name}"][DEAD], rows),
        "others moved": not torch.equal(end[f"weight {name}"][alive], after[f"weight {name}"][alive]),
        "computes": torch.equal(computes[DEAD], rows.to(engine.module.quantize.embedding.weight.dtype).float()),
        "unused": usage.unused.tolist(),
        "due": [usage.looked, usage.due],
    }


def counted() -> list:
    """Three steps of two micro-batches that each rank counts; the last step has a placeholder."""
    usage, found = codebook.Usage(CODES, "cpu"), []
    for step in range(3):
        for micro in range(2):
            usage.add(*tokens_of(process.start().rank, step, micro))
        usage.end_of_step()
        found.append([{key: float(value) for key, value in usage.figures().items()}, usage.unused.tolist()])
    return found


def tokens_of(rank: int, step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + micro)
    tokens = torch.randint(0, CODES - 4 * step, (2, 6), generator=generator)
    return tokens, (torch.tensor([1.0, 0.0]) if step == 2 else None)


def main() -> None:
    me = process.start(threads=1)
    found = {"counted": counted()} | {f"{stage} {precision}": reseeded(stage, precision) for stage, precision in MODES}
    Path(sys.argv[1], f"rank_{me.rank}.json").write_text(json.dumps(found))
    process.leave(0)


if __name__ == "__main__":
    main()
