"""Processes that stand still in every way a process can: they leave their stacks and end by themselves."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.processes

# argv: how to stand still, a folder, rank, world, port. No launcher, no DeepSpeed; torch only for the store.
PROGRAM = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from mage_ds.engine import process, watch

form, folder, rank, world, port = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
store = None
if world > 1:
    import torch
    tcp = torch.distributed.TCPStore("127.0.0.1", port, world, rank == 0)
    store = torch.distributed.PrefixStore("mage_ds", tcp)
process._process = process.Process(rank, world, rank, world, None, store)
watch._TICK_S, watch._ANSWER_S, watch._END_S = 0.1, 1.0, 4.0

def bystander():
    time.sleep(60)

def standing_still():
    if form == "sleeps":
        time.sleep(60)
    elif form == "computes":
        while True:
            pass
    elif form == "holds":  # in C, and no other thread of Python can run
        ctypes.PyDLL(None).sleep(60)
    elif form == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)

def working():  # by a clock of its own, so that a busy machine changes nothing
    now = [time.monotonic()]
    watch.time = SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep, strftime=time.strftime)
    for _ in range(10):
        now[0] += 25
        time.sleep(0.05)
        watch.beat()

threading.Thread(target=bystander, daemon=True).start()
with watch.armed(10):  # three times that, as no step is done
    watch.write_to(folder / "logs", lambda reason: (folder / f"reason_{rank}").write_text(reason))
    if world > 1:
        store.set(f"ready/{rank}", "1")
        store.wait([f"ready/{1 - rank}"])
    if form == "works":
        working()
    else:
        watch.beat()
        watch._watch.seconds = 2 if (form, rank, world) == ("sleeps", 0, 2) else 0.4  # the other one is to be first
        watch._watch.set_timer()
        standing_still()
"""


def start(form, folder, rank=0, world=1, port=0) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    line = [sys.executable, "-c", PROGRAM, form, str(folder), str(rank), str(world), str(port)]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_process_that_stands_still_says_where_and_ends(tmp_path):
    forms = ("sleeps", "computes", "holds", "works")
    started = {form: start(form, tmp_path / form) for form in forms}
    ended = {form: (one.communicate(timeout=60)[1], one.returncode) for form, one in started.items()}
    for form in ("sleeps", "computes", "holds"):
        said, code = ended[form]
        assert code == 1, (form, said)
        stacks = (tmp_path / form / "logs/stack_rank_0.txt").read_text()
        assert "in standing_still" in stacks and "in bystander" in stacks, form
        if form == "holds":  # nothing could be said: the timer in C ended it
            assert said == ""
            continue
        place = r"in standing_still \(<string>:\d+\)"
        assert re.fullmatch(rf"mage-ds: error: no progress for .*: rank 0 {place}; stacks: .*stack_rank_.*\n", said)
        assert said == f"mage-ds: error: {(tmp_path / form / 'reason_0').read_text()}\n"
    assert ended["works"] == ("", 0)  # 250 s, never 30 without a beat; no empty file is left
    assert list((tmp_path / "works/logs").iterdir()) == []


def test_the_other_ranks_leave_their_stacks_too(tmp_path):
    """Rank 1 holds the interpreter in C; rank 0 is alive and beats: both end, and rank 0 says who is silent."""
    port = free_port()
    ranks = [start(form, tmp_path, rank, 2, port) for rank, form in enumerate(("sleeps", "holds"))]
    said = [one.communicate(timeout=60)[1] for one in ranks]
    assert [one.returncode for one in ranks] == [1, 1], said
    assert "rank 1 does not answer; rank 0 in standing_still" in said[0] and said[1] == ""
    for rank in range(2):
        assert "in standing_still" in (tmp_path / f"logs/stack_rank_{rank}.txt").read_text()
    assert (tmp_path / "reason_0").exists()


@pytest.mark.full
def test_rank_0_stopped_the_others_speak_and_end(tmp_path):
    """A stopped rank 0 takes the store with it; it cannot end by itself, that is the launcher's."""
    port = free_port()
    ranks = [start(form, tmp_path, rank, 2, port) for rank, form in enumerate(("stopped", "sleeps"))]
    said = ranks[1].communicate(timeout=60)[1]
    assert ranks[1].returncode == 1
    assert "rank 1 in standing_still" in said and "rank 0 does not answer" in said
    assert said == f"mage-ds: error: {(tmp_path / 'reason_1').read_text()}\n"
    time.sleep(0.1)
    assert ranks[0].poll() is None
    os.kill(ranks[0].pid, signal.SIGKILL)
    ranks[0].communicate()
