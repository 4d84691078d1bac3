"""Trained models out of run folders, exports and official files, without DeepSpeed: for sampling, evaluation, export
and as frozen parts."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mage_ds.engine import checkpoint, run_folder
from mage_ds.errors import UserError
from mage_ds.interop import exported, official, safe
from mage_ds.interop.parts import MODELS, Parts, brief, check, encoder_of, expected
from mage_ds.models import Classifier, Encoder, Mage, Vqgan
from mage_ds.recipes.schema import Recipe

_SHARED = ("image_size", "sampling", "unused", "origin")  # fields of Stored and Parts
_KINDS = {"pretrain": "mage", "tokenizer": "tokenizer"}  # of a run's task: what its model is called


@dataclass(frozen=True)
class Stored:
    """An opened model: float32, eval mode, on the CPU, without gradients.

    kind: "mage", "tokenizer" or "classifier"; the model of that name, and the tokenizer where one came along;
    image_size: pixels of a side; sampling: the fields of a recipe's section, empty but for a mage; classes: names of
    the first of its labels, where they are known; label_dropout: of a model with classes the share of the samples that
    it was trained on without their label, None where that is not known: at 0 it predicts nothing of use without one;
    unused: tensors of a foreign file that nothing here uses; origin: one line, what it is and where from.
    """

    kind: str
    mage: Mage | None
    classifier: Classifier | None
    tokenizer: Vqgan | None
    image_size: int
    sampling: dict
    classes: list[str]
    label_dropout: float | None
    unused: dict[str, Tensor]
    origin: str


def open_model(path: Path, tokenizer: Path | None = None, step: int | None = None) -> Stored:
    """Opens a run folder, an export, or a file of the authors' layouts (pre-training, fine-tuned, tokenizer alone).

    Args: tokenizer: another tokenizer than the one that belongs to it; step: a run's checkpoint (the newest).
    Raises: UserError, one line, for what cannot be opened or does not fit.
    """
    parts = open_parts(Path(path), step)
    if parts.kind == "encoder":
        raise UserError(f"{path}: is an encoder alone, which `train --init` takes; open the run that it lies in")
    built = {parts.kind: build(parts)}
    if tokenizer is not None:
        if parts.kind == "tokenizer":
            raise UserError(f"{path}: is a tokenizer itself; leave out the tokenizer {tokenizer}")
        built["tokenizer"], info = load_tokenizer(Path(tokenizer))
        if parts.foreign and parts.tokenizer is None:  # nothing in the file says how large its pictures are
            parts = replace(parts, image_size=math.isqrt(parts.model["tokens"]) * built["tokenizer"].factor)
        size, codes = parts.image_size, info["model"]["codes"]
        tokens = (size // built["tokenizer"].factor) ** 2 if size % built["tokenizer"].factor == 0 else 0
        if tokens != parts.model["tokens"] or codes != parts.model.get("codes", codes):
            raise UserError(
                f"--tokenizer {tokenizer}: makes {tokens} tokens of {codes} codes of {size} px, {path} takes "
                f"{parts.model['tokens']} of {parts.model.get('codes', codes)}; choose another"
            )
    elif parts.tokenizer is not None:
        built["tokenizer"] = build(parts.tokenizer)
    models = {kind: built.get(kind) for kind in ("mage", "classifier", "tokenizer")}
    classes = [safe.printable(name) for name in parts.facts.get("classes", [])]
    beside = {name: getattr(parts, name) for name in _SHARED}
    return Stored(parts.kind, **models, classes=classes, label_dropout=_label_dropout(parts), **beside)


def _label_dropout(parts: Parts) -> float | None:
    """What the recipe says, a run's or that of an export's config.json, which may be a stranger's."""
    recipe = parts.facts.get("recipe")
    share = recipe.get("label_dropout") if parts.model.get("classes") and isinstance(recipe, dict) else None
    return float(share) if type(share) in (int, float) and 0 <= share < 1 else None


def open_parts(path: Path, step: int | None = None, advance: Callable[[int], object] | None = None) -> Parts:
    """The tables of whatever `open_model` opens, memory-mapped; a run's checkpoint has been verified.

    advance(bytes) is called while a checkpoint is verified.
    """
    if (path / "recipe.yaml").is_file():
        return _parts_of_run(path, step, advance)
    if step is not None:
        raise UserError(f"--checkpoint {step}: {path} is no run folder, it has one state only; leave the step out")
    if (path / "config.json").is_file():
        return exported.read(path)
    if path.is_dir():
        files = [each.name for pattern in ("*.pth", "*.ckpt") for each in sorted(path.glob(pattern))]
        hint = f"give its file {path / files[0]}" if files else "train a run with `mage-ds train`, or export one"
        raise UserError(f"{path}: is no run folder and no export (no recipe.yaml, no config.json); {hint}")
    if not path.exists():
        raise UserError(f"{path}: no such run folder, export or file of a model; see the spelling")
    return official.read(path)


def _parts_of_run(path: Path, step: int | None, advance) -> Parts:
    recipe = run_folder.load_recipe(path)
    if recipe.task not in _KINDS:
        raise UserError(f"{path}: is a run of task {recipe.task}, which makes no model to hand on")
    kind, model = _KINDS[recipe.task], recipe.model.model_dump()
    engine = "decoder" if model.get("classes") else kind
    weights, meta = checkpoint.load_weights(path, engine, step, advance)
    if engine == "decoder":
        weights |= _frozen_of_run(path, "encoder", meta.get("encoder")).weights
    shapes = expected(kind, model, path)
    check(weights, shapes, weights.keys() - shapes.keys(), path)
    # Checkpoints of runs that were begun without that entry are opened as they are.
    tokenizer = _frozen_of_run(path, "tokenizer", meta.get("tokenizer")) if kind == "mage" else None
    facts = {"description": recipe.description, "step": meta["step"], "recipe": recipe.model_dump()}
    facts |= {name: meta[name] for name in ("data", "tokenizer", "encoder", "classes") if meta.get(name)}
    return Parts(
        kind,
        model,
        weights,
        recipe.inputs.image_size,
        origin=f"run {path.resolve().name}, step {meta['step']:,}",
        tokenizer=tokenizer,
        sampling=recipe.sampling.model_dump() if kind == "mage" else {},
        facts=facts | {"figures": figures(path, meta["step"])},
    )


def _frozen_of_run(path: Path, name: str, expected_hash: str | None = None) -> Parts:
    """A run's copy of a frozen model. UserError where it is missing, or not the one that the run was trained with."""
    if not (path / name / "config.json").is_file():
        raise UserError(f"{path}/{name}: is missing; copy the whole run folder")
    parts = exported.read(path / name)
    if expected_hash is not None and weights_hash(parts.weights) != expected_hash:
        raise UserError(f"{path}/{name}: is not the one that this run was trained with; copy the whole run folder")
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


def build(parts: Parts) -> Mage | Encoder | Vqgan | Classifier:
    """The model of these tables: float32, eval mode, CPU, without gradients. UserError for weights that are no numbers,
    of which everything that comes out is none."""
    with torch.device("meta"):
        model = MODELS[parts.kind](**parts.model)
    model.to_empty(device="cpu").load_state_dict(parts.weights)
    if bad := [name for name, value in model.state_dict().items() if not value.isfinite().all()]:
        raise UserError(
            f"{parts.origin}: {brief(bad)}: values that are no numbers; take an earlier checkpoint, or copy it again"
        )
    return model.eval().requires_grad_(False)


def open_run(path: Path, task: str) -> Recipe:
    """The recipe of a run folder. Raises UserError where `path` is no run, or a run of another task."""
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path}: is no run folder (it has no recipe.yaml); train one with `mage-ds train`")
    recipe = run_folder.load_recipe(path)
    if recipe.task != task:
        raise UserError(f"{path}: is a run of task {recipe.task}, a {task} run is needed")
    return recipe


def precision(path: Path) -> torch.dtype:
    """The number format that a run was trained in."""
    try:
        return torch.bfloat16 if json.loads((path / "ds_config.json").read_text())["bf16"]["enabled"] else torch.float32
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}/ds_config.json: cannot be read ({error!r}); copy the whole run folder") from None


def save_tokenizer(folder: Path, model: Vqgan, numbers: dict, image_size: int) -> None:
    """A tokenizer as a folder that stands alone: config.json and model.safetensors (float32)."""
    folder.mkdir(parents=True)
    exported.write(folder, Parts("tokenizer", numbers, model.state_dict(), image_size, origin=""))


def load_tokenizer(path: Path, step: int | None = None) -> tuple[Vqgan, dict]:
    """A frozen tokenizer (float32, eval mode, CPU): a tokenizer's run, folder or export; the one that lies in a MAGE's
    run or export; or of a file of the authors' layouts, alone or `vqgan.*` in a MAGE's.

    Returns it and {"model": its numbers, "image_size": pixels, "hash": digest of its weights}.
    """
    path = Path(path)
    if (path / "recipe.yaml").is_file():
        if run_folder.load_recipe(path).task != "tokenizer" and (path / "tokenizer").is_dir():
            path = path / "tokenizer"
    elif not (path / "config.json").is_file() and not path.is_file():
        raise UserError(
            f"{path}: neither a tokenizer's run folder nor a tokenizer folder nor a file; train one with "
            "`mage-ds train digits_tokenizer`"
        )
    parts = open_parts(path, step)
    parts = parts if parts.kind == "tokenizer" else parts.tokenizer
    if parts is None:
        raise UserError(f"{path}: holds no tokenizer; give the one that it was trained with")
    model = build(parts)
    info = {"model": parts.model, "image_size": parts.image_size, "hash": weights_hash(model.state_dict())}
    return model, info


def load_encoder(path: Path) -> tuple[Encoder, dict]:
    """The frozen encoder (float32, eval mode, CPU) of a MAGE, whatever `open_model` opens, or of an encoder's folder.

    Returns it and {"model": its numbers, "image_size": pixels, "hash": digest of its weights, "tokenizer": the hash of
    the tokenizer that came along with it, or None}.
    """
    parts = open_parts(Path(path))
    if parts.kind not in ("mage", "encoder"):
        raise UserError(f"{path}: is a {parts.kind}, a pre-trained MAGE is needed; give its run folder, export or file")
    beside = parts.tokenizer and weights_hash(parts.tokenizer.weights)
    parts = encoder_of(parts)
    model = build(parts)
    info = {"model": parts.model, "image_size": parts.image_size, "hash": weights_hash(model.state_dict())}
    return model, info | {"tokenizer": beside}


def save_encoder(folder: Path, model: Encoder, numbers: dict, image_size: int) -> None:
    """As `save_tokenizer`."""
    folder.mkdir(parents=True)
    exported.write(folder, Parts("encoder", numbers, model.state_dict(), image_size, origin=""))


def weights_hash(weights: dict) -> str:
    """SHA-256 over names and float32 values, independent of file layout."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
