"""`tokenize`: what it writes, how it survives, and that training from it equals training from the pictures."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launched import OFTEN, TINY, Launch, losses, metrics, run
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from mage_ds import cli, recipes
from mage_ds.engine import planner, stored, training, wrap
from mage_ds.errors import UserError
from mage_ds.inputs import dali, token_cache
from mage_ds.inputs.catalog import open_catalog
from mage_ds.inputs.quarantine import Quarantine
from mage_ds.models import Vqgan
from mage_ds.tasks import bench_tokens
from mage_ds.tasks import tokenize as task
from mage_ds.tasks.pretrain import pretrain

MODEL = {"channels": 8, "multipliers": [1, 1, 1], "blocks": 1, "code_dim": 4, "codes": 32}
N, VAL, BATCH = 22, 5, 4
FIGURES = ("live tokenization", "token cache", "ratio")  # of `bench tokens`
SMALL = [
    f"tokenizer={json.dumps(MODEL)}",
    "inputs.image_size=16",
    "inputs.evaluation_resize=18",
    "model.tokens=16",
    "model.codes=32",
    "model.vocabulary=34",
    *(f"model.{part}={{depth: 1, width: 32, heads: 2}}" for part in ("encoder", "decoder")),
    "batch=8",
    "duration={steps: 7}",  # 56 samples of 22: three epochs begun
    "report.evaluate_every={steps: 3}",
    "report.pictures_every={steps: 7}",
    "report.log_every=1",
    "machine={precision: float32, micro_batch: 4}",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """data/ of two classes and two splits, tokenizer/ and another/ with random values, recipe.yaml."""
    root = tmp_path_factory.mktemp("tokenize")
    rng = np.random.default_rng(0)
    for i in range(N + VAL):
        path = root / "data" / ("val" if i >= N else "train") / f"class{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((20 + i % 5, 24 - i % 3), Image.Resampling.BICUBIC).save(path)
    for seed, name in enumerate(("tokenizer", "another")):
        vqgan = Vqgan(**MODEL)
        wrap.initialize_weights(vqgan, seed)
        with torch.no_grad():
            vqgan.quantize.embedding.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        stored.save_tokenizer(root / name, vqgan, MODEL, 16)
    full = {"activation_checkpointing": "none", "compile": "false", "hang_timeout": "60"}
    (root / "recipe.yaml").write_text(
        recipes.dump(recipes.load_recipe("digits_mage", [*SMALL, *(f"machine.{k}={v}" for k, v in full.items())]))
    )
    return SimpleNamespace(
        data=root / "data", tokenizer=root / "tokenizer", another=root / "another", recipe=root / "recipe.yaml"
    )


def tokenize(place, out, **more):
    options = {"recipe": str(place.recipe), "batch": BATCH, "precision": "float32", **more}
    task.tokenize(str(options.pop("data", place.data)), str(options.pop("tokenizer", place.tokenizer)), out, **options)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def strong(place, tmp_path_factory):
    """Three strong views."""
    return tokenize(place, tmp_path_factory.mktemp("strong") / "t", views=3, augmentation="strong")


@pytest.fixture(scope="module")
def plain(place, tmp_path_factory):
    return tokenize(place, tmp_path_factory.mktemp("plain") / "t")


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


def mistake(capsys, *argv) -> str:
    code = cli.main([str(word) for word in argv])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("mage-ds: error: ")
    return lines[0]


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


# --- training from it


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


def test_bench(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mage_ds.tasks.bench_tokens._SECONDS", 0.1)
    line = ["bench", "tokens", place.recipe, "--data", place.data, "--images", 8, "--samples", 1000]
    assert cli.main([str(word) for word in [*line, "--dir", tmp_path]]) == 0
    said = capsys.readouterr().out
    live, cached, ratio = (float(re.search(rf"{word} +([\d,.e+]+)", said)[1].replace(",", "")) for word in FIGURES)
    assert "16 tokens of 16 px, float32, micro batch 4, 1 ranks" in said
    assert cached > live > 0 and ratio == pytest.approx(cached / live, rel=0.02)
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
