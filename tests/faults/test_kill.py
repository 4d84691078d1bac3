"""SIGKILL of everything, from outside, at random times: the joined loss curve is that of a run left alone."""

import json
import random
import shutil
import time

import pytest
from launched import OFTEN, Launch, losses, metrics, run, status

pytestmark = pytest.mark.processes

# The recipe's own model, with its dropout: only fields of the machine and the length are changed.
OWN = ["report.evaluate_every.steps=20", *(word for word in OFTEN if "evaluate" not in word)]


def command(made, folder, steps, *fields):
    data, tokenizer = made
    fields = [f"duration.steps={steps}", *OWN, *fields]
    return ["train", "digits_mage", *fields, "--data", data, "--tokenizer", tokenizer, "--out", folder]


def last_digests(folder):
    """Checksums of the newest checkpoint's files: weights and moments."""
    meta = json.loads((folder / "checkpoints/latest/meta.json").read_text())
    return {name: file["sha256"] for name, file in meta["files"].items()}


def held_out(folder):
    return [(record["step"], record["val_loss"]) for record in metrics(folder) if "val_loss" in record]


def test_a_killed_run_goes_on_with_the_same_losses(made, tmp_path):
    folder, steps = tmp_path / "run", 60
    line = command(made, folder, steps, "batch=32", "report.checkpoint_every.steps=20")
    kill_after = random.Random(0).randrange(24, 36)
    with Launch(*line, cwd=tmp_path) as launch:
        launch.until(lambda: len(losses(folder)) >= kill_after)
        launch.kill()
    first, before = losses(folder), held_out(folder)
    assert [step for step, _ in first] == list(range(1, len(first) + 1)) and kill_after <= len(first) < steps
    assert status(folder)["state"] == "running"  # nobody could write anything else
    again = run(*line, cwd=tmp_path).text
    saved = len(first) // 20 * 20
    assert f"at step {saved} " in again
    joined = losses(folder)
    assert [step for step, _ in joined] == list(range(1, steps + 1))
    assert joined[: len(first)] == first  # written before the kill and, from step 21 on, by the second start
    assert held_out(folder)[: len(before)] == before and len(held_out(folder)) == 3
    assert status(folder)["state"] == "finished"


@pytest.mark.full
def test_five_kills_at_random_times(made, tmp_path):
    steps, draw = 120, random.Random(20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    with Launch(*command(made, whole, steps, "report.checkpoint_every.steps=20"), cwd=tmp_path) as launch:
        launch.until(lambda: losses(whole))
        start = time.monotonic() - began
        assert launch.ended() == 0, launch.output
        trained = time.monotonic() - began - start
    lives = []
    for life in range(5):
        with Launch(*command(made, killed, steps, "report.checkpoint_every.steps=20"), cwd=tmp_path) as launch:
            if life == 2:  # one of them while it starts
                time.sleep(draw.uniform(0.2, 0.9) * start)
            else:
                launch.until(lambda launch=launch: "\nstep " in launch.output)
                time.sleep(draw.uniform(0.05, 0.35) * trained)
            assert launch.outer.poll() is None, launch.output
            launch.kill()
        lives.append([step for step, _ in losses(killed)])
        assert lives[-1] == list(range(1, len(lives[-1]) + 1))
    assert sum(len(life) % 20 > 0 for life in lives) >= 2, lives  # killed between two saves, not only beside one
    run(*command(made, killed, steps, "report.checkpoint_every.steps=20"), cwd=tmp_path)
    assert losses(killed) == losses(whole)
    assert held_out(killed) == held_out(whole)
    assert last_digests(killed) == last_digests(whole)
    shutil.rmtree(tmp_path)
