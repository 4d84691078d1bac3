"""launch/local.sh: what it does when a training dies or is told to stop, by what status.json says."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import OFTEN, TINY, Script, losses, status

pytestmark = pytest.mark.processes

_SCRIPTS = Path(__file__).parents[2] / "launch"

# In place of `deepspeed`: each start does what the next line of the file `script` says, "STATE STEP EXIT_CODE CODE":
# the status.json that it leaves (- for none) and its own exit code.
_STUB = """#!{python}
import json, pathlib, sys, time
lines = pathlib.Path("script").read_text().splitlines()
state, step, exit_code, code = lines[0].split()
pathlib.Path("script").write_text("\\n".join(lines[1:]))
with open("starts", "a") as file:
    print(*sys.argv[1:], file=file)
run = pathlib.Path("run")
run.mkdir(exist_ok=True)
if state != "-":
    status = dict(state=state, step=int(step), reason="for a test", time=time.time())
    if exit_code != "-":
        status["exit_code"] = int(exit_code)
    (run / "status.json").write_text(json.dumps(status))
sys.exit(int(code))
"""


@pytest.fixture
def scripted(tmp_path):
    """Runs local.sh over a stub: (lines, options) -> (exit code, output, command lines of the starts)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin/deepspeed").write_text(_STUB.format(python=sys.executable))
    for program in ("python", "deepspeed"):
        (tmp_path / "bin" / program).chmod(0o755)

    def run(*lines: str, options=("--backoff", 0)):
        (tmp_path / "script").write_text("\n".join(lines))
        (tmp_path / "starts").unlink(missing_ok=True)
        argv = [*options, "digits_mage", "--data", "d", "--out", "run"]
        with Script("local.sh", *argv, cwd=tmp_path, VIRTUAL_ENV=str(tmp_path)) as script:
            code = script.ended()
            return code, script.output, (tmp_path / "starts").read_text().splitlines()

    return run


@pytest.mark.parametrize(
    "words, said",
    [
        (["local.sh", "--restarts", "x", "digits_mage"], "local.sh: --restarts x: must be a whole number"),
        (["local.sh", "digits_mage", "--data", "d"], "local.sh: --out RUN is missing"),
        (["hostfile.sh", "nowhere", "digits_mage", "--out", "r"], "hostfile.sh: nowhere: cannot be read"),
    ],
)
def test_the_command_line_is_read_before_anything_is_set_up(words, said, tmp_path):
    env = {"PATH": "/usr/bin:/bin", "VIRTUAL_ENV": str(tmp_path)}  # an environment that cannot be set up
    done = subprocess.run(
        ["bash", _SCRIPTS / words[0], *words[1:]], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith(said), done


def test_status_decides_not_the_exit_code_of_deepspeed(scripted):
    # Killed twice with progress in between, though `deepspeed` says 0 and 247; finished, though it says 1.
    code, said, starts = scripted("running 10 - 0", "running 20 - 247", "finished 30 - 1")
    assert code == 0 and len(starts) == 3, said
    assert not starts[0].endswith("--resume auto") and starts[1].endswith("--out run --resume auto")
    # Nothing new was written: the run was finished before.
    code, said, starts = scripted("- 0 - 0")
    assert code == 0 and len(starts) == 1, said


@pytest.mark.parametrize("last, expected", [("failed 5 2 1", 2), ("- 0 - 2", 2), ("stopped 5 - 1", 75)])
def test_what_is_not_started_again(scripted, last, expected):
    code, said, starts = scripted("failed 3 1 1", last)
    assert code == expected and len(starts) == 2, said


def test_two_deaths_at_the_same_step_end_it(scripted):
    code, said, starts = scripted("running 10 - 1", "running 20 - 1", "failed 20 1 1", "finished 30 - 0")
    assert code == 1 and len(starts) == 3, said
    assert "without progress, at step 20" in said and "for a test" in said


@pytest.mark.full
def test_it_gives_up_after_n_restarts(scripted):
    options = ("--restarts", 2, "--backoff", 0)
    code, said, starts = scripted(*(f"running {step} - 1" for step in range(9)), options=options)
    assert code == 1 and len(starts) == 3 and "it was started 3 times" in said, said


@pytest.mark.full
@pytest.mark.parametrize("argv", [("--restarts", "x", "digits_mage"), (), ("digits_mage",)])
def test_a_wrong_command_line_is_one_line(argv, tmp_path):
    with Script("local.sh", *argv, cwd=tmp_path) as script:
        assert script.ended() != 0
        assert len(script.output.splitlines()) == 1, script.output


# --- real trainings


@pytest.fixture
def line(made, tmp_path):
    data, tokenizer = made
    endless = ["duration.steps=100000", *TINY, *OFTEN, "report.checkpoint_every.steps=5"]
    where = ["--data", data, "--tokenizer", tokenizer, "--out", tmp_path / "run"]
    return ["--backoff", 0, "--num_accelerators", 2, "digits_mage", *endless, *where]


def after(script, folder, steps: int) -> None:
    """Wait for this many more steps than were logged."""
    before = losses(folder)[-1][0] if losses(folder) else 0
    script.until(lambda: losses(folder) and losses(folder)[-1][0] >= before + steps)


def kill_all_but_the_script(script) -> None:
    roles = script.processes()
    assert {"deepspeed", "launch.py", "rank 0", "rank 1"} <= set(roles.values())
    for pid, role in roles.items():
        if role != "other":
            os.kill(pid, signal.SIGKILL)


def check_unbroken(folder) -> None:
    assert [step for step, _ in losses(folder)] == list(range(1, len(losses(folder)) + 1))


def test_a_killed_training_starts_again_and_sigterm_reaches_the_ranks(line, tmp_path):
    folder = tmp_path / "run"
    with Script("local.sh", *line, cwd=tmp_path) as script:
        after(script, folder, 7)
        kill_all_but_the_script(script)
        script.until(lambda: "resumed" in script.output)
        saved = status(folder)["step"]
        assert saved >= 5
        script.until(lambda: losses(folder)[-1][0] > saved)
        script.outer.terminate()
        assert script.ended() == 75, script.output
    state = status(folder)
    assert state["state"] == "stopped" and "SIGTERM" in state["reason"] and state["step"] == losses(folder)[-1][0]
    check_unbroken(folder)


@pytest.mark.full
@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1", "SIGKILL"])
def test_other_signals_to_the_script_save_too(line, tmp_path, name):
    folder = tmp_path / "run"
    with Script("local.sh", *line, cwd=tmp_path) as script:
        after(script, folder, 3)
        script.outer.send_signal(getattr(signal, name))
        code = script.ended()
        assert code == (75 if name != "SIGKILL" else -signal.SIGKILL), script.output
    state = status(folder)
    assert state["state"] == "stopped" and state["step"] == losses(folder)[-1][0], state
    assert ("launcher died" if name == "SIGKILL" else name) in state["reason"]


@pytest.mark.full
def test_sigterm_before_the_training_begins_and_between_two_starts(line, tmp_path):
    with Script("local.sh", *line, cwd=tmp_path) as script:
        script.until(lambda: "rank 0" in script.processes().values())
        script.outer.terminate()
        assert script.ended() == 75, script.output
    line[1] = 60
    with Script("local.sh", *line, cwd=tmp_path) as script:
        after(script, tmp_path / "run", 2)
        kill_all_but_the_script(script)
        script.until(lambda: "start 2 in 60 s" in script.output)
        began = time.monotonic()
        script.outer.terminate()
        assert script.ended() == 75, script.output
        assert time.monotonic() - began < 30
