"""Recipe files and `key=value` overrides -> a checked Recipe. Whatever is wrong is one line that names it."""

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mage_ds.errors import UserError
from mage_ds.recipes.explain import explain
from mage_ds.recipes.schema import TASKS, Recipe
from mage_ds.recipes.sections import Duration

_FOLDER = Path(__file__).parent
_KINDS = ("paper", "digits", "emoji")  # folders of recipes; sweeps/ holds tables of them
_UNITS = ("epochs", "steps", "samples")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.1 wants a dot there) and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                problem = f"the key {key.value} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(path.stem for path in _files())


def _files() -> list[Path]:
    return [path for kind in _KINDS for path in (_FOLDER / kind).glob("*.yaml")]


def recipe_file(name_or_path: str | Path) -> Path:
    """The file of a packaged recipe by its name, or of a user's own by its path (ends in .yaml or .yml)."""
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        if not path.is_file():
            raise UserError(f"{text}: no such recipe file; packaged recipes: {', '.join(recipe_names())}")
        return path
    for path in _files():
        if path.stem == text:
            return path
    close = difflib.get_close_matches(text, recipe_names(), 1, 0.4)
    hint = f"did you mean {close[0]}? " if close else ""
    names = ", ".join(recipe_names())
    raise UserError(f"recipe {text}: no such recipe; {hint}packaged: {names}; or give the path of a .yaml file")


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of this name or file, with overrides: "batch=4", "duration.steps=2" (values are YAML).

    Raises UserError for an unknown name, key or value; the message names the file or override, the key, the
    value and what is allowed.
    """
    path = recipe_file(name_or_path)
    data = read(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a recipe: it must hold `key: value` lines")
    source = path.name if path.is_relative_to(_FOLDER) else str(path)
    _expand_augmentation(data, source)
    for override in overrides:
        _apply(data, override)
    task = str(data.get("task"))
    if task not in TASKS:
        raise UserError(f"{source}: task = {task}: must be one of {', '.join(TASKS)}")
    try:
        return TASKS[task].model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, TASKS[task], data, source, overrides)) from error


def augmentations() -> dict[str, dict]:
    """What the names stand for that a recipe may give as inputs.augmentation."""
    return read(_FOLDER / "augmentations.yaml")


def dump(recipe: Recipe) -> str:
    """The recipe as YAML; `load_recipe` of it gives an equal one."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, default_flow_style=None, width=110)


def resolve(duration: Duration, *, samples: int, batch: int) -> int:
    """Optimizer steps of a duration: the fewest that see as many samples as it asks for.

    Args: samples: size of the data set's training split; batch: samples of a step (the global batch).
    """
    if duration.steps is not None:
        return duration.steps
    wanted = duration.samples if duration.samples is not None else duration.epochs * samples
    return -(-wanted // batch)


def schedule(recipe: Recipe, samples: int) -> tuple[int, int, str]:
    """Steps and warm-up steps of a recipe on `samples` training samples, and a note to show (often empty).

    A warm-up longer than the training is cut to it; the note says so.
    """
    steps = resolve(recipe.duration, samples=samples, batch=recipe.batch)
    warmup = resolve(recipe.warmup, samples=samples, batch=recipe.batch)
    if warmup <= steps:
        return steps, warmup, ""
    return steps, steps, f"warm-up of {warmup} steps is longer than the training: cut to {steps} steps"


def read(path: Path) -> Any:
    """What a YAML file holds, as recipes are read. Raises UserError that names the file and the line."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {_yaml_problem(error)}") from error


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}: " if mark else ""
    return place + (getattr(error, "problem", None) or "not valid YAML")


def _expand_augmentation(data: dict, source: str) -> None:
    inputs = data.get("inputs")
    name = inputs.get("augmentation") if isinstance(inputs, dict) else None
    if isinstance(name, str):
        known = augmentations()
        if name not in known:
            choices = ", ".join(known)
            raise UserError(
                f"{source}: inputs.augmentation = {name}: must be one of {choices} or {{scale, ratio, flip}}"
            )
        inputs["augmentation"] = copy.deepcopy(known[name])


def _apply(data: dict, override: str) -> None:
    """Sets `override` (KEY=VALUE) in `data`; the key is checked with the rest of the recipe."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"{override}: an override is key=value, for example batch=64 or duration.steps=100")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{override}: the value is not valid YAML: {_yaml_problem(error)}") from error
    section = data
    for name in parts[:-1]:
        if not isinstance(section.get(name), dict):
            section[name] = {}
        section = section[name]
    if section and set(section) <= set(_UNITS) and parts[-1] in _UNITS:
        section.clear()  # a duration has one unit: the new one replaces the old
    section[parts[-1]] = value
    _expand_augmentation(data, "command line")
