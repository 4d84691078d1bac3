"""The table and the plot of a sweep, of made figures."""

import re

import numpy as np
import pytest
from PIL import Image

from mage_ds.report import sweep_plot, sweep_table
from mage_ds.report.sweep_table import Row


def figure(value, half=None):
    return {"value": value, "interval": None if half is None else [value - half, value + half], "n": 9}


def made(steps=(2, 4), temperatures=(0.5, 3.0), order=None, **names):
    """Rows whose figures are a plain function of the settings; names: figure -> function."""
    rows = []
    for t in steps:
        for tau in temperatures:
            settings = {"steps": t, "temperature": tau} | ({"order": order} if order else {})
            rows.append(Row(sweep_table.told(settings, ","), settings, {k: make(t, tau) for k, make in names.items()}))
    return rows


FIGURES = {
    "fid": lambda t, tau: figure(100 / t + tau, 1.234),
    "is": lambda t, tau: figure(t + tau, 0.05),
    "recall": lambda t, tau: figure(0.5),
    "kid": lambda t, tau: figure(None if t == 2 else 0.0123 * tau),
}


def test_the_table_marks_the_best():
    rows = made(order="halton", **FIGURES)
    lines = [re.split(r"  +", line.strip()) for line in sweep_table.table(rows).splitlines()]
    assert lines[0] == ["steps", "temperature", "FID", "Inception score", "recall", "KID"]  # order is the same in all
    assert lines[1] == ["2", "0.5", "50.5 ± 1.2", "2.500 ± 0.050", "0.5000 *", "-"]
    assert lines[3] == ["4", "0.5", "25.5 ± 1.2 *", "4.500 ± 0.050", "0.5000", "0.006150 *"]
    assert lines[4] == ["4", "3", "28.0 ± 1.2", "7.000 ± 0.050 *", "0.5000", "0.03690"]
    widths = {len(line) for line in sweep_table.table(rows).splitlines()}
    assert len(widths) == 1
    assert sweep_table.best(rows) == {"fid": 2, "is": 3, "recall": 0, "kid": 2}
    assert rows[3].name == "steps=4,temperature=3,order=halton"


def test_markdown():
    head, rule, *lines = sweep_table.markdown(made(temperatures=(1.0,), fid=FIGURES["fid"])).splitlines()
    assert (head, rule) == ("| steps | FID |", "| ---: | ---: |")
    assert lines == ["| 2 | 51.0 ± 1.2 |", "| 4 | **26.0 ± 1.2** |"]


def test_lines_join_what_differs_in_one_setting():
    rows = made(**FIGURES)
    along = sweep_plot.lines(rows, "steps")
    assert {name: [row.settings["steps"] for row in line] for name, line in along.items()} == {
        "temperature=0.5": [2, 4],
        "temperature=3": [2, 4],
    }
    assert [*sweep_plot.lines(rows, "temperature")] == ["steps=2", "steps=4"]
    assert [*sweep_plot.lines(made(temperatures=(1,), **FIGURES), "steps")] == [""]


@pytest.mark.parametrize(
    "there, upwards, sideways",
    [
        (("fid", "is", "recall", "kid"), "fid", "is"),
        (("fid", "recall"), "fid", "recall"),
        (("is", "recall"), "is", "recall"),
        (("recall",), "recall", None),
    ],
)
def test_axes(there, upwards, sideways):
    rows = made(steps=(4, 8), **{name: FIGURES[name] for name in there})
    assert sweep_plot.axes_of(rows) == (upwards, sideways)


@pytest.mark.parametrize(
    "settings, panels",
    [
        ({}, 2),
        ({"steps": (2, 4, 8, 16), "temperatures": tuple(range(10))}, 2),
        ({"steps": (4,)}, 1),
        ({"temperatures": (1.0,)}, 2),
    ],
)
def test_the_plot(tmp_path, settings, panels):
    """The plot's size, and that something of every line's colour is in each panel."""
    rows = made(**settings, fid=FIGURES["fid"], recall=lambda t, tau: figure(t / 20 + tau / 30))
    sweep_plot.save(tmp_path / "sweep.png", rows, "made")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]
    picture = np.asarray(Image.open(tmp_path / "sweep.png").convert("RGB")).astype(int)
    high, wide, _ = picture.shape
    assert wide == 920 * panels and 840 <= high <= 950
    for style in (style for _, _, style in sweep_plot._styled(rows, sweep_table.varying(rows)[0])):
        colour = np.round(np.array(style["color"][:3]) * 255)
        for panel in np.split(picture[: high - 100], panels, axis=1):
            assert (np.abs(panel - colour).max(2) <= 2).sum() > 30


def test_a_plot_of_one_figure_and_words(tmp_path):
    rows = [
        Row(name, {"order": name}, {"precision": figure(value)}) for name, value in (("halton", 0.5), ("other", 0.7))
    ]
    sweep_plot.save(tmp_path / "one.png", rows, "made")
    assert Image.open(tmp_path / "one.png").width == 920
