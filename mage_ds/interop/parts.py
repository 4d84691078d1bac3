"""A model as tables: what is read from a foreign file or an export, and what one is written from."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from mage_ds.errors import UserError
from mage_ds.interop.safe import first_line, printable
from mage_ds.models import Classifier, Encoder, Mage, Vqgan

MODELS = {"mage": Mage, "tokenizer": Vqgan, "classifier": Classifier, "encoder": Encoder}
ENCODER = ("encoder", "tokens", "codes", "vocabulary", "dropout")  # of a MAGE's numbers, those of its encoder
PATCH = 16  # pixels of a token, where no tokenizer came along to tell
_SHOWN = 4


@dataclass(frozen=True)
class Parts:
    """kind: of MODELS; model: the numbers that build it; weights: its state_dict, in any floating dtype, maybe
    memory-mapped; image_size: pixels; tokenizer: of a mage or classifier, where it came along; sampling: of a mage,
    the fields of a recipe's section; unused: tensors of a foreign file that nothing here uses, by the file's names;
    foreign: whether it came from the authors' layout; facts: what a model card says, and "classes", the names of a
    mage's labels, plain values; origin: one line.
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


def encoder_of(parts: Parts) -> Parts:
    """The encoder alone out of a MAGE."""
    numbers = {key: parts.model[key] for key in ENCODER}
    names = expected("encoder", numbers, parts.origin)
    return Parts("encoder", numbers, {name: parts.weights[name] for name in names}, parts.image_size, parts.origin)


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
