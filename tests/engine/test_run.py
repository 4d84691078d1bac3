"""A run while it trains: what is saved first, what a stop cuts off and a start makes up for, logs on a full disk."""

import os
import shutil
import signal
import subprocess

import numpy as np
import pytest
import tiny
import torch
from deepspeed import zero
from made_runs import evaluator, held_out, losses, opened

from mage_ds.engine import checkpoint, process, run_folder, state
from mage_ds.engine.run import owed
from mage_ds.errors import Stopped, UserError

EVERY = ["duration.steps=6", "report.checkpoint_every={steps: 3}", "report.evaluate_every={steps: 2}"]


@pytest.fixture
def numbers():
    return tiny.recipe(*EVERY, "report.pictures_every={steps: 3}")


def paint(engines, step):
    return np.zeros((8, 8, 3), np.uint8)


def train(path, numbers, steps=6, source=None, evaluate=None, pictures=paint):
    engine = tiny.engine_of(numbers, 1)
    run = opened(path, numbers, engine, source)
    tiny.train(engine, numbers, steps, run, evaluate=evaluate or evaluator(), pictures=pictures)
    return run


@pytest.fixture(scope="module")
def whole(me, tmp_path_factory):
    """The run that nothing happens to."""
    return train(tmp_path_factory.mktemp("whole") / "run", tiny.recipe(*EVERY, "report.pictures_every={steps: 3}")).path


class Killed(BaseException):
    pass


def test_it_saves_before_it_evaluates_and_draws(me, numbers, tmp_path):
    seen = []

    def evaluate(engines, step):
        seen.append((step, checkpoint.steps(tmp_path / "run")))
        return {}

    train(tmp_path / "run", numbers, evaluate=evaluate)
    assert seen == [(2, []), (4, [3]), (6, [3, 6])]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_it_evaluates_and_draws_with_the_average(me, tmp_path, stage):
    """What is shown is what is opened later; training goes on with the weights themselves."""
    numbers = tiny.recipe(*EVERY, "report.pictures_every={steps: 3}", "optimizer.ema=0.5", "warmup.steps=0")
    engine, seen = tiny.engine_of(numbers, stage), []
    name = "mlm_layer.fc.weight"
    parameter = state.parameters(engine)[name]

    def look(engines, step):
        average = state.get_full(engine, parameter, state.EMA).clone()
        with zero.GatheredParameters([parameter], enabled=stage == 3):
            seen.append(torch.equal(parameter.detach(), average))
        return {}

    def draw(engines, step):
        look(engines, step)
        return paint(engines, step)

    run = opened(tmp_path / "run", numbers, engine)
    tiny.train(engine, numbers, 6, run, evaluate=look, pictures=draw)
    assert seen == [True] * 5  # of steps 2, 3, 4, 6 and 6
    alone = tiny.engine_of(tiny.recipe(*EVERY, "warmup.steps=0"), stage)
    tiny.train(alone, tiny.recipe(*EVERY, "warmup.steps=0"), 6)
    assert tiny.equal(tiny.full_state(engine), tiny.full_state(alone))
    kept, _ = checkpoint.load_weights(run.path, "mage")
    assert torch.equal(kept[name], state.get_full(engine, parameter, state.EMA))


@pytest.mark.parametrize("step", [4, 6])
def test_a_stop_cuts_a_held_out_pass_off_and_the_next_start_makes_up_for_it(
    me, signals, numbers, tmp_path, whole, step
):
    seen, path = [], tmp_path / "run"
    process.stop_on_signals()

    def at(now, batch):
        seen.append((now, batch))
        if (now, batch) == (step, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=f"SIGTERM: saved after step {step}"):
        train(path, numbers, evaluate=evaluator(at))
    assert seen[-1] == (step, 1)
    meta = checkpoint.read_meta(checkpoint.find(path))
    assert (meta["step"], meta["due"]) == (step, ["evaluate", "pictures"] if step == 6 else ["evaluate"])
    assert owed(path, meta) == meta["due"]
    process._stop_reason = None
    train(path, numbers, source=checkpoint.find(path))
    assert losses(path) == losses(whole) and held_out(path) == held_out(whole)
    assert (path / "pictures" / "step_000006.png").exists()
    assert owed(path, checkpoint.read_meta(checkpoint.find(path))) == []


def test_a_kill_in_the_last_held_out_pass_or_picture_loses_neither(me, numbers, tmp_path, whole):
    path = tmp_path / "run"

    def kill(engines, step):
        if step == 6:
            raise Killed
        return evaluator()(engines, step)

    with pytest.raises(Killed):
        train(path, numbers, evaluate=kill)
    meta = checkpoint.read_meta(checkpoint.find(path))
    assert meta["step"] == 6 and owed(path, meta) == ["evaluate", "pictures"]
    with pytest.raises(Killed):  # evaluated, not drawn
        train(path, numbers, source=checkpoint.find(path), pictures=lambda engines, step: kill(engines, 6))
    assert owed(path, meta) == ["pictures"]
    train(path, numbers, source=checkpoint.find(path))
    assert owed(path, meta) == [] and held_out(path) == held_out(whole) and losses(path) == losses(whole)


def test_what_was_done_is_not_done_again(me, numbers, tmp_path, whole):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    seen = []

    def evaluate(engines, step):
        seen.append(step)
        return {}

    train(path, numbers, source=checkpoint.folder_of(path, 3), evaluate=evaluate)
    assert seen == [4, 6] and held_out(path) == held_out(whole)[:1]


def test_going_back_to_an_older_checkpoint_takes_the_newer_out_of_the_run(me, numbers, tmp_path, whole):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    train(path, numbers, 4, source=checkpoint.folder_of(path, 3))  # and is killed before it saves
    assert checkpoint.find(path).name == "step_000003"  # a start goes on from where the user went back to
    assert (path / "checkpoints" / "step_000006.left1" / "meta.json").exists()
    train(path, numbers, source=checkpoint.find(path))
    assert checkpoint.steps(path) == [3, 6] and not (path / "checkpoints" / "step_000006.left1").exists()


def test_every_so_many_are_kept(me, tmp_path):
    numbers = tiny.recipe("duration.steps=7", "report.checkpoint_every={steps: 1}", "report.keep_every=3")
    train(tmp_path / "run", numbers, 7)
    assert checkpoint.steps(tmp_path / "run") == [3, 6, 7]


# --- a full disk


def test_metrics_that_cannot_be_written_stop_the_run_after_saving(me, signals, numbers, tmp_path, capsys):
    path = tmp_path / "run"
    path.mkdir()
    engine = tiny.engine_of(numbers, 1)
    run = opened(path, numbers, engine)
    run._metrics.close()
    run._metrics = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); step 1 is saved; make room"):
        tiny.train(engine, numbers, 6, run)
    assert checkpoint.steps(path) == [1]
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture
def mounted():
    """mounted(path, bytes): a small disk of its own."""
    done = []

    def mount(path, size):
        path.mkdir(parents=True, exist_ok=True)
        line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        if subprocess.run(line, capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        done.append(path)

    yield mount
    for path in done:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_of_tensorboard_stops_the_run_after_saving(me, signals, tmp_path, mounted, capfd):
    numbers, path = tiny.recipe("duration.steps=400", "report.checkpoint_every={steps: 400}"), tmp_path / "run"
    mounted(path / "tensorboard", 4096)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); step \d+ is saved"):
        train(path, numbers, 400)
    assert len(checkpoint.steps(path)) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_full_disk_keeps_the_last_checkpoint_and_the_reason(me, signals, tmp_path, mounted, capfd):
    often = ["report.checkpoint_every={steps: 2}", "report.evaluate_every={steps: 2}"]
    numbers, path = tiny.recipe("duration.steps=400", *often), tmp_path / "run"
    engine = tiny.engine_of(numbers, 1)
    mounted(path, int(checkpoint.size_of({"mage": engine}) * 3.5))
    run_folder.own(run_folder.create(path, numbers, {}, {}, {}))
    run = opened(path, numbers, engine)
    fill = (path / "filler").open("wb", buffering=0)

    def at(now, batch):
        if (now, batch) == (2, 0):
            try:
                while True:
                    fill.write(bytes(4096))
            except OSError:
                fill.close()

    with pytest.raises(UserError, match=r"needs .* are free|cannot be written"), run_folder.ending(path):
        tiny.train(engine, numbers, 400, run, evaluate=evaluator(at))
    assert checkpoint.steps(path) == [2]
    checkpoint.verified(checkpoint.find(path))
    status = run_folder.read_status(path)
    assert (status["state"], status["exit_code"]) == ("failed", 2) and "checkpoint of step 2 is kept" in status[
        "reason"
    ]
    assert "Traceback" not in capfd.readouterr().err


def test_a_training_that_could_not_be_saved_is_not_begun(me, numbers, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 1000, 0))
    with pytest.raises(UserError, match=r"a checkpoint needs .* there is no checkpoint yet; make room"):
        opened(tmp_path / "run", numbers, tiny.engine_of(numbers, 1))
