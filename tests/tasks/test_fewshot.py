"""`mage-ds fewshot` as a user starts it: two sources, two data sets, again, on two ranks; and mistakes."""

import json
import shutil

import numpy as np
import pytest
import torch
from launched import run, several
from made_export import SIDE, make_export
from PIL import Image

import mage_ds
from mage_ds.evaluation import few_shot

pytestmark = pytest.mark.processes
CLASSES, TRAIN, VAL, SHOTS, TRIALS = 3, 7, 5, (1, 2, 5), 2


def draw(folder, seed, train=TRAIN, side=SIDE):
    """Class folders of noisy patterns, one a class."""
    rng = np.random.default_rng(seed)
    for label in range(CLASSES):
        for split, number in (("train", train), ("val", VAL)):
            (folder / split / f"class {label}").mkdir(parents=True)
            for i in range(number):
                coarse = (
                    np.random.default_rng(label).integers(0, 256, (4, 4, 3)).repeat(side // 4, 0).repeat(side // 4, 1)
                )
                picture = np.clip(rng.normal(coarse, 30), 0, 255).astype(np.uint8)
                Image.fromarray(picture).save(folder / split / f"class {label}" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, answers by name): what the command line made and said."""
    root = tmp_path_factory.mktemp("fewshot")
    for number, name in enumerate(("one", "two")):
        make_export(root / name, classes=number or None)
    draw(root / "many", 0), draw(root / "few", 1, train=4), draw(root / "tiny", 2, train=1)
    draw(root / "bare", 3)
    shutil.move(root / "bare" / "val" / "class 0" / "0.png", root / "bare" / "val" / "0.png")
    shutil.copytree(root / "many" / "train", root / "unsplit")
    base = ["fewshot", "one", "run:two", "--data", "many", "few", "--shots", "1,2,5", "--trials", TRIALS, "--out"]
    lines = {
        "first": [*base, "out"],
        "other draws": [*base, "out", "--seed", 1],
        "again": [*base, "out"],
        "fewer": ["fewshot", "one", "--data", "tiny", "--shots", "2,5", "--out", "never"],
        "bare": ["fewshot", "one", "--data", "bare", "--out", "never"],
        "unsplit": ["fewshot", "one", "--data", "unsplit", "--out", "never"],
        "one split": ["fewshot", "one", "--data", "many:val", "--out", "never"],
        "missing": ["fewshot", "nothing", "--data", "many", "--shots", 1, "--out", "never"],
        "twice": ["fewshot", "one", "one", "--data", "many", "--shots", 1, "--out", "never"],
        "shots": ["fewshot", "one", "--data", "many", "--shots", "0", "--out", "never"],
        "other batch": [*base, "out", "--batch", 8],
    }
    return root, dict(zip(lines, several(*lines.values(), cwd=root), strict=True))


def said(made, name):
    code, out, err = made[1][name]
    assert code == 0, err
    return out


def results(folder):
    return json.loads((folder / "fewshot.json").read_text())


def test_the_figures_are_those_of_a_plain_loop(made):
    root, _ = made
    said(made, "first")
    found = results(root / "out")
    assert len(found["results"]) == 2 * (3 + 2)
    for row in found["results"]:
        model = mage_ds.from_pretrained(root / row["source"].removeprefix("run:"), device="cpu")
        features, labels = {}, {}
        for split in ("train", "val"):
            paths = sorted((root / row["data"] / split).rglob("*.png"))
            images = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2)
            features[split] = model.features(images.float() / 255)
            labels[split] = np.array([int(path.parent.name[-1]) for path in paths])
        top1 = []
        for trial in range(TRIALS):
            drawn = few_shot.draw(labels["train"], CLASSES, row["shots"], trial, 0)
            shown = features["train"][torch.from_numpy(drawn)]
            top1.append(few_shot.answer(shown, features["val"], torch.from_numpy(labels["val"])).top1)
        assert [each["top1"] for each in row["trials"]] == pytest.approx(top1, abs=1.01 / (CLASSES * VAL))
        assert row["top1"] == pytest.approx(np.mean([each["top1"] for each in row["trials"]]))
        assert row["std"] == pytest.approx(np.std([each["top1"] for each in row["trials"]], ddof=1))
    best = [row["top1"] for row in found["results"] if row["data"] == "many" and row["shots"] == 5]
    assert max(best) > 0.5  # of 3 classes


def test_what_is_said_and_kept(made):
    root, _ = made
    text = said(made, "first")
    for part in (
        "many: 3 classes, 21 pictures in train/; top-1 in % on the 15 of val/, mean ± standard deviation of 2 draws",
        "1 shot ",
        "5 shots",
        "few: class class 0 has 4 pictures in train/, too few for 5 shots: left out",
        "the last 1/5 of each class's shots",
        "fitted 20/20",
    ):
        assert part in text, part
    table = [line.split() for line in text.splitlines() if line.startswith("two ")]
    assert table[1][-1] == "-" and table[0][-1] != "-"
    found = results(root / "out")
    assert [each["name"] for each in found["sources"]] == ["one", "two"]
    assert all(len(each["hash"]) == 64 and each["width"] == 32 for each in found["sources"])
    many, few = found["data"]
    assert (many["classes"], many["train"]["n"], many["val"]["n"], many["train"]["resized"]) == (3, 21, 15, SIDE)
    assert many["shots"] == [1, 2, 5] and few["shots"] == [1, 2] and len(many["drawn"]) == 64
    assert found["options"]["seed"] == 0 and found["versions"]["torch"]
    assert Image.open(root / "out" / "fewshot.png").width == 1280


def test_features_are_computed_once(made):
    root, _ = made
    assert "looked at 21/21" in said(made, "first")
    for name in ("again", "other draws"):
        assert "looked at" not in said(made, name)
    sets = [path.parent.relative_to(root / "out" / "features") for path in root.glob("out/features/**/features.json")]
    assert len(sets) == 2 * 2 * 2 and {path.name for path in sets} == {"train", "val"}


MISTAKES = {
    "fewer": ["--data tiny: class class 0 has 1 pictures in train/, too few for 2, 5 shots; give smaller --shots"],
    "bare": ["--data bare", "val/ has pictures without a class"],
    "unsplit": ["has no val/"],
    "one split": ["--data many:val", "train/ and val/"],
    "missing": ["nothing: no such run folder"],
    "twice": ["one: is given twice"],
    "shots": ["--shots", "whole number at least 1"],
    "other batch": ["batch 64 there, 8 here"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(made, name):
    root, answers = made
    code, _, err = answers[name]
    assert code == 2 and err.count("\n") == 1 and all(part in err for part in MISTAKES[name]), err
    assert not (root / "never").exists()


def test_two_ranks(made, tmp_path):
    """The same figures to the last digit."""
    root, _ = made
    line = ["fewshot", root / "one", "--data", root / "many", "--shots", "1,2,5", "--trials", TRIALS]
    text = run(*line, "--out", tmp_path / "out", cwd=tmp_path).text
    assert text.count("written to") == 1 and "fitted 3/3" in text
    found = results(tmp_path / "out")
    alone = [row for row in results(root / "out")["results"] if (row["source"], row["data"]) == ("one", "many")]
    assert found["results"] == alone and found["machine"]["ranks"] == 2
