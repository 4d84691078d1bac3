"""The hosts of a run: the hostfile, ssh to each of them, and whether all see the same run folder."""

import os
import re
import shlex
import socket
import subprocess
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mage_ds.engine import process
from mage_ds.errors import UserError

_CONNECT_S, _ANSWER_S = 8, 14  # a host that drops packets answers nothing, a name server may be slow too
SSH_FAILED = 255  # ssh's own exit code; others are the remote command's
_SEEN_S = 20  # a network file system may show a new file late


@dataclass(frozen=True)
class Host:
    """A host as ssh knows it, and the number of ranks that it takes."""

    name: str
    slots: int


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a file of lines `NAME slots=N`, in its order; `#` begins a comment.

    DeepSpeed's rules, and stricter where it would guess. Raises UserError that names the file and the line.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a hostfile ({error}); see hostfile.example") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([\w.:@%-]+)\s+slots=(\d+)", text)
        if not match or match[1].startswith("-") or int(match[2]) < 1:
            raise UserError(f"{path}: line {number} is {line.strip()!r}; it must read NAME slots=N")
        if match[1] in hosts:
            raise UserError(f"{path}: line {number} names {match[1]} again; give it one line with all its slots")
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise UserError(f"{path}: names no host; add lines NAME slots=N")
    return list(hosts.values())


def ssh_command(host: Host | str, words: Sequence[str], port: int | None = None) -> list[str]:
    """The command line that runs `words` on `host` by ssh, which never asks for anything.

    PDSH_SSH_ARGS_APPEND is obeyed, so that one setting (`-F CONFIG`, `-i KEY`) serves pdsh and this.
    """
    name = host if isinstance(host, str) else host.name
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}", "-n"]
    if port is not None:
        options += ["-p", str(port)]
    return ["ssh", *options, *shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")), name, shlex.join(words)]


def ask(
    hosts: Sequence[Host], words: Sequence[str], port: int | None = None, seconds: float = _ANSWER_S
) -> dict[str, subprocess.CompletedProcess]:
    """Run `words` on all hosts at the same time: by host name what came of it, text as str.

    returncode 255: ssh itself failed, or there was no answer within `seconds`; stderr then says why.
    """

    def one(host: Host) -> subprocess.CompletedProcess:
        line = ssh_command(host, words, port)
        try:
            return subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=seconds)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(line, SSH_FAILED, "", f"no answer within {seconds:.0f} s")
        except OSError as error:
            return subprocess.CompletedProcess(line, SSH_FAILED, "", f"ssh cannot be started: {error}")

    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        return dict(zip((host.name for host in hosts), pool.map(one, hosts), strict=True))


def unreachable(hosts: Sequence[Host], port: int | None = None) -> dict[str, str]:
    """The hosts that ssh does not reach without a password, by name, each with the reason; all asked at once."""
    answers = ask(hosts, ["true"], port)
    return {name: reason_of(answer) for name, answer in answers.items() if answer.returncode == SSH_FAILED}


def reason_of(answer: subprocess.CompletedProcess) -> str:
    """The last thing that a failed command said."""
    lines = [line.strip() for line in answer.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {answer.returncode}"


def check_shared(folder: Path) -> None:
    """See that `folder` (or what will hold it) is the same on every host of the run. All ranks call it.

    Rank 0 writes a file there, and one rank of every host looks for it. Raises UserError that names the hosts
    which do not see it; the file is gone afterwards.
    """
    me = process.start()
    if me.local_world == me.world:
        return
    token, writer = process.on_first(lambda: (_write_token(folder), socket.gethostname()))
    try:
        seen = me.local_rank != 0 or _appears(token)
        answers = process.gather_objects((socket.gethostname(), seen))
    finally:
        if me.first:
            token.unlink(missing_ok=True)
    blind = sorted({name for name, saw in answers if not saw})
    if blind:
        raise UserError(
            f"--out {folder}: is not shared: {', '.join(blind)} does not see what {writer} writes to {token.parent}; "
            "choose a path on a file system that all hosts mount"
        )


def _write_token(folder: Path) -> Path:
    place = folder.resolve()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    token = place / f".mage_ds.{uuid.uuid4().hex}"
    try:
        token.touch()
    except OSError as error:
        raise UserError(f"--out {folder}: {place} cannot be written ({error.strerror}); choose another") from None
    return token


def _appears(path: Path) -> bool:
    end = time.monotonic() + _SEEN_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
