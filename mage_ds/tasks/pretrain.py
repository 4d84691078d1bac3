"""Training of MAGE (paper sections 3 and 4, Table 10): pictures -> tokens -> masks -> logits -> loss.

Where the recipe's model has classes, the encoder is that of a MAGE which is already trained, and frozen: it stands
outside of the engine, which is a new decoder that is told each picture's label (paper section 5, Table 1).
Where its objective is `contrastive` or `both`, each picture comes in two views that are also told from those of other
pictures (MAGE-C, paper section 3); a `contrastive` model is an encoder alone.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mage_ds import keyed
from mage_ds.engine import (
    below,
    gather,
    held_out,
    loop,
    made,
    planner,
    process,
    run_folder,
    run_parts,
    stored,
    training,
    watch,
    wrap,
)
from mage_ds.engine.training import Options, Plan, tokenize
from mage_ds.inputs.batch import Batch
from mage_ds.inputs.catalog import open_catalog
from mage_ds.inputs.token_cache import TokenCache
from mage_ds.models import Encoder, Vqgan
from mage_ds.models.contrastive import info_nce
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
    init: str | None = None,
    deepspeed_config: str | None = None,
    resume: str = "auto",
    extend: bool = False,
) -> None:
    """Train a MAGE on the pictures of `data`, into the run folder `out`; continues a run that is there.

    data: a folder of pictures, or what `tokenize` made of one. tokenizer: a tokenizer's run folder or tokenizer
    folder, or "random" (initial values, for trials); a run that exists and a token cache have their own copies. init:
    what the frozen encoder comes from where the model has classes, a MAGE or an encoder's folder; the tokenizer that
    lies in it will do. A run that exists has a copy of that too, and goes on with it where what `init` names is gone or
    has been trained on. Raises UserError for what cannot be, Stopped after a signal.
    """
    options = Options(Path(out), deepspeed_config, resume, extend)
    process.start()
    process.stop_on_signals()
    with run_folder.ending(options.out), watch.armed(recipe.machine.hang_timeout):
        catalog, validation = (open_catalog(data, split, tokens=True) for split in ("train", "val"))
        cached = isinstance(catalog, TokenCache)
        encoder, found = (None, {}) if recipe.model.classes is None else below.encoder(init, recipe, options.out)
        if tokenizer is None and not (options.out / "tokenizer").is_dir():
            came_along = init if found.get("tokenizer") else None
            tokenizer = catalog.root / "tokenizer" if cached else came_along
        vqgan, info = below.tokenizer(tokenizer, recipe, options.out)
        facts = {"data": catalog.fingerprint, "tokenizer": info["hash"]}
        copies = {"tokenizer": partial(stored.save_tokenizer, model=vqgan, **below.sizes(info))}
        if encoder is not None:
            facts |= {"encoder": found["hash"], "init": init and str(Path(init).resolve())}
            facts["classes"] = below.labels(recipe, data, catalog, validation)
            copies["encoder"] = partial(stored.save_encoder, model=encoder, **below.sizes(found))
            below.warn_of_tokens(found, info["hash"])
        if cached:
            below.refuse_others(catalog, recipe, info["hash"], tokenizer or options.out / "tokenizer")
        plan = training.plan(
            recipe,
            options,
            dataset=catalog.n,
            facts=facts,
            largest=partial(_largest_micro_batch, recipe),
        )
        if training.already_done(plan):
            return
        if cached:
            below.warn_of_dtype(catalog, plan.precision)
        process.say(f"{catalog.n:,} training pictures, {validation.n if validation else 'no'} held out (val/)")
        if encoder is not None:
            process.say(f"encoder: {sum(p.numel() for p in encoder.parameters()):,} parameters, frozen")
        model = wrap.build(lambda: made.model_of(recipe), recipe.seed, plan.config)
        opened = training.begin(
            plan,
            {run_parts.engine_name(recipe): model},
            copies=copies,
            flops_per_image=planner.flops_per_image(recipe, cached=cached),
        )
        vqgan = training.frozen(vqgan, plan.dtype)
        encoder = encoder and training.frozen(encoder, plan.dtype)
        step = (
            partial(contrast_fn, recipe=recipe)
            if recipe.contrastive
            else partial(step_fn, recipe=recipe, encoder=encoder)
        )
        seen = recipe.objective != "contrastive"  # there is nothing to predict or to draw
        loop.train(
            opened.engines,
            training.stream(plan, catalog),
            partial(step, tokenize=partial(tokenize, vqgan)),
            opened.lr,
            opened.run,
            opened.limits,
            evaluate=_evaluator(plan, validation, vqgan, encoder) if validation and seen else None,
            pictures=_painter(plan, validation or catalog, vqgan, encoder) if seen else None,
        )
        opened.run.finish()


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


def told_labels(recipe: PretrainRecipe, batch: Batch) -> torch.Tensor:
    """The labels (B,) that the decoder is told: of a share of the samples none (-1), keyed, so that it also learns to
    do without and its pictures can be guided."""
    withheld = keyed.uniform(recipe.seed, "label", batch.index, batch.epoch)[:, 0] < recipe.label_dropout
    return batch.labels.masked_fill(torch.from_numpy(withheld).to(batch.labels.device, non_blocking=True), -1)


def predict(engines, encoder: Encoder | None, tokens, masked, keep=None, labels=None, guidance=None) -> torch.Tensor:
    """Logits (B, N, codes) as `Mage.forward` gives them: by one engine, or by one behind the frozen encoder."""
    if encoder is None:
        return engines["mage"](tokens, masked, keep)
    with torch.no_grad():
        x, words = encoder(tokens, masked, keep), encoder.code_vectors()
    return engines["decoder"](x, masked, keep, words, labels, guidance)


def step_fn(engines, batch, step, *, recipe: PretrainRecipe, tokenize, encoder: Encoder | None = None):
    """One micro-batch: the loss is the sum of the samples' losses over the micro batch's size (architecture 4.5)."""
    tokens = tokens_of(batch, tokenize)
    masked, keep, _ = draw_masks(recipe, batch.index, batch.epoch, tokens.device)
    labels = None if encoder is None else told_labels(recipe, batch)
    logits = predict(engines, encoder, tokens, masked, keep, labels)
    losses, top1 = token_loss(logits, tokens, masked, recipe.label_smoothing)
    loss = (losses * batch.valid).mean()
    yield next(iter(engines)), loss, {"loss": loss, "top1": (top1 * batch.valid).mean()}


def contrast_fn(engines, batch, step, *, recipe: PretrainRecipe, tokenize):
    """As `step_fn`, of two views of each picture: what they have in common, and with `both` the masked tokens of each.

    Shows, beside its parts of the loss: contrast_top1, share of the views whose other one is the nearest; pairs, the
    pictures of a contrast that count; no_pairs, share of the contrasts without any, whose loss is 0.
    """
    numbers, me = recipe.contrastive, process.start()
    tokens = views_of(batch, tokenize)
    masked, keep, few = _view_masks(recipe, batch, tokens.device)
    counted = batch.valid * few
    out = next(iter(engines.values()))(tokens, masked, keep, counted.repeat(2), gather.total)
    logits, views = out if recipe.objective == "both" else (None, out)
    contrast, nearest, pairs = info_nce(
        views, counted, temperature=numbers.temperature, gathered=gather.gathered, first=me.rank * len(counted)
    )
    loss, shown = numbers.weight * contrast, {"contrast": contrast, "contrast_top1": nearest, "pairs": pairs}
    if logits is not None:
        valid = batch.valid.repeat(2)
        losses, top1 = token_loss(logits, tokens, masked, recipe.label_smoothing)
        shown |= {"reconstruction": (losses * valid).mean(), "top1": (top1 * valid).mean()}
        loss = shown["reconstruction"] + loss
    yield next(iter(engines)), loss, {"loss": loss, **shown, "no_pairs": (pairs == 0).float()}


def views_of(batch: Batch, tokenize: Callable) -> torch.Tensor:
    """The tokens of a batch of B pictures in two views, int64 (2B, N): view 0 of all of them, then view 1."""
    if batch.images is None:
        return batch.tokens.transpose(0, 1).flatten(0, 1)
    return tokenize(batch.images.transpose(0, 1).flatten(0, 1))


def _view_masks(recipe: PretrainRecipe, batch: Batch, device):
    """As `draw_masks`, of both views, (2B, ...); instead of the ratios float32 (B,): 1 where both are below the highest
    one that is contrasted."""
    if recipe.masking is None:
        count = len(batch.index)
        masked = torch.zeros(2 * count, recipe.model.tokens, dtype=torch.bool, device=device)
        return masked, None, torch.ones(count, device=device)
    drawn = [draw_masks(recipe, batch.index, batch.epoch, device, purpose) for purpose in ("mask", "mask of view 1")]
    masked, keep, ratios = zip(*drawn, strict=True)
    few = (torch.stack(ratios) < recipe.contrastive.highest).all(dim=0)
    return torch.cat(masked), torch.cat(keep), few.float().to(device, non_blocking=True)


# --- held-out figures and pictures


def _evaluator(plan: Plan, catalog, vqgan: Vqgan, encoder: Encoder | None):
    """evaluate(engines, step): loss and top1 on held-out pictures under masks that are always the same; a decoder is
    told every label."""
    recipe = plan.recipe

    def evaluate(engines, step) -> dict[str, float]:
        [engine] = engines.values()
        engine.eval()
        sums = torch.zeros(len(_BANDS), 3, dtype=torch.float64)  # a row a band, the last for all: n, loss, top1
        for batch, counts in held_out.batches(plan, catalog):
            tokens = tokens_of(batch, partial(tokenize, vqgan))
            masked, keep, ratio = draw_masks(recipe, batch.index, batch.epoch, tokens.device, "held-out mask")
            with torch.no_grad():
                logits = predict(engines, encoder, tokens, masked, keep, batch.labels)
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


def _painter(plan: Plan, catalog, vqgan: Vqgan, encoder: Encoder | None):
    """pictures(engines, step): originals (a cache has none), reconstructions, masked input, prediction, and samples,
    those of a decoder of the labels of the originals, on one sheet."""
    recipe = plan.recipe

    def paint(engines, step) -> np.ndarray:
        [engine] = engines.values()
        engine.eval()
        batch = held_out.shown(plan, catalog, _SHOWN)
        tokens = tokens_of(batch, partial(tokenize, vqgan))
        masked, _, _ = draw_masks(recipe, batch.index, batch.epoch, tokens.device, "shown mask")
        with torch.no_grad():
            logits = predict(engines, encoder, tokens, masked, labels=batch.labels)
            filled = torch.where(masked, logits.argmax(-1), tokens)
            sampled = decode(
                held_out.stoppable(partial(predict, engines, encoder)),
                torch.zeros_like(tokens),
                torch.ones_like(masked),
                noise=keyed_noise(recipe.seed, batch.index, recipe.model.tokens),
                labels=None if encoder is None else batch.labels,
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


def _largest_micro_batch(recipe: PretrainRecipe) -> int:
    me = process.start()
    with torch.device("meta"):
        model = made.model_of(recipe)
    kept = planner.activation_bytes(lambda: made.mage_on_made_inputs(recipe, model, 1, torch.float32, "meta")[0], model)
    return planner.largest_micro_batch(kept, me.device, me.local_world)
