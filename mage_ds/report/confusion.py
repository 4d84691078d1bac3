"""What a classifier takes for what, as a picture: the confusion matrix, beside it the worst classes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_MOST = 30  # classes of the matrix: of more, the worst and what they are taken for
_WORST = 20  # classes of the list beside it
_LONG = 22  # letters of a name
_DPI = 130


def save(path: Path, confusion: np.ndarray, names: Sequence[str], worst: np.ndarray, title: str) -> None:
    """Writes PNG, whole or not at all. confusion: int64 (classes, classes), rows are what pictures are; worst: the
    classes that have pictures, the worst first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen, worst = shown(confusion, worst), worst[:_WORST]
    size, lines = max(4.0, 0.32 * len(chosen) + 1.6), len(worst)
    figure = Figure(figsize=(size + 4.6, max(size, 0.26 * lines + 1.4)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no screen, no global state
    matrix, beside = figure.subplots(1, 2, width_ratios=(size, 4.0))
    _matrix(matrix, confusion, chosen, names)
    _worst(beside, confusion, names, worst)
    figure.suptitle(title, fontsize=9)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png")
    part.replace(path)


def shown(confusion: np.ndarray, worst: np.ndarray) -> np.ndarray:
    """The classes of the matrix, rising: all, or of more than _MOST the worst, each with what it is most taken for."""
    if len(confusion) <= _MOST:
        return np.arange(len(confusion))
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    found: dict[int, None] = {}
    for each in worst[:_MOST]:
        pair = dict.fromkeys((int(each), int(wrong[each].argmax())))
        if len(found | pair) <= _MOST:
            found |= pair
    return np.array(sorted(found))


def _matrix(axes, confusion: np.ndarray, chosen: np.ndarray, names: Sequence[str]) -> None:
    counts = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(confusion, counts, out=np.zeros(confusion.shape), where=counts > 0)[np.ix_(chosen, chosen)]
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for row, column in np.argwhere(confusion[np.ix_(chosen, chosen)] > 0):
        share = shares[row, column]
        text = f"{confusion[chosen[row], chosen[column]]}"
        axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color="white" if share > 0.5 else "black")
    told = [_short(names[each]) for each in chosen]
    places = range(len(chosen))
    axes.set_xticks(places, told, rotation=90 if max(map(len, told)) > 2 else 0, fontsize=7)
    axes.set_yticks(places, told, fontsize=7)
    axes.set_xlabel("taken for", fontsize=8)
    axes.set_ylabel("is", fontsize=8)
    some = f", {len(chosen)} of {len(confusion):,} classes: the worst, and what they are taken for"
    axes.set_title("pictures" + (some if len(chosen) < len(confusion) else " (colour: share of the row)"), fontsize=8)


def _worst(axes, confusion: np.ndarray, names: Sequence[str], chosen: np.ndarray) -> None:
    """The worst classes: share that is named right, and the most frequent mistake."""
    shares = confusion.diagonal() / confusion.sum(axis=1).clip(1)
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    places = np.arange(len(chosen))
    axes.barh(places, shares[chosen], color="lightsteelblue", height=0.7)
    for place, each in zip(places, chosen, strict=True):
        other = int(wrong[each].argmax())
        text = f"{shares[each]:.0%} of {confusion[each].sum():,}"
        text += f", mostly taken for {_short(names[other])}" if wrong[each, other] else ""
        axes.text(0.02, place, text, va="center", fontsize=6.5, color="black")
    axes.set_yticks(places, [_short(names[each]) for each in chosen], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("worst classes: named right, of how many", fontsize=8)


def _short(name: str) -> str:
    return name if len(name) <= _LONG else name[: _LONG - 1] + "…"
