"""Class-conditional training in one process: a decoder on the frozen encoder of a MAGE, from its start to its use."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launched import losses, metrics
from PIL import Image
from safetensors.torch import load_file

from mage_ds import cli, recipes
from mage_ds.engine import process, stored
from mage_ds.errors import Stopped, UserError
from mage_ds.models.mage import Encoder
from mage_ds.sampling.decode import decode, keyed_noise
from mage_ds.tasks import pretrain as task
from mage_ds.tasks.tokenize import tokenize

SIZES = [
    "batch=8",
    "machine.precision=float32",
    "machine.micro_batch=4",
    "tokenizer={channels: 8, multipliers: [1, 1, 1], blocks: 1, code_dim: 4, codes: 32}",
    "inputs={image_size: 16, augmentation: none, interpolation: linear, evaluation_resize: 16, broken_limit: 0.5}",
    "model.encoder={depth: 2, width: 32, heads: 2}",
    "model.decoder={depth: 1, width: 32, heads: 2}",
    "model.codes=32",
    "model.vocabulary=34",
    "sampling={steps: 3, temperature: 1.0, guidance: 0.5, guidance_schedule: linear}",
    "report.log_every=1",
]
MAGE = [*SIZES[:-2], "sampling={steps: 3, temperature: 1.0}", "duration.steps=2", "warmup.steps=0"]
MINE = [*SIZES, "model.classes=3", "label_dropout=0.25", "duration.steps=6", "warmup.steps=1"]
MINE += ["report.checkpoint_every.steps=2", "report.evaluate_every.steps=3", "report.pictures_every.steps=6"]
NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "stop_on_signals", lambda: None)
        yield


def draw(folder, count: int, first: int = 0) -> None:
    folder.mkdir(parents=True)
    for i in range(first, first + count):
        shade = np.linspace(11 * i % 256, 255 - 7 * i % 256, 16)
        Image.fromarray(np.broadcast_to(shade[:, None, None], (16, 16, 3)).astype(np.uint8)).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures of three classes, a MAGE trained on them, and a class-conditional run on its encoder."""
    root = tmp_path_factory.mktemp("conditional")
    for i, name in enumerate(NAMES):
        draw(root / "data" / "train" / name, 6, 10 * i)
        draw(root / "data" / "val" / name, 2, 10 * i + 7)
    task.pretrain(recipes.load_recipe("digits_mage", MAGE), str(root / "data"), str(root / "mage"), "random")
    place = SimpleNamespace(root=root, data=root / "data", mage=root / "mage", run=root / "run")
    train(place, "run", init=place.mage)
    return place


def train(place, out, *overrides, data=None, **options):
    recipe = recipes.load_recipe("digits_class_conditional", [*MINE, *overrides])
    options = {key: None if value is None else str(value) for key, value in options.items()}
    task.pretrain(recipe, str(data or place.data), str(place.root / out), **options)
    return place.root / out


def facts(run) -> dict:
    return json.loads((run / "facts.json").read_text())


def weights(run, kind="weight") -> dict:
    files = sorted((run / "checkpoints" / "step_000006").glob(f"*.{kind}.*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def figures(run) -> list[dict]:
    """All that does not depend on the clock."""
    kept = ("step", "loss", "top1", "grad_norm", "val_loss", "val_top1")
    return [{key: record[key] for key in kept if key in record} for record in metrics(run)]


# --- the run and what is made of it


def test_the_run_stands_alone(place):
    below, mage = stored.load_encoder(place.mage), stored.open_model(place.mage)
    known = facts(place.run)
    assert known["encoder"] == below[1]["hash"] and known["classes"] == NAMES
    assert known["tokenizer"] == below[1]["tokenizer"] == stored.load_tokenizer(place.run)[1]["hash"]
    copied = load_file(place.run / "encoder" / "model.safetensors")  # after the training: as it was before
    names = Encoder(**below[1]["model"]).state_dict()
    assert copied.keys() == names.keys()
    assert all(torch.equal(value, mage.mage.state_dict()[name]) for name, value in copied.items())
    assert not list(place.run.glob("*.part")) + list(place.run.glob(".*.part"))
    meta = json.loads((place.run / "checkpoints" / "latest" / "meta.json").read_text())
    assert list(meta["engines"]) == ["decoder"] and meta["classes"] == NAMES
    assert not weights(place.run).keys() & names.keys() and "label_embeddings.weight" in weights(place.run)
    assert [step for step, _ in losses(place.run)] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in figures(place.run) if "val_loss" in record] == [3, 6]
    assert (place.run / "pictures" / "step_000006.png").is_file()


def test_it_opens_as_a_mage_that_takes_labels(place, tmp_path):
    opened = stored.open_model(place.run)
    assert (opened.kind, opened.mage.classes, opened.classes, opened.image_size) == ("mage", 3, NAMES, 16)
    assert opened.sampling == recipes.load_recipe("digits_class_conditional", MINE).sampling.model_dump()
    assert opened.label_dropout == 0.25 and stored.open_model(place.mage).label_dropout is None
    mine, theirs = opened.mage.state_dict(), load_file(place.run / "encoder" / "model.safetensors")
    for name, value in (weights(place.run) | theirs).items():
        assert torch.equal(mine.pop(name), value)
    assert not mine
    labels, empty = torch.tensor([0, 1, 2, -1]), torch.zeros(4, 16, dtype=torch.int64)
    noise = keyed_noise(0, range(4), 16)
    pictures = decode(opened.mage, empty, empty == 0, noise=noise, labels=labels, **opened.sampling)
    assert pictures.shape == (4, 16) and set(pictures.flatten().tolist()) <= set(range(32))
    logits = opened.mage(empty, empty == 0, None, labels)
    assert len({row.numpy().tobytes() for row in logits}) == 4

    # Handed on, it is the same.
    for dtype in ("float32", "bf16"):
        assert cli.main(["export", str(place.run), "--out", str(tmp_path / dtype), "--dtype", dtype]) == 0
        again = stored.open_model(tmp_path / dtype)
        assert (again.classes, again.sampling, again.mage.classes) == (NAMES, opened.sampling, 3)
        assert again.label_dropout == 0.25
        exact = 0 if dtype == "float32" else 0.05
        torch.testing.assert_close(again.mage(empty, empty == 0, None, labels), logits, rtol=exact, atol=exact)
    assert "| classes | 3 |" in (tmp_path / "float32" / "README.md").read_text()


def test_what_has_no_place_for_labels_is_refused(place, tmp_path, capsys):
    for source, words, said in (
        (place.run, ["--layout", "official"], "--layout official: "),
        (place.run / "encoder", [], f"{place.run / 'encoder'}: is an encoder alone"),
    ):
        assert cli.main(["export", str(source), "--out", str(tmp_path / "out"), *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"mage-ds: error: {said}") and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
    opened = stored.open_model(place.run / "encoder")
    assert opened.kind == "encoder" and opened.mage is None and opened.encoder is not None


# --- going on


def test_stopped_and_continued_it_is_the_same_and_needs_neither_init_nor_tokenizer(place, monkeypatch):
    before, drawn = signal.getsignal(signal.SIGTERM), []
    signal.signal(signal.SIGTERM, process._on_signal)
    usual = task.told_labels

    def told_labels(recipe, batch):
        drawn.append(batch.index)
        if len(drawn) == 6:  # the second micro-batch of step 3
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(recipe, batch)

    monkeypatch.setattr(task, "told_labels", told_labels)
    try:
        with pytest.raises(Stopped) as stopped:
            train(place, "parts", init=place.mage)
    finally:
        process._stop_reason = None
        signal.signal(signal.SIGTERM, before)
    assert str(stopped.value) == "SIGTERM: saved after step 3"
    monkeypatch.setattr(task, "told_labels", usual)
    away = place.mage.rename(place.root / "away")
    parts = train(place, "parts")
    away.rename(place.mage)
    assert figures(parts) == figures(place.run)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        one, two = weights(parts, kind), weights(place.run, kind)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    train(place, "parts", init=parts)  # its own encoder: finished, nothing to do


def test_it_goes_on_with_its_own_encoder_where_init_is_no_longer_what_it_was(place, tmp_path, capsys):
    def more(steps):
        train(place, run, f"duration.steps={steps}", init=init, extend="yes")
        return capsys.readouterr().out

    run, init = tmp_path / "run", tmp_path / "mage"
    shutil.copytree(place.mage, init)
    train(place, run, "duration.steps=1", init=init)
    assert "WARNING" not in more(2)
    further = recipes.load_recipe("digits_mage", [*MAGE, "duration.steps=3"])
    task.pretrain(further, str(place.data), str(init), "random", extend=True)
    assert f"WARNING: --init {init}: is not what it was when this run began with it; this run goes on" in more(3)
    shutil.rmtree(init / "checkpoints")
    assert f"WARNING: --init {init}: cannot be opened any more; this run goes on with its own copy" in more(4)
    shutil.rmtree(init)
    said = f"WARNING: --init {init}: is not there any more; this run goes on with its own copy of the encoder, "
    assert f"{said}{run / 'encoder'}" in more(5)
    assert facts(run)["encoder"] == stored.load_encoder(place.mage)[1]["hash"] == stored.load_encoder(run)[1]["hash"]
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(UserError, match="tokenizer: is missing; copy the whole run folder"):
        stored.open_model(run)


def test_from_a_token_cache_it_learns_the_same(place):
    tokenize(place.data, place.mage, place.root / "tokens", precision="float32")
    cached = train(place, "cached", data=place.root / "tokens", init=place.mage)
    assert figures(cached) == figures(place.run)
    assert facts(cached)["classes"] == NAMES and facts(cached)["tokenizer"] == facts(place.run)["tokenizer"]


# --- what cannot be


def refused(place, *overrides, **options) -> str:
    with pytest.raises(UserError) as caught:
        train(place, "new", *overrides, **options)
    assert not (place.root / "new").exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_one_line_says_what_is_wrong(place, tmp_path):
    assert refused(place).startswith(
        "--init is missing: model.classes = 3 trains a decoder on the encoder of a trained"
    )
    tokenizer = place.mage / "tokenizer"
    assert refused(place, init=tokenizer).startswith(f"{tokenizer}: is a tokenizer, an encoder is needed")
    assert "no such run folder" in refused(place, init=tmp_path / "nowhere")
    encoder = "model.encoder={depth: 2, width: 32, heads: 4}"
    assert refused(place, encoder, init=place.mage) == (
        f"--init {place.mage}: its encoder is {{depth: 2, width: 32, heads: 2}}, the recipe's model.encoder is "
        '{depth: 2, width: 32, heads: 4}; choose another MAGE, or add "model.encoder={depth: 2, width: 32, heads: 2}"'
    )
    said = refused(place, "model.vocabulary=40", init=place.mage)
    assert "its vocabulary is 34, the recipe's model.vocabulary is 40;" in said and '"model.vocabulary=34"' in said
    assert refused(place, "model.classes=2", init=place.mage) == (
        f'--data {place.data}: has 3 classes, the recipe\'s model.classes is 2; add "model.classes=3"'
    )
    draw(tmp_path / "flat", 9)
    said = refused(place, init=place.mage, data=tmp_path / "flat")
    assert said.startswith(f"--data {tmp_path / 'flat'}: has no classes, and model.classes = 3 needs labels")
    shutil.copytree(place.data, tmp_path / "some")
    draw(tmp_path / "some" / "train" / "loose", 2, 60)
    for path in (tmp_path / "some" / "train" / "loose").iterdir():
        path.rename(path.parents[1] / path.name)
    (tmp_path / "some" / "train" / "loose").rmdir()
    said = refused(place, init=place.mage, data=tmp_path / "some")
    assert said.startswith(
        f"--data {tmp_path / 'some'}: of its pictures 2 in train/ have no label, which model.classes"
    )
    bare = tmp_path / "bare"
    shutil.copytree(place.run / "encoder", bare)
    assert refused(place, init=bare).startswith("--tokenizer is missing")  # it comes without one


def test_another_encoder_is_refused(place, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(place.run, other)
    task.pretrain(recipes.load_recipe("digits_mage", [*MAGE, "seed=5"]), str(place.data), str(tmp_path / "m"), "random")
    with pytest.raises(UserError, match=r"--init: differs from the one that .*other was started with"):
        train(place, other, "duration.steps=7", init=tmp_path / "m", extend="yes", tokenizer=other)
    shutil.rmtree(other / "encoder")
    with pytest.raises(UserError, match="encoder: is missing; copy the whole run folder"):
        stored.open_model(other)
    assert cli.main(["export", str(tmp_path / "m"), "--out", str(tmp_path / "e")]) == 0
    encoder, info = stored.load_encoder(tmp_path / "e")
    stored.save_encoder(other / "encoder", encoder, info["model"], 16)
    with pytest.raises(UserError, match="encoder: is not the one that this run was trained with"):
        stored.open_model(other)


def test_fewer_classes_and_another_tokenizer_are_said(place, capsys):
    draw(place.root / "few" / "train" / "ant", 8)
    train(place, "few run", "duration.steps=1", data=place.root / "few", init=place.mage)
    assert "1 classes; model.classes = 3 leaves room for 2" in capsys.readouterr().out
    assert stored.open_model(place.root / "few run").classes == ["ant"]
    train(place, "strange", "duration.steps=1", "seed=9", init=place.mage, tokenizer="random")
    assert "WARNING: the encoder was trained with another tokenizer" in capsys.readouterr().out
