"""`tokenize`: what it writes, what it refuses, and how it survives."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import Launch
from made_tokens import BATCH, VAL, N, files, mistake, tokenize

from mage_ds import recipes
from mage_ds.engine import stored, training
from mage_ds.errors import UserError
from mage_ds.inputs import dali, token_cache
from mage_ds.inputs.catalog import open_catalog
from mage_ds.inputs.quarantine import Quarantine
from mage_ds.tasks import tokenize as task
from mage_ds.tasks.pretrain import pretrain

# --- what is in it


def live(place, epochs: int, *overrides):
    """{(epoch, index): tokens} of the live stream, in another order and other company."""
    recipe = recipes.load_recipe(place.recipe, overrides)
    vqgan = training.frozen(stored.load_tokenizer(place.tokenizer)[0], torch.float32)
    catalog, found = open_catalog(place.data, "train"), {}
    common = {"seed": recipe.seed, "position": 0, "batch": BATCH, "micro_batch": BATCH, "rank": 0, "world": 1}
    broken = Quarantine(None, 1.0, catalog.n)
    source = dali.stream(catalog, inputs=recipe.inputs, device="cpu", quarantine=broken, **common)
    while len(found) < epochs * N:
        batch = next(source)
        for row, tokens in enumerate(training.tokenize(vqgan, batch.images[:, 0]).tolist()):
            if batch.epoch[row] < epochs:
                found[int(batch.epoch[row]), int(batch.index[row])] = tokens
    source.close()
    return found


def test_views_are_the_first_epochs_of_live_training(place, strong):
    cache = open_catalog(strong, "train", tokens=True)
    expected = live(place, 3, "inputs.augmentation=strong")
    assert all(cache.tokens[i, epoch].tolist() == tokens for (epoch, i), tokens in expected.items())
    assert (cache.tokens[:, 0] != cache.tokens[:, 1]).any()
    assert len(np.unique(cache.tokens)) > 8  # a codebook that says something
    assert cache.valid.all() and cache.labels.tolist() == open_catalog(place.data, "train").labels.tolist()


def test_held_out_pictures_have_the_evaluation_crop_and_one_view(place, strong, plain):
    cache, catalog = open_catalog(strong, "val", tokens=True), open_catalog(place.data, "val")
    inputs = recipes.load_recipe(place.recipe).inputs
    vqgan = training.frozen(stored.load_tokenizer(place.tokenizer)[0], torch.float32)
    broken = Quarantine(None, 1.0, VAL)
    seen = dali.evaluation(catalog, range(VAL), batch=BATCH, inputs=inputs, device="cpu", quarantine=broken)
    tokens = torch.cat([training.tokenize(vqgan, batch.images[:, 0]) for batch in seen])[:VAL]
    assert cache.views == 1 and cache.tokens[:, 0].tolist() == tokens.tolist()
    assert (strong / "val" / "tokens.npy").read_bytes() == (plain / "val" / "tokens.npy").read_bytes()


def test_settings_and_copy_of_the_tokenizer(place, strong):
    facts = json.loads((strong / "tokens.json").read_text())
    _, info = stored.load_tokenizer(strong / "tokenizer")
    expected = {"tokenizer": info["hash"], "dtype": "float32", "batch": BATCH, "views": 3, "seed": 0, "image_size": 16}
    expected |= {"interpolation": "linear", "evaluation_resize": 18, "tokens": 16, "codes": 32}
    expected |= {"augmentation": recipes.augmentations()["strong"]}
    expected |= {"data": {s: open_catalog(place.data, s).fingerprint for s in ("train", "val")}}
    assert facts["settings"] == expected
    assert {split: one["n"] for split, one in facts["splits"].items()} == {"train": N, "val": VAL}
    assert not list(strong.rglob("*.part")) and not (strong / "train" / "parts").exists()


def test_without_a_recipe_the_tokenizer_decides(place, tmp_path):
    cache = open_catalog(tokenize(place, tmp_path / "t", recipe=None), "train", tokens=True)
    assert cache.settings["augmentation"] == recipes.augmentations()["none"]
    assert (cache.settings["image_size"], cache.settings["evaluation_resize"]) == (16, 16)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_recipes_precision_unless_another_is_asked_for(place, tmp_path, precision):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(recipes.load_recipe(place.recipe, [f"machine.precision={precision}"])))
    made = [tokenize(place, tmp_path / asked, recipe=str(path), precision=asked) for asked in ("auto", "float32")]
    found = [token_cache.read_facts(out)["settings"]["dtype"] for out in made]
    assert found == [precision, "float32"]


def test_a_complete_one_is_said_and_left(place, plain, capsys):
    before = {path: os.stat(path).st_mtime_ns for path in plain.rglob("*")}
    tokenize(place, plain)
    assert "tokens of train 22 and val 5 pictures of these settings are complete" in capsys.readouterr().out
    assert {path: os.stat(path).st_mtime_ns for path in plain.rglob("*") if path.name != ".lock"}.items() <= (
        before.items()
    )


def test_unreadable_pictures(place, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(place.data, data)
    (data / "train" / "class0" / "00.png").write_bytes(b"")
    path = data / "train" / "class1" / "21.png"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"unreadable, more than inputs\.broken_limit=0\.01"):
        tokenize(place, tmp_path / "strict", data=data)
    tolerant = tmp_path / "tolerant.yaml"
    tolerant.write_text(recipes.dump(recipes.load_recipe(place.recipe, ["inputs.broken_limit=0.5"])))
    out = tokenize(place, tmp_path / "t", data=data, recipe=str(tolerant))
    cache, names = open_catalog(out, "train", tokens=True), open_catalog(data, "train")
    bad = [names.name(i) for i in np.flatnonzero(~cache.valid[:, 0])]
    assert sorted(bad) == ["train/class0/00.png", "train/class1/21.png"]
    listed = [json.loads(line)["name"] for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(listed) == sorted(bad)
    with pytest.raises(UserError, match=r"9.09% of its pictures were unreadable"):
        pretrain(recipes.load_recipe(place.recipe), str(out), str(tmp_path / "run"))


# --- mistakes


def test_mistakes_of_tokenize(place, plain, strong, tmp_path, capsys, monkeypatch):
    line = ["tokenize", "--data", place.data, "--tokenizer", place.tokenizer, "--out"]
    new, foreign = tmp_path / "new", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    common = ["--recipe", place.recipe, "--batch", BATCH, "--precision", "float32"]
    cases = [
        ([*line, plain, "--recipe", place.recipe, "--batch", 8, "--precision", "float32"], "batch 4 there, 8 here"),
        ([*line, plain, *common, "--views", 2, "--augmentation", "weak"], "views 1 there, 2 here"),
        ([*line, foreign, *common], "holds files but no tokens.json"),
        ([*line, new, *common, "--views", 4], "--views 4: without augmentation they are all the same"),
        ([*line, new, "--recipe", "digits_mge"], "did you mean digits_mage?"),
        ([*line, new, "--views", 0], "--views"),
        (["tokenize", "--data", plain, "--tokenizer", place.tokenizer, "--out", new], "pictures are needed here"),
        (["tokenize", "--data", place.data, "--tokenizer", "random", "--out", new], "--tokenizer random"),
        (["tokenize", "--data", tmp_path / "no", "--tokenizer", place.tokenizer, "--out", new], "no such data folder"),
        (["tokenize", "--data", place.data, "--tokenizer", place.data, "--out", new], "neither a tokenizer's run"),
    ]
    for argv, says in cases:
        assert says in mistake(capsys, *argv)
        assert not new.exists()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "disk has 0 MB left; make room" in mistake(capsys, *line, new, *common)


# --- a killed process


class Killed(BaseException):
    pass


def test_killed_before_any_publication_it_goes_on(place, plain, tmp_path, monkeypatch):
    """Every file is published by os.replace. Killed before the k-th of them, it leaves what it wrote aside."""
    replace, published = os.replace, []

    def dying(source, target):
        if len(published) + 1 == deadly:
            shutil.copy(source, target.with_name(f".{target.name}.1.part"))
            raise Killed
        published.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    monkeypatch.setattr(task, "_PART", 8)
    deadly, seen = 0, ["tokens.json", "tokens.json"]
    while deadly <= len(seen):
        deadly, out = deadly + 1, tmp_path / f"killed at {deadly}"
        published.clear()
        try:
            tokenize(place, out)
            seen = list(published)
        except Killed:
            seen = [*published, "killed"]
            with pytest.raises(UserError):
                open_catalog(out, "train", tokens=True)
            deadly, again = 0, deadly
            tokenize(place, out)
            deadly = again
        assert files(out) == files(plain)
    arrays = ["tokens.npy", "valid.npy", "labels.npy"]
    parts = [f"000_{first:09d}.npz" for first in (0, 8, 16)]
    assert published == ["tokens.json", *parts, *arrays, parts[0], *arrays, "tokens.json"]


# --- several processes

SMALL_AND_SLOW = """
import sys, time
from mage_ds import cli
from mage_ds.inputs import token_cache
from mage_ds.tasks import tokenize

def slowly(*part):
    write(*part)
    time.sleep(0.5)

tokenize._PART = 4
write, token_cache.Parts.write = token_cache.Parts.write, slowly
sys.exit(cli.main())
"""


def unlocked(out: Path) -> bool:
    """A killed process lets go of its files a moment after it has left /proc."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.processes
def test_two_ranks_killed_and_continued_alone_equal_one(place, plain, tmp_path, monkeypatch):
    script, out = tmp_path / "small_and_slow.py", tmp_path / "tokens"
    script.write_text(SMALL_AND_SLOW)
    line = ["--data", place.data, "--tokenizer", place.tokenizer, "--recipe", place.recipe, "--batch", BATCH]
    with Launch("tokenize", *line, "--precision", "float32", "--out", out, cwd=tmp_path, script=script) as launch:
        parts = out / "train" / "parts"
        launch.until(lambda: len(list(parts.glob("[!.]*.npz"))) >= 2)
        launch.kill()
        launch.until(lambda: unlocked(out), 60, alive=False)
    assert 2 <= len(list(parts.glob("[!.]*.npz"))) < 6  # 22 pictures, 4 a part
    with pytest.raises(UserError, match="not finished it"):
        open_catalog(out, "train", tokens=True)
    monkeypatch.setattr(task, "_PART", 4)
    tokenize(place, out)
    assert files(out) == files(plain)
