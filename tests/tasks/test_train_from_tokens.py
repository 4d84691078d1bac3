"""Training from a token cache equals training from the pictures; what it refuses; `bench tokens`."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import OFTEN, TINY, losses, metrics, run
from made_tokens import MODEL, files, mistake, tokenize
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from mage_ds import cli, recipes
from mage_ds.engine import planner, stored
from mage_ds.inputs import token_cache
from mage_ds.inputs.catalog import open_catalog
from mage_ds.models import Vqgan
from mage_ds.tasks import bench_tokens
from mage_ds.tasks.pretrain import pretrain

FIGURES = ("live tokenization", "token cache", "ratio")  # of `bench tokens`


@pytest.fixture
def trained(place, tmp_path, monkeypatch):
    """trained(name, data, *overrides): a run in this process; its folder."""
    monkeypatch.setattr("mage_ds.engine.process.stop_on_signals", lambda: None)

    def train(name, data, *overrides, tokenizer=None):
        pretrain(recipes.load_recipe(place.recipe, overrides), str(data), str(tmp_path / name), tokenizer)
        return tmp_path / name

    return train


def figures(run: Path) -> list[dict]:
    """All that does not depend on the clock."""
    kept = ("step", "loss", "top1", "grad_norm", "val_loss", "val_top1")
    return [{key: record[key] for key in kept if key in record} for record in metrics(run)]


def test_training_equals_live_training(place, plain, trained):
    live = trained("live", place.data, tokenizer=str(place.tokenizer))
    cached = trained("cached", plain)
    assert figures(live) == figures(cached) and len(losses(cached)) == 7
    assert any("val_loss" in record for record in figures(cached))
    names = [json.loads((run / "facts.json").read_text()) for run in (live, cached)]
    assert names[0]["tokenizer"] == names[1]["tokenizer"] and names[0]["data"] != names[1]["data"]
    assert names[1]["data"] == open_catalog(plain, "train", tokens=True).fingerprint
    _, info = stored.load_tokenizer(cached / "tokenizer")
    assert info["hash"] == names[1]["tokenizer"]
    heights = [Image.open(run / "pictures" / "step_000007.png").height for run in (live, cached)]
    assert heights[1] < heights[0]  # the sheet has no row of originals


def test_views_equal_live_training_in_their_epochs(place, strong, trained):
    words = ["inputs.augmentation=strong", "duration={steps: 10}", "report.pictures_every={steps: 100}"]
    live = figures(trained("live", place.data, *words, tokenizer=str(place.tokenizer)))
    cached = figures(trained("cached", strong, *words))
    live, cached = ([record["loss"] for record in run if "loss" in record] for run in (live, cached))
    assert live[:8] == cached[:8]  # 64 of the 66 samples of three epochs
    assert live[8:] != cached[8:]  # then the first view comes again, and live training draws a fourth


def test_a_cache_of_another_precision_is_told_and_used(plain, trained, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    shutil.copytree(plain, other)
    facts = json.loads((other / "tokens.json").read_text())
    facts["settings"]["dtype"] = "bf16"
    facts["fingerprint"] = token_cache.fingerprint(facts["settings"])
    (other / "tokens.json").write_text(json.dumps(facts))
    for data, warnings in ((plain, 0), (other, 1)):
        trained(f"of {data.name}", data, "duration={steps: 1}")
        said = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
        assert len(said) == warnings
    for part in (str(other), "made in bf16", "is in float32", "`mage-ds tokenize --precision float32 ...`"):
        assert part in said[0]


def test_a_step_from_a_cache_is_charged_no_encoder(place):
    recipe = recipes.load_recipe(place.recipe)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Vqgan(**MODEL).encode(torch.zeros(1, 3, 16, 16))
    live, cached = (planner.flops_per_image(recipe, cached=cached) for cached in (False, True))
    assert live - cached == counter.get_total_flops() > 0


def test_mistakes_of_a_training(place, plain, strong, tmp_path, capsys):
    line = ["train", place.recipe, "--out", tmp_path / "run", "--data"]
    half, cut = tmp_path / "half", tmp_path / "cut"
    for copy in (half, cut):
        shutil.copytree(plain, copy)
    facts = json.loads((half / "tokens.json").read_text())
    (half / "tokens.json").write_text(json.dumps(facts | {"complete": False}))
    path = cut / "train" / "tokens.npy"
    path.write_bytes(path.read_bytes()[:-1])
    cases = [
        ([plain, "--tokenizer", place.another], ["another", str(plain), "leave it out"]),
        ([plain, "--tokenizer", "random"], ["--tokenizer random", str(plain)]),
        ([strong], ["augmentation strong there, none here", "--recipe"]),
        ([plain, "inputs.augmentation=weak"], ["augmentation none there, weak here"]),
        ([plain, "inputs.interpolation=cubic", "inputs.evaluation_resize=16"], ["linear", "cubic", "18 there, 16"]),
        ([half], [str(half), "run the same command again"]),
        ([cut], [str(path), "remove it and run the same"]),
    ]
    for words, parts in cases:
        said = mistake(capsys, *line, *words)
        assert all(part in said for part in parts), said
        assert not (tmp_path / "run").exists()
    small = ["train", "digits_tokenizer", "--out", tmp_path / "run", "--data", plain]
    assert "holds tokens, and pictures are needed here" in mistake(capsys, *small)
    path.unlink()  # the remedy
    tokenize(place, cut)
    assert files(cut) == files(plain)


# --- on several processes


@pytest.mark.processes
@pytest.mark.full
def test_two_ranks_train_as_they_do_live(made, tmp_path):
    data, tokenizer = made
    words = [*TINY, *OFTEN, "duration.steps=8", "report.evaluate_every.steps=4"]
    words += ["--micro-batch", "8", "--precision", "float32"]
    line = ["tokenize", "--data", data, "--tokenizer", tokenizer, "--precision", "float32", "--batch", "8"]
    run(*line, "--out", "tokens", cwd=tmp_path)
    run("train", "digits_mage", *words, "--data", data, "--tokenizer", tokenizer, "--out", "live", cwd=tmp_path)
    run("train", "digits_mage", *words, "--data", "tokens", "--out", "cached", cwd=tmp_path)
    assert figures(tmp_path / "live") == figures(tmp_path / "cached")
    assert len(losses(tmp_path / "cached")) == 8
    cli.main([str(word) for word in [*line, "--out", tmp_path / "alone"]])
    assert files(tmp_path / "alone") == files(tmp_path / "tokens")
    assert token_cache.read_facts(tmp_path / "tokens")["complete"]


# --- what it gains


def test_bench(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mage_ds.tasks.bench_tokens._SECONDS", 0.1)
    line = ["bench", "tokens", place.recipe, "--data", place.data, "--images", 8, "--samples", 1000]
    assert cli.main([str(word) for word in [*line, "--dir", tmp_path]]) == 0
    said = capsys.readouterr().out
    live, cached, ratio = (float(re.search(rf"{word} +([\d,.e+]+)", said)[1].replace(",", "")) for word in FIGURES)
    assert "16 tokens of 16 px, float32, micro batch 4, 1 ranks" in said
    assert cached > live > 0 and ratio == pytest.approx(cached / live, rel=0.06)  # of two digits
    assert not list(tmp_path.iterdir())
    assert "--dir" in mistake(capsys, *line, "--dir", tmp_path / "nowhere")
    many = mistake(capsys, *line[:-1], 10**14, "--dir", tmp_path)
    assert "--samples 100000000000000: their tokens need 3,200,000,000 MB" in many and "MB left" in many
    assert "trains a tokenizer" in mistake(capsys, "bench", "tokens", "digits_tokenizer", "--data", place.data)


def test_bench_writes_block_by_block(place, tmp_path, monkeypatch):
    recipe = recipes.load_recipe(place.recipe)
    for rows in (7, 1000):
        monkeypatch.setattr(bench_tokens, "_BLOCK", 16 * rows)
        bench_tokens._write(tmp_path / f"{rows}.npy", 50, recipe)
    tokens = [np.load(tmp_path / f"{rows}.npy", mmap_mode="r") for rows in (7, 1000)]
    assert all((t.shape, t.dtype) == ((50, 1, 16), np.uint16) and t.max() < 32 for t in tokens)
    assert len(np.unique(tokens[0][:, 0], axis=0)) == 50
