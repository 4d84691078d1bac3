"""Training of a tokenizer (VQGAN, paper section 1): pixels, LPIPS, codebook, and a discriminator where it has one."""

import json
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mage_ds import keyed, recipes
from mage_ds.engine import (
    beginning,
    codebook,
    ds_config,
    held_out,
    loop,
    planner,
    process,
    run_folder,
    stored,
    training,
    watch,
    wrap,
)
from mage_ds.engine.adversarial import Opponent
from mage_ds.engine.tally import SHOWN, Tally, block
from mage_ds.engine.training import Options, Plan
from mage_ds.errors import UserError
from mage_ds.evaluation.features import load_inception
from mage_ds.inputs.catalog import open_catalog
from mage_ds.interop.lpips import load_lpips
from mage_ds.models import Vqgan
from mage_ds.models.adversary import Lpips, PatchGAN
from mage_ds.recipes.schema import TokenizerRecipe
from mage_ds.report import grids
from mage_ds.sampling.decode import pixels


def train_tokenizer(
    recipe: TokenizerRecipe,
    data: str,
    out: str,
    init: str | None = None,
    deepspeed_config: str | None = None,
    resume: str = "auto",
    extend: bool = False,
) -> None:
    """Train a tokenizer on the pictures of `data`, into the run folder `out`; continues a run that is there.

    init: a tokenizer (run folder, export, published file) whose weights a new run begins with. Raises UserError for
    what cannot be, Stopped after a signal.
    """
    options = Options(Path(out), deepspeed_config, resume, extend)
    me = process.start()
    process.stop_on_signals()
    with run_folder.ending(options.out), watch.armed(recipe.machine.hang_timeout):
        catalog, validation = open_catalog(data, "train"), open_catalog(data, "val")
        given, _, begun = beginning.given(init, options.out, partial(_load, recipe=recipe))
        lpips = load_lpips(recipe.loss.perceptual_weights).to(me.device) if recipe.loss.perceptual else None
        inception = load_inception(recipe.report.inception).to(me.device) if recipe.report.inception else None
        plan = training.plan(
            recipe,
            options,
            dataset=catalog.n,
            facts={"data": catalog.fingerprint, **begun},
            largest=partial(_largest_micro_batch, recipe),
        )
        _check_stage(plan)
        if training.already_done(plan):
            return
        process.say(f"{catalog.n:,} training pictures, {validation.n if validation else 'no'} held out (val/)")
        vqgan = _first_values(plan, catalog, given)
        models = {"tokenizer": vqgan}
        if recipe.adversary:
            models["discriminator"] = PatchGAN(**recipe.adversary.model_dump(include={"channels", "layers", "norm"}))
            wrap.initialize_weights(models["discriminator"], recipe.seed)
        step = Step(plan, vqgan, lpips)
        opened = training.begin(plan, models, flops_per_image=planner.flops_per_image(recipe))
        figures = HeldOut(plan, validation, catalog, lpips, inception)
        loop.train(
            opened.engines,
            training.stream(plan, catalog),
            step,
            opened.lr,
            opened.run,
            opened.limits,
            after_step=step.after,
            evaluate=figures.evaluate if validation else None,
            pictures=figures.draw,
        )
        opened.run.finish()


# --- what cannot be


def _check_stage(plan: Plan) -> None:
    """Raises UserError for what DeepSpeed's stage 3 cannot do."""
    key = ds_config.needs_whole_weights(plan.recipe)
    if key and plan.config["zero_optimization"]["stage"] == 3:
        raise UserError(f"--deepspeed_config {plan.options.deepspeed_config}: {key} needs ZeRO 0, 1 or 2; choose zero2")


# --- first values


def _load(path: str, recipe: TokenizerRecipe) -> tuple[Vqgan, dict]:
    """The tokenizer that a run begins with. UserError where its sizes are not the recipe's."""
    vqgan, info = stored.load_tokenizer(Path(path))
    for key, ours in recipe.model.model_dump().items():
        if info["model"][key] != ours:
            theirs = json.dumps(info["model"][key])
            raise UserError(
                f"--init {path}: its {key} is {theirs}, the recipe's model.{key} is {ours}; choose another "
                f'tokenizer, or add "model.{key}={theirs}"'
            )
    return vqgan, info


def _first_values(plan: Plan, catalog, given: Vqgan | None) -> Vqgan:
    """The tokenizer before step 1, on the device; of a run that continues, whatever: its checkpoint is loaded later."""
    vqgan = Vqgan(**plan.recipe.model.model_dump())
    wrap.initialize_weights(vqgan, plan.recipe.seed)
    vqgan.to(process.start().device)
    if given is not None:
        vqgan.load_state_dict(given.state_dict())
        process.say(f"begins with the weights of {plan.facts['init']['path']}")
    elif plan.recipe.codebook_init == "data" and plan.source is None:
        _codebook_from_data(vqgan, plan, catalog)
    return vqgan


def _codebook_from_data(vqgan: Vqgan, plan: Plan, catalog) -> None:
    """Draw the first codes from the untrained encoder's outputs on the first samples of the stream.

    Written before any engine exists, so it is the initial value of every copy and shard. Every rank starts from
    its own samples; the engine then takes rank 0's values. Where two epochs hold no picture that can be read, the
    first values stay: the training says what is wrong.
    """
    source, points, unread = training.stream(plan, catalog, listed=False)(0), [], 0
    codes, together = plan.recipe.model.codes, plan.share.micro_batch * process.start().world
    with torch.no_grad(), closing(source):
        while sum(len(some) for some in points) < 4 * codes:
            batch = next(source)
            z = vqgan.encode(batch.images[batch.valid > 0, 0].float() / 255)
            points.append(z.flatten(2).transpose(1, 2).flatten(0, 1))
            unread = 0 if len(z) else unread + together
            if unread >= 2 * catalog.n:
                return
        points = torch.cat(points)
        chosen = keyed.permutation(plan.recipe.seed, "codebook", 0, len(points))[:codes]
        vqgan.quantize.embedding.weight.copy_(points[torch.from_numpy(chosen)])


# --- one step


class Step:
    """The step of a tokenizer: `step(engines, batch, number)` for each micro-batch, `after` at its end.

    vqgan: the module that the tokenizer's engine is made of, before it is.
    """

    def __init__(self, plan: Plan, vqgan: Vqgan, lpips: Lpips | None = None):
        self.recipe, self.dtype, self.lpips = plan.recipe, plan.dtype, lpips
        self.opponent, self._z, self._valid = None, None, None
        if adversary := plan.recipe.adversary:
            start = recipes.resolve(adversary.start, samples=plan.dataset, batch=plan.recipe.batch)
            self.opponent = Opponent(adversary, vqgan, start, plan.dtype)
        self.usage = codebook.Usage(plan.recipe.model.codes, process.start().device)
        if plan.recipe.reseed_after:
            self.usage.attach(vqgan)
            vqgan.quantize.register_forward_hook(self._keep_z)

    def __call__(self, engines, batch, step):
        """One micro-batch: each loss is the sum of the samples' losses over its size (architecture 4.5)."""
        images, weights = batch.images[:, 0].float() / 255, self.recipe.loss
        drawn, tokens, *own = engines["tokenizer"](images.to(self.dtype))
        self.usage.add(tokens, batch.valid)
        self._valid = batch.valid > 0
        leaf = drawn.detach().float().requires_grad_()
        l1 = (leaf - images).abs().mean(dim=(1, 2, 3))
        losses, logs = weights.l1 * l1, {"l1": (l1.detach() * batch.valid).mean()}
        if self.lpips is not None:
            perceptual = self.lpips(leaf, images)
            losses = losses + weights.perceptual * perceptual
            logs["perceptual"] = (perceptual.detach() * batch.valid).mean()
        picture = (losses * batch.valid).mean()
        (pull,) = torch.autograd.grad(picture, leaf)
        codes = ((weights.codebook * own[0] + weights.commitment * own[1]) * batch.valid).mean()
        # Without the adversarial part, which says nothing about quality: curves and the rule for spikes look at it.
        whole = picture.detach() + codes.detach()
        logs = {"loss": whole, **logs}
        playing = self.opponent is not None and step >= self.opponent.start
        if playing:
            more, told = self.opponent.pull(engines["discriminator"], leaf, batch.valid, pull)
            pull, logs, whole = pull + more, logs | told, whole + told["adversarial"].detach()
        loss = (drawn.float() * pull).sum() + codes
        # The gradient is right; the value is made that of the losses, for where it is not finite the step is skipped.
        yield "tokenizer", loss + (whole - loss).detach(), logs
        if playing:
            loss, logs = self.opponent.loss(engines["discriminator"], images, leaf.detach(), batch.valid)
            yield "discriminator", loss, logs

    def after(self, engines, step: int) -> dict[str, torch.Tensor]:
        """At the end of a step: how its codes were used, and new values for dead ones."""
        self.usage.end_of_step()
        if after := self.recipe.reseed_after:
            codebook.reseed(engines["tokenizer"], self.usage, self._points, self.recipe.seed, step, after)
        return self.usage.figures()

    def _keep_z(self, quantizer, inputs: tuple[torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._z = inputs[0].detach(), outputs[0].detach()

    def _points(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's outputs in the last micro-batch, (n N, D), and the squared distance of each to its code (n N,);
        of placeholders none."""
        z, codes = (each[self._valid].flatten(2).transpose(1, 2).flatten(0, 1).float() for each in self._z)
        return z, (z - codes).square().sum(dim=1)


# --- held-out figures and pictures


class HeldOut:
    """What is measured and drawn of held-out pictures while a tokenizer trains.

    validation: the held-out split, or None; then pictures of the training split are drawn, and nothing is measured.
    lpips, inception: where there are any, on the device.
    """

    def __init__(self, plan: Plan, validation, training_split, lpips: Lpips | None, inception):
        self.plan, self.validation, self.shown = plan, validation, validation or training_split
        self.lpips, self.inception = lpips, inception
        self._worst, self._measured = [], None  # after which step

    def evaluate(self, engines, step: int) -> dict[str, float]:
        """l1, PSNR, SSIM and use of the codes; LPIPS and rFID where their networks are there."""
        engine = engines["tokenizer"]
        tally = Tally(self.plan.recipe.model.codes, process.start().device, self.lpips, self.inception)
        engine.eval()
        with torch.no_grad():
            for batch, _ in held_out.batches(self.plan, self.validation):
                drawn, tokens, *_ = engine((batch.images[:, 0].float() / 255).to(self.plan.dtype))
                tally.add(batch, drawn, tokens)
        engine.train()
        figures = tally.finish()
        self._worst, self._measured = tally.worst.kept, step
        # Always the same: the number of pictures, and what has nothing to do with the tokenizer.
        return {f"val_{key}": value for key, value in figures.items() if key not in ("n", "psnr_flat")}

    def draw(self, engines, step: int) -> np.ndarray:
        """Originals above their reconstructions; so the worst of the split as of this process's last evaluation, where
        it has made one: nothing is measured for the sake of a picture."""
        engine, count = engines["tokenizer"], min(SHOWN, self.shown.n)
        columns = max(count, len(self._worst))
        engine.eval()
        images = held_out.shown(self.plan, self.shown, SHOWN).images[:, 0]
        with torch.no_grad():
            drawn, *_ = engine((images.float() / 255).to(self.plan.dtype))
        engine.train()
        rows = {"originals": images.permute(0, 2, 3, 1).cpu().numpy(), "reconstructed": pixels(drawn)}
        blocks = [("originals", *held_out.join(rows, count).values(), [""] * count)]
        if self._worst:
            when = "" if self._measured == step else f" after step {self._measured}"
            blocks.append((f"worst originals{when}", *block(self._worst)))
        return grids.pairs(blocks, columns)


def _largest_micro_batch(recipe: TokenizerRecipe) -> int:
    me = process.start()
    return planner.largest_micro_batch(planner.tokenizer_step_bytes(recipe), me.device, me.local_world)
