"""Fixtures of the engine's tests: a world of one in this process, and one start of two ranks for all tests."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def me():
    from mage_ds.engine import process

    return process.start(threads=1)


@pytest.fixture
def signals():
    """Signal handlers and a stop that a test asked for do not outlive it."""
    from mage_ds.engine import process

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    process._stop_reason = None
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def start_ranks(folder: Path, world: int, *scenarios: str, script: str = "ranks.py") -> list[subprocess.Popen]:
    """`script` in `world` processes, with the environment that a launcher gives; their screens go to rank_N.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in ours.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
        with open(folder / f"rank_{rank}.log", "w") as log:
            command = [sys.executable, str(HERE / script), str(folder), *scenarios]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return started


def ended(started: list[subprocess.Popen], folder: Path) -> list[str]:
    """Wait for all ranks to end well; their screens."""
    codes = [one.wait(450) for one in started]
    screens = [(folder / f"rank_{rank}.log").read_text() for rank in range(len(started))]
    assert codes == [0] * len(started), "\n".join(screens)
    return screens


def found(folder: Path, world: int) -> list[dict]:
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(world)]


def ran(folder: Path, world: int, *scenarios: str, script: str) -> list[dict]:
    """What each rank of `script` reports, once all have ended well."""
    started = start_ranks(folder, world, *scenarios, script=script)
    try:
        ended(started, folder)
    finally:
        for one in started:
            one.kill()
    return found(folder, world)


@pytest.fixture(scope="session")
def two(tmp_path_factory, me):
    """What two ranks report of all scenarios in ranks.py, and of the legs that this process runs between theirs."""
    from ranks import moved_leg

    from mage_ds.engine import checkpoint

    folder = tmp_path_factory.mktemp("ranks")
    started = start_ranks(folder, 2)
    try:
        while 5 not in checkpoint.steps(folder / "moved") and all(one.poll() is None for one in started):
            time.sleep(0.1)
        leg_2 = moved_leg(3, 5, 10, folder) if 5 in checkpoint.steps(folder / "moved") else None
        screens = ended(started, folder)
        leg_4 = moved_leg(0, 14, 18, folder)
    finally:
        for one in started:
            one.kill()
    return SimpleNamespace(folder=folder, ranks=found(folder, 2), screens=screens, leg_2=leg_2, leg_4=leg_4)


@pytest.fixture(scope="session")
def four(two):
    """What four ranks report of the last leg of the moved run."""
    started = start_ranks(two.folder, 4, "leg_5")
    try:
        ended(started, two.folder)
    finally:
        for one in started:
            one.kill()
    return found(two.folder, 4)
