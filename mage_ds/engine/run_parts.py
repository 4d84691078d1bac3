"""A run folder as the tables of its model: which of the checkpoint's engines it is, and what of it lies beside.

task and objective or protocol -> engine of the checkpoint -> model
pretrain                       -> mage                     -> mage; a projection head is left out
pretrain with classes          -> decoder                  -> mage, with RUN/encoder
pretrain, contrastive alone    -> encoder                  -> encoder; a projection head is left out
classify: fine-tune, scratch   -> classifier               -> classifier, or pixel_vit where it has patches
classify: probe                -> head                     -> the same of RUN/encoder and the head, one linear layer
tokenizer                      -> tokenizer                -> tokenizer
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Size, Tensor

from mage_ds.engine import checkpoint, run_folder, state
from mage_ds.errors import UserError
from mage_ds.interop import exported
from mage_ds.interop.parts import Parts, check, expected, numbers, plain_norm, weights_hash
from mage_ds.models.classifier import folded
from mage_ds.recipes.schema import Recipe

_PROJECTION = "projection."  # of MAGE-C and SimCLR: used in training only
_HEAD = ("norm.running_mean", "norm.running_var", "linear.weight", "linear.bias")  # of a `ProbeHead`


def read(run: Path, step: int | None, advance: Callable[[int], object] | None, weights: str | None) -> Parts:
    """The model of a run's checkpoint, memory-mapped and verified. Args: of `stored.open_parts`. Raises: UserError."""
    recipe = run_folder.load_recipe(run)
    (kind, model), engine = numbers(recipe), engine_name(recipe)
    found, meta = checkpoint.load_weights(run, engine, step, advance, weights)
    if recipe.task == "pretrain":
        found = {name: value for name, value in found.items() if not name.startswith(_PROJECTION)}
    if engine == "decoder":
        found |= frozen(run, "encoder", meta.get("encoder")).weights
    elif engine == "head":
        found = _probed(run, recipe, found, frozen(run, "encoder", meta.get("encoder")))
    shapes = expected(kind, model, run)
    check(found, shapes, found.keys() - shapes.keys(), run)
    sees_tokens = kind not in ("tokenizer", "pixel_vit")
    facts = {"description": recipe.description, "step": meta["step"], "recipe": recipe.model_dump()}
    facts |= {name: meta[name] for name in ("data", "tokenizer", "encoder", "classes") if meta.get(name)}
    averaged = any(name.startswith(f"{engine}.{state.EMA}.") for name in meta["files"])
    facts |= {"weights": weights or "ema"} if averaged else {}
    return Parts(
        kind,
        model,
        found,
        recipe.inputs.image_size,
        origin=f"run {run.resolve().name}, step {meta['step']:,}"
        + (f", {facts['weights']} weights" if averaged else ""),
        # Checkpoints of runs that were begun without that entry are opened as they are.
        tokenizer=frozen(run, "tokenizer", meta.get("tokenizer")) if sees_tokens else None,
        sampling=recipe.sampling.model_dump() if kind == "mage" else {},
        facts=facts | {"figures": figures(run, meta["step"])},
    )


def engine_name(recipe: Recipe) -> str:
    """The name in a checkpoint of what a recipe trains."""
    if recipe.task == "tokenizer":
        return "tokenizer"
    if recipe.task == "classify":
        return "head" if recipe.protocol == "probe" else "classifier"
    if recipe.model.classes is not None:
        return "decoder"
    return "encoder" if recipe.objective == "contrastive" else "mage"


def _probed(run: Path, recipe: Recipe, head: dict[str, Tensor], encoder: Parts) -> dict[str, Tensor]:
    """The weights of a classifier: of the frozen encoder, a LayerNorm that only normalizes, and the head, its BatchNorm
    folded into the linear layer."""
    width, classes = recipe.model.encoder.width, recipe.model.classes
    check(head, dict(zip(_HEAD, map(Size, ((width,), (width,), (classes, width), (classes,))), strict=True)), (), run)
    weights = encoder.weights
    if encoder.kind == "encoder":  # its own last LayerNorm has no part in features
        weights = {name: value for name, value in weights.items() if not name.startswith("norm.")}
        weights |= plain_norm("fc_norm", width)
    return weights | {f"head.{name}": value for name, value in folded(head).items()}


def encoder(run: Path) -> Parts | None:
    """The frozen encoder that a probe's run holds, as it was before; None where a run has trained its own."""
    recipe = run_folder.load_recipe(run)
    if engine_name(recipe) != "head":
        return None
    parts = frozen(run, "encoder")
    return parts if recipe.tokenizer is None else replace(parts, tokenizer=frozen(run, "tokenizer"))


def frozen(run: Path, name: str, expected_hash: str | None = None) -> Parts:
    """A run's copy of a frozen model. UserError where it is missing, or not the one that the run was trained with."""
    if not (run / name / "config.json").is_file():
        raise UserError(f"{run}/{name}: is missing; copy the whole run folder")
    parts = exported.read(run / name)
    if expected_hash is not None and weights_hash(parts.weights) != expected_hash:
        raise UserError(f"{run}/{name}: is not the one that this run was trained with; copy the whole run folder")
    return parts


def figures(run: Path, step: int) -> dict[str, float]:
    """The last held-out figures that a run logged at or before `step`: empty where there are none."""
    last = {}
    try:
        for line in (run / "metrics.jsonl").read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
                found = {key: v for key, v in record.items() if key.startswith("val") and isinstance(v, int | float)}
                last = found or last
    except OSError:
        pass
    return last
