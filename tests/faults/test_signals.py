"""Signals to each process of a launch: the run saves its last completed step, nothing is left over, it goes on."""

import os
import signal
import time

import pytest
from launched import OFTEN, TINY, Launch, losses, status

pytestmark = pytest.mark.processes

ENDLESS = ["duration.steps=100000", *TINY, *OFTEN, "report.checkpoint_every.steps=100000"]


@pytest.fixture
def line(made, tmp_path):
    data, tokenizer = made
    return ["train", "digits_mage", *ENDLESS, "--data", data, "--tokenizer", tokenizer, "--out", tmp_path / "run"]


def stopped(launch, folder, send, within: float = 30.0) -> dict:
    """Wait for some steps, `send()` a signal, see everything end; returns status.json."""
    before = losses(folder)[-1][0] if losses(folder) else 0
    launch.until(lambda: "\nstep " in launch.output and losses(folder)[-1][0] >= before + 3)
    roles = sorted(launch.processes().values())
    assert {"deepspeed", "launch.py", "rank 0", "rank 1"} <= set(roles)
    send(launch)
    launch.ended(within)
    return status(folder)


def check_saved(folder, state: dict, least: int) -> int:
    """The run is stopped at a step that is saved and is the last that was logged."""
    assert state["state"] == "stopped", state
    step = state["step"]
    assert step >= least
    assert losses(folder)[-1][0] == step
    assert (folder / f"checkpoints/step_{step:06d}/meta.json").is_file()
    return step


def check_continues(line, cwd, folder, step: int) -> None:
    with Launch(*line, cwd=cwd) as launch:
        launch.until(lambda: f"at step {step} " in launch.output)
        launch.until(lambda: losses(folder)[-1][0] > step)
        assert status(folder)["state"] == "running"
        assert [number for number, _ in losses(folder)] == list(range(1, len(losses(folder)) + 1))


def to(role: str, number: int):
    return lambda launch: os.kill(launch.pid(role), number)


def ctrl_c(launch) -> None:
    os.killpg(launch.outer.pid, signal.SIGINT)  # a terminal sends it to all of them


def test_sigterm_to_deepspeed_leaves_no_orphans_and_the_next_start_continues(line, tmp_path):
    folder = tmp_path / "run"
    with Launch(*line, cwd=tmp_path) as launch:
        state = stopped(launch, folder, to("deepspeed", signal.SIGTERM))
        assert launch.outer.returncode == -signal.SIGTERM  # DeepSpeed's own end: it tells nobody
        step = check_saved(folder, state, 3)
        assert "Traceback" not in launch.output
    check_continues(line, tmp_path, folder, step)


@pytest.mark.full
@pytest.mark.parametrize(
    "send",
    [
        to("launch.py", signal.SIGTERM),
        to("launch.py", signal.SIGKILL),
        to("deepspeed", signal.SIGKILL),
        to("rank 0", signal.SIGTERM),
        to("rank 1", signal.SIGUSR1),
        ctrl_c,
    ],
    ids=["TERM launch.py", "KILL launch.py", "KILL deepspeed", "TERM rank 0", "USR1 rank 1", "ctrl-c"],
)
def test_the_run_is_saved_and_continues(line, tmp_path, send, request):
    folder = tmp_path / "run"
    with Launch(*line, cwd=tmp_path) as launch:
        step = check_saved(folder, stopped(launch, folder, send), 3)
        said, code = launch.output, launch.outer.returncode
        assert "Traceback" not in "\n".join(text for text in launch.said if not text.startswith(" ")) or send is ctrl_c
    if "rank" in request.node.callspec.id:  # the launcher sees the rank's own code
        assert "return code = 75" in said and code == 75, said
    check_continues(line, tmp_path, folder, step)


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_takes_the_others_along(line, tmp_path, rank):
    folder = tmp_path / "run"
    line = [*line, "report.checkpoint_every.steps=5"]
    with Launch(*line, cwd=tmp_path) as launch:
        launch.until(lambda: (folder / "checkpoints/latest").exists())
        state = stopped(launch, folder, to(f"rank {rank}", signal.SIGKILL))
        assert launch.outer.returncode != 0
    assert state["state"] in ("running", "failed"), state  # whoever could write knew no more
    saved = sorted((folder / "checkpoints").glob("step_*"))[-1]
    check_continues(line, tmp_path, folder, int(saved.name.removeprefix("step_")))


@pytest.mark.full
def test_sigterm_in_a_long_accumulation(line, tmp_path):
    """The open step is dropped: a launcher kills 30 s after the signal, long before such a step would end."""
    folder = tmp_path / "run"
    line = [*line, "batch=6000", "--micro-batch", 1]
    with Launch(*line, cwd=tmp_path) as launch:
        launch.until(lambda: losses(folder), 590)
        time.sleep(2)
        began = time.monotonic()
        os.kill(launch.pid("launch.py"), signal.SIGTERM)
        launch.ended(30)
        took = time.monotonic() - began
        step = check_saved(folder, status(folder), 1)
        assert step == 1 and "SIGTERM" in status(folder)["reason"]
    from launched import metrics

    whole = metrics(folder)[0]["seconds"]
    assert whole > 20, "the step is too short for this test"
    assert took < 30 and took < whole
