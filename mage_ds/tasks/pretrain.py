"""Training of MAGE (paper sections 3 and 4, Table 10): pictures -> tokens -> masks -> logits -> loss.

Where the recipe's model has classes, the encoder is that of a MAGE which is already trained, and frozen: it stands
outside of the engine, which is a new decoder that is told each picture's label (paper section 5, Table 1).
"""

import json
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
from mage_ds.models import Encoder, Vqgan
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
        encoder, below = _encoder(init, recipe, options.out)
        if tokenizer is None and not (options.out / "tokenizer").is_dir():
            came_along = init if below.get("tokenizer") else None
            tokenizer = catalog.root / "tokenizer" if cached else came_along
        vqgan, info = _tokenizer(tokenizer, recipe, options.out)
        facts = {"data": catalog.fingerprint, "tokenizer": info["hash"]}
        copies = {"tokenizer": partial(stored.save_tokenizer, model=vqgan, **_sizes(info))}
        if encoder is not None:
            facts |= {"encoder": below["hash"], "init": init and str(Path(init).resolve())}
            facts["classes"] = _classes(recipe, data, catalog, validation)
            copies["encoder"] = partial(stored.save_encoder, model=encoder, **_sizes(below))
            _warn_of_tokens(below, info["hash"])
        if cached:
            _refuse_others(catalog, recipe, info["hash"], tokenizer or options.out / "tokenizer")
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
            _warn_of_dtype(catalog, plan.precision)
        process.say(f"{catalog.n:,} training pictures, {validation.n if validation else 'no'} held out (val/)")
        if encoder is not None:
            process.say(f"encoder: {sum(p.numel() for p in encoder.parameters()):,} parameters, frozen")
        model = wrap.build(lambda: planner.model_of(recipe), recipe.seed, plan.config)
        opened = training.begin(
            plan,
            {"mage" if encoder is None else "decoder": model},
            copies=copies,
            flops_per_image=planner.flops_per_image(recipe, cached=cached),
        )
        vqgan = training.frozen(vqgan, plan.dtype)
        encoder = encoder and training.frozen(encoder, plan.dtype)
        loop.train(
            opened.engines,
            training.stream(plan, catalog),
            partial(step_fn, recipe=recipe, tokenize=partial(tokenize, vqgan), encoder=encoder),
            opened.lr,
            opened.run,
            opened.limits,
            evaluate=_evaluator(plan, validation, vqgan, encoder) if validation else None,
            pictures=_painter(plan, validation or catalog, vqgan, encoder),
        )
        opened.run.finish()


# --- what lies below the model that is trained


def _sizes(info: dict) -> dict:
    return {"numbers": info["model"], "image_size": info["image_size"]}


def _encoder(init: str | None, recipe: PretrainRecipe, out: Path) -> tuple[Encoder | None, dict]:
    """The frozen encoder that the command line names, or the run's own, and what it is; None and nothing where the
    whole model is trained. UserError where its sizes are not the recipe's."""
    if recipe.model.classes is None:
        return None, {}
    if init is None and not (out / "encoder").is_dir():
        raise UserError(
            f"--init is missing: model.classes = {recipe.model.classes} trains a decoder on the encoder of a trained "
            "MAGE; give its run folder, an export or a file of the authors'"
        )
    path, (encoder, info) = _load_encoder(init and Path(init), out)
    asked = recipe.model.model_dump()
    for key in ("encoder", "tokens", "codes", "vocabulary"):
        if info["model"][key] != asked[key]:
            theirs, ours = json.dumps(info["model"][key]).replace('"', ""), json.dumps(asked[key]).replace('"', "")
            raise UserError(
                f"--init {path}: its {key} is {theirs}, the recipe's model.{key} is {ours}; choose another MAGE, or "
                f'add "model.{key}={theirs}"'
            )
    return encoder, info


def _load_encoder(init: Path | None, out: Path) -> tuple[Path, tuple[Encoder, dict]]:
    """What `init` names, and `stored.load_encoder` of it; the copy in `out`, with a warning, where a run that exists
    was started with a MAGE that is no longer there, or no longer what it was. Another one is told by the facts."""
    own = out / "encoder"
    if init is None:
        return own, stored.load_encoder(own)
    begun = run_folder.read_facts(out) if own.is_dir() and (out / "recipe.yaml").is_file() else {}
    named = bool(begun) and begun.get("init") == str(init.resolve())
    try:
        found = stored.load_encoder(init)
    except UserError:
        if not begun or (init.exists() and not named):
            raise
        why = "cannot be opened any more" if init.exists() else "is not there any more"
    else:
        if not named or found[1]["hash"] == begun["encoder"]:
            return init, found
        why = "is not what it was when this run began with it"
    process.say(f"WARNING: --init {init}: {why}; this run goes on with its own copy of the encoder, {own}")
    return own, stored.load_encoder(own)


def _classes(recipe: PretrainRecipe, data: str, *splits) -> list[str]:
    """The names of the labels. UserError where there are none, or more than the model has, and where some of the
    pictures have none: how often the decoder learns to do without is what label_dropout says."""
    names, most = splits[0].classes, recipe.model.classes
    labels = [int(split.labels.max(initial=-1)) for split in splits if split is not None]
    count = max(len(names), 1 + max(labels))
    if not names or labels[0] < 0:
        raise UserError(
            f"--data {data}: has no classes, and model.classes = {most} needs labels; sort the pictures into class "
            "folders, or give the tars .cls files"
        )
    bare = [int((split.labels < 0).sum()) if split is not None else 0 for split in splits]
    if any(bare):
        counts = " and ".join(f"{n:,} in {part}/" for n, part in zip(bare, ("train", "val"), strict=False) if n)
        raise UserError(
            f"--data {data}: of its pictures {counts} have no label, which model.classes = {most} needs of all; move "
            "them into class folders or out of the data (what is withheld on purpose is label_dropout)"
        )
    if count > most:
        raise UserError(
            f'--data {data}: has {count} classes, the recipe\'s model.classes is {most}; add "model.classes={count}"'
        )
    if count < most:
        process.say(
            f"{count} classes; model.classes = {most} leaves room for {most - count} that nothing is learned of"
        )
    return names


def _warn_of_tokens(below: dict, tokenizer: str) -> None:
    """An encoder understands the codes that it was trained on; of another tokenizer they mean something else."""
    if below["tokenizer"] not in (None, tokenizer):
        process.say(
            f"WARNING: the encoder was trained with another tokenizer ({below['tokenizer'][:12]}) than this training "
            f"({tokenizer[:12]}): unless their codes are the same, it will learn little"
        )


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
        model = planner.model_of(recipe)
    kept = planner.activation_bytes(
        lambda: planner.mage_on_made_inputs(recipe, model, 1, torch.float32, "meta")[0], model
    )
    return planner.largest_micro_batch(kept, me.device, me.local_world)
