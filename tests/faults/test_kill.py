"""Signals from outside at random times, to whichever process: the finished run is that of one left alone."""

import math
import os
import random
import shutil
import signal
import time
from collections import Counter

import pytest
from launched import Launch, losses, run, status
from test_matrix import digests, held_out, newest

pytestmark = [pytest.mark.processes, pytest.mark.full]

KILLS, STEPS = 50, 400
# The recipe's own model, with its dropout: only the length, the batch and what happens how often are changed.
FIELDS = [
    f"duration.steps={STEPS}",
    "batch=32",
    "report.log_every=1",
    "report.evaluate_every.steps=40",
    "report.pictures_every.steps=1000",
    "report.checkpoint_every.steps=5",
]
VICTIMS = ["rank 0", "rank 1", "launch.py", "deepspeed", "all"]


def window(start: float, trained: float) -> float:
    """Seconds after the start-up within which a kill may fall: so many that kills at times spread evenly over
    start-up and window leave about half of the training to the last life."""
    share = trained / KILLS
    return (share + math.sqrt(share * share + 4 * share * start)) / 2


def let_live(launch: Launch, folder, seconds: float, kills: int) -> None:
    """Until `seconds` have passed, or the run has come so far that too few steps would be left for `kills` more."""
    end, last = time.monotonic() + seconds, last_step(folder)
    most = min(STEPS - 10, last + 2 * max(0, STEPS - 10 - last) // kills)
    while time.monotonic() < end and last_step(folder) <= most:
        assert launch.outer.poll() is None, launch.output
        time.sleep(0.02)


def last_step(folder) -> int:
    return losses(folder)[-1][0] if losses(folder) else 0


def strike(launch: Launch, victim: str, number: int) -> str:
    """The signal, to `deepspeed` where the victim is not born yet; everything must end then. Who was hit."""
    living = launch.processes()
    if victim != "all" and victim not in living.values():
        victim = "deepspeed"
    for pid, role in living.items():
        if victim in ("all", role):
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # by the death of another
                continue
    launch.ended(150)  # the longest is a start-up on a busy machine: a rank looks for its launcher after it
    return f"{signal.Signals(number).name} {victim}"


def test_fifty_kills(made, tmp_path):
    draw, whole, killed = random.Random(20), tmp_path / "whole", tmp_path / "killed"
    line = ["train", "digits_mage", *FIELDS, "--data", made[0], "--tokenizer", made[1], "--out"]
    began = time.monotonic()
    with Launch(*line, whole, cwd=tmp_path) as launch:
        launch.until(lambda: losses(whole))
        start = time.monotonic() - began
        assert launch.ended() == 0, launch.output
        trained = time.monotonic() - began - start
    expected, exact, hits, lengths = losses(whole), 0, Counter(), []
    for life in range(KILLS):
        saved = newest(killed)
        with Launch(*line, killed, cwd=tmp_path) as launch:
            let_live(launch, killed, draw.uniform(0, start + window(start, trained)), KILLS - life)
            hits[strike(launch, draw.choice(VICTIMS), draw.choice([signal.SIGKILL, signal.SIGTERM]))] += 1
            resumed = " at step " in launch.output
            assert not (resumed and saved) or f" at step {saved} from " in launch.output, launch.output
        so_far = losses(killed)
        assert so_far == expected[: len(so_far)], (len(lengths), launch)
        lengths.append(len(so_far))
        exact += 1
    assert max(lengths) < STEPS
    saved = newest(killed)
    last = run(*line, killed, cwd=tmp_path).text
    assert f" at step {saved} from " in last and status(killed)["state"] == "finished"
    assert losses(killed) == expected and held_out(killed) == held_out(whole) and digests(killed) == digests(whole)
    between = sum(length % 5 > 0 for length in lengths)
    print(f"\n{KILLS} kills, {exact} exact recoveries; {sum(hits.values())} signals: {dict(hits)}")
    print(f"start {start:.1f} s, training {trained:.1f} s; {between} ended between two saves; steps seen: {lengths}")
    shutil.rmtree(tmp_path)
