"""The rows of a sweep of sampling settings: what varies in them, which is best, and a table that people paste."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mage_ds.report.passport import NAMES
from mage_ds.report.tables import aligned

HIGHER = ("is", "precision", "recall")  # better; of the others the lower


class Row(NamedTuple):
    """name: of its folder; settings: name -> value, the same names in the same order in every row; figures: as in
    results.json, name -> {"value", "interval": [low, high] or None, ...}."""

    name: str
    settings: Mapping
    figures: Mapping[str, Mapping]


def written(value) -> str:
    """A setting's value as names and tables have it: 3.0 is 3."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def told(settings: Mapping, separator: str = ", ") -> str:
    return separator.join(f"{name}={written(value)}" for name, value in settings.items())


def varying(rows: Sequence[Row]) -> list[str]:
    """The settings that are not the same in all rows."""
    return [name for name in rows[0].settings if len({written(row.settings[name]) for row in rows}) > 1]


def best(rows: Sequence[Row]) -> dict[str, int]:
    """figure -> number of its best row, of equal ones the first. A figure that no row has a number for is left out."""
    found = {}
    for name in rows[0].figures:
        values = [(row.figures[name]["value"], number) for number, row in enumerate(rows)]
        sign = -1 if name in HIGHER else 1
        known = [(sign * value, number) for value, number in values if value is not None]
        if known:
            found[name] = min(known)[1]
    return found


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """A head, and a line for each row: the settings that vary, and each figure as value ± half its interval, with a
    star behind the best."""
    keys, first = varying(rows), best(rows)
    lines = [[*keys, *(NAMES.get(name, name) for name in rows[0].figures)]]
    for number, row in enumerate(rows):
        figures = [_figure(each) + (" *" if first.get(name) == number else "") for name, each in row.figures.items()]
        lines.append([*(written(row.settings[key]) for key in keys), *figures])
    return lines


def table(rows: Sequence[Row]) -> str:
    """For the screen; figures without a star leave its place free, so that digits stand below digits."""
    settings = len(varying(rows))
    return aligned(
        [
            [*line[:settings], *(each if each.endswith("*") else f"{each}  " for each in line[settings:])]
            for line in cells(rows)
        ]
    )


def markdown(rows: Sequence[Row]) -> str:
    """For a README; the best are bold."""
    head, *lines = cells(rows)
    bold = [[f"**{each.removesuffix(' *')}**" if each.endswith("*") else each for each in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---:"] * len(head), *bold])


def _figure(figure: Mapping) -> str:
    value, interval = figure["value"], figure.get("interval")
    if value is None:
        return "-"
    half = (interval[1] - interval[0]) / 2 if interval else 0
    if half <= 0:
        return f"{value:#.4g}"
    digits = max(0, 1 - math.floor(math.log10(half)))  # two of the half are told
    return f"{value:.{digits}f} ± {half:.{digits}f}"
