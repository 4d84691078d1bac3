"""How pictures are decoded: a model's own settings, but for what a caller of the Python API gives."""

from typing import get_args

from mage_ds.errors import UserError
from mage_ds.inputs import convert
from mage_ds.recipes.sections import Sampling

_NEVER = "this model was trained with label_dropout 0 and cannot do without a label"


def given(arguments: dict) -> dict:
    """Those of a function's arguments that are fields of a recipe's `sampling` and are given."""
    return {name: arguments[name] for name in Sampling.model_fields if arguments.get(name) is not None}


def chosen(own: dict, given: dict, labels, classes: int | None, label_dropout: float | None) -> dict:
    """The arguments of `decode.decode` that a recipe's `sampling` names.

    Args: own: all fields, the model's; given: what is asked for instead; labels: int64 (B,), negative: none; None: no
    picture has one; classes, label_dropout: the model's (see `stored.Stored`).
    Raises: UserError for a value that cannot be, guidance without a label, and for what the model never learned.
    """
    if given.get("guidance") and labels is None:
        raise UserError(f"guidance {convert.brief(given['guidance'])}: moves towards a label; give class_label too")
    how = own | given
    how["steps"] = convert.whole("steps", how["steps"], 1)
    how |= {name: convert.real(name, how[name], 0) for name in ("temperature", "token_temperature", "guidance")}
    for name in ("order", "guidance_schedule"):
        known = get_args(Sampling.model_fields[name].annotation)
        if how[name] not in known:
            raise UserError(f"{name} {convert.brief(how[name])}: must be one of {', '.join(known)}")
    if label_dropout == 0:
        if labels is None or (labels < 0).any():
            raise UserError(f"class_label: {_NEVER}; give one from 0 to {classes - 1} for each picture")
        if how["guidance"]:
            raise UserError(f"guidance {how['guidance']:g}: {_NEVER}, which guidance leads away from; give guidance=0")
    return how
