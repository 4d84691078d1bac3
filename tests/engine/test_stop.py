"""The agreement on where to stop, among ranks of unlike pace: threads, each with a copy of the module of its own."""

import importlib.util
import random
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore, PrefixStore

from mage_ds.engine import process


def copy_of_process():
    """A rank's own module: the signal's flag is the module's."""
    spec = importlib.util.spec_from_file_location("a_rank", process.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules["a_rank"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def agree(world: int, *, accumulation: int, micros: int, seed: int, asked: dict[int, int]) -> tuple[list, list]:
    """Ranks walk through micro-batches at their own pace and meet after every `accumulation` of them.

    asked: rank -> the micro-batch at which its signal arrives. Returns where each stopped, and the reasons.
    """
    store, meeting = HashStore(), threading.Barrier(world, timeout=20)
    stopped, reasons = [None] * world, [None] * world

    def walk(rank: int) -> None:
        module, draw = copy_of_process(), random.Random(1000 * seed + rank)
        one = SimpleNamespace(rank=rank, world=world, first=rank == 0, store=PrefixStore("x", store))
        stop, pace = module.Stop(one), draw.choice([0, 0, 0.0005, 0.003])
        for micro in range(micros):
            if asked.get(rank) == micro:
                module._stop_reason = f"SIGNAL{rank}"
            if reason := stop.due(micro):
                stopped[rank], reasons[rank] = micro, reason
                return
            time.sleep(pace * draw.random())
            if (micro + 1) % accumulation == 0:
                meeting.wait()  # the reduction of the gradients

    threads = [threading.Thread(target=walk, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return stopped, reasons


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("accumulation", [1, 8, 64])
def test_all_stop_before_the_same_micro_batch(world, accumulation):
    for seed in range(8):
        draw = random.Random(seed)
        some = draw.sample(range(world), draw.randint(1, world))
        asked = {rank: draw.randint(0, 70) for rank in some}
        stopped, reasons = agree(world, accumulation=accumulation, micros=320, seed=seed, asked=asked)
        assert len(set(stopped)) == 1 and stopped[0] is not None, (seed, asked, stopped)
        # Whoever ran ahead waits at the meeting: nobody is further than one accumulation from the request.
        assert min(asked.values()) <= stopped[0] <= max(asked.values()) + 2 * accumulation + 2
        assert len(set(reasons)) == 1 and reasons[0] in {f"SIGNAL{rank}" for rank in asked}


def test_nobody_stops_unasked():
    assert agree(2, accumulation=4, micros=40, seed=0, asked={}) == ([None, None], [None, None])


def test_a_request_after_the_last_micro_batch_is_too_late():
    stopped, _ = agree(3, accumulation=4, micros=8, seed=0, asked={0: 7, 1: 7, 2: 7})
    assert stopped == [None] * 3


def test_alone(me, signals, monkeypatch):
    stop = process.Stop(me)
    assert stop.due(0) is None
    monkeypatch.setattr(process, "_stop_reason", "SIGTERM")
    assert stop.due(1) == "SIGTERM"


def test_signals_ask_for_a_stop_and_a_second_interrupt_ends(me, signals):
    import os
    import signal

    process.stop_on_signals()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process._stop_reason = None
        os.kill(os.getpid(), number)
        assert process._stop_reason == number.name
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_stop_saves_the_last_completed_step(me, signals, tmp_path):
    import os
    import signal

    import tiny

    from mage_ds.engine import checkpoint
    from mage_ds.engine.run import Run
    from mage_ds.errors import Stopped

    numbers = tiny.recipe("batch=32")
    run = Run(tmp_path, numbers, {}, steps=20, dataset=40)
    run.begin(flops_per_image=None, peak_flops=None)
    process.stop_on_signals()
    seen = []

    def step_fn(engines, batch, step):
        seen.append(step)
        if seen.count(3) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        yield from tiny.pretrain.step_fn(engines, batch, step, recipe=numbers, tokenize=tiny.tokenize)

    with pytest.raises(Stopped, match="SIGTERM: saved after step 3"):
        tiny.train(tiny.engine_of(numbers, 1), numbers, 20, run, step_fn)
    assert seen.count(3) == 2 and checkpoint.steps(tmp_path) == [3]
