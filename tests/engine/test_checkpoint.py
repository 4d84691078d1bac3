"""Checkpoints of one rank: what is on the disk, damage, full disks, pruning, and what is never read."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open

from mage_ds.engine import checkpoint, state
from mage_ds.errors import UserError

MODES = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.fixture(scope="module")
def numbers():
    return tiny.recipe()


@pytest.fixture(scope="module")
def engine(me, numbers):
    """One step old, so that its moments are there."""
    engine = tiny.engine_of(numbers, 1)
    tiny.train(engine, numbers, 2)
    return engine


@pytest.fixture
def run(tmp_path, engine):
    """A run folder with checkpoints of steps 1 and 2 (of the same values)."""
    for step in (1, 2):
        save(tmp_path, engine, step)
    return tmp_path


def save(run: Path, engine, step: int, keep: int = 5) -> Path:
    return checkpoint.save(run, step, {"mage": engine}, {"position": 8 * step, "skipped": 0}, keep=keep)


def entries(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def test_layout(run, engine):
    folder = checkpoint.find(run)
    assert entries(run) == ["latest", "step_000001", "step_000002"]
    assert os.readlink(run / "checkpoints" / "latest") == "step_000002"
    files = sorted(path.name for path in folder.iterdir())
    kinds = ("exp_avg", "exp_avg_sq", "weight")
    assert files == [f"mage.{kind}.00000.safetensors" for kind in kinds] + ["meta.json"]
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["step"], meta["position"], meta["engines"]["mage"]["updates"]) == (2, 16, 2)
    assert set(meta["files"]) == set(files) - {"meta.json"}
    shapes = {name: tuple(p.shape) for name, p in engine.module.named_parameters()}
    for name in meta["files"]:
        with safe_open(folder / name, framework="pt") as file:
            assert {key: tuple(file.get_tensor(key).shape) for key in file.keys()} == shapes  # noqa: SIM118
            assert all(file.get_tensor(key).dtype == torch.float32 for key in shapes)


def test_no_pickle_is_read_or_written():
    for path in Path(checkpoint.__file__).parent.glob("*.py"):
        text = path.read_text()
        for word in ("torch.load", "torch.save(", "import pickle", "load_checkpoint", "save_checkpoint"):
            assert word not in text, f"{path.name}: {word}"


def test_buffers_are_kept(me, tmp_path, numbers):
    from mage_ds.engine import wrap
    from mage_ds.models import Mage

    def engine_with(value: float):
        model = Mage(**numbers.model.model_dump())
        wrap.initialize_weights(model, 0)
        model.register_buffer("average", torch.full((3,), value))
        return wrap.wrap(model, numbers, tiny.config_of(numbers, 1), me.device)

    save(tmp_path, engine_with(2.5), 1)
    new = engine_with(0.0)
    checkpoint.load(checkpoint.find(tmp_path), {"mage": new})
    assert new.module.average.tolist() == [2.5] * 3
    weights, _ = checkpoint.load_weights(tmp_path, "mage")
    assert weights["average"].tolist() == [2.5] * 3


@pytest.mark.parametrize(("stage", "precision"), MODES)
def test_loading_before_the_first_update_sets_everything(me, run, numbers, stage, precision):
    from deepspeed import zero

    new = tiny.engine_of(numbers, stage, precision)
    checkpoint.load(checkpoint.find(run), {"mage": new})
    assert tiny.equal(tiny.full_state(new), tiny.stored_state(checkpoint.find(run)))
    assert state.updates(new) == 2
    stored = tiny.stored_state(checkpoint.find(run))
    parameters = dict(new.module.named_parameters())
    with zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        for name, parameter in parameters.items():  # the copy that computes
            assert torch.equal(parameter.data, stored[f"weight {name}"].to(parameter.dtype)), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_in_bf16_are_another_optimizer_of_deepspeed(me, run, numbers, stage):
    """What a user's JSON may ask for: the state is found there too, and training goes on from it."""
    new = tiny.engine_of(numbers, stage, "bf16", data_types={"grad_accum_dtype": "bf16"})
    checkpoint.load(checkpoint.find(run), {"mage": new})
    assert tiny.equal(tiny.full_state(new), tiny.stored_state(checkpoint.find(run)))
    tiny.train(new, numbers, 4, tiny.Recorder(numbers, 2))
    assert state.updates(new) == 4


def test_weights_are_read_without_an_engine(run, engine):
    weights, meta = checkpoint.load_weights(run, "mage", 1)
    assert meta["step"] == 1
    assert all(torch.equal(weights[name], p) for name, p in engine.module.named_parameters())
    with pytest.raises(UserError, match="holds mage, not tokenizer"):
        checkpoint.load_weights(run, "tokenizer")
    with pytest.raises(UserError, match=r"--checkpoint 7: not in .*; there are 1, 2"):
        checkpoint.load_weights(run, "mage", 7)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.find(run / "nowhere")


def test_another_model_is_refused(me, run):
    wider = tiny.recipe("model.decoder={depth: 1, width: 12, heads: 2}")
    with pytest.raises(UserError, match="does not fit the recipe's model"):
        checkpoint.load(checkpoint.find(run), {"mage": tiny.engine_of(wider, 1)})
    deeper = tiny.recipe("model.decoder={depth: 2, width: 10, heads: 2}")
    with pytest.raises(UserError, match=r"lacks decoder_blocks\.1\."):
        checkpoint.load(checkpoint.find(run), {"mage": tiny.engine_of(deeper, 1)})
    with pytest.raises(UserError, match="holds no engine 'other'"):
        checkpoint.load(checkpoint.find(run), {"other": tiny.engine_of(deeper, 1)})


# --- damage


def test_half_written_folders_are_ignored(run):
    shutil.copytree(checkpoint.folder_of(run, 2), run / "checkpoints" / ".step_000003.part")
    (run / "checkpoints" / "step_4").mkdir()
    (run / "checkpoints" / "step_000005.old").mkdir()
    assert checkpoint.steps(run) == [1, 2]


@pytest.mark.parametrize("name", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("damage", ["flip", "cut", "lost"])
def test_damage_is_named_with_the_remedy(run, engine, name, damage):
    path = checkpoint.folder_of(run, 2) / f"mage.{name}.00000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-5])
    before = tiny.full_state(engine)
    with pytest.raises(UserError) as caught:
        checkpoint.load(checkpoint.find(run), {"mage": engine})
    assert str(path) in str(caught.value) and "damaged checkpoint" in str(caught.value)
    assert f"--resume {checkpoint.folder_of(run, 1)}" in str(caught.value)
    assert tiny.equal(tiny.full_state(engine), before)
    if name == "weight":
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load_weights(run, "mage")


@pytest.mark.parametrize("key", ["step", "position", "updates"])
def test_damage_of_meta_is_found(run, engine, key):
    path = checkpoint.folder_of(run, 1) / "meta.json"
    text = path.read_text()
    start = text.index(f'"{key}": ') + len(key) + 4
    digit = text[start]
    path.write_text(text[:start] + chr(ord(digit) ^ 1) + text[start + 1 :])  # one bit: another digit
    with pytest.raises(UserError, match=r"step_000001/meta\.json: damaged checkpoint.*train anew"):
        checkpoint.load(checkpoint.folder_of(run, 1), {"mage": engine})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 2}'])
def test_a_meta_that_is_none(run, engine, text):
    (checkpoint.folder_of(run, 2) / "meta.json").write_text(text)
    with pytest.raises(UserError, match="step_000002"):
        checkpoint.load(checkpoint.find(run), {"mage": engine})


# --- writing


def test_what_a_kill_left_behind_is_cleaned_up(run, engine):
    for name in (".step_000001.gone", ".step_000003.part", ".step_000007.part"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "file").write_text("x")
    save(run, engine, 3, keep=2)
    assert entries(run) == ["latest", "step_000002", "step_000003"]


def test_the_same_step_again(run, engine):
    marker = checkpoint.folder_of(run, 2) / "old"
    marker.write_text("x")
    save(run, engine, 2)
    assert not marker.exists() and entries(run) == ["latest", "step_000001", "step_000002"]
    checkpoint.verify(checkpoint.find(run), checkpoint.read_meta(checkpoint.find(run)))


@pytest.mark.parametrize("failing", ["save_file", "rename", "meta"])
def test_a_failing_write_leaves_the_last_one(run, engine, monkeypatch, failing):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if failing == "save_file":
            patched.setattr(checkpoint, "save_file", full)
        elif failing == "rename":
            patched.setattr(checkpoint.os, "rename", full)
        else:
            patched.setattr(checkpoint.json, "dump", full)
        with pytest.raises(UserError, match=r"step_000003: cannot be .*No space left"):
            save(run, engine, 3)
    assert entries(run) == ["latest", "step_000001", "step_000002"]
    checkpoint.load(checkpoint.find(run), {"mage": engine})
    save(run, engine, 3)  # once there is room again
    assert checkpoint.steps(run) == [1, 2, 3]


def test_a_file_in_the_place_of_the_folder(tmp_path, engine):
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(UserError, match="checkpoints: cannot be written"):
        save(tmp_path, engine, 1)


@pytest.fixture
def small_disk(tmp_path, engine):
    """A disk with room for one and a half checkpoints."""
    size = int(checkpoint.size_of({"mage": engine}) * 1.5)
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)]
    if subprocess.run(line, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("filled", ["before", "meanwhile"])
def test_a_disk_that_is_really_full(small_disk, engine, monkeypatch, filled):
    save(small_disk, engine, 1)
    if filled == "meanwhile":  # by something else, after there was room
        monkeypatch.setattr(checkpoint, "check_room", lambda *_: None)
    told = (
        r"a checkpoint needs 0\.\d MB, 0\.\d MB are free" if filled == "before" else "step_000002: cannot be .*No space"
    )
    with pytest.raises(UserError, match=f"{told}.*the checkpoint of step 1 is kept; make room"):
        save(small_disk, engine, 2)
    assert entries(small_disk) == ["latest", "step_000001"]
    assert tiny.equal(tiny.full_state(engine), tiny.stored_state(checkpoint.find(small_disk)))
    checkpoint.verified(checkpoint.find(small_disk))


def test_the_size_is_known_before(run, engine):
    size = sum(path.stat().st_size for path in checkpoint.find(run).iterdir())
    numbers = sum(p.numel() for p in engine.module.parameters())
    assert 12 * numbers < size < checkpoint.size_of({"mage": engine})
    meta = checkpoint.read_meta(checkpoint.find(run))
    assert set(meta["seconds"]) == {"gather", "write", "verify"} and min(meta["seconds"].values()) > 0


PLACES = [
    ("while writing", [1]),
    ("before meta", [1]),
    ("before the rename", [1]),
    ("before the link", [1, 2]),
    ("before pruning", [1, 2]),
    ("while pruning", [2]),
]


def end_at(where: str, end, patch=setattr) -> None:
    """end() is called at a place of a save."""
    write, written = checkpoint.save_file, []
    places = {
        "while writing": (checkpoint, "save_file", lambda *args: end() if written else written.append(write(*args))),
        "before meta": (checkpoint, "_publish", end),
        "before the rename": (os, "rename", end),
        "before the link": (os, "replace", end),
        "before pruning": (checkpoint.retention, "prune", end),
        "while pruning": (shutil, "rmtree", end),
    }
    patch(*places[where])


class Killed(BaseException):
    """Nothing in a save catches it, as nothing does after SIGKILL."""


@pytest.mark.parametrize(("where", "left"), PLACES)
def test_an_end_while_saving_leaves_a_whole_checkpoint(tmp_path, engine, monkeypatch, where, left):
    def end(*args, **options):
        raise Killed

    save(tmp_path, engine, 1)
    with monkeypatch.context() as patched:
        end_at(where, end, patched.setattr)
        with pytest.raises(Killed):
            save(tmp_path, engine, 2, keep=1)
    assert checkpoint.steps(tmp_path) == left
    for step in left:
        checkpoint.verified(checkpoint.folder_of(tmp_path, step))
    save(tmp_path, engine, 3, keep=1)
    assert entries(tmp_path) == ["latest", "step_000003"]


@pytest.mark.processes
def test_a_real_kill_between_writing_and_publishing(tmp_path, engine):
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import tiny, test_checkpoint
tiny.process.start(threads=1)
engine = tiny.engine_of(tiny.recipe(), 1)
test_checkpoint.save(test_checkpoint.Path({str(tmp_path)!r}), engine, 1)
test_checkpoint.end_at("before the rename", lambda *args: os.kill(os.getpid(), 9))
test_checkpoint.save(test_checkpoint.Path({str(tmp_path)!r}), engine, 2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert entries(tmp_path) == [".step_000002.part", "latest", "step_000001"]
    checkpoint.load(checkpoint.find(tmp_path), {"mage": engine})
    save(tmp_path, engine, 2)
    assert entries(tmp_path) == ["latest", "step_000001", "step_000002"]
