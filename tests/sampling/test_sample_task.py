"""`sample` on a small run, through DeepSpeed's inference engine, in one other process for all cases."""

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sampling.made_models import make_export

from mage_ds import models, recipes
from mage_ds.engine import painting, stored
from mage_ds.errors import UserError
from mage_ds.report import joined, pictures
from mage_ds.sampling import decode
from mage_ds.tasks import sample as task

SIZES = [
    "tokenizer={channels: 32, multipliers: [1, 1, 1], blocks: 1, code_dim: 8, codes: 32}",
    "inputs.image_size=16",
    "inputs.evaluation_resize=16",
    "model={encoder: {depth: 1, width: 32, heads: 2}, decoder: {depth: 1, width: 32, heads: 2}, tokens: 16, "
    "codes: 32, vocabulary: 34, dropout: 0.5, padding: cls}",
    "sampling={steps: 4, temperature: 2.0}",
]


def make_run(path: Path):
    """A run folder as training leaves it, of untrained weights; returns its models."""
    recipe = recipes.load_recipe("digits_mage", SIZES)
    mage, vqgan = models.Mage(**recipe.model.model_dump()), models.Vqgan(**recipe.tokenizer.model_dump())
    for model in (mage, vqgan):
        for i, parameter in enumerate(model.parameters()):
            with torch.no_grad():
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(i))
    folder = path / "checkpoints" / "step_000007"
    folder.mkdir(parents=True)
    file = folder / "mage.weight.00000.safetensors"
    save_file(dict(mage.state_dict()), file)
    data = file.read_bytes()
    files = {file.name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    meta = {"format": 1, "step": 7, "engines": {"mage": {}}, "files": files}
    meta["digest"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    stored.save_tokenizer(path / "tokenizer", vqgan, recipe.tokenizer.model_dump(), 16)
    (path / "recipe.yaml").write_text(recipes.dump(recipe))
    return mage.eval(), vqgan.eval()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder with everything made, the models, and what each call reported by its name."""
    root = tmp_path_factory.mktemp("sample")
    trained = make_run(root / "run")
    classes = make_export(root / "classes", classes=3)
    shutil.copytree(root / "classes", root / "bare")
    shutil.rmtree(root / "bare" / "tokenizer")
    config = root / "bare" / "config.json"  # without one, tokens count as 16 px
    config.write_text(config.read_text().replace('"image_size": 16', '"image_size": 64'))
    make_export(root / "undropped", classes=3, label_dropout=0.0)
    conditional = {"run": str(root / "classes"), "num": 6, "batch": 3}
    calls = {
        "first": {"num": 11, "out": "a", "batch": 4},
        "again": {"num": 11, "out": "a"},
        "more": {"num": 14, "out": "a"},
        "whole": {"num": 14, "out": "b", "batch": 4},
        "other batch": {"num": 14, "out": "c", "batch": 5},
        "few": {"num": 3, "out": "d", "steps": 2, "temperature": 0, "round": True},
        "other seed": {"num": 11, "out": "a", "seed": 1},
        "options": {**OPTIONS, "num": 4, "out": "f"},
        "guided": {**conditional, "out": "g", "class_label": "owl,cat", "guidance": 2.0, **RISING},
        "balanced": {**conditional, "out": "h"},
        "lent": {"run": str(root / "classes"), "num": 2, "out": "i", "tokenizer": str(root / "run" / "tokenizer")},
        "no tokenizer": {"run": str(root / "bare"), "num": 2, "out": "e"},
        "a tokenizer": {"run": str(root / "run" / "tokenizer"), "num": 2, "out": "e"},
        "no classes": {"num": 2, "out": "e", "class_label": "3"},
        "no such class": {**conditional, "out": "e", "class_label": "3"},
        "no such name": {**conditional, "out": "e", "class_label": "cta"},
        "guidance without": {"num": 2, "out": "e", "guidance": 1.0},
        "guidance untrained": {**conditional, "run": str(root / "undropped"), "out": "e", "guidance": 1.0},
        "steps without tokens": {"num": 2, "out": "e", "steps": 17},
        "large batch": {"num": 3, "out": "k", "batch": 2**28},
        "smaller batch": {"num": 3, "out": "k", "batch": 3},
        "no drop": {"num": 2, "out": "e", "drop": 1.0},
        "no form": {"num": 2, "out": "e", "format": "gif"},
        "no pictures": {"num": 0, "out": "e"},
        "no step": {"num": 1, "out": "e", "checkpoint": 8},
        "no run": {"num": 1, "out": "e", "run": str(root)},
    }
    lines = [json.dumps({"run": str(root / "run"), **c, "out": str(root / c["out"])}) for c in calls.values()]
    (root / "calls.jsonl").write_text("\n".join(lines))
    script = Path(__file__).with_name("sample_run.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[2]), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, str(script), str(root / "calls.jsonl")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return root, (*trained, *classes), dict(zip(calls, results, strict=True)), done.stdout


OPTIONS = {"token_temperature": 0.5, "order": "halton", "drop": 0.5, "precision": "bf16"}
RISING = {"guidance_schedule": "power-cosine"}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


pytestmark = pytest.mark.processes


def test_pictures_are_what_the_models_give(ran):
    root, (mage, vqgan, *_), _, _ = ran
    with np.load(root / "b" / "tokens.npz") as file:
        tokens = torch.from_numpy(file["tokens"].astype(np.int64))
    index = np.arange(14)
    empty, every = torch.zeros(14, 16, dtype=torch.int64), torch.ones(14, 16, dtype=torch.bool)
    noise = decode.keyed_noise(0, index, 16)
    expected = decode.decode(mage, empty, every, steps=4, temperature=2.0, noise=noise)
    assert (tokens == expected).all()
    with torch.no_grad():
        images = vqgan.detokenize(tokens)
    for i in index:
        with open(root / "b" / f"{i:06d}.png", "rb") as file:
            shown = np.asarray(Image.open(file)).astype(int)
        exact = (images[i].clamp(0, 1) * 255).permute(1, 2, 0).numpy()
        assert shown.shape == (16, 16, 3) and np.abs(shown - np.floor(exact)).max() <= 1  # rounding of the floats
        assert (shown == np.floor(exact)).mean() > 0.99
    assert len({p.read_bytes() for p in (root / "b").glob("0*.png")}) == 14


def test_options_reach_the_decoding(ran):
    root, (mage, _, conditional, _), _, _ = ran
    cases = {
        "f": (mage, 4, None, {"token_temperature": 0.5, "order": "halton", "drop": 0.5}),
        "g": (conditional, 6, [2, 0], {"guidance": 2.0, **RISING}),
        "h": (conditional, 6, [0, 1, 2], {}),
    }
    for name, (model, num, asked, how) in cases.items():
        with np.load(root / name / "tokens.npz") as file:
            tokens = torch.from_numpy(file["tokens"].astype(np.int64))
        empty, every = torch.zeros(num, 16, dtype=torch.int64), torch.ones(num, 16, dtype=torch.bool)
        labels = None if asked is None else torch.tensor([asked[i % len(asked)] for i in range(num)])
        if name == "f":
            model = copy.deepcopy(model).bfloat16()
        noise = decode.keyed_noise(0, np.arange(num), 16)
        how = {"steps": 4, "temperature": 2.0, "noise": noise, "labels": labels, **how}
        assert (tokens == decode.decode(model, empty, every, **how)).float().mean() > 0.95
        rows = (root / name / "manifest.csv").read_text().splitlines()[1:]
        assert [int(row.split(",")[1]) for row in rows] == ([-1] * num if labels is None else labels.tolist())
    manifest = json.loads((root / "g" / "manifest.json").read_text())
    assert manifest["class_label"] == "2,0" and manifest["classes"] == ["cat", "dog", "owl"]
    assert manifest["checkpoint"] is None and manifest["guidance_schedule"] == "power-cosine"
    manifest = json.loads((root / "f" / "manifest.json").read_text())
    assert (manifest["precision"], manifest["order"], manifest["drop"]) == ("bf16", "halton", 0.5)


def test_every_prediction_goes_through_the_engine(ran):
    counts = {name: (result["engine"], result["module"]) for name, result in ran[2].items()}
    assert counts["first"] == (3 * 4, 3 * 4)  # three tiles, four steps
    assert counts["again"] == (0, 0)  # nothing to do
    assert counts["more"] == (2 * 4, 2 * 4)  # the tile that had padding, and a new one
    assert counts["few"] == (2, 2)


def test_a_continued_folder_equals_one_made_at_once(ran):
    root = ran[0]
    assert files(root / "a") == files(root / "b")
    assert "complete; nothing to do" in ran[3]


def test_another_batch_gives_the_same_tokens(ran):
    root = ran[0]
    one, other = (np.load(root / name / "tokens.npz")["tokens"] for name in "bc")
    assert (one == other).all(axis=1).mean() >= 0.95


def test_the_manifest_says_everything(ran):
    root = ran[0]
    manifest = json.loads((root / "d" / "manifest.json").read_text())
    expected = {"checkpoint": 7, "seed": 0, "steps": 2, "temperature": 0.0, "rounding": "nearest", "num": 3}
    expected |= {"batch": 3, "threads": 1, "precision": "float32", "complete": True, "device": "cpu"}
    assert {key: manifest[key] for key in expected} == expected
    assert len(manifest["weights"]) == len(manifest["tokenizer"]) == 64
    assert manifest["run"] == str(root / "run") and set(manifest["versions"]) == {"torch", "deepspeed", "numpy"}


def test_what_is_sampled_from_is_pinned(ran):
    root = ran[0]
    pins = (root / "run" / "checkpoints" / "step_000007" / "pinned").read_text().splitlines()
    assert pins[:2] == [f"sampled into {root / 'a'}", f"sampled into {root / 'b'}"] and len(set(pins)) == len(pins)


def test_mistakes_are_one_line_and_change_nothing(ran):
    root, _, results, _ = ran
    said = {
        "other seed": ["seed 0 there, 1 here", str(root / "a")],
        "no pictures": ["--num 0"],
        "no step": ["--checkpoint 8", "7"],
        "no run": ["recipe.yaml", str(root)],
        "no tokenizer": ["bare", "--tokenizer PATH"],
        "a tokenizer": ["is a tokenizer", "MAGE"],
        "no classes": ["--class-label 3", "no classes"],
        "no such class": ["--class-label 3", "0..2"],
        "no such name": ["did you mean cat"],
        "guidance without": ["--guidance 1.0", "classes"],
        "guidance untrained": ["--guidance 1.0", "label_dropout = 0", "--guidance 0"],
        "steps without tokens": ["--steps 17", "16 tokens"],
        "large batch": ["--batch 268435456", "--batch 134217728 or less"],
        "no drop": ["--drop 1.0", "less than 1"],
        "no form": ["--format gif", "npz"],
    }
    for name, parts in said.items():
        error = results[name]["error"]
        assert error and "\n" not in error
        for part in parts:
            assert part in error, (name, part, error)
    assert all(results[name]["error"] is None for name in results if name not in said)
    assert not (root / "e").exists()


def test_a_batch_that_does_not_fit_gives_way(ran):
    manifest = json.loads((ran[0] / "k" / "manifest.json").read_text())
    assert manifest["batch"] == 3 and manifest["complete"] and len(list((ran[0] / "k").glob("0*.png"))) == 3


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_runs_out_is_one_line(error, monkeypatch):
    monkeypatch.setattr(painting.process, "start", lambda: SimpleNamespace(device="cuda:0"))
    for batch, remedy in ((9, "give --batch 4 or less"), (1, "use a machine with more")):
        with (
            pytest.raises(UserError, match=f"^--batch {batch}: the memory of cuda:0 .*; {remedy}$"),
            painting._fitting(batch),
        ):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), painting._fitting(9):
        raise RuntimeError("shapes differ")


# --- a worker among others


@pytest.fixture
def worker(tmp_path):
    """One of 8 pictures in two tiles, in a folder that is begun; it advances a list."""
    book = pictures.Pictures(tmp_path, "png", 4)
    settings = {"seed": 0, "batch": 4, "format": "png", "device": "cpu"}
    pictures.open_folder(book, settings, 8, 16)
    worker = task._Worker(book, 8, settings, [], None)
    worker.said, worker.told = [], worker._left()
    worker.advance = worker.said.append
    return worker


def written(worker, start):
    tile = np.arange(start, start + 4)
    worker._write(tile, np.zeros((4, 6), int), np.full((4, 4, 4, 3), start, np.uint8), map)


def test_progress_before_the_first_picture_and_when_some_are_lost(worker):
    for do in (
        lambda: None,
        lambda: written(worker, 0),
        lambda: worker.book.discard(worker.book.tile(0), 0),
        lambda: [written(worker, start) for start in (0, 4)],
    ):
        do()
        worker._count()
    assert worker.said == [4, 8]
    (worker.book.out / "000006.png").unlink()
    assert worker._missing() == [4] and worker._left() == 4
    assert worker.book.done(0, 8) and not worker.book.done(4, 8)


def test_a_worker_whose_folder_was_begun_anew_leaves_it_alone(worker):
    """It has not made a tile yet when another replaces the settings; then it has."""
    other = pictures.Pictures(worker.book.out, "png", 2)
    assert pictures.open_folder(other, worker.settings | {"batch": 2}, 8, 16) == 8
    with pytest.raises(UserError, match="batch 2 there, 4 here"):
        written(worker, 0)
    assert not any((worker.book.out / ".tiles").iterdir())
    with pytest.raises(UserError, match="batch 2 there, 4 here"):
        worker._look()
    (worker.book.out / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is gone"):
        worker._look()


def test_a_worker_that_was_stopped_for_long_leaves_a_larger_set_alone(worker, monkeypatch):
    """It joins 8 pictures while others make and close a set of 12."""
    book = worker.book
    for start in (0, 4):
        written(worker, start)
    joining, before = joined.finish, {}

    def finish(late, num, names):
        pictures.open_folder(book, worker.settings, 12, 16)
        worker.num = 12
        written(worker, 8)
        joining(book, 12, names)
        book.seal(12)
        before.update({path.name: path.read_bytes() for path in book.out.iterdir() if path.is_file()})
        joining(late, num, names)

    monkeypatch.setattr(joined, "finish", finish)
    worker.num = 8
    assert worker._finish() and worker._look() and worker.num == 12
    assert len(before) == 12 + 4
    assert [name for name, data in before.items() if (book.out / name).read_bytes() != data] == []


def test_who_waits_looks_ever_more_seldom(worker, monkeypatch):
    """Another process has both tiles, and takes its time."""
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 12:
            for start in (0, 4):
                written(worker, start)

    monkeypatch.setattr(task.time, "sleep", sleep)
    monkeypatch.setattr(worker.claims, "take", lambda name: len(slept) >= 12)
    with task.Writer(worker._write) as writer:
        worker._work([0, 4], writer)
    assert slept[0] == 0.5 and slept[11] == 5 and slept == sorted(slept)
    assert worker.said == [8] and worker.made == 0 and writer.drawing == 0
