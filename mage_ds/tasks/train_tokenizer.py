"""Training of a tokenizer (VQGAN, paper.md 1): reconstruction, codebook and commitment loss."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from mage_ds import keyed
from mage_ds.engine import held_out, loop, planner, process, run_folder, training, watch, wrap
from mage_ds.engine.training import Options, Plan
from mage_ds.inputs.catalog import open_catalog
from mage_ds.models import Vqgan
from mage_ds.recipes.schema import TokenizerRecipe
from mage_ds.report import grids
from mage_ds.sampling.decode import pixels

_SHOWN = 8  # pictures in a row of the picture sheet


def train_tokenizer(
    recipe: TokenizerRecipe,
    data: str,
    out: str,
    deepspeed_config: str | None = None,
    resume: str = "auto",
    extend: bool = False,
) -> None:
    """Train a tokenizer on the pictures of `data`, into the run folder `out`; continues a run that is there.

    Raises UserError for what cannot be, Stopped after a signal.
    """
    options = Options(Path(out), deepspeed_config, resume, extend)
    process.start()
    process.stop_on_signals()
    with run_folder.ending(options.out), watch.armed(recipe.machine.hang_timeout):
        catalog, validation = open_catalog(data, "train"), open_catalog(data, "val")
        with torch.device("meta"):
            outline = Vqgan(**recipe.model.model_dump())
        plan = training.plan(
            recipe,
            options,
            dataset=catalog.n,
            facts={"data": catalog.fingerprint},
            largest=partial(_largest_micro_batch, outline, recipe),
        )
        if training.already_done(plan):
            return
        process.say(f"{catalog.n:,} training pictures, {validation.n if validation else 'no'} held out (val/)")
        vqgan = Vqgan(**recipe.model.model_dump())
        wrap.initialize_weights(vqgan, recipe.seed)
        if recipe.codebook_init == "data" and plan.source is None:
            _codebook_from_data(vqgan.to(process.start().device), plan, catalog)
        opened = training.begin(plan, {"tokenizer": vqgan}, flops_per_image=planner.flops_per_image(recipe))
        loop.train(
            opened.engines,
            training.stream(plan, catalog),
            partial(step_fn, recipe=recipe, dtype=plan.dtype),
            opened.lr,
            opened.run,
            opened.limits,
            evaluate=_evaluator(plan, validation) if validation else None,
            pictures=_painter(plan, validation or catalog),
        )
        opened.run.finish()


def _codebook_from_data(vqgan: Vqgan, plan: Plan, catalog) -> None:
    """Draw the first codes from the untrained encoder's outputs on the first samples of the stream.

    Written before any engine exists, so it is the initial value of every copy and shard. Every rank starts from
    its own samples; the engine then takes rank 0's values.
    """
    source, points = training.stream(plan, catalog, listed=False)(0), []
    codes = plan.recipe.model.codes
    with torch.no_grad():
        while sum(len(some) for some in points) < 4 * codes:
            batch = next(source)
            z = vqgan.encode(batch.images[batch.valid > 0, 0].float() / 255)
            points.append(z.flatten(2).transpose(1, 2).flatten(0, 1))
        source.close()
        points = torch.cat(points)
        chosen = keyed.permutation(plan.recipe.seed, "codebook", 0, len(points))[:codes]
        vqgan.quantize.embedding.weight.copy_(points[torch.from_numpy(chosen)])


# --- one step


def step_fn(engines, batch, step, *, recipe: TokenizerRecipe, dtype: torch.dtype):
    """One micro-batch: the loss is the sum of the samples' losses over the micro batch's size (architecture 4.5)."""
    images = batch.images[:, 0].float() / 255
    drawn, tokens, codebook, commitment = engines["tokenizer"](images.to(dtype))
    l1 = (drawn.float() - images).abs().mean(dim=(1, 2, 3))
    weights = recipe.loss
    losses = weights.l1 * l1 + weights.codebook * codebook + weights.commitment * commitment
    loss, l1 = (losses * batch.valid).mean(), (l1 * batch.valid).mean()
    yield "tokenizer", loss, {"loss": loss, "l1": l1, "perplexity": perplexity(tokens, recipe.model.codes)}


def perplexity(tokens: torch.Tensor, codes: int) -> torch.Tensor:
    """exp of the entropy of the codes' frequencies in a micro-batch: how many are used evenly; 1 to `codes`."""
    counts = torch.zeros(codes, device=tokens.device)
    counts.scatter_add_(0, tokens.flatten(), counts.new_ones(tokens.numel()))
    p = counts / counts.sum()
    return torch.exp(-(p * torch.log(p.clamp(min=1e-12))).sum())


# --- held-out figures and pictures


def _evaluator(plan: Plan, catalog):
    """evaluate(engines, step): mean absolute error, PSNR and codebook use on held-out pictures."""
    codes = plan.recipe.model.codes

    def evaluate(engines, step) -> dict[str, float]:
        engine = engines["tokenizer"]
        engine.eval()
        sums, used = torch.zeros(3, dtype=torch.float64), torch.zeros(codes, dtype=torch.float64)
        for batch, counts in held_out.batches(plan, catalog):
            images = batch.images[:, 0].float() / 255
            with torch.no_grad():
                drawn, tokens, *_ = engine(images.to(plan.dtype))
            error = drawn.float().clamp(0, 1) - images
            psnr = -10 * torch.log10(error.square().mean(dim=(1, 2, 3)).clamp(min=1e-10))
            rows = torch.stack([torch.ones_like(psnr), error.abs().mean(dim=(1, 2, 3)), psnr], dim=1).cpu().double()
            sums += (rows * counts[:, None]).sum(0)
            used += torch.bincount(tokens.cpu()[counts].flatten(), minlength=codes)
        engine.train()
        me = process.start()
        totals = process.sum_over_ranks(torch.cat([sums, used]).to(me.device)).cpu()
        n, l1, psnr = totals[:3].tolist()
        share = float((totals[3:] > 0).double().mean())
        return {"val_l1": l1 / n, "val_psnr": psnr / n, "val_codes_used": share} if n else {}

    return evaluate


def _painter(plan: Plan, catalog):
    """pictures(engines, step): originals above their reconstructions."""

    def paint(engines, step) -> np.ndarray:
        engine = engines["tokenizer"]
        engine.eval()
        images = held_out.shown(plan, catalog, _SHOWN).images[:, 0]
        with torch.no_grad():
            drawn, *_ = engine((images.float() / 255).to(plan.dtype))
        engine.train()
        originals = images.permute(0, 2, 3, 1).cpu().numpy()
        rows = {"originals": originals, "reconstructed": pixels(drawn.float())}
        return grids.rows(list(held_out.join(rows, min(_SHOWN, catalog.n)).items()))

    return paint


# --- what an image costs


def _picture_on_meta(recipe: TokenizerRecipe) -> torch.Tensor:
    return torch.zeros(1, 3, recipe.inputs.image_size, recipe.inputs.image_size, device="meta")


def _largest_micro_batch(outline: Vqgan, recipe: TokenizerRecipe) -> int:
    me = process.start()
    kept = planner.activation_bytes(lambda: outline(_picture_on_meta(recipe)), outline)
    return planner.largest_micro_batch(kept, me.device, me.local_world)
