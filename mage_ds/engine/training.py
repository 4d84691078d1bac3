"""From a recipe to a run that is about to take its first step: the part that every training shares."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mage_ds import recipes
from mage_ds.engine import checkpoint, ds_config, hosts, optim, process, run_folder, watch, wrap
from mage_ds.engine.loop import Limits
from mage_ds.engine.run import Run, owed
from mage_ds.errors import EXIT_BUG, UserError
from mage_ds.inputs import dali, token_cache
from mage_ds.inputs.catalog import Catalog
from mage_ds.inputs.quarantine import Quarantine
from mage_ds.inputs.token_cache import TokenCache
from mage_ds.models import Vqgan
from mage_ds.recipes.schema import Recipe
from mage_ds.report.progress import peak_flops


@dataclass(frozen=True)
class Options:
    """What the command line says about a start. out: the run folder; deepspeed_config: a JSON file or the name of
    one that comes with the package; resume: auto, never or a checkpoint folder; extend: a longer duration is meant."""

    out: Path
    deepspeed_config: str | None = None
    resume: str = "auto"
    extend: bool = False


@dataclass(frozen=True)
class Plan:
    """A start, decided but not begun: nothing is built, nothing written.

    steps, warmup: of the whole run; share: how the batch falls to ranks; config: DeepSpeed's, in force;
    source: the checkpoint to continue from; facts: fingerprints of the data and of frozen models.
    """

    recipe: Recipe
    options: Options
    precision: str
    share: ds_config.Share
    config: dict
    steps: int
    warmup: int
    dataset: int
    facts: dict
    source: Path | None

    @property
    def dtype(self) -> torch.dtype:
        return ds_config.dtype_of(self.precision)

    @property
    def done(self) -> bool:
        return self.source is not None and checkpoint.read_meta(self.source)["step"] >= self.steps


def plan(recipe: Recipe, options: Options, *, dataset: int, facts: dict, largest: Callable[[], int]) -> Plan:
    """Decide everything about a start and refuse what cannot be, before anything is built. All ranks call it.

    dataset: samples of the training split; facts: {"data": fingerprint, "tokenizer": hash, ...}; largest(): the micro
    batch that fits.
    """
    me = process.start()
    path, config = ds_config.read(options.deepspeed_config or ds_config.default(recipe))
    if options.deepspeed_config is None:
        process.say(f"DeepSpeed configuration: {path.name} (choose another with --deepspeed_config)")
    precision = ds_config.choose_precision(recipe.machine.precision, me.device, recipe)
    process.say(f"precision {precision}, {me.world} ranks on {me.device.type} of {torch.get_num_threads()} threads")
    steps, warmup, note = recipes.schedule(recipe, dataset)
    if steps < 1:
        raise UserError(f"duration = {recipe.duration.model_dump()}: is no step of {recipe.batch} samples")
    if note:
        process.say(note)
    hosts.check_shared(options.out)
    source = process.on_first(
        lambda: run_folder.choose_start(options.out, recipe, facts, options.resume, options.extend)
    )
    exact = _same_micro_batch(recipe, options.out, me.world)
    free = exact.machine.micro_batch == "auto" and recipe.views == 1
    share = ds_config.share(exact, me.world, largest() if free else 0)
    config = ds_config.in_force(path, config, share, clip=recipe.optimizer.clip, precision=precision)
    ds_config.check_norms(path, config, recipe)
    return Plan(recipe, options, precision, share, config, steps, warmup, dataset, facts, source)


def _same_micro_batch(recipe: Recipe, out: Path, world: int) -> Recipe:
    """For `auto` in a run that exists: the micro batch it had, so that its dropout goes on unchanged."""
    try:
        before = json.loads((out / "ds_config.json").read_text())["train_micro_batch_size_per_gpu"]
    except (OSError, ValueError, KeyError):
        return recipe
    if recipe.machine.micro_batch != "auto" or recipe.views > 1 or recipe.batch % (before * world):
        return recipe  # (the micro batch of a contrast is no choice)
    return recipe.model_copy(update={"machine": recipe.machine.model_copy(update={"micro_batch": before})})


def already_done(plan: Plan) -> bool:
    """Says so where the run has reached its last step, and ends one that was killed just before it said so."""
    out = plan.options.out
    if not plan.done or process.on_first(lambda: owed(out, checkpoint.read_meta(plan.source))):
        return False
    if process.start().first and run_folder.read_status(out).get("state") != "finished":
        run_folder.close_books(out, step=plan.steps, steps=plan.steps)
    process.say(f"{out}: already finished ({plan.steps} steps); --extend with a longer duration trains on")
    return True


@dataclass(frozen=True)
class Training:
    """A run, open: engines by name, and what the loop needs."""

    run: Run
    engines: dict
    lr: dict
    limits: Limits


def begin(
    plan: Plan, models: dict[str, torch.nn.Module], *, copies: dict | None = None, flops_per_image: float
) -> Training:
    """Write the run folder, wrap the models as DeepSpeed engines, resume, open the logs. All ranks call it.

    models: by name, with their initial values; copies: of its frozen models, as run_folder.create takes them.
    """
    me, recipe, out = process.start(), plan.recipe, plan.options.out
    start, meta = process.on_first(partial(_claim, plan, copies or {}))
    run_folder.own(start)
    process.log_to_file(out / "logs")
    watch.write_to(out / "logs", partial(run_folder.write_status, out, "failed", exit_code=EXIT_BUG))
    engines = {name: wrap.wrap(model, recipe, plan.config, me.device) for name, model in models.items()}
    run = Run(out, recipe, plan.facts, steps=plan.steps, dataset=plan.dataset)
    run.resume(engines, plan.source, meta)
    _announce(plan, models)
    peak = peak_flops(me.device, plan.dtype) * me.world
    run.begin(flops_per_image=flops_per_image, peak_flops=peak)
    lr = partial(
        optim.cosine,
        peak=recipe.effective_lr(),
        floor=recipe.optimizer.min_lr,
        steps=plan.steps,
        warmup=plan.warmup,
    )
    limits = Limits(plan.steps, plan.share.accumulation, recipe.report.max_skipped)
    return Training(run, engines, dict.fromkeys(models, lr), limits)


def _claim(plan: Plan, copies: dict) -> tuple[str, dict | None]:
    """Rank 0's part: first verify the checkpoint (auto: it is already), so that a damaged one changes nothing."""
    read = checkpoint.read_meta if plan.options.resume == "auto" else checkpoint.verified
    meta = read(plan.source) if plan.source else None
    return run_folder.create(plan.options.out, plan.recipe, plan.facts, plan.config, copies), meta


def _announce(plan: Plan, models: dict[str, torch.nn.Module]) -> None:
    share, recipe = plan.share, plan.recipe
    for name, model in models.items():
        count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        process.say(f"{name}: {count:,} parameters")
    process.say(
        f"{plan.steps:,} steps of {share.batch} images = {share.micro_batch} per forward x {share.accumulation} "
        f"accumulated x {share.world} ranks; learning rate {recipe.effective_lr():.3g} after {plan.warmup:,} steps of "
        f"warm-up; ZeRO stage {plan.config['zero_optimization']['stage']}"
    )


def frozen(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A frozen model beside the engine: on the device and in the run's number format.

    Not channels last: on a CPU that gains 12 % at the paper's size, but halves the speed of a small model in bf16; on a
    GPU see `inference.layout`.
    """
    return model.to(process.start().device, dtype).requires_grad_(False).eval()


def tokenize(vqgan: Vqgan, images: torch.Tensor) -> torch.Tensor:
    """Pictures uint8 (B, 3, H, W) -> tokens int64 (B, N), by a frozen tokenizer in its own number format."""
    dtype = vqgan.quantize.embedding.weight.dtype
    with torch.no_grad():
        return vqgan.tokenize((images.float() / 255).to(dtype))


def stream(plan: Plan, catalog: Catalog | TokenCache, listed: bool = True) -> Callable[[int], dali.Ahead]:
    """position -> this rank's endless micro-batches from there on.

    Unreadable pictures are listed in the run folder, which must exist then; `listed` False looks over them.
    """
    me, recipe = process.start(), plan.recipe
    path, limit = (plan.options.out / "quarantine.jsonl", recipe.inputs.broken_limit) if listed else (None, 1.0)
    share = {"batch": recipe.batch, "micro_batch": plan.share.micro_batch, "rank": me.rank, "world": me.world}
    common = {"seed": recipe.seed, "device": me.device, "views": recipe.views, **share}
    if isinstance(catalog, TokenCache):
        return lambda position: token_cache.stream(catalog, position=position, **common)
    return lambda position: dali.stream(
        catalog,
        position=position,
        inputs=recipe.inputs,
        quarantine=Quarantine(path, limit, catalog.n),
        **common,
    )
