"""What a checkpoint costs: seconds of a save by kind of work, and its share of the time between two saves."""

import shutil
import tempfile
import time
from pathlib import Path

from mage_ds import recipes
from mage_ds.engine import checkpoint, ds_config, made, process, wrap
from mage_ds.errors import UserError
from mage_ds.recipes.schema import Recipe
from mage_ds.report.progress import duration

_SAVES = 4  # the first one creates the moments and is not counted
_STALL = 0.02  # share of the training time that saving may take


def save(
    name: str,
    overrides: list[str],
    *,
    where: str = ".",
    deepspeed_config: str = "zero1",
    images_per_s: float | None = None,
    samples: int = 1_281_167,
) -> None:
    """Saves a recipe's model three times below `where`, and prints the seconds to gather, write, verify and publish.

    Alone or under `deepspeed`. The checkpoint is the recipe's, its values are the initial ones. images_per_s: of a
    real training, for the share of the time that saving takes; samples: of the data set, for a length in epochs.
    Raises UserError for a disk without room.
    """
    recipe = recipes.load_recipe(name, overrides)
    me = process.start()
    folder = Path(process.on_first(lambda: _folder(where)))
    try:
        engines = {"model": _engine(recipe, deepspeed_config, me)}
        rows = [_measure(folder, step, engines) for step in range(_SAVES)][1:]
    finally:
        process.barrier()
        process.on_first(lambda: shutil.rmtree(folder, ignore_errors=True))
    size = checkpoint.size_of(engines)
    process.say(
        f"{name}: {size / 1e6:,.1f} MB a checkpoint, {me.world} ranks, {deepspeed_config}, on the disk of {where}"
    )
    process.say("  ".join(f"{what:>8}" for what in rows[0]))
    for row in rows:
        process.say("  ".join(f"{seconds:8.2f}" for seconds in row.values()))
    longest = max(row["all"] for row in rows)
    every = recipes.resolve(recipe.report.checkpoint_every, samples=samples, batch=recipe.batch)
    process.say(_share(longest, every * recipe.batch, recipe.report.checkpoint_every.model_dump(), images_per_s))


def _engine(recipe: Recipe, deepspeed_config: str, me):
    machine = recipe.machine.model_copy(update={"micro_batch": 1, "compile": False})
    recipe = recipe.model_copy(update={"machine": machine, "batch": me.world})
    precision = ds_config.choose_precision(machine.precision, me.device)
    config = ds_config.alone(deepspeed_config, recipe, me.world, precision)
    model = wrap.build(lambda: made.model_of(recipe), recipe.seed, config)
    return wrap.wrap(model, recipe, config, me.device)


def _folder(where: str) -> str:
    try:
        return tempfile.mkdtemp(prefix=".bench_save.", dir=where)
    except OSError as error:
        raise UserError(f"--dir {where}: cannot be written ({error.strerror}); name another folder") from None


def _measure(folder: Path, step: int, engines: dict) -> dict[str, float]:
    """Seconds of one save; what rank 0 did not gather, write or verify is publishing, and waiting for the others."""
    process.barrier()
    began = time.perf_counter()
    path = checkpoint.save(folder, step, engines, {"position": 0, "skipped": 0}, keep=1)
    whole = time.perf_counter() - began
    seconds = process.on_first(lambda: checkpoint.read_meta(path)["seconds"])
    return {**seconds, "rest": whole - sum(seconds.values()), "all": whole}


def _share(longest: float, images: int, every: dict, images_per_s: float | None) -> str:
    if not images:
        return "the recipe saves at the end only"
    often = ", ".join(f"{amount} {unit}" for unit, amount in every.items())
    text = f"saved every {often}: {images:,} images"
    if images_per_s:
        interval = images / images_per_s
        text += f", {duration(interval)} at {images_per_s:g} images/s, of which a save takes {longest / interval:.2%}"
    return f"{text}; more than {_STALL:.0%} from {images * _STALL / longest:,.0f} images/s on"
