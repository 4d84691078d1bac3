"""Classifiers (paper section 4, Tables 11 to 13): a linear probe, a fine-tuned encoder, or one from initial values.

pictures -> mixup, cutmix -> tokens (or pixels) -> classifier -> loss; a probe's encoder is frozen and stands outside of
the engine, which is a linear layer on its features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mage_ds.engine import (
    beginning,
    below,
    ds_config,
    feature_table,
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
from mage_ds.engine.training import Options, Plan
from mage_ds.errors import UserError
from mage_ds.inputs.batch import Batch
from mage_ds.inputs.catalog import open_catalog
from mage_ds.inputs.mixing import mixed
from mage_ds.inputs.token_cache import TokenCache
from mage_ds.models import Encoder, PixelViT, Vqgan
from mage_ds.recipes.schema import ClassifyRecipe
from mage_ds.report import grids
from mage_ds.sampling.decode import pixels

_SHOWN, _COLUMNS, _SIDE = 16, 8, 96  # pictures of the sheet, in a row, and pixels that a caption needs
_TOP = 5


def classify(
    recipe: ClassifyRecipe,
    data: str,
    out: str,
    tokenizer: str | None = None,
    init: str | None = None,
    deepspeed_config: str | None = None,
    resume: str = "auto",
    extend: bool = False,
) -> None:
    """Train a classifier on the labelled pictures of `data`, into the run folder `out`; continues a run that is there.

    data: a folder of pictures, or what `tokenize` made of one. init: of a probe and of fine-tuning, what the encoder
    comes from: a MAGE, an encoder's folder, another classifier; with model.patch a ViT over pixels. tokenizer: as of
    `pretrain`; the one that lies in `init` will do. Raises UserError for what cannot be, Stopped after a signal.
    """
    options = Options(Path(out), deepspeed_config, resume, extend)
    me = process.start()
    process.stop_on_signals()
    with run_folder.ending(options.out), watch.armed(recipe.machine.hang_timeout):
        catalog, validation = (open_catalog(data, split, tokens=_tokens_will_do(recipe)) for split in ("train", "val"))
        encoder, found, facts, copies = _encoder(init, recipe, options.out)
        vqgan = None
        if recipe.tokenizer is None and tokenizer is not None:
            raise UserError(f"--tokenizer {tokenizer}: this model sees pixels (model.patch); leave it out")
        if recipe.tokenizer is not None:
            vqgan, info = _tokenizer(tokenizer, init, found, catalog, recipe, options.out)
            facts["tokenizer"] = info["hash"]
            copies["tokenizer"] = partial(stored.save_tokenizer, model=vqgan, **below.sizes(info))
        facts |= {"data": catalog.fingerprint, "classes": below.labels(recipe, data, catalog, validation)}
        plan = training.plan(
            recipe, options, dataset=catalog.n, facts=facts, largest=partial(_largest_micro_batch, recipe)
        )
        _check_micro_batch(plan)
        if training.already_done(plan):
            return
        process.say(f"{catalog.n:,} training pictures, {validation.n if validation else 'no'} held out (val/)")
        precision = plan.precision
        if recipe.protocol == "probe":  # the head is float32 for LARS's sake, what is frozen need not be
            precision = ds_config.choose_precision(recipe.machine.precision, me.device)
            count = sum(p.numel() for p in encoder.parameters())
            process.say(f"encoder: {count:,} parameters, frozen, in {precision}")
        if isinstance(catalog, TokenCache):
            below.warn_of_dtype(catalog, precision)
        given = _given(encoder) if recipe.protocol == "finetune" and encoder is not None else None
        model = wrap.build(lambda: made.model_of(recipe), recipe.seed, plan.config, given)
        tabled = feature_table.serves(recipe, catalog)
        opened = training.begin(
            plan,
            {run_parts.engine_name(recipe): model},
            copies=copies,
            flops_per_image=_flops(recipe, cached=isinstance(catalog, TokenCache), tabled=tabled),
        )
        see = Sight(recipe, vqgan, encoder if recipe.protocol == "probe" else None, ds_config.dtype_of(precision))
        batches = training.stream(plan, catalog)
        if tabled:
            table = feature_table.made(plan, catalog, see, precision)
            batches = partial(feature_table.Stream, plan, table, catalog.labels)
        loop.train(
            opened.engines,
            batches,
            partial(step_fn, recipe=recipe, see=see),
            opened.lr,
            opened.run,
            opened.limits,
            evaluate=Evaluator(plan, validation, see) if validation else None,
            pictures=_painter(plan, validation or catalog, see),
        )
        opened.run.finish()


# --- what lies below


def _tokens_will_do(recipe: ClassifyRecipe) -> bool:
    return recipe.tokenizer is not None and not (recipe.mix or recipe.inputs.colour or recipe.inputs.policy)


def _encoder(init: str | None, recipe: ClassifyRecipe, out: Path) -> tuple[Encoder | PixelViT | None, dict, dict, dict]:
    """The trained encoder (None: from scratch, or fine-tuning goes on), what it is, and what a run's facts and copies
    say of it."""
    if recipe.protocol == "scratch":
        if init is not None:
            raise UserError(f"--init {init}: protocol = scratch begins with initial values; leave it out")
        return None, {}, {}, {}
    if recipe.protocol == "probe":
        encoder, found = below.encoder(init, recipe, out)
        facts = {"encoder": found["hash"], "init": init and str(Path(init).resolve())}
        return encoder, found, facts, {"encoder": partial(stored.save_encoder, model=encoder, **below.sizes(found))}

    def load(path: str) -> tuple[Encoder | PixelViT, dict]:
        encoder, found = below.opened(Path(path), recipe)
        below.check_sizes(path, found, recipe)
        process.say(f"begins with the encoder of {path}: its {found['of']}")
        return encoder, found

    encoder, found, facts = beginning.given(init, out, load)
    if encoder is None and not facts:
        raise below.no_init(recipe)
    return encoder, found, facts, {}


def _given(encoder: Encoder | PixelViT) -> dict[str, torch.Tensor]:
    """What a classifier begins with: all of the encoder but the norms behind its blocks; its own is new."""
    own = ("norm.", "fc_norm.")
    return {name: value for name, value in encoder.state_dict().items() if not name.startswith(own)}


def _tokenizer(tokenizer: str | None, init, found: dict, catalog, recipe: ClassifyRecipe, out: Path):
    """The frozen tokenizer and what it is; checked against the encoder and a token cache."""
    cached = isinstance(catalog, TokenCache)
    if tokenizer is None and not (out / "tokenizer").is_dir():
        came_along = init if found.get("tokenizer") else None
        tokenizer = catalog.root / "tokenizer" if cached else came_along
    vqgan, info = below.tokenizer(tokenizer, recipe, out)
    if found:
        below.warn_of_tokens(found, info["hash"])
    if cached:
        below.refuse_others(catalog, recipe, info["hash"], tokenizer or out / "tokenizer")
    return vqgan, info


class Sight:
    """What the trained model is given of a batch: pixels, or their tokens, or a frozen encoder's features of them.

    dtype: of the frozen models.
    """

    def __init__(self, recipe: ClassifyRecipe, vqgan: Vqgan | None, encoder: Encoder | PixelViT | None, dtype):
        self.dtype = dtype
        self.vqgan = vqgan and training.frozen(vqgan, dtype)
        self.encoder = encoder and training.frozen(encoder, dtype)
        self._dropout = None
        if isinstance(encoder, Encoder):  # as published: active while the head trains, though nothing below it does
            self._dropout = encoder.token_emb.dropout
            self._dropout.p = recipe.model.dropout

    @torch.no_grad()
    def __call__(self, batch: Batch, pictures: torch.Tensor | None = None, training: bool = False) -> torch.Tensor:
        """pictures: (B, 3, H, W) in [0, 1] in place of the batch's; training: with dropout."""
        if batch.features is not None:
            return batch.features
        if batch.tokens is not None:
            seen = batch.tokens[:, 0]
        else:
            pictures = (in_unit(batch.images) if pictures is None else pictures).to(self.dtype)
            seen = pictures if self.vqgan is None else self.vqgan.tokenize(pictures)
        if self.encoder is None:
            return seen
        if self._dropout is not None:
            self._dropout.train(training)
        return self.encoder.features(seen).float()


def in_unit(images: torch.Tensor) -> torch.Tensor:
    """The first view of pictures uint8 (B, V, 3, H, W) in [0, 1], float32 (B, 3, H, W)."""
    return images[:, 0].float() / 255


# --- one step


def step_fn(engines, batch: Batch, step: int, *, recipe: ClassifyRecipe, see: Sight):
    """One micro-batch: the loss is the sum of the samples' losses over the micro batch's size (architecture 4.5)."""
    [(name, engine)] = engines.items()
    weights = batch.valid
    if recipe.mix:  # what a placeholder was mixed into counts no more than itself
        weights = weights * weights.flip(0)
    pictures, targets = mixed(
        None if batch.images is None else in_unit(batch.images),
        batch.labels,
        mix=recipe.mix,
        classes=recipe.model.classes,
        smoothing=recipe.label_smoothing,
        key=(recipe.seed, int(batch.epoch[0]), int(batch.index[0])),
    )
    scores = engine(see(batch, pictures, training=True)).float()
    loss = (F.cross_entropy(scores, targets, reduction="none") * weights).mean()
    top1 = ((scores.argmax(1) == targets.argmax(1)) * weights).mean()
    yield name, loss, {"loss": loss, "top1": top1}


# --- held-out figures and pictures


class Evaluator:
    """evaluate(engines, step): loss, top-1 and top-5 of held-out pictures, each counted once; after the last step of
    the whole split."""

    def __init__(self, plan: Plan, catalog, see: Sight):
        self.plan, self.catalog, self.see = plan, catalog, see
        self._all = plan.recipe.report.evaluate_samples >= catalog.n
        self._features: dict[bool, list] = {}  # of a frozen encoder they are always the same

    def __call__(self, engines, step: int) -> dict[str, float]:
        [engine] = engines.values()
        sums = torch.zeros(4, dtype=torch.float64)
        with _judging(engine):
            for seen, labels, counts in self._batches(step == self.plan.steps or self._all):
                scores = engine(seen).float()
                loss = F.cross_entropy(scores, labels.clamp(min=0), reduction="none")
                right = scores.topk(min(_TOP, scores.shape[1])).indices == labels[:, None]
                rows = torch.stack([torch.ones_like(loss), loss, right[:, 0], right.any(1)], dim=1)
                sums += rows[counts.to(rows.device)].double().sum(0).cpu()
        n, *sums = process.sum_over_ranks(sums.to(process.start().device)).tolist()
        return {f"val_{key}": total / n for key, total in zip(("loss", "top1", "top5"), sums, strict=True)} if n else {}

    def _batches(self, whole: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        if whole in self._features:
            return iter(self._features[whole])
        plan = self.plan
        if whole:
            report = plan.recipe.report.model_copy(update={"evaluate_samples": self.catalog.n})
            plan = replace(plan, recipe=plan.recipe.model_copy(update={"report": report}))
        found = ((self.see(batch), batch.labels, counts) for batch, counts in held_out.batches(plan, self.catalog))
        if self.see.encoder is None:
            return found
        self._features[whole] = list(found)
        return iter(self._features[whole])


@contextmanager
def _judging(engine):
    """Within it the engine computes as the saved classifier will: without dropout, and by rank 0's running statistics;
    the run sees to the average of the weights. All ranks call it."""
    engine.eval()
    if process.start().world > 1:
        for buffer in engine.module.buffers():
            torch.distributed.broadcast(buffer, 0)
    with torch.no_grad():
        yield
    engine.train()


def _painter(plan: Plan, catalog, see: Sight):
    """pictures(engines, step): some pictures, below each what it is taken for, and what it is where that is wrong."""
    names, count = plan.facts["classes"], min(_SHOWN, catalog.n)

    def paint(engines, step) -> np.ndarray:
        [engine] = engines.values()
        batch = held_out.shown(plan, catalog, count)
        with _judging(engine):
            seen = see(batch)
            answers = engine(seen).argmax(1)
            if batch.images is None:  # a cache's tokens, as the tokenizer draws them
                shown = pixels(see.vqgan.detokenize(batch.tokens[:, 0]).float())
            else:
                shown = batch.images[:, 0].permute(0, 2, 3, 1).cpu().numpy()
        drawn = {"shown": shown, "answers": answers.cpu().numpy(), "labels": batch.labels.cpu().numpy()}
        drawn = held_out.join(drawn, count)
        texts = [_caption(names, *each) for each in zip(drawn["answers"], drawn["labels"], strict=True)]
        images = grids.enlarge(drawn["shown"], _SIDE)
        return grids.grid(images, columns=_COLUMNS, captions=texts)

    return paint


def _caption(names: list[str], answer: int, label: int) -> str:
    said = names[answer] if answer < len(names) else f"label {answer}"
    return said if answer == label else f"{said}, not {names[label]}"


# --- what an image costs, and what does not fit


def _check_micro_batch(plan: Plan) -> None:
    micro, each = plan.share.micro_batch, plan.recipe.batch // plan.share.world
    fits = [size for size in range(2, each + 1, 2) if each % size == 0]
    hint = f"choose {min(fits, key=lambda size: abs(size - micro))}" if fits else "choose another batch"
    if plan.recipe.mix and micro % 2:
        raise UserError(f"--micro-batch {micro}: mix joins the pictures of a micro-batch in pairs; {hint}")
    if plan.recipe.protocol == "probe" and micro == 1:
        raise UserError(f"--micro-batch 1: the probe's batch norm needs two pictures at least; {hint}")


def _flops(recipe: ClassifyRecipe, *, cached: bool, tabled: bool) -> int:
    if not tabled:
        return planner.flops_per_image(recipe, cached=cached)
    with torch.device("meta"):
        head = made.model_of(recipe).eval()
        return 3 * planner.forward_flops(lambda: made.loss_on_made_inputs(recipe, head, 1, torch.float32, "meta"))


def _largest_micro_batch(recipe: ClassifyRecipe) -> int:
    me = process.start()
    if recipe.protocol == "probe":  # of what is frozen nothing is kept
        each = max(peak.slope for _, peak in planner.frozen_bytes(recipe, torch.float32).values())
    else:
        with torch.device("meta"):
            model = made.model_of(recipe)
        each = planner.activation_bytes(
            lambda: made.loss_on_made_inputs(recipe, model, 1, torch.float32, "meta"), model
        )
    return planner.largest_micro_batch(each, me.device, me.local_world)
