"""A model as tables: what is read from a foreign file or an export, and what one is written from."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from mage_ds.errors import UserError
from mage_ds.interop.safe import first_line, printable
from mage_ds.models import Classifier, Encoder, Mage, PixelViT, Vqgan
from mage_ds.models.mage import class_id
from mage_ds.recipes.schema import Recipe

MODELS = {"mage": Mage, "tokenizer": Vqgan, "classifier": Classifier, "encoder": Encoder, "pixel_vit": PixelViT}
ENCODER = ("encoder", "tokens", "codes", "vocabulary", "dropout")  # of a MAGE's numbers, those of its encoder
PATCH = 16  # pixels of a token, where no tokenizer came along to tell
CODES, WORDS = 1024, 2025  # of the authors' files
_SHOWN = 4


@dataclass(frozen=True)
class Parts:
    """kind: of MODELS; model: the numbers that build it; weights: its state_dict, in any floating dtype, maybe
    memory-mapped; image_size: pixels; tokenizer: of a model that sees tokens, where it came along; sampling: of a mage,
    the fields of a recipe's section; unused: tensors of a foreign file that nothing here uses, by the file's names;
    foreign: whether it came from other people's layout; facts: what a model card says, and "classes", the names of its
    labels, plain values; origin: one line.
    """

    kind: str
    model: dict
    weights: dict[str, torch.Tensor]
    image_size: int
    origin: str
    tokenizer: "Parts | None" = None
    sampling: dict = field(default_factory=dict)
    unused: dict[str, torch.Tensor] = field(default_factory=dict)
    foreign: bool = False
    facts: dict = field(default_factory=dict)


def expected(kind: str, model: dict, where) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of a model of these numbers. Raises UserError where they build none."""
    try:
        with torch.device("meta"):
            return {name: value.shape for name, value in MODELS[kind](**model).state_dict().items()}
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"{where}: its sizes do not build a {kind} ({first_line(error)}); take the file from its source"
        ) from None


def numbers(recipe: Recipe) -> tuple[str, dict]:
    """Of the model that a recipe trains, with what it stands on: its kind and the numbers that build it."""
    model = recipe.model.model_dump()
    if recipe.task == "tokenizer":
        return "tokenizer", model
    if recipe.task == "pretrain":
        alone = recipe.objective == "contrastive"
        return ("encoder", {key: model[key] for key in ENCODER}) if alone else ("mage", model)
    keys = ("encoder", "classes", "drop_path", "head_std")
    if recipe.model.patch is None:
        kind, keys, more = "classifier", (*keys, "tokens", "vocabulary", "dropout"), {}
        more["class_id"] = class_id(recipe.model.vocabulary)
    else:
        kind, keys, more = "pixel_vit", (*keys, "patch"), {"image_size": recipe.inputs.image_size}
    return kind, {key: model[key] for key in keys} | more


def encoder_of(parts: Parts) -> Parts:
    """The encoder alone: out of a MAGE, of a ViT over pixels (all but its head), or of a classifier's blocks.

    A classifier has no LayerNorm behind its blocks: the encoder's, which features do without, is then of no effect.
    """
    keep = {"image_size": parts.image_size, "origin": parts.origin, "tokenizer": parts.tokenizer}
    if parts.kind == "pixel_vit":
        model = parts.model | {"classes": None, "drop_path": 0.0}
        weights = {name: value for name, value in parts.weights.items() if not name.startswith("head.")}
        return Parts("pixel_vit", model, weights, **keep)
    model, weights = parts.model, parts.weights
    if parts.kind == "classifier":
        model = model | {"codes": _codes(parts)}
        weights = weights | plain_norm("norm", model["encoder"]["width"])
    model = {key: model[key] for key in ENCODER}
    names = expected("encoder", model, parts.origin)
    return Parts("encoder", model, {name: weights[name] for name in names}, **keep)


def _codes(parts: Parts) -> int:
    """How many of a classifier's words are codes, which its own numbers do not tell."""
    if parts.tokenizer:
        return parts.tokenizer.model["codes"]
    return CODES if parts.model["vocabulary"] == WORDS else parts.model["vocabulary"] - 2


def plain_norm(name: str, width: int) -> dict[str, torch.Tensor]:
    """The parameters of a LayerNorm that only normalizes."""
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def weights_hash(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and float32 values, independent of file layout."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def check(weights: dict, shapes: dict[str, torch.Size], surplus: Iterable[str], where) -> None:
    """Raises UserError, one line that names the first keys and counts them, where weights are missing or of another
    shape or type than `shapes` says, or where there are some in `surplus` that would change what the model computes."""
    missing = [name for name in shapes if name not in weights]
    wrong = [
        f"{name} {_form(weights[name])} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in weights and (weights[name].shape != shape or not weights[name].is_floating_point())
    ]
    kinds = {"missing": missing, "unexpected": sorted(surplus), "wrong": wrong}
    found = [f"{len(names)} {kind}: {brief(names)}" for kind, names in kinds.items() if names]
    if found:
        raise UserError(f"{where}: does not fit: {'; '.join(found)}; is it the file of another model?")


def check_size(parts: Parts, where) -> None:
    """Raises UserError where pictures of `image_size` do not make as many tokens as the model takes."""
    factor = 2 ** (len(parts.tokenizer.model["multipliers"]) - 1) if parts.tokenizer else PATCH
    side, rest = divmod(parts.image_size, factor)
    if rest or side * side != parts.model["tokens"]:
        raise UserError(
            f"{where}: damaged: pictures of {parts.image_size} px are not {parts.model['tokens']} tokens of "
            f"{factor} px; copy it again"
        )


def brief(names: Iterable[str]) -> str:
    """The first few of some names, for a line."""
    names = [printable(name[:120]) for name in names]
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _form(value: torch.Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
