"""Claims are respected while their processes live and move, and never longer."""

import json
import os
import subprocess
import sys

import pytest

from mage_ds.sampling import claims
from mage_ds.sampling.claims import Claims


@pytest.fixture
def clock():
    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def held(tmp_path, clock):
    """What another living process has claimed, and one who looks."""

    def claim(name="7", **more):
        owner = {"host": claims._host(), "pid": os.getppid(), "start": claims._started(os.getppid())} | more
        (tmp_path / name).write_text(json.dumps(owner))
        return tmp_path / name

    return claim, Claims(tmp_path, clock)


def test_one_takes_the_other_passes_by(tmp_path):
    one, other = Claims(tmp_path / "work"), Claims(tmp_path / "work")
    assert one.take("a") and not other.take("a") and not one.take("a")
    assert other.take("b")
    one.release("a")
    assert other.take("a")
    one.clear()
    assert not (tmp_path / "work").exists()


def test_the_claim_of_a_dead_process_is_nobodys(held):
    claim, me = held
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    claim(pid=gone.pid)
    assert me.take("7")
    claim("8", start="1")  # its number is another process's now
    assert me.take("8")
    assert json.loads((me.folder / "8").read_text())["pid"] == os.getpid()


def test_a_dead_process_that_nobody_has_waited_for_is_dead(held):
    claim, me = held
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
    claim(pid=gone.pid, start=claims._started(os.getpid()))
    assert me.take("7")
    gone.wait()


@pytest.mark.parametrize("more", [{}, {"host": "another"}], ids=["here", "elsewhere"])
def test_a_claim_that_stands_still_is_nobodys_after_30_s_of_the_observers_clock(held, clock, more):
    claim, me = held
    path = claim(**more)
    os.utime(path, (0, 0))  # however old it is by the clock of whoever wrote it
    assert not me.take("7")
    clock.now += 29
    assert not me.take("7")
    os.utime(path, (5, 5))
    clock.now += 2
    assert not me.take("7")
    clock.now += 31
    assert me.take("7")


def test_a_claim_that_moves_for_ever_is_passed_over_at_last(held, clock):
    claim, me = held
    path, me.patience = claim(host="another"), 100
    for second in range(0, 100, 10):
        assert not me.take("7")
        clock.now += 10
        os.utime(path, (second, second))
    assert me.take("7")


def test_half_a_claim_is_respected_for_30_s(held, clock):
    claim, me = held
    claim().write_text('{"host": "an')
    assert not me.take("7")
    clock.now += 31
    assert me.take("7")


def test_claims_are_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_BEAT_S", 0.01)
    me = Claims(tmp_path)
    me.take("a")
    os.utime(tmp_path / "a", (0, 0))
    while (tmp_path / "a").stat().st_mtime == 0:
        pass
    me.release("a")


def test_half_written_files_of_the_dead_are_swept_away(held, clock):
    claim, me = held
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    names = {
        "dead": f"00003.tar.aaa~{claims._host()}~{gone.pid}~77",
        "mine": f"00003.tar.bbb~{me.mark}",
        "far": "00003.tar.ccc~elsewhere-4026~7~77",
        "far and old": "00004.tar.ddd~elsewhere-4026~7~77",
        "unmarked": "manifest.json.eee~",
    }
    for name in names.values():
        (me.folder / name).write_text("half")
    os.utime(me.folder / names["far and old"], (0, 0))
    claim("9", start="1")
    assert not me.busy()
    claim("8")
    assert me.busy()
    me.take("7")
    me.sweep()
    assert sorted(os.listdir(me.folder)) == sorted(["7", "8", "9", names["mine"], names["far"], names["unmarked"]])
    me.release_all()
    assert "7" not in os.listdir(me.folder) and "8" in os.listdir(me.folder)
    (me.folder / "8").unlink()
    assert not me.busy()
