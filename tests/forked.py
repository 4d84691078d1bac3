"""For tests: processes that start at once, because they are forked from one that has imported everything.

A script of such processes is started by `Forked`, calls `serve`, and waits for orders, a line of JSON each. Every
worker is a process of its own that can be killed.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

_CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "open")
_TESTS = Path(__file__).parent


class Forked:
    """Used with `with`; then none of its processes is left. script: what calls `serve`."""

    def __init__(self, script):
        self._script = str(script)

    def __enter__(self):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (_TESTS.parent, _TESTS))),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(
            [sys.executable, self._script], env=environment, stdin=pipe, stdout=pipe, text=True
        )
        self._living: set[int] = set()
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

    def order(self, **order) -> int:
        """A process that does it; its id. order: log: where it says what it says, and at last "changes: N" of files
        below `below`; kill_at: it dies, as by SIGKILL, before the change of this number (0: never); "2 text": before
        the second one whose operation and paths hold this text; more, as the script's work takes it."""
        pid = self._ask(**order)
        self._living.add(pid)
        return pid

    def wait(self, pid: int) -> int:
        """The exit code of a worker, -9 after SIGKILL."""
        code = self._ask(wait=pid)
        self._living.discard(pid)
        return code

    def kill(self, pid: int) -> int:
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def run(self, *args, **options) -> int:
        return self.wait(self.start(*args, **options))


def serve(work: Callable[[dict], int]) -> None:
    """Orders from stdin, until it ends; work: what a worker does, returns its exit code."""
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                _do(work, order)
        print(json.dumps(answer), flush=True)


def _do(work: Callable[[dict], int], order: dict) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    changes = _watch_changes(order["kill_at"], order["below"])
    code = 1
    try:
        code = work(order)
        print(f"changes: {changes[0]}")
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _watch_changes(kill_at: int | str, below: str) -> list[int]:
    """Counts them in the first number of a list."""
    seen = [0, 0]
    number, _, text = str(kill_at).partition(" ")

    def look(event: str, arguments: tuple) -> None:
        if event not in _CHANGES or not str(arguments[0]).startswith(below):
            return
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        seen[0] += 1
        what = f"{event} {' '.join(map(str, arguments[:2]))}"
        seen[1] += bool(text) and text in what
        if int(number) and seen[bool(text)] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    return seen


def files(folder: Path) -> dict[str, bytes]:
    """All below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(made: Path, other: Path) -> None:
    """Asserts that two folders hold the same, to the byte."""
    one, two = files(made), files(other)
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []
