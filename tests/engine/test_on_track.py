"""Real trainings beside the curve of earlier ones: a learning rate that is not scaled is noticed while it trains."""

import re

import pytest
import tiny
from made_runs import evaluator, opened

from mage_ds import recipes
from mage_ds.report import bands

LONG = ["duration.steps=60", "report.checkpoint_every={steps: 60}", "report.log_every=3"]


@pytest.fixture(scope="module")
def place(me, tmp_path_factory):
    """Holds runs of three seeds, and their curve where a packaged recipe has it."""
    place = tmp_path_factory.mktemp("on_track")
    runs = {seed: trained(place / f"seed_{seed}", seed) for seed in range(3)}
    path = bands.path_of(place / "package" / "made" / "tiny.yaml")
    path.parent.parent.mkdir(parents=True)
    bands.write(path, tiny.recipe(*LONG), runs, tiny.DATASET)
    return place


@pytest.fixture
def said(place, monkeypatch, capsys):
    """said(seed, changes): what such a run says about its track."""
    elsewhere = type("Elsewhere", (), {"__file__": place / "package" / "made.py", "schedule": recipes.schedule})
    monkeypatch.setattr(bands, "recipes", elsewhere)

    def lines(seed: int, *changes: str) -> list[str]:
        capsys.readouterr()
        trained(place / f"run_{seed}", seed, *changes)
        text = capsys.readouterr().out
        assert text.count("\nstep ") >= 10
        return [line for line in text.splitlines() if " track" in line or "compared" in line]

    return lines


def trained(path, seed: int, *changes: str):
    numbers = tiny.recipe(*LONG, f"seed={seed}", *changes)
    engine = tiny.engine_of(numbers, 0)
    tiny.train(engine, numbers, numbers.duration.steps, opened(path, numbers, engine), evaluate=evaluator(batches=0))
    return path


def test_another_seed_is_on_track(said):
    assert said(7) == ["compared while it trains with 3 finished runs of tiny"]


def test_a_learning_rate_that_is_not_scaled_is_noticed(said):
    """The 32nd of it, as if the batch of 8 had been scaled for twice: said well before the end, with the cause."""
    about, first, *others = said(8, "optimizer.base_lr=0.009375", "optimizer.min_lr=0")
    assert about.endswith(
        "3 finished runs of tiny (optimizer.base_lr 0.3 there, 0.009375 here; optimizer.min_lr 0.001 there, 0.0 here)"
    )
    since = int(re.match(r"off track since ([\d,]+) samples: ", first)[1].replace(",", ""))
    assert since <= 8 * 30, first
    told = re.search(r"this looks like a learning rate that is not scaled: it is (\S+) where .* had (\S+) \(", first)
    assert float(told[2]) == pytest.approx(32 * float(told[1]), rel=0.2)
    assert all(re.match("off track since|on track again", line) for line in others) and len(others) <= 4


def test_another_length_has_no_curve(said):
    assert said(9, "duration.steps=40") == []
