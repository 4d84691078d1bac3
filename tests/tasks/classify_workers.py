"""For tests: mage-ds's command lines in forked processes, each of which may be killed or be one rank of several (see
forked.py)."""

import importlib
import os
import socket
from pathlib import Path

from forked import Forked, serve


class Lines(Forked):
    def __init__(self, folder: Path):
        super().__init__(__file__)
        self._folder, self._count = folder, 0

    def start(self, *words, kill_at: int | str = 0, ranks: dict | None = None) -> int:
        """One process that does `mage-ds words`; kill_at: as of `Forked.order`, changes below the folder count."""
        self._count += 1
        self.log = self._folder / f"log{self._count}"
        line = [str(word) for word in words]
        return self.order(line=line, ranks=ranks or {}, below=self._folder, log=self.log, kill_at=kill_at)

    def done(self, *words) -> str:
        """What a process said that ended well."""
        code = self.run(*words)
        assert code == 0, self.log.read_text()
        return self.log.read_text()

    def all_done(self, lines: dict[str, list]) -> dict[str, str]:
        """As `done`, of several lines at once."""
        started = {name: (self.start(*words), self.log) for name, words in lines.items()}
        codes = {name: self.wait(pid) for name, (pid, _) in started.items()}
        said = {name: log.read_text() for name, (_, log) in started.items()}
        assert not any(codes.values()), said
        return said

    def two(self, *words) -> str:
        """What the first of two ranks said; both ended well."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in (1, 0):
            each = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_SIZE": 2}
            each |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            started.append((self.start(*words, ranks=each), self.log))
        codes = [self.wait(pid) for pid, _ in started]
        assert codes == [0, 0], "\n".join(log.read_text() for _, log in started)
        return started[1][1].read_text()


def _work(order: dict) -> int:
    from mage_ds import cli
    from mage_ds.engine import process

    def leave(code: int):
        raise SystemExit(code)

    process.leave = leave
    os.environ.update({key: str(value) for key, value in order["ranks"].items()})
    try:
        return cli.main(order["line"])
    except SystemExit as done:
        return done.code


# All that a training imports sooner or later: half of the time of a short one.
_SLOW = [
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.figure",
    "nvidia.dali.ops",
    "tensorboard.compat.proto.summary_pb2",
    "timm.data.mixup",
    "torch.utils.tensorboard",
    *(f"mage_ds.tasks.{name}" for name in ("classify", "evaluate_classifier", "pretrain", "tokenize")),
]

if __name__ == "__main__":
    for name in _SLOW:
        importlib.import_module(name)
    serve(_work)
