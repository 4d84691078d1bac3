"""Who is at work on what, as files in a folder that any number of processes share.

A claim is a hint that saves double work and nothing more: whatever it is about may be done twice, with the same
result. So no lock of a file system is needed, which network file systems keep or break in their own ways.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_BEAT_S = 5  # seconds between two touches of a claim
_STILL_S = 30  # an untouched claim is nobody's, by the clock of whoever looks
_OLD_S = 86400  # whatever lies untouched in the folder for a day is nobody's
_PATIENCE_S = 600  # so long a claim is respected at least, however alive its owner; see `Claims.patience`


class Claims:
    """This process's claims in `folder`, and what it has seen of others' there.

    patience: seconds after which the same claim of a living process is passed over too: it may hang. Whoever knows how
    long the work takes sets more. mark: with "~" before it the end of the names of files that this process writes aside
    in the folder, by which `sweep` knows them when it is dead.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic):
        self.folder, self._clock, self.patience = folder, clock, _PATIENCE_S
        self._mine: set[str] = set()
        self._seen: dict[str, tuple] = {}
        self._me = {"host": _host(), "pid": os.getpid(), "start": _started(os.getpid())}
        self.mark = "~".join(map(str, self._me.values()))
        self._beat: threading.Thread | None = None

    def take(self, name: str) -> bool:
        """Claims `name`: False where this process or another living one has it."""
        if name in self._mine or not self._put(name):
            return False
        self._mine.add(name)
        if self._beat is None:
            self._beat = threading.Thread(target=self._touch, name="claims", daemon=True)
            self._beat.start()
        return True

    def release(self, name: str) -> None:
        self._mine.discard(name)
        with suppress(OSError):
            (self.folder / name).unlink()

    def release_all(self) -> None:
        for name in [*self._mine]:
            self.release(name)

    def busy(self) -> bool:
        """Whether another living process seems to be at work here."""
        return any(self._held(self.folder / name) for name in self._names() if "~" not in name)

    def sweep(self) -> None:
        """Removes what processes of this host that are dead were writing, and what has been left for a day."""
        for name in self._names():
            mark = name.split("~")[1:]
            with suppress(OSError):
                old = time.time() - (self.folder / name).stat().st_mtime > _OLD_S
                if old or (len(mark) == 3 and _gone(*mark)):
                    (self.folder / name).unlink()

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except OSError:
            return []

    def clear(self) -> None:
        """Removes all claims, others' too: there is nothing left to do."""
        self._mine.clear()
        with suppress(OSError):
            for path in self.folder.iterdir():
                with suppress(OSError):
                    path.unlink()
            self.folder.rmdir()

    def _put(self, name: str) -> bool:
        path, text = self.folder / name, json.dumps(self._me)
        try:
            self.folder.mkdir(exist_ok=True)
            with open(path, "x") as file:
                file.write(text)
            return True
        except FileNotFoundError:  # another has cleared the folder meanwhile
            return False
        except FileExistsError:
            if self._held(path):
                return False
        part = self.folder / f".{name}.{uuid.uuid4().hex[:12]}~{self.mark}"
        try:
            part.write_text(text)
            os.replace(part, path)  # two may do so at once
            return True
        except FileNotFoundError:
            return False

    def _held(self, path: Path) -> bool:
        """Whether another process seems to be at the work that the claim is about."""
        try:
            with open(path, "rb") as file:  # opened: a network file system then asks for what is true now
                text, touched = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return True  # given back just now: the work is done, or free at the next look
        if _dead(text):
            return False
        now, last = self._clock(), self._seen.get(path.name)
        if last is None or last[0] != text:
            last = (text, touched, now, now)
        elif last[1] != touched:
            last = (text, touched, now, last[3])
        self._seen[path.name] = last
        return now - last[2] < _STILL_S and now - last[3] < self.patience

    def _touch(self) -> None:
        while True:
            time.sleep(_BEAT_S)
            for name in [*self._mine]:
                with suppress(OSError):
                    os.utime(self.folder / name)


def _dead(text: bytes) -> bool:
    """Whether the claim's process was one of this host and is gone. A half-written claim tells nothing."""
    try:
        owner = json.loads(text)
        return _gone(owner["host"], owner["pid"], owner["start"])
    except (ValueError, KeyError, TypeError):
        return False


def _gone(host: str, pid: int | str, start: str) -> bool:
    return host == _host() and _started(int(pid)) != start


def _host() -> str:
    """This machine, and where containers share its name, the process ids that are seen here."""
    with suppress(OSError):
        return f"{socket.gethostname()}-{os.readlink('/proc/self/ns/pid').strip('pid:[]')}"
    return socket.gethostname()


def _started(pid: int) -> str:
    """When a living process was started, which tells it from a later one of the same number; empty: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:  # a system without /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"
