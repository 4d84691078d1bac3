"""What other people's files have in common: a table of tensors, sizes that shapes tell, what of it a model takes."""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, float64

from mage_ds.errors import UserError
from mage_ds.interop import safe
from mage_ds.interop.parts import brief, check, expected


def table(file: Mapping, path: Path) -> dict[str, Tensor]:
    """The tensors in what `safe.read` gave. UserError where there are none."""
    for key in ("model", "state_dict"):
        if isinstance(file.get(key), Mapping):
            return safe.tensors(file[key], path)
    flat = {name: value for name, value in file.items() if isinstance(value, Tensor)}
    if not flat:
        raise UserError(f"{path}: has neither `model` nor `state_dict` nor tensors, only {brief(map(str, file))}")
    return safe.tensors(flat, path)


def settings_of(file: Mapping) -> Mapping:
    """What a file that was written here says beside its tensors."""
    return file["mage_ds"] if isinstance(file.get("mage_ds"), Mapping) else {}


def has(table: Mapping, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in table)


def fit(
    kind: str, model: dict, table: Mapping, path: Path, prefix: str = "", idle: Collection[str] = ()
) -> tuple[dict, dict]:
    """(the model's weights, the rest); what is beside the model's own modules is of no effect on it, nor is `idle`.

    prefix: of the names in the file, for what is said.
    """
    shapes = expected(kind, model, path)
    modules = {name.partition(".")[0] for name in shapes}
    rest = {name: value for name, value in table.items() if name not in shapes}
    surplus = [name for name in rest if name.partition(".")[0] in modules and name not in idle]
    in_file = {prefix + name: value for name, value in table.items()}
    check(in_file, {prefix + name: shape for name, shape in shapes.items()}, [prefix + name for name in surplus], path)
    double = [name for name in shapes if table[name].dtype == float64]
    if double:  # models here are float32: the values would change without a word
        raise UserError(f"{path}: {prefix}{double[0]} is float64; have the file saved as float32")
    return {name: table[name] for name in shapes}, rest


def shape(table: Mapping, name: str, dimensions: int, path: Path) -> tuple[int, ...]:
    if name not in table:
        raise UserError(f"{path}: does not fit: {name} is missing; is it the file of another model?")
    if table[name].ndim != dimensions:
        raise UserError(f"{path}: does not fit: {name} has {table[name].ndim} dimensions instead of {dimensions}")
    return tuple(table[name].shape)


def count(table: Mapping, name: str) -> int:
    """How many numbers stand behind `name.`; where one is left out, its tensors will be missed."""
    start = len(name) + 1
    return len({key[start:].partition(".")[0] for key in table if key.startswith(f"{name}.")})


def setting(settings: Mapping, name: str, default: int, path: Path) -> int:
    value = settings.get(name, default)
    if type(value) is not int or not 1 <= value < 2**31:
        raise UserError(f"{path}: mage_ds.{name} = {safe.printable(value)[:40]}: must be a whole number")
    return value


def say(stack: Mapping) -> str:
    return f"{stack['depth']} x {stack['width']} / {stack['heads']} heads"


def say_unused(unused: Collection[str]) -> str:
    return f"{len(unused)} tensors are not used: {brief(unused)}" if unused else "every tensor is used"
