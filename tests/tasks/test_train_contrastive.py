"""Contrastive pre-training (MAGE-C, SimCLR) from its start to its use, in one process; two ranks: engine tests."""

import re

import numpy as np
import pytest
import torch
from launched import losses, metrics
from made_tokens import SMALL, make, mistake, tokenize

from mage_ds import recipes
from mage_ds.engine import process, stored
from mage_ds.errors import UserError
from mage_ds.inputs import token_cache
from mage_ds.inputs.dali import PADDING
from mage_ds.tasks import pretrain as task

SIZES = [*SMALL[:-1], "machine.precision=float32", "contrastive.images=4", "warmup.steps=1"]
SIZES += ["report.checkpoint_every={steps: 3}"]
VIEWS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    found = make(tmp_path_factory.mktemp("contrast"))
    found.root = found.data.parent
    words = {"recipe": None, "augmentation": "strong"}
    found.cache = tokenize(found, found.root / "cache", views=VIEWS, **words)
    found.single = tokenize(found, found.root / "single", **words)
    return found


@pytest.fixture
def train(place, monkeypatch):
    """train(name, *overrides): a run in this process; its folder."""
    monkeypatch.setattr(process, "stop_on_signals", lambda: None)

    def train(name, *overrides, recipe="digits_mage_c", data=None, **options):
        augmented = ["inputs.augmentation=strong", "inputs.evaluation_resize=16", *overrides]
        numbers = recipes.load_recipe(recipe, [*SIZES, *augmented])
        tokenizer = None if data else str(place.tokenizer)
        task.pretrain(numbers, str(data or place.data), str(place.root / name), tokenizer, **options)
        return place.root / name

    return train


def test_mage_c_is_opened_as_a_mage(place, train):
    run = train("both")
    rows = [row for row in metrics(run) if "loss" in row]
    for row in rows:
        assert row["loss"] == pytest.approx(row["reconstruction"] + 0.1 * row["contrast"], rel=1e-6)
        assert row["pairs"] == 4 and row["no_pairs"] == 0
    assert any("val_loss" in row for row in metrics(run))
    opened = stored.open_model(run)
    assert opened.kind == "mage" and not any("projection" in name for name in opened.mage.state_dict())


@pytest.mark.parametrize("recipe", ["digits_mage_c", "digits_simclr"])
def test_contrast_alone_trains_an_encoder(place, train, recipe):
    words = ["objective=contrastive"] if recipe == "digits_mage_c" else ["inputs.colour=null"]
    run = train(recipe, "duration={steps: 7}", *words, recipe=recipe)
    assert all("top1" not in row for row in metrics(run)) and len(losses(run)) == 7
    encoder, info = stored.load_encoder(run)
    assert info["kind"] == "encoder" and info["of"] == "encoder"
    features = encoder.features(torch.zeros(2, 16, dtype=torch.int64))
    assert features.shape == (2, 32) and bool(torch.isfinite(features).all())


def test_a_run_that_was_stopped_goes_on_as_if_not(train):
    whole = train("whole")
    with pytest.MonkeyPatch.context() as patch:
        seen = []

        def stop(*args):
            seen.append(args)
            if len(seen) == 9:  # in the middle of a step
                raise process.StopAsked("SIGTERM")

        patch.setattr(process, "stop_point", stop)
        with pytest.raises(Exception, match="saved after step 3"):
            train("stopped")
    assert losses(train("stopped")) == losses(whole)


def test_without_pairs_it_learns_by_the_reconstruction_alone(train):
    run = train("none", "contrastive.highest=0.5001", "duration={steps: 2}")
    for row in (row for row in metrics(run) if "loss" in row):
        assert (row["pairs"], row["no_pairs"], row["contrast"]) == (0, 1, 0)
        assert row["loss"] == row["reconstruction"] > 0 and row["grad_norm"] > 0


def test_the_first_view_has_the_masks_of_plain_training(place):
    numbers = recipes.load_recipe("digits_mage_c", [*SIZES, "contrastive.highest=0.55"])
    index, epoch = np.arange(30), np.full(30, 2)
    batch = task.Batch(torch.full((30,), -1), index, epoch, torch.ones(30))
    masked, keep, few = task._view_masks(numbers, batch, torch.device("cpu"))
    first, kept, ratio = task.draw_masks(numbers, index, epoch, "cpu")
    assert torch.equal(masked[:30], first) and torch.equal(keep[:30], kept)
    assert not torch.equal(masked[30:], first)
    _, _, other = task.draw_masks(numbers, index, epoch, "cpu", "mask of view 1")
    expected = [float(max(pair) < 0.55) for pair in zip(ratio.tolist(), other.tolist(), strict=True)]
    assert few.tolist() == expected and 0 < sum(expected) < 30


def test_a_cache_gives_all_pairs_of_its_views_in_turn(place, train):
    cache = token_cache.open_cache(place.cache, "train")
    seen = set()
    for epoch in range(VIEWS * (VIEWS - 1)):
        tokens, _, valid = cache.rows(np.array([epoch]), np.array([3]), 2)
        pair = [[i for i in range(VIEWS) if (cache.tokens[3, i] == tokens[0, v]).all()] for v in (0, 1)]
        seen.add((pair[0][0], pair[1][0]))
        assert pair[0] == [epoch % VIEWS] and valid.tolist() == [1]
    assert seen == {(a, b) for a in range(VIEWS) for b in range(VIEWS) if a != b}
    assert cache.rows(np.array([0]), np.array([PADDING]), 2)[2].tolist() == [0]
    run = train("cached", "seed=0", data=place.cache)
    assert len(losses(run)) == 7 and np.isfinite(losses(run)).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["contrastive=null"], "objective = both: needs the section contrastive"),
        (["masking=null"], "masking is null: objective = both needs masks"),
        (["contrastive.images=3"], "contrastive.images = 3: must divide batch = 8"),
        (["contrastive.highest=0.5"], "contrastive.highest = 0.5: no picture would count, as mask ratios begin at 0.5"),
        (
            ["objective=contrastive", "masking=null", "inputs.augmentation=none"],
            "objective = contrastive: both views of a picture are the same, without masks and augmentation",
        ),
    ],
)
def test_recipes_that_contradict_themselves(words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        recipes.load_recipe("digits_mage_c", [*SIZES, *words])


def test_what_a_cache_cannot_serve(place, train, capsys):
    with pytest.raises(
        UserError, match=r"single: has one view of a picture, objective = both compares two; make another"
    ):
        train("refused", data=place.single)
    said = mistake(
        capsys,
        "tokenize",
        "--data",
        place.data,
        "--tokenizer",
        place.tokenizer,
        "--recipe",
        "digits_simclr",
        "--out",
        "x",
    )
    assert "inputs.colour changes pictures in more ways than a token cache has views of; train on the pictures" in said
