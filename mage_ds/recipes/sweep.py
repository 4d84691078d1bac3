"""A table of the paper as a file: what is trained for each of its rows, what is measured, and what was published.

Each row stands at two scales: the paper's, and `digits`, in which tiny recipes ask the same question of digits.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from mage_ds.errors import UserError
from mage_ds.recipes import load
from mage_ds.recipes.explain import explain
from mage_ds.recipes.schema import Recipe
from mage_ds.recipes.sections import Section

SCALES = ("paper", "digits")
_FOLDER = Path(__file__).parent / "sweeps"
_EXAMPLE = "duration.epochs=800"

Column = Literal["fid", "is", "top1", "finetune", "shots"]
Count = Annotated[int, Field(ge=1)]


def _of(meaning: str, **more):
    return Field(description=meaning, **more)


class Training(Section):
    """A recipe with changes."""

    recipe: str = _of("name of a packaged recipe, or a .yaml file")
    set: list[str] = _of("changes of it, key=value", default=[])

    def resolved(self, seed: int = 0) -> tuple[Recipe, list[str]]:
        """The recipe, and all changes of it: with `seed` > 0 also of its seed, by so much. Raises UserError."""
        recipe, changes = load.load_recipe(self.recipe, self.set), list(self.set)
        if seed:
            changes.append(f"seed={recipe.seed + seed}")
            recipe = load.load_recipe(self.recipe, changes)
        return recipe, changes


class Fewshot(Section):
    shots: Annotated[list[Count], Field(min_length=1)] = _of("pictures of a class that a classifier sees")
    trials: int = _of("draws of each", ge=1)


class Scale(Section):
    """What all rows have in common. What is null here is given on the command line where it is needed."""

    sample: Literal["digits", "photos", "emoji"] | None = _of(
        "the data that `prepare` makes; null: --data", default=None
    )
    tokenizer: Training | None = _of("the tokenizer; null: --tokenizer", default=None)
    extractor: Training | None = _of("a MAGE whose features FID is of; null: Inception, --inception", default=None)
    reference: Literal["train", "val"] = _of("split of the data that FID compares with", default="val")
    samples: Count | None = _of("pictures that FID is of; null: no FID", default=None)
    probe: Training | None = _of("the linear probe; null: none", default=None)
    fewshot: Fewshot | None = _of("few-shot classification of all rows together; null: none", default=None)


class Entry(Section):
    """A row at one scale: what is trained, or a file of others, and what differs from the other rows' measurements."""

    train: Training | None = _of("what is trained; null: `given`", default=None)
    given: str | None = _of("a file of others in --models, such as mae:mae_pretrain_vit_base.pth", default=None)
    probe: Training | None = _of("the linear probe, where it is not the scale's", default=None)
    finetune: Training | None = _of("fine-tuning; null: none", default=None)

    @model_validator(mode="after")
    def _one(self):
        if (self.train is None) == (self.given is None):
            raise ValueError("give exactly one of train, given")
        if self.given and "/" in self.given:
            raise ValueError(f"given = {self.given}: must be the name of a file, which lies in --models")
        return self


class Row(Section):
    at: float | None = _of("its place on the plot's axis; null: none", default=None)
    published: dict[str, float] = _of("the paper's figures by column; accuracies in per cent", default={})
    paper: Entry | None = _of("the row at the paper's size; null: not there", default=None)
    digits: Entry | None = _of("the row on digits; null: not there", default=None)


class Trend(Section):
    """The plot, where the table's point is a trend."""

    axis: str = _of("what `at` of the rows is")
    figures: Annotated[list[Literal["fid", "top1"]], Field(min_length=1)] = _of("a panel for each of these columns")


class Sweep(Section):
    title: str = _of("what the table is of, in one line")
    compared: str = _of("what differs between the rows and what is the same, in one line")
    columns: Annotated[list[Column], Field(min_length=1)] = _of("what is told of each row")
    trend: Trend | None = _of("the plot; null: none", default=None)
    paper: Scale = _of("common to all rows at the paper's size")
    digits: Scale = _of("common to all rows on digits")
    rows: dict[str, Row] = _of("the rows by their labels")

    @model_validator(mode="after")
    def _agree(self):
        for label, row in self.rows.items():
            for name in row.published:
                if name not in self.columns or name == "shots":
                    raise ValueError(
                        f"row {label}: published.{name}: is none of the columns {', '.join(self.columns)}"
                        f"{_nearest(name, self.columns)}"
                    )
            if self.trend and row.at is None:
                raise ValueError(f"row {label}: at is missing, which the trend needs")
        if self.trend and (other := [name for name in self.trend.figures if name not in self.columns]):
            raise ValueError(f"trend.figures: {other[0]} is none of the columns {', '.join(self.columns)}")
        return self

    def entries(self, scale: str) -> Iterator[tuple[str, Entry]]:
        """(label, entry) of the rows that stand at this scale."""
        for label, row in self.rows.items():
            if entry := getattr(row, scale):
                yield label, entry


def sweep_names() -> list[str]:
    """Names of the packaged tables, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_sweep(name_or_path: str) -> Sweep:
    """The table of this name, or of a user's own .yaml file. Raises UserError: one line with file, key and value."""
    path = _file(str(name_or_path))
    source = path.name if path.is_relative_to(_FOLDER) else str(path)
    data = load.read(path)
    if not isinstance(data, dict) or not isinstance(data.get("rows"), dict) or not data["rows"]:
        raise UserError(
            f"{source}: is no table: it must hold `key: value` lines, `rows` with a label for each among them"
        )
    rows = {str(label): _checked(Row, row, f"{source}: row {label}") for label, row in data["rows"].items()}
    return _checked(Sweep, data | {"rows": rows}, source)


def _checked(kind: type[Section], data, source: str):
    if not isinstance(data, dict):
        raise UserError(f"{source}: must be a section with the keys {', '.join(kind.model_fields)}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, kind, data, source, ())) from error


def _file(text: str) -> Path:
    if text.endswith((".yaml", ".yml")):
        if not Path(text).is_file():
            raise UserError(f"{text}: no such file; packaged tables: {', '.join(sweep_names())}")
        return Path(text)
    if text not in sweep_names():
        hint = _nearest(text, sweep_names()).removeprefix("; ")
        raise UserError(
            f"sweep {text}: no such table; {hint + ' ' if hint else ''}packaged: {', '.join(sweep_names())}; or give "
            "the path of a .yaml file"
        )
    return _FOLDER / f"{text}.yaml"


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, 1, 0.4)
    return f"; did you mean {close[0]}?" if close else ""
