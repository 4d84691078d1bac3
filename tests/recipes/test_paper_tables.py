"""Tables as files: what the packaged ones say, and which jobs a table is made of."""

from pathlib import Path

import pytest

from mage_ds.errors import UserError
from mage_ds.recipes.jobs import Inputs, expand
from mage_ds.recipes.sweep import SCALES, load_sweep, sweep_names

# The specification's section 7, written out once more: FID, probe.
EPOCHS = {"400": (12.2, 72.2), "800": (11.6, 73.3), "1600": (11.1, 74.7)}
DECODERS = {
    "8 x 512": (12.4, 72.1),
    "8 x 768": (11.6, 73.3),
    "8 x 1024": (11.4, 73.5),
    "6 x 768": (12.4, 71.8),
    "10 x 768": (11.4, 73.2),
    "12 x 768": (11.3, 73.4),
}
LAMBDAS = {0: 73.3, 0.01: 75.5, 0.05: 76.7, 0.1: 77.1, 0.2: 76.9, 0.5: 76.6}
RATIOS = {1.0: (14.1, 75.0), 0.7: (23.5, 76.3), 0.6: (27.0, 77.1)}

TABLE = """
title: a table
compared: three rows
columns: [fid, top1]
paper:
  samples: 500
  probe: {recipe: digits_probe}
digits:
  sample: digits
  tokenizer: {recipe: digits_tokenizer}
  extractor: {recipe: digits_mage}
  reference: train
  samples: 100
  probe: {recipe: digits_probe}
rows:
  plain: &row
    published: {top1: 70.0}
    paper: {train: {recipe: digits_mage}}
    digits: {train: {recipe: digits_mage}}
  the same, otherwise said:
    paper: {train: {recipe: digits_mage, set: [model.padding=cls]}}
    digits: {train: {recipe: digits_mage, set: [model.padding=cls, report.log_every=7]}}
  padded:
    paper: {train: {recipe: digits_mage, set: [model.padding=mask]}}
    digits: {train: {recipe: digits_mage, set: [model.padding=mask]}}
  theirs:
    published: {top1: 68.0}
    paper: {given: "mae:file.pth", probe: {recipe: digits_probe, set: [batch=64]}}
"""


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "table.yaml"
    path.write_text(TABLE)
    return path


def kinds(graph) -> list[str]:
    return sorted(name.rpartition("-")[0] for name in graph.jobs)


def packaged(name: str, scale: str):
    """The jobs of a packaged table."""
    return expand(load_sweep(name), scale, Inputs(), Path("out"), told=True)


def test_the_packaged_tables():
    assert sweep_names() == ["figure2", *(f"table{n}" for n in range(2, 10))]
    published = {name: {k: row.published for k, row in load_sweep(name).rows.items()} for name in sweep_names()}
    fid_probe = lambda pairs: {k: {"fid": fid, "top1": top1} for k, (fid, top1) in pairs.items()}  # noqa: E731
    assert {k.removesuffix(" epochs"): v for k, v in published["table4"].items()} == fid_probe(EPOCHS)
    assert published["table5"] == fid_probe(DECODERS)
    assert [*published["table2"].values()] == [{"top1": v} for v in (75.1, 75.8, 64.1, 78.9)]
    assert published["table3"] == fid_probe({"[MASK]": (12.4, 72.5), "[C]": (11.6, 73.3)})
    assert published["table6"] == {
        "ViT-B, strong": {"fid": 11.1, "is": 81.2, "top1": 74.7, "finetune": 82.5},
        "ViT-B, weak": {"fid": 8.67, "top1": 70.5},
        "ViT-L, strong": {"fid": 9.10, "is": 105.1, "top1": 78.9, "finetune": 83.9},
    }
    loss = {"MAE": 68.0, "R": 73.3, "SimCLR": 74.2, "C": 72.9, "C+R": 77.1}
    assert published["table7"] == {k: {"top1": v} for k, v in loss.items()}
    for name, wanted in (("table8", {k: {"top1": v} for k, v in LAMBDAS.items()}), ("table9", fid_probe(RATIOS))):
        assert {row.at: row.published for row in load_sweep(name).rows.values()} == wanted


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", sweep_names())
def test_every_packaged_table_expands(name, scale):
    """All of its recipes are there, take its changes, and what is needed stands before what needs it."""
    graph = packaged(name, scale)
    before = set()
    for job in graph.jobs.values():
        assert set(job.needs) <= before
        before.add(job.name)


def test_tables_share_runs():
    """MAGE-C of lambda 0.1, 800 epochs, with the largest mask ratio of 0.6 is a row of three tables, trained once."""
    three = {"table7": "C+R", "table8": "lambda 0.1", "table9": "max m_r 0.6"}
    graphs = {name: packaged(name, "paper") for name in three}
    assert len({graphs[name].rows[label].probe[0] for name, label in three.items()}) == 1


def test_what_is_the_same_is_one_job(table):
    """On digits: data, tokenizer, two MAGEs, for each a score and a probe; the extractor is one of the MAGEs."""
    graph = expand(load_sweep(str(table)), "digits", Inputs(), Path("out"))
    assert kinds(graph) == ["data", *["digits_mage"] * 2, *["digits_probe"] * 2, "digits_tokenizer", *["score"] * 2]
    assert graph.rows["plain"] == graph.rows["the same, otherwise said"] != graph.rows["padded"]
    assert graph.jobs[graph.rows["plain"].probe[0]].rows == ["plain", "the same, otherwise said"]
    sizes = [len(stage) for stage in graph.stages()]
    assert sizes == [1, 1, 2, 4]
    [mage] = graph.rows["plain"].sources
    [score] = graph.rows["padded"].fid
    words = graph.jobs[score].words
    assert words[:3] == ["evaluate", graph.rows["padded"].sources[0], "--reference"]
    assert words[words.index("--features") + 1] == f"run:{mage}" and words[words.index("-n") + 1] == "100"
    assert Path(mage).name in graph.jobs[score].needs and words[words.index("--out") + 1] == graph.jobs[score].out


def test_seeds_and_rows(table):
    """Each seed has its own tokenizer, MAGE, score and probe; what FID is measured by is the first's for all."""
    graph = expand(load_sweep(str(table)), "digits", Inputs(), Path("out"), seeds=3, only=["padded"])
    assert kinds(graph) == [
        "data", *["digits_mage"] * 4, *["digits_probe"] * 3, *["digits_tokenizer"] * 3, *["score"] * 3,
    ]  # fmt: skip
    seeds = [[w for w in graph.jobs[name].words if w.startswith("seed=")] for name in graph.rows["padded"].probe]
    assert seeds == [[], ["seed=1"], ["seed=2"]]
    measures = {w for name in graph.rows["padded"].fid for w in graph.jobs[name].words if w.startswith("run:")}
    assert len(measures) == 1
    plain = expand(load_sweep(str(table)), "digits", Inputs(), Path("out"), seeds=1, only=["padded"])
    assert plain.jobs.items() <= graph.jobs.items()


def test_the_papers_scale(table, tmp_path):
    (tmp_path / "file.pth").write_bytes(b"")
    sweep, given = load_sweep(str(table)), Inputs("D", "T", models=str(tmp_path))
    graph = expand(sweep, "paper", given, Path("out"))
    assert graph.remarks == ["FID and IS are left out: they need Inception's weights (--inception FILE)"]
    assert kinds(graph) == [*["digits_mage"] * 2, *["digits_probe"] * 3]
    theirs = graph.jobs[graph.rows["theirs"].probe[0]]
    assert theirs.needs == [] and theirs.words[theirs.words.index("--init") + 1] == f"mae:{tmp_path}/file.pth"
    assert "batch=64" in theirs.words and "--tokenizer" not in theirs.words
    scored = expand(sweep, "paper", given._replace(inception="I"), Path("out"))
    assert scored.jobs[scored.rows["plain"].fid[0]].words[2:6] == ["--reference", "D:val", "--inception", "I"]
    left = expand(sweep, "paper", given._replace(models=None), Path("out"))
    assert any("row theirs is left out: it is of file.pth" in each for each in left.remarks)
    assert left.rows["theirs"].probe == []
    names = [set(each.jobs) for each in (scored, expand(sweep, "paper", Inputs(), Path("x"), told=True))]
    assert names[0] == names[1]  # a name does not depend on where things are


@pytest.mark.parametrize(
    "before, after, says",
    [
        ("probe: {recipe", "prob: {recipe", "table.yaml: paper.prob: there is no such key; did you mean paper.probe?"),
        ("published: {top1: 70.0}", "publishd: {top1: 70.0}", "row plain: publishd: there is no such key; did you"),
        ("{top1: 70.0}", "{topl: 70.0}", "published.topl: is none of the columns fid, top1; did you mean top1"),
        ("samples: 500", "samples: none", "paper.samples = none: must be a whole number at least 1"),
        ("columns: [fid, top1]", "columns: [fid]", "row plain: published.top1: is none of the columns fid"),
        ("given: \"mae:file.pth\"", "given: mae:/etc/file", "must be the name of a file"),
        ("{train: {recipe: digits_mage}}", "{}", "row plain: paper: give exactly one of train, given"),
        ("rows:", "row:", "is no table"),
        ("columns: [fid", "trend: {axis: x, figures: [fid]}\ncolumns: [fid", "at is missing, which the trend needs"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file(table, before, after, says):
    assert before in TABLE
    table.write_text(TABLE.replace(before, after, 1))
    with pytest.raises(UserError) as error:
        load_sweep(str(table))
    assert says in str(error.value) and str(table) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, given, more, says",
    [
        ("", {}, {"scale": "paper"}, "--data: is missing"),
        ("", {"data": "D"}, {"scale": "paper"}, "--tokenizer: is missing"),
        ("", {}, {"only": ["padde"]}, "--only padde: there is no such row; the rows are plain"),
        ("", {}, {"only": ["theirs"]}, "none of the rows of --only stands at this scale"),
        ("model.padding=masc", {}, {}, "row padded: digits_mage: model.padding = masc: must be one of cls, mask"),
        ("model.paddin=mask", {}, {}, "did you mean model.padding?"),
    ],
)
def test_mistakes_of_a_command(table, change, given, more, says):
    table.write_text(TABLE.replace("model.padding=mask", change or "model.padding=mask"))
    more = {"scale": "digits", **more}
    with pytest.raises(UserError) as error:
        expand(load_sweep(str(table)), more.pop("scale"), Inputs(**given), Path("out"), **more)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_table():
    with pytest.raises(UserError, match="sweep tabel8: no such table; did you mean table8"):
        load_sweep("tabel8")
    with pytest.raises(UserError, match=r"nothing\.yaml: no such file"):
        load_sweep("nothing.yaml")
