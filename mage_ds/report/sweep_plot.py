"""The plot of a sweep: fidelity against diversity, and what the number of steps does.

Every line joins the rows that differ in one setting only.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mage_ds.report.passport import NAMES
from mage_ds.report.sweep_table import HIGHER, Row, best, told, varying, written

_Y = ("fid", "fid_infinity", "kid", "is", "precision", "recall")  # the first that is there is drawn upwards
_X = ("is", "recall", "kid", "precision")  # the first other one that is there, sideways
_PANEL, _HEIGHT, _LEGEND, _DPI = 4.6, 4.2, 0.22, 200  # inches: of a panel, of a line of the legend; dots of an inch
_COLUMNS = 5  # of the legend
_MARKERS = "osD^vPX*"
_WIDE = 20  # times the least value: from there on the axis is logarithmic
_AROUND = [(0, 9), (0, -9), (8, 0), (-8, 0), (7, 7), (7, -7), (-7, 7), (-7, -7)]  # points: where a label may stand
_ASIDE = 0.09  # of a place: how far its bars spread
_APART = 9  # points: nearer than this, labels and what they cover are hard to read


def save(path: Path, rows: Sequence[Row], title: str) -> None:
    """Writes PNG, whole or not at all, of 920 pixels a panel.

    Left: FID (else the first of its kind) against IS, else recall, KID or precision; points are labelled by the first
    setting that varies, and joined along it. Right, where steps vary: FID against steps. Where there is one figure
    only: against the first setting.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys, (y, x) = varying(rows), axes_of(rows)
    rows = [row for row in rows if _drawn(row, y) and (x is None or _drawn(row, x))]
    panels = [keys[0]] * (x is not None)  # what a line runs along
    panels += ["steps"] * ("steps" in keys) or [keys[0]] * (not panels)
    legend = -(-len(lines(rows, keys[0])) // _COLUMNS) if len(keys) > 1 else 0
    figure = Figure(figsize=(_PANEL * len(panels), _HEIGHT + _LEGEND * legend), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no screen, no global state
    spots = []
    for number, along in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        if x is not None and number == 0:
            spots = _traded(axes, rows, along, y, x)
        else:
            _over(axes, rows, along, y)
        if len(keys) > 1 and len({*panels}) > 1:  # lines of two kinds: each panel says what its own are
            axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    if len(keys) > 1 and len({*panels}) == 1:
        handles = figure.axes[-1].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=_COLUMNS, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.draw_without_rendering()  # from here on it is known what lies where
    _label(figure.axes[0], spots)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png")
    part.replace(path)


def axes_of(rows: Sequence[Row]) -> tuple[str, str | None]:
    """The figures that are drawn upwards and sideways; None: there is one only."""
    there = [name for name in _Y if any(_drawn(row, name) for row in rows)]
    return there[0], next((name for name in _X if name in there[1:]), None)


def _drawn(row: Row, figure: str) -> bool:
    return row.figures.get(figure, {}).get("value") is not None


def lines(rows: Sequence[Row], along: str) -> dict[str, list[Row]]:
    """What the rows of a line have in common -> them, in their order."""
    keys, found = [key for key in varying(rows) if key != along], {}
    for row in rows:
        found.setdefault(told({key: row.settings[key] for key in keys}), []).append(row)
    return found


def _traded(axes, rows: Sequence[Row], along: str, y: str, x: str) -> list[tuple]:
    """One figure against another; returns what to write beside points: (points of a line, texts, colour) each."""
    spots = []
    for name, line, style in _styled(rows, along):
        points = [(row.figures[x]["value"], row.figures[y]["value"]) for row in line]
        axes.plot(*zip(*points, strict=True), label=name, **style)
        spots.append((points, [written(row.settings[along]) for row in line], style["color"]))
    first = rows[best(rows)[y]]
    axes.plot(first.figures[x]["value"], first.figures[y]["value"], "o", ms=11, mfc="none", mec="crimson", mew=1.3)
    _dress(axes, rows, y)
    axes.set_xlabel(_called(x))
    axes.set_title(f"beside each point its {along}; circled: the best {NAMES.get(y, y)}", fontsize=8)
    return spots


def _over(axes, rows: Sequence[Row], along: str, y: str) -> None:
    """A figure, with its interval, against a setting."""
    values = [*dict.fromkeys(row.settings[along] for row in rows)]
    numbers = all(isinstance(value, int | float) and value > 0 for value in values)
    at = {value: value if numbers else place for place, value in enumerate(values)}
    if numbers:
        axes.set_xscale("log")
    styled = [*_styled(rows, along)]
    for number, (name, line, style) in enumerate(styled):
        aside = _ASIDE * (number - (len(styled) - 1) / 2) / len(styled)  # bars of one place stand beside each other
        spots = [at[row.settings[along]] for row in line]
        spots = [spot * (1 + aside) if numbers else spot + aside for spot in spots]
        figures = [row.figures[y] for row in line]
        bars = [(each["interval"][1] - each["interval"][0]) / 2 if each.get("interval") else 0 for each in figures]
        axes.errorbar(spots, [each["value"] for each in figures], bars, label=name, capsize=2, elinewidth=0.9, **style)
    _dress(axes, rows, y)
    axes.set_xticks([*at.values()], [written(value) for value in values])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(along)
    axes.set_title("bars: the 95 % interval", fontsize=8)


def _styled(rows: Sequence[Row], along: str) -> Iterator[tuple[str, list[Row], dict]]:
    """(name, rows, style) of each line; colours run from dark to bright in the order of the settings."""
    from matplotlib import colormaps

    found = lines(rows, along)
    for number, (name, line) in enumerate(found.items()):
        colour = colormaps["viridis"](0.85 * number / max(1, len(found) - 1))
        yield name, line, {"color": colour, "marker": _MARKERS[number % len(_MARKERS)], "ms": 4.5, "lw": 1.3}


def _dress(axes, rows: Sequence[Row], y: str) -> None:
    values = [row.figures[y]["value"] for row in rows]
    if min(values) > 0 and max(values) > _WIDE * min(values):
        axes.set_yscale("log")
    axes.set_ylabel(_called(y))
    axes.margins(0.08)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _called(figure: str) -> str:
    return f"{NAMES.get(figure, figure)} ({'higher' if figure in HIGHER else 'lower'} is better)"


def _label(axes, spots: list[tuple]) -> None:
    """Each text where it is nearest to no point, no line and no text before it. spots: as `_traded` returns them."""
    inch = _DPI / 72
    pixels = [axes.transData.transform(points) for points, _, _ in spots]
    steps = np.linspace(0, 1, 9)[:, None]
    taken = [piece for line in pixels for a, b in itertools.pairwise(line) for piece in a + steps * (b - a)]
    taken += [point for line in pixels for point in line]
    for (points, texts, colour), line in zip(spots, pixels, strict=True):
        for point, text, pixel in zip(points, texts, line, strict=True):
            places = pixel + inch * np.array(_AROUND)
            distances = np.linalg.norm(places[:, None] - np.array(taken)[None], axis=2) / (inch * _APART)
            covered = np.clip(1 - distances, 0, None).sum(1)
            chosen = int(covered.argmin())
            taken += [places[chosen]] * 3  # another text is worse than a line
            dark = tuple(0.7 * part for part in colour[:3])
            how = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 7.5, "color": dark}
            axes.annotate(text, point, _AROUND[chosen], **how)
