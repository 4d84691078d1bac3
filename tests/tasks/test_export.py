"""`export` and `convert`: run folders of both kinds and files of the authors', out and in again."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import launched
import pytest
import torch
from interop import plain_official as plain
from launched import OFTEN, TINY, environment, mage_ds
from safetensors.torch import save_file

from mage_ds import cli, models, recipes
from mage_ds.engine import retention, stored
from mage_ds.errors import UserError
from mage_ds.recipes.sections import Sampling
from mage_ds.tasks import export as task

TOKENIZER = "{channels: 32, multipliers: [1, 1, 1], blocks: 1, code_dim: 8, codes: 32}"
SIZES = {
    "mage": [
        f"tokenizer={TOKENIZER}",
        "model={encoder: {depth: 1, width: 32, heads: 2}, decoder: {depth: 1, width: 32, heads: 2}, tokens: 16, "
        "codes: 32, vocabulary: 34, dropout: 0.5, padding: mask}",
        "sampling={steps: 4, temperature: 2.0}",
    ],
    "tokenizer": [f"model={TOKENIZER}"],
}
FIGURES = [
    {"step": 3, "val_loss": 3.5},
    {"step": 5, "loss": 1.0, "seconds": 2},
    {"step": 7, "val_loss": 2.5, "val_top1": 0.25},
    {"step": 9, "val_loss": 1.5},
]


def make_run(path: Path, kind: str, sizes=None, step: int = 7):
    """A run folder as training leaves it, with random weights; returns (its model, its tokenizer or None)."""
    pixels = ["inputs.image_size=16", "inputs.evaluation_resize=16"] if sizes is None else []
    recipe = recipes.load_recipe(
        f"digits_{kind}" if sizes is None else sizes, [*SIZES[kind], *pixels] if sizes is None else []
    )
    model = {"mage": models.Mage, "tokenizer": models.Vqgan}[kind](**recipe.model.model_dump())
    tokenizer = models.Vqgan(**recipe.tokenizer.model_dump()) if kind == "mage" else None
    with torch.no_grad():
        for i, parameter in enumerate([*model.parameters(), *(tokenizer.parameters() if tokenizer else ())]):
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(i))
    folder = path / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    weights, files = model.state_dict(), {}
    for i, names in enumerate((list(weights)[::2], list(weights)[1::2])):
        for what in ("weight", "exp_avg"):
            file = folder / f"{kind}.{what}.{i:05d}.safetensors"
            save_file({name: weights[name] for name in names}, file)
            data = file.read_bytes()
            files[file.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    meta = {"format": 1, "step": step, "engines": {kind: {}}, "files": files, "data": "f1n6e7"}
    meta |= {"tokenizer": stored.weights_hash(tokenizer.state_dict())} if tokenizer else {}
    meta["digest"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    if tokenizer:
        stored.save_tokenizer(path / "tokenizer", tokenizer, recipe.tokenizer.model_dump(), recipe.inputs.image_size)
    (path / "recipe.yaml").write_text(recipes.dump(recipe))
    (path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in FIGURES) + '{"step": 6, "val')
    return model.eval(), tokenizer and tokenizer.eval()


def run(*argv) -> int:
    return cli.main([str(word) for word in argv])


def inputs(batch=2):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(32, (batch, 16), generator=generator)
    return tokens, torch.rand(batch, 16, generator=generator) < 0.5


@torch.no_grad()
def same(opened, mage, tokenizer):
    tokens, masked = inputs()
    assert torch.equal(opened.mage(tokens, masked), mage(tokens, masked))
    assert torch.equal(opened.mage.features(tokens), mage.features(tokens))
    assert torch.equal(opened.tokenizer.detokenize(tokens), tokenizer.detokenize(tokens))


def test_mage_run(tmp_path, capsys):
    mage, tokenizer = make_run(tmp_path / "run", "mage")
    assert run("export", tmp_path / "run", "--out", tmp_path / "out", "--licence", "cc0-1.0") == 0
    assert "run run, step 7" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors", "tokenizer"]
    opened = stored.open_model(tmp_path / "out")
    same(opened, mage, tokenizer)
    same(stored.open_model(tmp_path / "run"), mage, tokenizer)
    assert opened.sampling == Sampling(steps=4, temperature=2.0).model_dump()
    assert opened.image_size == 16 and opened.unused == {} and opened.classes == []
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("license: cc0-1.0", "f1n6e7", "| val_loss | 2.5 |", "| val_top1 | 0.25 |", "task: pretrain", "| 7 |"):
        assert part in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "config.json").read_text()  # it is handed on
    assert retention.pins(retention.find(tmp_path / "run")) == [f"exported into {tmp_path / 'out'}"]
    model, info = stored.load_tokenizer(tmp_path / "out")
    assert info["hash"] == stored.weights_hash(tokenizer.state_dict()) and model.factor == 4


def test_mage_run_in_the_authors_layout_and_back(tmp_path):
    mage, tokenizer = make_run(tmp_path / "run", "mage")
    assert run("export", tmp_path / "run", "--out", tmp_path / "theirs", "--layout", "official") == 0
    assert sorted(os.listdir(tmp_path / "theirs")) == ["README.md", "mage.pth"]
    opened = stored.open_model(tmp_path / "theirs" / "mage.pth")
    same(opened, mage, tokenizer)  # heads, codes and padding are in no shape: they came along
    assert run("convert", tmp_path / "theirs" / "mage.pth", "--out", tmp_path / "ours") == 0
    same(stored.open_model(tmp_path / "ours"), mage, tokenizer)
    assert run("export", tmp_path / "ours", "--out", tmp_path / "again", "--layout", "official") == 0
    first, again = (torch.load(tmp_path / name / "mage.pth", weights_only=True) for name in ("theirs", "again"))
    assert first["mage_ds"] == again["mage_ds"] and first["model"].keys() == again["model"].keys()
    assert all(torch.equal(value, again["model"][name]) for name, value in first["model"].items())


@pytest.mark.parametrize("layout", ["ours", "official"])
def test_tokenizer_run(tmp_path, layout):
    tokenizer, _ = make_run(tmp_path / "run", "tokenizer")
    assert run("export", tmp_path / "run", "--out", tmp_path / "out", "--layout", layout) == 0
    path = tmp_path / "out" if layout == "ours" else tmp_path / "out" / "tokenizer.ckpt"
    opened = stored.open_model(path)
    assert opened.kind == "tokenizer" and opened.image_size == 16
    tokens, _ = inputs()
    assert torch.equal(opened.tokenizer.detokenize(tokens), tokenizer.detokenize(tokens))
    assert stored.load_tokenizer(path)[1] == stored.load_tokenizer(tmp_path / "run")[1]


def test_bf16(tmp_path):
    mage, _ = make_run(tmp_path / "run", "mage")
    assert run("export", tmp_path / "run", "--out", tmp_path / "out", "--dtype", "bf16") == 0
    opened = stored.open_model(tmp_path / "out").mage
    for name, value in mage.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value.bfloat16().float())


def test_official_file_to_export_and_back(tmp_path, capsys):
    w = plain.make_file(tmp_path / "a.pth")
    assert run("convert", tmp_path / "a.pth", "--out", tmp_path / "out") == 0
    assert "9 tensors are not used: cls_token" in capsys.readouterr().out
    assert run("export", tmp_path / "out", "--out", tmp_path / "theirs", "--layout", "official") == 0
    again = torch.load(tmp_path / "theirs" / "mage.pth", weights_only=True)["model"]
    assert again.keys() == w.keys()
    assert all(torch.equal(again[name], value) and again[name].dtype == value.dtype for name, value in w.items())


def test_one_of_several_checkpoints(tmp_path):
    first, _ = make_run(tmp_path / "run", "tokenizer", step=3)
    assert run("export", tmp_path / "run", "--checkpoint", "3", "--out", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["facts"]["step"] == 3 and config["facts"]["figures"] == {"val_loss": 3.5}
    assert torch.equal(
        stored.open_model(tmp_path / "run", step=3).tokenizer.quantize.embedding.weight, first.quantize.embedding.weight
    )


def test_another_tokenizer_in_the_run_folder_is_refused(tmp_path):
    _, tokenizer = make_run(tmp_path / "run", "mage")
    stored.open_model(tmp_path / "run")
    numbers = recipes.load_recipe(str(tmp_path / "run" / "recipe.yaml")).tokenizer.model_dump()
    with torch.no_grad():
        tokenizer.quantize.embedding.weight[0] += 1
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    stored.save_tokenizer(tmp_path / "run" / "tokenizer", tokenizer, numbers, 16)
    with pytest.raises(UserError) as caught:
        stored.open_model(tmp_path / "run")
    said = f"{tmp_path / 'run'}/tokenizer: is not the one that this run was trained with; copy the whole run folder"
    assert str(caught.value) == said


BAD = {
    "no source": (["export", "nowhere"], "nowhere: no such run folder"),
    "an empty folder": (["export", "empty"], "empty: is no run folder and no export"),
    "a step that is not there": (["export", "run", "--checkpoint", "8"], "--checkpoint 8: not in"),
    "a step of an export": (["export", "done", "--checkpoint", "7"], "is no run folder, it has one state only"),
    "existing out": (["export", "run", "--out", "done"], "done: exists already"),
    "bf16 for the authors": (["export", "run", "--dtype", "bf16", "--layout", "official"], "are float32"),
    "licence of two lines": (["export", "run", "--licence", "mit\n# x\x1b"], "must be one line of printable"),
    "damaged checkpoint": (["export", "damaged"], "damaged checkpoint"),
    "unknown dtype": (["export", "run", "--dtype", "int4"], "argument --dtype"),
    "out in a file": (["export", "run", "--out", "text.pth/out"], "cannot be written"),
    "convert nothing": (["convert", "nowhere.pth"], "nowhere.pth: no such"),
    "convert a run": (["convert", "run"], "run: is a folder; `convert` takes a file"),
    "convert text": (["convert", "text.pth"], "text.pth: is no file of a model"),
    "convert a cut file": (["convert", "cut.pth"], "cut.pth: damaged or cut off"),
    "convert another model": (["convert", "other.pth"], "other.pth: is in none of the authors' layouts"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("bad")
    make_run(place / "run", "tokenizer")
    task.export(place / "run", place / "done")
    shutil.copytree(place / "run", place / "damaged")
    file = next((place / "damaged" / "checkpoints").glob("*/tokenizer.weight.*"))
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    (place / "empty").mkdir()
    (place / "text.pth").write_text("text")
    torch.save({"model": {"conv1.weight": torch.ones(3)}}, place / "other.pth")
    (place / "cut.pth").write_bytes((place / "other.pth").read_bytes()[:-30])
    return place


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(place, name, capsys, monkeypatch):
    monkeypatch.chdir(place)
    before = sorted(os.listdir(place))
    words, said = BAD[name]
    assert run(*words, *([] if "--out" in words else ["--out", "out"])) == 2
    wrong = capsys.readouterr().err
    assert said in wrong and wrong.count("\n") == 1
    assert sorted(os.listdir(place)) == before


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    make_run(tmp_path / "run", "tokenizer")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(task.exported, "write_card", full)
    with pytest.raises(UserError, match="No space left"):
        task.export(tmp_path / "run", tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]
    monkeypatch.undo()
    monkeypatch.setattr(task.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=r"0\.00 GB free; choose another disk"):
        task.export(tmp_path / "run", tmp_path / "out")
    monkeypatch.undo()

    def wrong(*_):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(task.exported, "write", wrong)
    with pytest.raises(RuntimeError, match="a mistake"):  # not said to be the disk's
        task.export(tmp_path / "run", tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]
    monkeypatch.undo()
    (tmp_path / ".out.part").mkdir()  # of an export that was killed
    (tmp_path / ".out.part" / "model.safetensors").write_text("half")
    task.export(tmp_path / "run", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors"]


# --- in other processes --------------------------------------------------------------------------------------

# Exports as the command line does, then says what was imported and how much memory it took.
_WATCHED = """
import json, sys, threading, time
from mage_ds.cli import main
import torch, timm, mage_ds.tasks.export
def status():
    return {k: int(v.split()[0]) * 1024 for k, v in (l.split(":") for l in open("/proc/self/status")) if k in KEYS}
KEYS = ("RssAnon", "VmHWM")
before, peak = status(), 0
def watch():
    global peak
    while True:
        peak = max(peak, status()["RssAnon"]); time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
code = main(sys.argv[1:])
print("RESULT", json.dumps({"code": code, "deepspeed": "deepspeed" in sys.modules,
    "group": torch.distributed.is_initialized(), "anonymous": peak - before["RssAnon"],
    "all": status()["VmHWM"] - before["VmHWM"]}))
"""


def watched(*argv) -> dict:
    line = [sys.executable, "-c", _WATCHED, *map(str, argv)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.processes
def test_one_process_without_deepspeed(tmp_path):
    make_run(tmp_path / "run", "mage")
    found = watched("export", tmp_path / "run", "--out", tmp_path / "out")
    assert (found["code"], found["deepspeed"], found["group"]) == (0, False, False)


@pytest.mark.full
@pytest.mark.processes
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_checkpoints_of_two_ranks(made, tmp_path, stage):
    data, tokenizer = made
    words = ["digits_mage", *TINY, *OFTEN, "duration.steps=3", "--data", data, "--tokenizer", tokenizer]
    launched.run("train", *words, "--out", "run", "--deepspeed_config", stage, cwd=tmp_path)
    mage_ds("export", "run", "--out", "out", cwd=tmp_path)
    model = stored.open_model(tmp_path / "run").mage
    opened = stored.open_model(tmp_path / "out")
    tokens = torch.randint(model.codes, (2, model.tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(opened.mage(tokens, tokens % 2 == 0), model(tokens, tokens % 2 == 0))


@pytest.mark.full
@pytest.mark.processes
def test_memory_of_vit_base(tmp_path):
    model, tokenizer = make_run(tmp_path / "run", "mage", sizes="pretrain_vit_base")
    size = sum(value.nbytes for part in (model, tokenizer) for value in part.state_dict().values())
    del model, tokenizer
    for words in ([], ["--dtype", "bf16"], ["--layout", "official"]):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        found = watched("export", tmp_path / "run", "--out", tmp_path / "out", *words)
        print(words, {key: f"{found[key] / size:.2f}" for key in ("anonymous", "all")}, f"of {size / 1e6:.0f} MB")
        assert found["code"] == 0 and found["all"] <= 1.3 * size and found["anonymous"] <= 0.3 * size
