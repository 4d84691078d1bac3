"""`mage-ds evaluate CLASSIFIER --reference DATA --metrics top1`: against a plain loop, on one rank and on two."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from made_classifiers import pictures, seen
from PIL import Image
from sklearn.linear_model import LogisticRegression

from mage_ds import cli
from mage_ds.engine import stored

pytestmark = pytest.mark.processes
TOP1 = ["--metrics", "top1"]
BROKEN = "val/2/broken.png"


def line(source, data, out):
    return ["evaluate", source, "--reference", data, *TOP1, "--batch", 4, *(["--out", out] if out else [])]


@pytest.fixture(scope="module")
def place(classifiers):
    """Each run of the classifiers, evaluated in ROOT/of KIND."""
    for kind in ("probe", "scratch", "vit"):
        where = classifiers.root / f"of {kind}"
        classifiers.said[f"of {kind}"] = classifiers.lines.done(*line(classifiers.root / kind, classifiers.data, where))
    return classifiers


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def rows(folder) -> list[dict]:
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


@torch.no_grad()
def scores(place, run) -> tuple[torch.Tensor, list[int]]:
    """Of every readable held-out picture, one after the other."""
    classifier, (given, labels) = stored.open_model(run).classifier, seen(place, "val", run)
    return torch.stack([classifier(each[None])[0] for each in given]).double(), labels.tolist()


@pytest.mark.parametrize("kind", ["probe", "scratch", "vit"])
def test_figures_and_predictions_are_those_of_a_plain_loop(place, kind):
    expected, labels = scores(place, place.root / kind)
    found, lines = results(place.root / f"of {kind}"), rows(place.root / f"of {kind}")
    ranks = [int((row > row[label]).sum()) for row, label in zip(expected, labels, strict=True)]
    assert found["n"] == 13 and found["split"] == "val"
    assert found["figures"] == pytest.approx({"top1": np.mean(np.equal(ranks, 0)), "top5": np.mean(np.less(ranks, 5))})
    told = [each for each in lines if each["predicted"]]
    assert [each["name"] for each in lines if not each["predicted"]] == [BROKEN] == found["unreadable"]
    assert [int(each["label"]) for each in told] == labels == [int(each["name"].split("/")[-2]) for each in told]
    for each, row in zip(told, expected, strict=True):
        share, top = row.softmax(0).topk(5)
        assert each["top5"] == "|".join(str(i) for i in top.tolist()) and each["predicted"] == str(top[0].item())
        assert float(each["score"]) == pytest.approx(share[0].item(), abs=2e-6)
    for number, each in enumerate(found["classes"]):
        own = [rank == 0 for rank, label in zip(ranks, labels, strict=True) if label == number]
        assert each == {"name": str(number), "n": len(own), "top1": pytest.approx(np.mean(own))}
    wrong = sum(count for _, _, count in found["mistakes"])
    assert wrong == sum(rank > 0 for rank in ranks)


def test_it_is_beside_logistic_regression_on_raw_pixels(place):
    x, y = pictures(place.data, "train")
    given, labels = pictures(place.data, "val")
    theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(x.flatten(1).numpy(), y.numpy())
    right = theirs.score(given.flatten(1).numpy(), labels.numpy())
    assert results(place.root / "of probe")["baselines"] == {"logistic regression on raw pixels": pytest.approx(right)}
    assert f"logistic regression on raw pixels  {right:.2%}" in place.said["of probe"].replace("   ", "  ")


def test_what_is_shown(place):
    figures = results(place.root / "of vit")["figures"]
    said = place.said["of vit"]
    assert re.search(rf"^vit +{figures['top1']:.2%} +{figures['top5']:.2%}$", said, re.MULTILINE)
    assert "13 pictures of val/" in said and f"not counted, because unreadable: {BROKEN}" in said
    with Image.open(place.root / "of vit" / "confusion.png") as picture:
        assert min(picture.size) > 400


def test_any_number_of_ranks_writes_the_same(place):
    """14 pictures in tiles of 4: one rank has 8 of them, the other 6."""
    place.lines.two(*line(place.root / "probe", place.data, place.root / "of two"))
    one, two = place.root / "of probe", place.root / "of two"
    assert (one / "predictions.csv").read_bytes() == (two / "predictions.csv").read_bytes()
    assert (one / "confusion.png").read_bytes() != b"" != (two / "confusion.png").read_bytes()
    varies = ("machine", "command")
    first, second = ({k: v for k, v in results(each).items() if k not in varies} for each in (one, two))
    assert first == second and results(two)["machine"]["ranks"] == 2


def test_an_export_is_named_as_well_as_its_run(place, capsys):
    """The average of a run's weights travels; an export does not know where held-out pictures lie."""
    out = place.root / "handed on"
    assert cli.main(["export", str(place.root / "scratch"), "--out", str(out)]) == 0
    assert cli.main([str(word) for word in line(out, place.data, place.root / "of export")]) == 0
    one, two = place.root / "of scratch", place.root / "of export"
    assert (one / "predictions.csv").read_bytes() == (two / "predictions.csv").read_bytes()
    capsys.readouterr()


def test_by_default_it_lies_in_the_run_and_keeps_its_checkpoint(place):
    run = place.root / "copied"
    shutil.copytree(place.root / "vit", run)
    place.lines.done(*line(run, place.data, None))
    assert rows(run / "evaluated" / "data") == rows(place.root / "of vit")
    assert (run / "checkpoints" / "step_000006" / "pinned").exists() or list(run.rglob("*pin*"))


def test_some_of_the_classes_will_do(place, tmp_path):
    """A folder without val/, of two of the classes: their numbers are found by name."""
    for name in ("4", "1"):
        shutil.copytree(place.data / "val" / name, tmp_path / "some" / name)
    place.lines.done(*line(place.root / "vit", tmp_path / "some", tmp_path / "out"))
    whole = {each["name"]: each for each in rows(place.root / "of vit")}
    found = rows(tmp_path / "out")
    assert len(found) == 3 and results(tmp_path / "out")["baselines"] == {}
    for each in found:
        assert each["label"] in ("1", "4") and each["predicted"] == whole[f"val/{each['name']}"]["predicted"]


def test_one_line_says_what_is_wrong(place, tmp_path, capsys):
    def said(source, data, *more):
        words = [*line(source, data, tmp_path / "never"), *more]
        assert cli.main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("mage-ds: error: ") and error.count("\n") == 1
        assert not (tmp_path / "never").exists()
        return error.removeprefix("mage-ds: error: ")

    probe = place.root / "probe"
    assert said(place.root / "mage", place.data).startswith(
        f"{place.root / 'mage'}: is a mage, which names no pictures"
    )
    shutil.copytree(place.data / "val" / "0", tmp_path / "strange" / "ant")
    assert "its classes ant are none of the classifier's (0, 1, 2, 3, ...)" in said(probe, tmp_path / "strange")
    shutil.copytree(place.data / "val" / "0", tmp_path / "flat")
    assert "has pictures without a class; sort them into class folders" in said(probe, tmp_path / "flat")
    (tmp_path / "bad" / "1").mkdir(parents=True)
    shutil.copy(place.data / BROKEN, tmp_path / "bad" / "1" / "0.png")
    assert "none of its 1 pictures can be read" in said(probe, tmp_path / "bad")
    assert "--metrics top1: is of a classifier, the others are of pictures" in said(
        probe, place.data, "--metrics", "top1,fid"
    )
