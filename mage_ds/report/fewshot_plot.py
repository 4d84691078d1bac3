"""The plot of few-shot classification (paper, Figure 2): accuracy against shots, a panel for each data set."""

from collections.abc import Mapping, Sequence
from pathlib import Path

_COLUMNS, _PANEL, _HEIGHT, _LEGEND, _DPI = 4, 3.2, 3.0, 0.3, 200  # inches: of a panel, of a row of the legend
_MARKERS = "osD^vPX*"


def save(path: Path, results: Sequence[Mapping], title: str) -> None:
    """Writes PNG, whole or not at all.

    results: rows with "data", "source" (both in the order in which they are drawn), "shots", "top1" and "std" (shares;
    None: one trial), as fewshot.json has them. The band around a line is one standard deviation to each side.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets, sources = ([*dict.fromkeys(row[name] for row in results)] for name in ("data", "source"))
    columns = min(_COLUMNS, len(sets))
    rows = -(-len(sets) // columns)
    size = (max(_PANEL * columns, 1.4 * _PANEL), _HEIGHT * rows + _LEGEND * -(-len(sources) // columns))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no screen, no global state
    for number, name in enumerate(sets):
        axes = figure.add_subplot(rows, columns, number + 1)
        _panel(axes, [row for row in results if row["data"] == name], sources)
        axes.set_title(name, fontsize=9)
        if number % columns == 0:
            axes.set_ylabel("top-1 on val/, %", fontsize=8)
        if number + columns >= len(sets):  # nothing below it
            axes.set_xlabel("labelled pictures a class", fontsize=8)
    known = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend([known[name] for name in sources], sources, loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(title, fontsize=9)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png")
    part.replace(path)


def colour(number: int) -> tuple:
    """Of the line of a source, by its place."""
    from matplotlib import colormaps

    return colormaps["tab10"](number % 10)


def _panel(axes, rows: Sequence[Mapping], sources: Sequence[str]) -> None:
    for number, source in enumerate(sources):
        line = sorted((row for row in rows if row["source"] == source), key=lambda row: row["shots"])
        if not line:
            continue
        shots, means = [row["shots"] for row in line], [100 * row["top1"] for row in line]
        spread = [100 * (row["std"] or 0) for row in line]
        edges = [[mean + sign * each for mean, each in zip(means, spread, strict=True)] for sign in (-1, 1)]
        style = {"color": colour(number), "marker": _MARKERS[number % len(_MARKERS)], "ms": 4, "lw": 1.4}
        axes.plot(shots, means, label=source, **style)
        axes.fill_between(shots, *edges, color=colour(number), alpha=0.18, lw=0)
    places = sorted({row["shots"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(places, [str(shots) for shots in places])
    axes.set_xticks([], minor=True)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
