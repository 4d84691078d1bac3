"""The launcher of DeepSpeed above this rank: seen to die, which it tells nobody, and its other ranks counted."""

import io
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mage_ds.errors import EXIT_STOPPED

_LAUNCHER = b"deepspeed.launcher.launch"
_GRACE_S = 60  # after a launcher's death nobody else ends a rank that hangs


def watch(died: Callable[[], None]) -> None:
    """End this rank when its launcher dies, or the launcher's own parent: neither tells its children.

    `deepspeed` starts launch.py, which starts the ranks. SIGTERM to `deepspeed` is not forwarded, and a SIGKILL
    cannot be: a rank must look. On another host launch.py is a child of sshd, which ends with the connection, or of a
    shell of sshd's, which does not. died() asks this rank to stop as a signal does; it is ended if it does not.
    """
    parent, grandparent = os.getppid(), _stat_of(os.getppid())[0]
    if grandparent < 0:  # no /proc: nothing to watch with
        return
    if _left_alone(parent):  # it died while this process started
        os._exit(EXIT_STOPPED)
    if not _is_launcher(parent):
        return

    for name, number in (("stdout", 1), ("stderr", 2)):
        if _is_pipe(number):
            raw = io.BufferedWriter(_Pipe(number))
            setattr(sys, name, io.TextIOWrapper(raw, errors="backslashreplace", line_buffering=True))
    above = {parent: grandparent}
    if _is_remote_shell(grandparent):
        above[grandparent] = _stat_of(grandparent)[0]

    def look() -> None:
        while os.getppid() == parent and all(_stat_of(pid)[0] == its for pid, its in above.items()):
            time.sleep(0.5)
        _let_go()
        died()
        time.sleep(_GRACE_S)
        os._exit(EXIT_STOPPED)

    threading.Thread(target=look, name="launcher watch", daemon=True).start()


class _Pipe(io.RawIOBase):
    """A pipe that swallows what nobody reads any more: an error there would break the last save."""

    def __init__(self, number: int):
        self._number = number

    def fileno(self) -> int:
        return self._number

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        try:
            return os.write(self._number, data)
        except BrokenPipeError:
            return len(data)


def _is_pipe(number: int) -> bool:
    mode = os.fstat(number).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _let_go() -> None:
    """Turn to nowhere what libraries write to pipes that nobody reads any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        if _is_pipe(number):
            os.dup2(nowhere, number)


def _left_alone(pid: int) -> bool:
    """Whether this process was started by a launcher, but `pid` and its forebears are none, or it has lost its own.

    `deepspeed` is in launch.py's session, init is not. Where launch.py leads one, as under ssh, nothing can be told.
    """
    while pid > 1 and not _is_launcher(pid):  # a wrapper may be between
        pid = _stat_of(pid)[0]
    if pid <= 1:
        return "CROSS_SIZE" in os.environ  # set by launch.py alone
    parent, session = _stat_of(pid)
    return session not in (pid, _stat_of(parent)[1])


def _is_remote_shell(pid: int) -> bool:
    """Whether a process is the shell of a command that came by ssh."""
    try:
        words, above = (Path(f"/proc/{each}/cmdline").read_bytes() for each in (pid, _stat_of(pid)[0]))
    except OSError:
        return False
    return b"-c" in words.split(b"\0") and above.startswith(b"sshd")


def fellows() -> int | None:
    """How many ranks of this host live, this one among them; None where no launcher of DeepSpeed started it."""
    parent = os.getppid()
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        states = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] for pid in children]
    except OSError:
        return None
    return sum(state != "Z" for state in states) if _is_launcher(parent) else None


def _is_launcher(pid: int) -> bool:
    try:
        return _LAUNCHER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _stat_of(pid: int) -> tuple[int, int]:
    """The parent and the session of a process, -1 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return -1, -1
    return int(fields[1]), int(fields[3])
