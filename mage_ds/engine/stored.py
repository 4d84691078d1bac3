"""Trained models out of run folders, without DeepSpeed: for sampling, evaluation, export and as frozen parts."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mage_ds.engine import checkpoint, run_folder
from mage_ds.errors import UserError
from mage_ds.models import Mage, Vqgan
from mage_ds.recipes.schema import Recipe


def open_run(path: Path, task: str) -> Recipe:
    """The recipe of a run folder. Raises UserError where `path` is no run, or a run of another task."""
    if not (path / "recipe.yaml").is_file():
        raise UserError(f"{path}: is no run folder (it has no recipe.yaml); train one with `mage-ds train`")
    recipe = run_folder.load_recipe(path)
    if recipe.task != task:
        raise UserError(f"{path}: is a run of task {recipe.task}, a {task} run is needed")
    return recipe


def load_mage(path: Path, step: int | None = None) -> tuple[Mage, Recipe, dict]:
    """The trained MAGE of a run (float32, eval mode, CPU), the run's recipe, and the checkpoint's meta."""
    recipe = open_run(path, "pretrain")
    weights, meta = checkpoint.load_weights(path, "mage", step)
    model = Mage(**recipe.model.model_dump())
    model.load_state_dict(weights)
    return model.eval(), recipe, meta


def precision(path: Path) -> torch.dtype:
    """The number format that a run was trained in."""
    try:
        return torch.bfloat16 if json.loads((path / "ds_config.json").read_text())["bf16"]["enabled"] else torch.float32
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}/ds_config.json: cannot be read ({error!r}); copy the whole run folder") from None


def save_tokenizer(folder: Path, model: Vqgan, numbers: dict, image_size: int) -> None:
    """A tokenizer as a folder that stands alone: config.json and model.safetensors (float32)."""
    folder.mkdir(parents=True)
    config = {"kind": "vqgan", "model": numbers, "image_size": image_size}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(
        {name: value.float().contiguous() for name, value in model.state_dict().items()},
        folder / "model.safetensors",
    )


def load_tokenizer(path: Path, step: int | None = None) -> tuple[Vqgan, dict]:
    """A frozen tokenizer (float32, eval mode, CPU) from a tokenizer folder or a tokenizer's run folder.

    Returns it and {"model": its numbers, "image_size": pixels, "hash": digest of its weights}.
    """
    if (path / "recipe.yaml").is_file():
        recipe = open_run(path, "tokenizer")
        weights, _ = checkpoint.load_weights(path, "tokenizer", step)
        info = {"model": recipe.model.model_dump(), "image_size": recipe.inputs.image_size}
    elif (path / "config.json").is_file():
        try:
            info = json.loads((path / "config.json").read_text())
            info = {"model": info["model"], "image_size": info["image_size"]}
            weights = load_file(path / "model.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{path}: damaged tokenizer folder ({error}); copy it again") from None
    else:
        raise UserError(
            f"--tokenizer {path}: neither a tokenizer's run folder nor a tokenizer folder; train one with "
            "`mage-ds train digits_tokenizer`, or give `random` to try a machine"
        )
    try:
        model = Vqgan(**info["model"])
        model.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{path}: its weights do not fit its config.json ({str(error).splitlines()[0]})") from None
    return model.eval().requires_grad_(False), {**info, "hash": weights_hash(weights)}


def weights_hash(weights: dict) -> str:
    """SHA-256 over names and float32 values, independent of file layout."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
