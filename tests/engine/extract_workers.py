"""For tests: processes that extract features, forked from one that has imported everything, each to be killed alone.

python extract_workers.py    reads orders, a line of JSON each: {"folder", ...} starts a process, {"wait": pid} waits
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path


class Extracting:
    """Used with `with`; then none of its processes is left."""

    def __enter__(self):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "DS_ACCELERATOR": "cpu"}
        line, pipe = [sys.executable, __file__], subprocess.PIPE
        self._server = subprocess.Popen(line, env=environment, stdin=pipe, stdout=pipe, text=True)
        self._living = set()
        return self

    def __exit__(self, *error):
        for pid in [*self._living]:
            self.kill(pid)
        self._server.stdin.close()
        self._server.wait()

    def _ask(self, **order):
        self._server.stdin.write(json.dumps(order, default=str) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, folder, source, network, n: int, batch: int, log, kill_at: int = 0) -> int:
        """Returns the process id. kill_at: it dies, as by SIGKILL, before the change of this number of a file below
        `folder`; at its end it says "changes: N"."""
        pid = self._ask(folder=folder, source=source, network=network, n=n, batch=batch, log=log, kill_at=kill_at)
        self._living.add(pid)
        return pid

    def wait(self, pid: int) -> int:
        """The exit code, -9 after SIGKILL."""
        code = self._ask(wait=pid)
        self._living.discard(pid)
        return code

    def kill(self, pid: int) -> int:
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def run(self, *args, **options) -> int:
        return self.wait(self.start(*args, **options))


def _watch_changes(kill_at: int, below: str) -> list[int]:
    seen = [0]

    def look(event: str, arguments: tuple) -> None:
        if event not in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "open"):
            return
        if not str(arguments[0]).startswith(below):
            return
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        seen[0] += 1
        if seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    return seen


def _work(order: dict) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    from mage_ds.engine import extracting, process
    from mage_ds.engine.extractors import open_extractor
    from mage_ds.engine.sources import open_source
    from mage_ds.errors import UserError
    from mage_ds.evaluation.feature_set import FeatureSet

    code = 1
    try:
        process.start(threads=1)
        changes = _watch_changes(order["kill_at"], order["folder"])
        source, extractor = open_source(order["source"]), open_extractor(features=f"run:{order['network']}")
        settings = extracting.settings_of(source, extractor)
        extracting.extract(FeatureSet.begin(order["folder"], settings, order["n"], order["batch"]), source, extractor)
        print(f"changes: {changes[0]}")
        code = 0
    except UserError as error:
        print(f"error: {error}")
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _serve() -> None:
    import deepspeed  # noqa: F401
    import torch

    import mage_ds.engine.extracting  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                _work(order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
