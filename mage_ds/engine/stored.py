"""Trained models out of run folders, exports and other people's files, without DeepSpeed: for sampling, evaluation,
export and as frozen parts."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mage_ds.engine import run_folder, run_parts
from mage_ds.errors import UserError
from mage_ds.interop import exported, official, safe, vit
from mage_ds.interop.parts import MODELS, Parts, brief, encoder_of, weights_hash
from mage_ds.models import Classifier, Encoder, Mage, PixelViT, Vqgan
from mage_ds.recipes.schema import Recipe

_SHARED = ("image_size", "sampling", "unused", "facts", "origin")  # fields of Stored and Parts


@dataclass(frozen=True)
class Stored:
    """An opened model: float32, eval mode, on the CPU, without gradients.

    kind: "mage", "tokenizer", "classifier" or "encoder"; the model of that name, and the tokenizer where one came
    along: classifiers and encoders see its tokens, or pixels (PixelViT); image_size: pixels of a side; sampling: the
    fields of a recipe's section, empty but for a mage; classes: names of the first of its labels, where they are known;
    label_dropout: of a mage with classes the share of the samples that it was trained on without their label, None
    where that is not known: at 0 it predicts nothing of use without one; weights: of a run that keeps an average of its
    weights, which were opened, "ema" or "raw"; else None; unused: tensors of a foreign file that nothing here uses;
    facts: as of Parts, of an export perhaps a stranger's; origin: one line, what it is and where from.
    """

    kind: str
    mage: Mage | None
    classifier: Classifier | PixelViT | None
    encoder: Encoder | PixelViT | None
    tokenizer: Vqgan | None
    image_size: int
    sampling: dict
    classes: list[str]
    label_dropout: float | None
    weights: str | None
    unused: dict[str, Tensor]
    facts: dict
    origin: str


def open_model(
    path: Path, tokenizer: Path | None = None, step: int | None = None, weights: str | None = None
) -> Stored:
    """Opens a run folder, an export, a file of the authors' layouts (pre-training, fine-tuned, tokenizer alone) or of
    MAE's, or what `open_parts` takes besides.

    Args: tokenizer: another tokenizer than the one that belongs to it; step, weights: of a run: see `open_parts`.
    Raises: UserError, one line, for what cannot be opened or does not fit.
    """
    parts = open_parts(path, step, weights=weights)
    kind = parts.kind
    if kind == "pixel_vit":
        kind = "encoder" if parts.model.get("classes") is None else "classifier"
    built = {kind: build(parts)}
    if tokenizer is not None:
        if "tokens" not in parts.model:
            why = "is a tokenizer itself" if kind == "tokenizer" else "sees pixels, not tokens"
            raise UserError(f"{path}: {why}; leave out the tokenizer {tokenizer}")
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
    models = {each: built.get(each) for each in ("mage", "classifier", "encoder", "tokenizer")}
    classes = [safe.printable(name) for name in parts.facts.get("classes", [])]
    beside = {name: getattr(parts, name) for name in _SHARED} | {"weights": parts.facts.get("weights")}
    return Stored(kind, **models, classes=classes, label_dropout=_label_dropout(parts), **beside)


def _label_dropout(parts: Parts) -> float | None:
    """What the recipe says, a run's or that of an export's config.json, which may be a stranger's."""
    recipe = parts.facts.get("recipe")
    share = recipe.get("label_dropout") if parts.model.get("classes") and isinstance(recipe, dict) else None
    return float(share) if type(share) in (int, float) and 0 <= share < 1 else None


def open_parts(
    path: Path,
    step: int | None = None,
    advance: Callable[[int], object] | None = None,
    weights: str | None = None,
) -> Parts:
    """The tables of whatever `open_model` opens, memory-mapped; a run's checkpoint has been verified.

    Args: path: also `mae:FILE`, which must be of one of MAE's layouts, and `timm:NAME` or `timm:NAME:FILE`, a plain ViT
    of timm, with weights from its cache or from a file; step: a run's checkpoint, by default the newest;
    advance(bytes) is called while it is verified; weights: of a run, "ema", their average over the training, or "raw",
    what its last update left; None: the average where one is kept.
    """
    path = Path(path)
    if weights not in (None, "ema", "raw"):
        raise UserError(f"--weights {weights}: must be ema or raw")
    if (path / "recipe.yaml").is_file():
        return run_parts.read(path, step, advance, weights)
    for option, value in (("checkpoint", step), ("weights", weights)):
        if value is not None:
            raise UserError(f"--{option} {value}: {path} is no run folder, it has one state only; leave it out")
    if (path / "config.json").is_file():
        return exported.read(path)
    kind, _, rest = str(path).partition(":")
    if kind in ("mae", "timm") and rest and not path.exists():
        return _foreign_vit(kind, rest)
    if path.is_dir():
        files = [each.name for pattern in ("*.pth", "*.ckpt") for each in sorted(path.glob(pattern))]
        hint = f"give its file {path / files[0]}" if files else "train a run with `mage-ds train`, or export one"
        raise UserError(f"{path}: is no run folder and no export (no recipe.yaml, no config.json); {hint}")
    if not path.exists():
        raise UserError(f"{path}: no such run folder, export or file of a model; see the spelling")
    return official.read(path)


def _foreign_vit(kind: str, rest: str) -> Parts:
    """mae:FILE, timm:NAME or timm:NAME:FILE."""
    if kind == "mae":
        if Path(rest).is_dir():
            raise UserError(f"mae:{rest}: is a folder; give a file of MAE's, such as mae_pretrain_vit_base.pth")
        return vit.read(Path(rest))
    name, _, file = rest.partition(":")
    return vit.of_timm(name, Path(file) if file else None)


def build(parts: Parts) -> Mage | Encoder | Vqgan | Classifier | PixelViT:
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


def load_encoder(path: Path, image_size: int | None = None) -> tuple[Encoder | PixelViT, dict]:
    """The encoder (float32, eval mode, CPU, without gradients) of whatever `open_parts` opens but tokenizers: of a
    MAGE, an encoder's folder, a ViT over pixels, or a classifier, whose blocks it then is. That of a probe's run is the
    one that it was made on.

    Args: image_size: of the pictures that a ViT over pixels is to see; None: those that it was trained on.
    Returns it and {"kind": "encoder" or "pixel_vit", "model": its numbers, "image_size": pixels, "hash": digest of its
    weights, "tokenizer": the hash of the tokenizer that came along with it, or None, "of": the kind of what it was
    taken from}.
    """
    path = Path(path)
    parts = (run_parts.encoder(path) if (path / "recipe.yaml").is_file() else None) or open_parts(path)
    if parts.kind == "tokenizer":
        raise UserError(f"{path}: is a tokenizer, an encoder is needed; give the run folder, export or file of a MAGE")
    of, beside = parts.kind, parts.tokenizer and weights_hash(parts.tokenizer.weights)
    parts = encoder_of(parts)
    if image_size is not None and parts.kind == "pixel_vit":
        parts = vit.resized(parts, image_size)
    model = build(parts)
    info = {"kind": parts.kind, "model": parts.model, "image_size": parts.image_size}
    return model, info | {"hash": weights_hash(model.state_dict()), "tokenizer": beside, "of": of}


def save_encoder(folder: Path, model: Encoder | PixelViT, numbers: dict, image_size: int) -> None:
    """As `save_tokenizer`."""
    folder.mkdir(parents=True)
    kind = "pixel_vit" if isinstance(model, PixelViT) else "encoder"
    exported.write(folder, Parts(kind, numbers, model.state_dict(), image_size, origin=""))
