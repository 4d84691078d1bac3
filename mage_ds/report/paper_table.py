"""A table of the paper: each figure as published beside the same as measured, and blank where there is none."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mage_ds.report.tables import aligned

NAMES = {"fid": "FID", "is": "IS", "top1": "probe", "finetune": "fine-tune"}
_PERCENT = ("top1", "finetune")


class Line(NamedTuple):
    """A row. at: its place on the plot's axis; published: column -> figure, accuracies in per cent; measured: column ->
    figures, one for each seed; columns of few-shot classification are numbers of shots, as text."""

    label: str
    at: float | None
    published: Mapping[str, float]
    measured: Mapping[str, Sequence[float]]


def cells(lines: Sequence[Line], columns: Sequence[str]) -> list[list[str]]:
    """A head, and a line for each row: of each column the published and the measured figure. A column without any
    published figure has none of it."""
    told = [name for name in columns if any(name in line.published for line in lines)]
    head = [""]
    for name in columns:
        called = _called(name)
        head += [f"{called} published", f"{called} measured"] if name in told else [called]
    found = [head]
    for line in lines:
        row = [line.label]
        for name in columns:
            row += [f"{line.published[name]:g}" if name in line.published else ""] * (name in told)
            row.append(_measured(line.measured.get(name, ()), name))
        found.append(row)
    return found


def _called(name: str) -> str:
    called = NAMES.get(name) or f"{name} shot{'s' * (name != '1')}"
    return f"{called} %" if name in _PERCENT or name not in NAMES else called


def _measured(values: Sequence[float], name: str) -> str:
    """The mean, and the standard deviation of several seeds."""
    if not values:
        return ""
    digits = 1 if name in _PERCENT or name not in NAMES else 2
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def text(lines: Sequence[Line], columns: Sequence[str]) -> str:
    """For the screen."""
    return aligned(cells(lines, columns))


def markdown(lines: Sequence[Line], columns: Sequence[str]) -> str:
    """For a README."""
    head, *rows = cells(lines, columns)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, rule, *rows])
