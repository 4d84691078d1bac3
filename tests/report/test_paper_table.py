"""The paper's table: published beside measured, blank cells, the spread of seeds; and its plot."""

from PIL import Image

from mage_ds.report import paper_table, table_plot
from mage_ds.report.paper_table import Line

LINES = [
    Line("one", 0.5, {"fid": 9.10, "top1": 78.9}, {"fid": [10.0, 11.0, 12.0], "top1": [70.04]}),
    Line("two", 0.0, {"fid": 27.0}, {}),
    Line("three", 1.0, {}, {"fid": [], "top1": [71.0], "5": [50.0, 52.0]}),
]


def test_cells():
    """The standard deviation of 10, 11, 12 is 1, that of 50 and 52 the square root of 2."""
    assert paper_table.cells(LINES, ["fid", "top1", "5"]) == [
        ["", "FID published", "FID measured", "probe % published", "probe % measured", "5 shots %"],
        ["one", "9.1", "11.00 ± 1.00", "78.9", "70.0", ""],
        ["two", "27", "", "", "", ""],
        ["three", "", "", "", "71.0", "51.0 ± 1.4"],
    ]
    text = paper_table.text(LINES, ["fid", "top1"]).splitlines()
    assert len({len(line) for line in text}) == 1
    markdown = paper_table.markdown(LINES, ["fid"]).splitlines()
    assert markdown[1] == "| --- | ---: | ---: |" and markdown[3] == "| two | 27 |  |"


def test_plot(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", _note(drawn, "measured"))
    monkeypatch.setattr("matplotlib.axes.Axes.plot", _note(drawn, "published"))
    path = tmp_path / "plot.png"
    assert table_plot.save(path, LINES, ["fid", "top1"], "lambda", "a table", apart=True)
    assert drawn["measured"] == [([1], [11.0], [1.0]), ([1, 2], [70.04, 71.0], None)]  # places in the order of `at`
    assert drawn["published"] == [((0, 1), (27.0, 9.10)), ((1,), (78.9,))]
    assert Image.open(path).size == (1840, 760)
    assert not table_plot.save(tmp_path / "none.png", [LINES[1]], ["fid"], "lambda", "a table", apart=False)
    assert not (tmp_path / "none.png").exists()


def _note(drawn: dict, name: str):
    import matplotlib.axes

    real = getattr(matplotlib.axes.Axes, "errorbar" if name == "measured" else "plot")

    def call(self, *values, **options):
        if options.get("label", "").startswith(name):
            drawn.setdefault(name, []).append(values)
        return real(self, *values, **options)

    return call
