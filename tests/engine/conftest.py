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


@pytest.fixture(scope="session")
def two(tmp_path_factory, me):
    """What two ranks report of all scenarios in ranks.py, and of the legs that this process runs between theirs."""
    from ranks import moved_leg

    from mage_ds.engine import checkpoint

    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_SIZE": 2, "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in ours.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
        with open(folder / f"rank_{rank}.log", "w") as log:
            command = [sys.executable, str(HERE / "ranks.py"), str(folder)]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        while 5 not in checkpoint.steps(folder / "moved") and all(one.poll() is None for one in started):
            time.sleep(0.1)
        leg_2 = moved_leg(3, 5, 10, folder) if 5 in checkpoint.steps(folder / "moved") else None
        codes = [one.wait(450) for one in started]
        screens = [(folder / f"rank_{rank}.log").read_text() for rank in range(2)]
        assert codes == [0, 0], "\n".join(screens)
        leg_4 = moved_leg(0, 14, 18, folder)
    finally:
        for one in started:
            one.kill()
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(folder=folder, ranks=ranks, screens=screens, leg_2=leg_2, leg_4=leg_4)
