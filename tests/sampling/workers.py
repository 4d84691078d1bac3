"""For tests: processes of `mage-ds` that start at once, because they are forked from one that has imported everything.

`Workers` starts this file, which waits for orders, a line of JSON each. Every worker is a process of its own, with a
process group of its own, that can be killed.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

_CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "open")


class Workers:
    """Used with `with`; then none of its processes is left."""

    def __enter__(self):
        script = Path(__file__)
        environment = os.environ | {
            "PYTHONPATH": str(script.parents[2]),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        line = [sys.executable, str(script)]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(line, env=environment, stdin=pipe, stdout=pipe, text=True)
        self._living: set[int] = set()
        return self

    def __exit__(self, *error):
        for pid in [*self._living]:
            self.kill(pid)
        self._server.stdin.close()
        self._server.wait()

    def _ask(self, **order):
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *argv, log: Path, below: Path, kill_at: int | str = 0, shard: int = 12) -> int:
        """`mage-ds argv`; what it says goes to `log`, and at last "changes: N" of files below `below`.

        kill_at: it dies, as by SIGKILL, before the change of this number (0: never); "2 text": before the second one
        whose operation and paths hold this text; shard: about so many pictures are in a tar. Returns the process id.
        """
        words = [str(word) for word in argv]
        pid = self._ask(argv=words, log=str(log), kill_at=kill_at, below=str(below), shard=shard)
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

    def run(self, *argv, log: Path, **options) -> int:
        return self.wait(self.start(*argv, log=log, **options))


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


def _work(order: dict) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    changes = _watch_changes(order["kill_at"], order["below"])
    from mage_ds.cli import main
    from mage_ds.report import pictures

    pictures._SHARD = order["shard"]
    code = 1
    try:
        code = main(order["argv"])
        print(f"changes: {changes[0]}")
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _serve() -> None:
    import deepspeed  # noqa: F401
    import torch

    import mage_ds.cli
    import mage_ds.tasks.sample  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            status = os.waitpid(order["wait"], 0)[1]
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                _work(order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
