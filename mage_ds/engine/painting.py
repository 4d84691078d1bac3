"""Pictures out of a trained MAGE, by their indices: which model, asked for what, and how its tokens are decoded.

Whoever draws pictures (`sample`, which writes them, and `evaluate`, which looks at them) makes a `Choice`, whose
settings belong beside what comes out, and a painter of it. A picture is a function of those settings and its index.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mage_ds.engine import ds_config, inference, process, retention, stored
from mage_ds.errors import UserError
from mage_ds.recipes.sections import Sampling
from mage_ds.sampling import decode, labels

_PRECISIONS = ("auto", "bf16", "float32")
_FULL = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # in the words of CUDA, the CPU's allocator, cuBLAS


class Choice(NamedTuple):
    """What pictures are made of.

    opened: the model, with a tokenizer; labels: picture i is asked to be the i-th of them, in turn; None: of no class;
    settings: as JSON takes them, all that the pictures depend on: run, checkpoint, weights, tokenizer (SHA-256),
    weights_of ("ema" or "raw" of a run that keeps an average, else None), seed, the fields of a recipe's `sampling`,
    class_label, classes, precision, rounding, device, versions, batch, threads.
    """

    opened: stored.Stored
    labels: list[int] | None
    settings: dict


def choose(
    run,
    *,
    tokenizer,
    class_label: str | None,
    seed: int,
    given: dict,
    batch: int,
    precision: str,
    rounded: bool,
    checkpoint: int | None,
    weights: str | None,
    begun: dict,
) -> Choice:
    """Opens a model and settles how it is sampled from. All ranks call it, after `process.start` with their threads.

    Args: run: whatever `stored.open_model` opens; tokenizer: where it comes without one; class_label: of a
    class-conditional model, what `labels.parse` reads, by default all classes in turn; given: fields of a recipe's
    `sampling` that are wanted otherwise than the model's; batch: pictures computed together; precision: of the model,
    "float32", "bf16" or "auto"; rounded: nearest 8-bit values instead of the published truncation; checkpoint: of a
    run, by default that of `begun`, settings of what is to be continued, else the newest; weights: of a run that keeps
    an average of them, "ema" or "raw", by default those of `begun`, else the average.
    Raises: UserError for a model that cannot be opened or makes no pictures, or a value that it cannot be given.
    """
    import torch

    if precision not in _PRECISIONS:
        raise UserError(f"--precision {precision}: must be one of {', '.join(_PRECISIONS)}")
    device = process.start().device
    opened, step = _open(Path(run), tokenizer, checkpoint, weights, begun)
    asked = _asked(opened, class_label, run)
    settings = {
        "run": str(Path(run).resolve()),
        "checkpoint": step,
        "weights": stored.weights_hash(opened.mage.state_dict()),
        "weights_of": opened.weights,
        "tokenizer": stored.weights_hash(opened.tokenizer.state_dict()),
        "seed": seed,
        **_sampling(opened, given, run),
        "class_label": None if asked is None else labels.written(asked),
        "classes": opened.classes,
        "precision": ds_config.choose_precision(precision, device),
        "rounding": "nearest" if rounded else "truncated",
        "device": process.device_name(),
        "versions": {name: metadata.version(name) for name in ("torch", "deepspeed", "numpy")},
        "batch": batch,
        "threads": torch.get_num_threads(),
    }
    return Choice(opened, asked, settings)


def pin(choice: Choice, why: str) -> None:
    """Has a training that goes on keep the run's checkpoint, because of `why`: "sampled into OUT". For all ranks."""
    if (folder := folder_of(choice)) and not process.on_first(lambda: retention.pin(folder, why)):
        process.say(f"{folder}: cannot be pinned (read-only?); a training that goes on there may remove it")


def folder_of(choice: Choice) -> Path | None:
    """Of the run's checkpoint; None where the model is of no run."""
    step = choice.settings["checkpoint"]
    return None if step is None else retention.folder_of(Path(choice.settings["run"]), step)


def otherwise(choice: Choice, given: dict) -> Choice:
    """The same pictures of the same model, but for these fields of a recipe's `sampling`. Raises: UserError."""
    own = {name: choice.settings[name] for name in Sampling.model_fields}
    how = _sampling(choice.opened, own | given, choice.settings["run"])
    return choice._replace(settings=choice.settings | how)


def painter(choice: Choice) -> Callable:
    """paint: index (B,), B always the batch of the settings -> tokens int64 (B, N), pictures uint8 (B, H, W, 3).

    paint(index, on_step) calls on_step as `decode.decode` does. The model moves to this process's device, into
    DeepSpeed's inference engine. Raises, as paint does: UserError where the batch does not fit into memory.
    """
    import torch

    opened, settings = choice.opened, choice.settings
    batch, device = settings["batch"], process.start().device
    torch.backends.cudnn.allow_tf32 = False  # float32 as published; matrix products have it off by default
    engine = inference.engine(opened.mage, ds_config.dtype_of(settings["precision"]))
    tokenizer = inference.frozen(opened.tokenizer)
    how = {name: settings[name] for name in Sampling.model_fields}
    turn = None if choice.labels is None else np.asarray(choice.labels, dtype=np.int64)
    with _fitting(batch):
        empty = torch.zeros(batch, opened.mage.tokens, dtype=torch.int64, device=device)
        masked = torch.ones_like(empty, dtype=torch.bool)

    def paint(index: np.ndarray, on_step: Callable | None = None) -> tuple[np.ndarray, np.ndarray]:
        with _fitting(batch):
            noise = decode.keyed_noise(settings["seed"], index, empty.shape[1])
            asked = None if turn is None else torch.from_numpy(turn[index % len(turn)]).to(device)
            tokens = decode.decode(engine, empty, masked, noise=noise, labels=asked, on_step=on_step, **how)
            return tokens.cpu().numpy(), inference.draw(tokenizer, tokens, settings["rounding"] == "nearest")

    return paint


@contextmanager
def _fitting(batch: int) -> Iterator[None]:
    """Memory that runs out becomes one line: how many pictures are computed together is the user's choice."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, the CPU's has no name
        named = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not named and not any(words in str(error) for words in _FULL):
            raise
        remedy = f"give --batch {batch // 2} or less" if batch > 1 else "use a machine with more"
        where = process.start().device
        raise UserError(f"--batch {batch}: the memory of {where} does not hold so many pictures; {remedy}") from None


def _open(run: Path, tokenizer, checkpoint, weights: str | None, begun: dict) -> tuple[stored.Stored, int | None]:
    """The model, and of a run the step of its checkpoint."""
    step = checkpoint
    if (run / "recipe.yaml").is_file():
        before = begun.get("checkpoint")
        if step is None and before is not None and retention.folder_of(run, before).is_dir():
            step = before
        step = retention.step_of(process.on_first(lambda: retention.find(run, step)))
    opened = stored.open_model(run, tokenizer, step, weights or begun.get("weights_of"))
    if opened.kind != "mage":
        raise UserError(f"{run}: is a {opened.kind}, which makes no pictures; give a MAGE's run, export or file")
    if opened.tokenizer is None:
        raise UserError(f"{run}: comes without a tokenizer; give the one that it was trained with: --tokenizer PATH")
    return opened, step


def _asked(opened: stored.Stored, class_label: str | None, run) -> list[int] | None:
    """The labels that pictures are asked for in turn, None for a model without classes."""
    classes = opened.mage.classes
    if classes is None:
        if class_label is not None:
            raise UserError(f"--class-label {class_label}: {run} knows no classes; leave it out")
        return None
    return [*range(classes)] if class_label is None else labels.parse(str(class_label), classes, opened.classes)


def _sampling(opened: stored.Stored, given: dict, run) -> dict:
    """All fields of `Sampling`: those given, the others the model's own."""
    try:
        how = Sampling.model_validate({**opened.sampling, **given}).model_dump()
    except ValueError as error:  # pydantic's
        first = error.errors()[0]
        name = "-".join(map(str, first["loc"])).replace("_", "-")
        raise UserError(f"--{name} {first['input']}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    if how["steps"] > opened.mage.tokens:
        raise UserError(
            f"--steps {how['steps']}: a picture of {run} has {opened.mage.tokens} tokens, and a step fills one at "
            f"least; give {opened.mage.tokens} or fewer"
        )
    if how["guidance"] and opened.mage.classes is None:
        raise UserError(f"--guidance {how['guidance']}: needs a model with classes, this one has none; leave it out")
    if how["guidance"] and opened.label_dropout == 0:
        raise UserError(
            f"--guidance {how['guidance']}: {run} was trained with label_dropout = 0, so it never learned to predict "
            "without a label, which guidance leads away from; give --guidance 0, or train with label_dropout=0.1"
        )
    return how
