"""The background thread of ahead.py: order, errors, waiting, and that it ends."""

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mage_ds.inputs.ahead import AHEAD, Ahead


def item(k):
    return SimpleNamespace(k=k, images=torch.zeros(1))


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "inputs"]


def ended(timeout=5.0):
    deadline = time.monotonic() + timeout
    while threads() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return not threads()


def endless(made):
    k = 0
    while True:
        made.append(k)
        yield item(k)
        k += 1


def test_order_and_end():
    ahead = Ahead(item(k) for k in range(10))
    assert [batch.k for batch in ahead] == list(range(10))
    assert next(ahead, None) is None and ended()


def test_an_error_arrives_after_what_was_made_before_it():
    def source():
        yield from map(item, range(2))
        raise KeyError("planted")

    ahead = Ahead(source())
    assert [next(ahead).k, next(ahead).k] == [0, 1]
    with pytest.raises(KeyError, match="planted") as error:
        next(ahead)
    assert any(entry.name == "source" for entry in error.traceback)  # a bug keeps its traceback
    assert next(ahead, None) is None and ended()


def test_runs_ahead_but_not_away():
    made = []
    ahead = Ahead(endless(made))
    time.sleep(0.3)
    assert len(made) == AHEAD
    next(ahead)
    time.sleep(0.3)
    assert len(made) == AHEAD + 1
    ahead.close()
    assert ended()


def test_waited_counts_the_consumers_seconds():
    def slow():
        for k in range(3):
            time.sleep(0.15)
            yield item(k)

    ahead = Ahead(slow())
    next(ahead)
    assert 0.1 < ahead.waited < 0.3
    time.sleep(0.5)
    before = ahead.waited
    next(ahead)
    assert ahead.waited - before < 0.05
    ahead.close()


def test_close_ends_the_thread_and_the_source():
    closed = []

    def source():
        try:
            yield from endless([])
        finally:
            closed.append(True)

    ahead = Ahead(source())
    next(ahead)
    ahead.close()
    ahead.close()
    assert not threads() and closed == [True]
    assert next(ahead, None) is None


def test_being_forgotten_ends_the_thread():
    ahead = Ahead(endless([]))
    next(ahead)
    assert threads()
    del ahead
    assert ended()


@pytest.mark.processes
def test_interpreter_exits_with_a_stream_open(folder):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from made_pictures import recipe
from mage_ds.inputs import catalog, dali, quarantine
c = catalog.open_catalog({str(folder)!r})
s = dali.stream(c, seed=0, position=0, batch=8, micro_batch=8, rank=0, world=1, inputs=recipe(), device="cpu",
                quarantine=quarantine.Quarantine(None, 0.0, c.n))
print(next(s).images.shape[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
    assert "rror" not in done.stderr
