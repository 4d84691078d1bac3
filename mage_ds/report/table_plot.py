"""The plot of a table whose point is a trend: figures against what differs between its rows."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from mage_ds.report.paper_table import NAMES, Line

_PANEL, _HEIGHT, _DPI = 4.6, 3.8, 200  # inches of a panel; dots of an inch
_CALLED = {"fid": "FID (lower is better)", "top1": "linear probe, top-1 % (higher is better)"}


def save(path: Path, lines: Sequence[Line], figures: Sequence[str], axis: str, title: str, apart: bool) -> bool:
    """Writes PNG, whole or not at all: a panel for each of `figures`, the measured with the standard deviation of their
    seeds, and the published dashed. The rows stand at even distances: a lambda of 0 has no place on a logarithm.

    apart: the published figures are of another data set, and have an axis of their own on the right.
    Returns: False, and nothing is written, where nothing is measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = sorted(lines, key=lambda line: line.at)
    if not any(line.measured.get(name) for line in lines for name in figures):
        return False
    figure = Figure(figsize=(_PANEL * len(figures), _HEIGHT), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no screen, no global state
    for number, name in enumerate(figures):
        axes = figure.add_subplot(1, len(figures), number + 1)
        _measured(axes, lines, name)
        _published(axes.twinx() if apart else axes, lines, name, apart)
        axes.set_xticks(range(len(lines)), [f"{line.at:g}" for line in lines])
        axes.set_xlabel(axis, fontsize=8)
        axes.set_ylabel(_CALLED.get(name, NAMES.get(name, name)), fontsize=8)
        axes.tick_params(labelsize=8)
        axes.margins(0.08)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(apart)
    known = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend([*known.values()], [*known], loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png")
    part.replace(path)
    return True


def _measured(axes, lines: Sequence[Line], name: str) -> None:
    there = [(place, line.measured[name]) for place, line in enumerate(lines) if line.measured.get(name)]
    means = [statistics.fmean(values) for _, values in there]
    bars = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in there]
    style = {"color": "tab:blue", "marker": "o", "ms": 4.5, "lw": 1.4, "capsize": 2, "elinewidth": 0.9}
    axes.errorbar([place for place, _ in there], means, bars if any(bars) else None, label="measured", **style)


def _published(axes, lines: Sequence[Line], name: str, apart: bool) -> None:
    there = [(place, line.published[name]) for place, line in enumerate(lines) if name in line.published]
    label = "published (ImageNet, right axis, another scale)" if apart else "published"
    axes.plot(*zip(*there, strict=True) if there else ([], []), label=label, color="0.45", ls="--", marker="s", ms=3.5)
    axes.tick_params(labelsize=8)
