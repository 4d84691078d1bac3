"""Pre-training of MAGE (paper sections 3 and 4, Table 10): pictures -> tokens -> masks -> logits -> loss."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mage_ds import keyed
from mage_ds.engine import held_out, loop, planner, process, run_folder, stored, training, watch, wrap
from mage_ds.engine.training import Options, Plan, tokenize
from mage_ds.errors import UserError
from mage_ds.inputs.batch import Batch
from mage_ds.inputs.catalog import open_catalog
from mage_ds.inputs.token_cache import TokenCache, brief
from mage_ds.models import Mage, Vqgan
from mage_ds.models.mage import token_loss
from mage_ds.models.masking import mask_ratio, masks
from mage_ds.recipes.schema import PretrainRecipe
from mage_ds.report import grids
from mage_ds.sampling.decode import decode, keyed_noise, pixels

_BANDS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the mask ratio, for the held-out loss
_SHOWN = 8  # pictures in a row of the picture sheet


def pretrain(
    recipe: PretrainRecipe,
    data: str,
    out: str,
    tokenizer: str | None = None,
    deepspeed_config: str | None = None,
    resume: str = "auto",
    extend: bool = False,
) -> None:
    """Train a MAGE on the pictures of `data`, into the run folder `out`; continues a run that is there.

    data: a folder of pictures, or what `tokenize` made of one. tokenizer: a tokenizer's run folder or tokenizer
    folder, or "random" (initial values, for trials); a run that exists and a token cache have their own copies.
    Raises UserError for what cannot be, Stopped after a signal.
    """
    options = Options(Path(out), deepspeed_config, resume, extend)
    process.start()
    process.stop_on_signals()
    with run_folder.ending(options.out), watch.armed(recipe.machine.hang_timeout):
        catalog, validation = (open_catalog(data, split, tokens=True) for split in ("train", "val"))
        cached = isinstance(catalog, TokenCache)
        if cached and tokenizer is None and not (options.out / "tokenizer").is_dir():
            tokenizer = catalog.root / "tokenizer"
        vqgan, info = _tokenizer(tokenizer, recipe, options.out)
        if cached:
            _refuse_others(catalog, recipe, info["hash"], tokenizer or options.out / "tokenizer")
        with torch.device("meta"):
            outline = Mage(**recipe.model.model_dump())
        plan = training.plan(
            recipe,
            options,
            dataset=catalog.n,
            facts={"data": catalog.fingerprint, "tokenizer": info["hash"]},
            largest=partial(_largest_micro_batch, outline, recipe),
        )
        if training.already_done(plan):
            return
        if cached:
            _warn_of_dtype(catalog, plan.precision)
        process.say(f"{catalog.n:,} training pictures, {validation.n if validation else 'no'} held out (val/)")
        mage = wrap.build(lambda: Mage(**recipe.model.model_dump()), recipe.seed, plan.config)
        opened = training.begin(
            plan,
            {"mage": mage},
            save_tokenizer=lambda folder: stored.save_tokenizer(folder, vqgan, info["model"], info["image_size"]),
            flops_per_image=planner.flops_per_image(recipe, cached=cached),
        )
        vqgan = training.frozen(vqgan, plan.dtype)
        loop.train(
            opened.engines,
            training.stream(plan, catalog),
            partial(step_fn, recipe=recipe, tokenize=partial(tokenize, vqgan)),
            opened.lr,
            opened.run,
            opened.limits,
            evaluate=_evaluator(plan, validation, vqgan) if validation else None,
            pictures=_painter(plan, validation or catalog, vqgan),
        )
        opened.run.finish()


def _tokenizer(tokenizer: str | None, recipe: PretrainRecipe, out: Path) -> tuple[Vqgan, dict]:
    """The frozen tokenizer that the command line names, or the run's own; checked against the recipe."""
    if tokenizer is None and (out / "tokenizer").is_dir():
        tokenizer = out / "tokenizer"
    if tokenizer is None:
        raise UserError("--tokenizer is missing: give the run folder of `mage-ds train digits_tokenizer`, or `random`")
    if tokenizer == "random":
        vqgan = Vqgan(**recipe.tokenizer.model_dump())
        wrap.initialize_weights(vqgan, recipe.seed)
        info = {"model": recipe.tokenizer.model_dump(), "image_size": recipe.inputs.image_size}
        info["hash"] = stored.weights_hash(vqgan.state_dict())
        return vqgan.eval().requires_grad_(False), info
    vqgan, info = stored.load_tokenizer(Path(tokenizer))
    size, codes = recipe.inputs.image_size, info["model"]["codes"]
    tokens = (size // vqgan.factor) ** 2 if size % vqgan.factor == 0 else 0
    if (tokens, codes) != (recipe.model.tokens, recipe.model.codes):
        raise UserError(
            f"--tokenizer {tokenizer}: makes {tokens} tokens of {codes} codes of {size} px, the recipe's model.tokens "
            f"is {recipe.model.tokens} and model.codes {recipe.model.codes}; choose another tokenizer or recipe"
        )
    return vqgan, info


def _refuse_others(cache: TokenCache, recipe: PretrainRecipe, tokenizer_hash: str, tokenizer) -> None:
    """UserError where the tokens are not those that the recipe and the tokenizer would make of the pictures."""
    made = cache.settings
    if tokenizer_hash != made["tokenizer"]:
        raise UserError(
            f"--tokenizer {tokenizer}: is not the one that made {cache.root} ({tokenizer_hash[:12]}, its tokens are of "
            f"{made['tokenizer'][:12]}); leave it out, the cache holds a copy, or tokenize the data with this one"
        )
    asked = recipe.inputs.model_dump(include={"image_size", "augmentation", "interpolation", "evaluation_resize"})
    if "val" not in made["data"]:
        del asked["evaluation_resize"]
    if keys := [key for key in asked if asked[key] != made[key]]:
        what = "; ".join(f"{key} {brief(made[key])} there, {brief(asked[key])} here" for key in keys)
        raise UserError(
            f"--data {cache.root}: its tokens were made of pictures cut otherwise than the recipe says ({what}); make "
            "others with `mage-ds tokenize --recipe RECIPE`, or change the recipe: inputs.KEY=VALUE"
        )
    bad = 1 - float(cache.valid.all(axis=1).mean())
    if bad > recipe.inputs.broken_limit:
        raise UserError(
            f"--data {cache.root}: {bad:.2%} of its pictures were unreadable, more than inputs.broken_limit="
            f"{recipe.inputs.broken_limit:g} allows ({cache.root / 'quarantine.jsonl'} lists them); raise the limit"
        )
    seed = "" if made["seed"] == recipe.seed else f" of seed {made['seed']}"
    views = f"{cache.views} views{seed}, one an epoch in turn" if cache.views > 1 else f"one view{seed}"
    process.say(f"tokens of {cache.root}: {views}, made in {made['dtype']} in batches of {made['batch']}")


def _warn_of_dtype(cache: TokenCache, precision: str) -> None:
    """A cache of another number format is of use, but live training would see some other tokens."""
    if (made := cache.settings["dtype"]) != precision:
        process.say(
            f"WARNING: the tokens of {cache.root} were made in {made}, this training is in {precision}, which would "
            f"make some of them other ones; for those: `mage-ds tokenize --precision {precision} ...`"
        )


# --- one step


def tokens_of(batch: Batch, tokenize: Callable) -> torch.Tensor:
    """The tokens of a batch, int64 (B, N): the cache's, or those of its pictures."""
    return batch.tokens[:, 0] if batch.images is None else tokenize(batch.images[:, 0])


def draw_masks(recipe: PretrainRecipe, index: np.ndarray, epoch: np.ndarray, device, purpose: str = "mask"):
    """The masks of samples `index` (B,) in their epochs, keyed: masked bool (B, N), keep int64 (B, K), ratio (B,)."""
    numbers = recipe.masking
    u = keyed.uniform(recipe.seed, f"{purpose} ratio", index, epoch)[:, 0]
    if numbers.per == "batch":
        u = np.full_like(u, u[0])
    noise = torch.from_numpy(keyed.uniform(recipe.seed, purpose, index, epoch, recipe.model.tokens))
    ratio = mask_ratio(torch.from_numpy(u), mean=numbers.mean, std=numbers.std, low=numbers.low, high=numbers.high)
    masked, keep = masks(noise, ratio, numbers.drop)
    return masked.to(device, non_blocking=True), keep.to(device, non_blocking=True), ratio


def step_fn(engines, batch, step, *, recipe: PretrainRecipe, tokenize):
    """One micro-batch: the loss is the sum of the samples' losses over the micro batch's size (architecture 4.5)."""
    tokens = tokens_of(batch, tokenize)
    masked, keep, _ = draw_masks(recipe, batch.index, batch.epoch, tokens.device)
    logits = engines["mage"](tokens, masked, keep)
    losses, top1 = token_loss(logits, tokens, masked, recipe.label_smoothing)
    loss = (losses * batch.valid).mean()
    yield "mage", loss, {"loss": loss, "top1": (top1 * batch.valid).mean()}


# --- held-out figures and pictures


def _evaluator(plan: Plan, catalog, vqgan: Vqgan):
    """evaluate(engines, step): loss and top1 on held-out pictures under masks that are always the same."""
    recipe = plan.recipe

    def evaluate(engines, step) -> dict[str, float]:
        engine = engines["mage"]
        engine.eval()
        sums = torch.zeros(len(_BANDS), 3, dtype=torch.float64)  # a row a band, the last for all: n, loss, top1
        for batch, counts in held_out.batches(plan, catalog):
            tokens = tokens_of(batch, partial(tokenize, vqgan))
            masked, keep, ratio = draw_masks(recipe, batch.index, batch.epoch, tokens.device, "held-out mask")
            with torch.no_grad():
                logits = engine(tokens, masked, keep)
            loss, top1 = token_loss(logits, tokens, masked, recipe.label_smoothing)
            rows = torch.stack([torch.ones_like(ratio), loss.double().cpu(), top1.double().cpu()], dim=1)
            rows *= counts[:, None]
            sums.index_add_(0, torch.bucketize(ratio, torch.tensor(_BANDS[1:-1], dtype=torch.float64)), rows)
            sums[-1] += rows.sum(0)
        engine.train()
        return _figures(process.sum_over_ranks(sums.to(tokens.device)).cpu())

    return evaluate


def _figures(sums: torch.Tensor) -> dict[str, float]:
    n, loss, top1 = sums.unbind(1)
    figures = {"val_loss": float(loss[-1] / n[-1]), "val_top1": float(top1[-1] / n[-1])} if n[-1] else {}
    for low, high, count, total in zip(_BANDS, _BANDS[1:], n.tolist(), loss.tolist(), strict=False):
        if count:
            figures[f"val_loss_{low:.1f}-{high:.1f}"] = total / count
    return figures


def _painter(plan: Plan, catalog, vqgan: Vqgan):
    """pictures(engines, step): originals (a cache has none), reconstructions, masked input, prediction, and samples,
    on one sheet."""
    recipe = plan.recipe

    def paint(engines, step) -> np.ndarray:
        engine = engines["mage"]
        engine.eval()
        batch = held_out.shown(plan, catalog, _SHOWN)
        tokens = tokens_of(batch, partial(tokenize, vqgan))
        masked, _, _ = draw_masks(recipe, batch.index, batch.epoch, tokens.device, "shown mask")
        with torch.no_grad():
            filled = torch.where(masked, engine(tokens, masked).argmax(-1), tokens)
            sampled = decode(
                held_out.stoppable(engine),
                torch.zeros_like(tokens),
                torch.ones_like(masked),
                noise=keyed_noise(recipe.seed, batch.index, recipe.model.tokens),
                **recipe.sampling.model_dump(),
            )
            rebuilt, predicted, samples = (pixels(vqgan.detokenize(grid).float()) for grid in (tokens, filled, sampled))
        engine.train()
        rows = {"reconstructed": rebuilt}
        if batch.images is not None:
            rows = {"originals": batch.images[:, 0].permute(0, 2, 3, 1).cpu().numpy(), **rows}
        hidden = grids.mask_overlay(next(iter(rows.values())), masked.cpu().numpy())
        rows |= {"masked": hidden, "predicted": predicted, "samples": samples}
        return grids.rows(list(held_out.join(rows, min(_SHOWN, catalog.n)).items()))

    return paint


# --- what an image costs


def _inputs_on_meta(recipe: PretrainRecipe):
    tokens = torch.zeros(1, recipe.model.tokens, dtype=torch.int64, device="meta")
    noise = torch.zeros(1, recipe.model.tokens, dtype=torch.float64, device="meta")
    masked, keep = masks(noise, torch.zeros(1, dtype=torch.float64, device="meta"), recipe.masking.drop)
    return tokens, masked, keep


def _largest_micro_batch(outline: Mage, recipe: PretrainRecipe) -> int:
    me = process.start()
    kept = planner.activation_bytes(lambda: outline(*_inputs_on_meta(recipe)), outline)
    return planner.largest_micro_batch(kept, me.device, me.local_world)
