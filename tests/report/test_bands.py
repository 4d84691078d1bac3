"""On-track bands: curves of made runs, and runs that leave them for known reasons."""

import json
import math

import numpy as np
import pytest

from mage_ds import recipes
from mage_ds.report import bands

MAGE, TOKENIZER = recipes.load_recipe("digits_mage"), recipes.load_recipe("digits_tokenizer")
EMA = recipes.load_recipe("digits_scratch")
STEPS = [1, *range(50, 1801, 50)]


def run_of(seed: int, slow: float = 1.0, noise: float = 0.05) -> list[dict]:
    """The records of a run whose loss falls from 5 to 2 in some hundred steps, and whose accuracy rises with it."""
    draw = np.random.default_rng(seed)
    records = []
    for step in STEPS:
        loss = 2 + 3 * math.exp(-step / (300 * slow)) + draw.normal(0, noise)
        lr = 1.5e-3 * math.cos(math.pi / 2 * step / 1800) + 1e-9
        records.append(
            {"step": step, "loss": loss, "top1": 0.1 + (5 - loss) / 10, "lr": lr, "usage": 0.6 + draw.normal(0, 0.01)}
        )
        if step % 300 == 0:
            records.append({"step": step, "val_loss": loss, "val_top1": 0.1 + (5 - loss) / 10 + draw.normal(0, 0.005)})
    return records


def made_curve(tmp_path, recipe, seeds=(0, 1, 2), upon=None):
    runs = {}
    for seed in seeds:
        runs[seed] = tmp_path / f"run_{seed}"
        runs[seed].mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in run_of(seed))
        (runs[seed] / "metrics.jsonl").write_text(lines)
    path = tmp_path / "curves" / f"{recipe.task}.json"
    bands.write(path, recipe, runs, 1457, upon)
    return path


def said(band, records) -> list[str]:
    return [line for record in records for line in band.look(record["step"], record)]


@pytest.fixture
def band(tmp_path):
    return lambda recipe=MAGE: bands.Band("made", json.loads(made_curve(tmp_path, recipe).read_text()), recipe)


def test_a_curve_is_the_mean_and_the_range(tmp_path):
    curve = json.loads(made_curve(tmp_path, MAGE).read_text())
    assert curve["seeds"] == [0, 1, 2] and curve["dataset"] == 1457 and "seed" not in curve["identity"]
    figure = curve["figures"]["loss"]
    assert figure["samples"] == [64 * step for step in STEPS]
    losses = np.array([[record["loss"] for record in run_of(seed) if "loss" in record] for seed in (0, 1, 2)])
    np.testing.assert_allclose(figure["mean"], losses.mean(0), rtol=1e-3)
    for i in (0, 7, len(STEPS) - 1):
        near = losses[:, max(0, i - 1) : i + 2]
        assert figure["low"][i] == pytest.approx(near.min(), rel=1e-3)
        assert figure["high"][i] == pytest.approx(near.max(), rel=1e-3)
    assert curve["figures"]["val_top1"]["samples"] == [64 * step for step in range(300, 1801, 300)]
    assert "val_codes_used" not in curve["figures"]


def test_whose_band_it_is(tmp_path, monkeypatch):
    """Of the packaged recipe that trains the same, how it learns apart, on the same number of samples."""
    path, data = made_curve(tmp_path, MAGE), {"dataset": 1457}
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "__init__.py"))
    place = tmp_path / "digits" / "curves"
    place.mkdir(parents=True)
    (place / "broken.json").write_text("{")
    path.rename(place / path.name)
    other = recipes.load_recipe("digits_mage", ["seed=7", "report.log_every=3", "machine.precision=float32"])
    assert bands.of(MAGE, data) and bands.of(other, data)
    assert bands.of(other, data).about() == "compared while it trains with 3 finished runs of pretrain"
    assert bands.of(MAGE, {"dataset": 1458}) is None
    for changes, differs in (
        (["batch=32"], None),  # half of the samples: another schedule
        (["batch=32", "duration.steps=3600"], {"batch", "duration"}),
        (["model.dropout=0.0"], None),
        (["inputs.augmentation=weak"], None),
        (["optimizer.base_lr=1.0", "warmup.steps=0"], {"optimizer.base_lr", "warmup"}),
    ):
        found = bands.of(recipes.load_recipe("digits_mage", changes), data)
        assert (found and set(found.differs)) == differs, changes
    assert found.about().endswith(
        "(warmup {'steps': 50} there, {'steps': 0} here; optimizer.base_lr 0.006 there, 1.0 here)"
    )
    assert bands.path_of(recipes.recipe_file("digits_mage")).parts[-3:] == ("digits", "curves", "digits_mage.json")


def test_what_a_classifier_stands_on(tmp_path, monkeypatch):
    """Its curve is for encoders of the same training, of any seed."""
    probe = recipes.load_recipe("digits_probe")
    path = made_curve(tmp_path, probe, upon=bands.identity(MAGE))
    place = tmp_path / "digits" / "curves"
    place.mkdir(parents=True)
    path.rename(place / path.name)
    for name, changes in (("same", ["seed=5"]), ("other", ["model.padding=mask"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(recipes.dump(recipes.load_recipe("digits_mage", changes)))
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "__init__.py"))
    inits = [str(tmp_path / "same"), {"path": str(tmp_path / "same"), "hash": "0"}, str(tmp_path / "other")]
    inits += ["mae:file.pth", None]
    fit = [bands.of(probe, {"dataset": 1457, "init": init}) is not None for init in inits]
    assert fit == [True, True, False, False, False]


def test_runs_of_other_seeds_stay_inside(band):
    """60 of them; a false alarm in one of them may be."""
    alarms = sum(bool(said(bands.Band("made", band_data(band), MAGE), run_of(seed))) for seed in range(100, 160))
    assert alarms <= 1


def band_data(band) -> dict:
    """The curve of the fixture, made once."""
    if not hasattr(band, "made"):
        found = band()
        band.made = found._whole
    return band.made


def test_a_learning_rate_that_is_not_scaled(band):
    """The line comes once, says since when, and names the learning rate; a run that comes back says so."""
    records = run_of(9, slow=4)
    for record in records:
        if "lr" in record:
            record["lr"] /= 16
    lines = said(band(), records)
    assert "off track since" in lines[0] and "a learning rate that is not scaled" in lines[0], lines
    assert "loss" in lines[0] and "reference" in lines[0] and "for 3 runs" in lines[0]
    since = int(lines[0].split()[3].replace(",", ""))
    assert 64 * 50 <= since <= 64 * 300
    assert sum("off track" in line and "; this looks like" in line for line in lines) <= 4  # once a figure, at most


def test_the_learning_rate_of_another_batch(tmp_path):
    """Half of the batch wants half of the learning rate, and its losses may scatter more."""
    curve = json.loads(made_curve(tmp_path, MAGE).read_text())
    half = recipes.load_recipe("digits_mage", ["batch=32", "duration.steps=3600"])
    records = [record | {"step": 2 * record["step"]} for record in run_of(9, slow=4)]
    halved = [record | ({"lr": record["lr"] / 2} if "lr" in record else {}) for record in records]
    for given, says in ((records, "a learning rate that is not scaled"), (halved, "learns too slowly")):
        assert says in said(bands.Band("made", curve, half), given)[0]
    noisy = [record | {"step": 2 * record["step"]} for record in run_of(10, noise=0.05 * math.sqrt(2))]
    noisy = [record | ({"lr": record["lr"] / 2} if "lr" in record else {}) for record in noisy]
    assert said(bands.Band("made", curve, half), noisy) == []


def test_back_on_track(band):
    records = run_of(9)
    for record in records:
        if "loss" in record and 500 <= record["step"] < 800:
            record["loss"] += 1.5
    lines = said(band(), records)
    assert len(lines) == 2
    assert lines[0].startswith("off track since 32,000 samples: loss ") and "learns too slowly" in lines[0]
    assert lines[1] == "on track again: loss, after 19,200 samples outside"


def test_one_record_outside_is_a_draw(band):
    records = run_of(9)
    next(record for record in records if record["step"] == 600)["loss"] += 3
    assert said(band(), records) == []


def test_pixels_of_a_wrong_range(band):
    records = run_of(9)
    for record in records:
        if "loss" in record:
            record["loss"] *= 100
    assert "a wrong range of pixels" in said(band(TOKENIZER), records)[0]


def test_dead_codes(band):
    records = [record | ({"usage": 0.05} if "usage" in record and record["step"] > 300 else {}) for record in run_of(9)]
    [line] = said(band(TOKENIZER), records)
    assert line.startswith("off track since 22,400 samples: usage 0.05") and "dead codes: the codebook" in line


def test_tokens_that_are_too_easy(band):
    """Of a MAGE also a loss below the band is suspicious; of a tokenizer it is not."""
    low = [record | ({"loss": record["loss"] / 3} if "loss" in record else {}) for record in run_of(9)]
    assert "dead codes in the tokenizer" in said(band(), low)[0]


def test_better_than_the_reference_is_no_alarm(band):
    low = [record | ({"loss": record["loss"] / 3} if "loss" in record else {}) for record in run_of(9)]
    assert said(band(TOKENIZER), low) == []


def test_an_average_that_lags(band):
    late = [record | ({"val_top1": 0.1, "val_loss": 4.0} if "val_top1" in record else {}) for record in run_of(9)]
    [line] = said(band(EMA), late)
    assert "EMA lag: the average of 100 steps" in line and "val_top1" in line and "val_loss" in line
