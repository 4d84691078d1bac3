"""What the launch scripts ask before, during and after a start: `python -m mage_ds.engine.starts QUESTION ...`.

How a start ended is read from status.json, because DeepSpeed's launcher turns the ranks' exit codes into others. Its
processes are known by their mark, MAGE_DS_LAUNCH in their environment, here or on the hosts of a hostfile.
"""

import base64
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import mage_ds
from mage_ds.engine import hosts
from mage_ds.errors import EXIT_USER, UserError

_SAVING_S = 75  # a rank whose launcher died saves, and ends itself after 60 s
_LAST_S = 90  # plain ssh: what the other hosts have, once one of them has ended

# Run on every host: whether this folder, this Python and this mage_ds are there, and how other hosts reach it.
_PROBE = """
import mage_ds
from mage_ds.engine import machine
print(mage_ds.__version__, *machine.meeting_place().values())
"""


def ready(hostfile: str, port: str = "") -> str:
    """`ADDRESS PORT` of the first host for the ranks to meet at, if every host can take ranks.

    Raises UserError that names the first host which cannot: unreachable, or without this folder or environment.
    """
    wanted = hosts.read_hostfile(hostfile)
    words = ["sh", "-c", 'cd "$1" && exec "$2" -c "$3"', "sh", os.getcwd(), sys.executable, _PROBE]
    answers = hosts.ask(wanted, words, _port(port), seconds=30)
    for name, answer in answers.items():
        if answer.returncode == hosts.SSH_FAILED:
            raise UserError(f"{hostfile}: host {name} cannot be reached ({hosts.reason_of(answer)}); try `ssh {name}`")
        if answer.returncode:
            raise UserError(
                f"{hostfile}: host {name} is not like this one ({hosts.reason_of(answer)}); "
                f"it needs {sys.executable} and {os.getcwd()} too"
            )
        version = answer.stdout.split()[-3]
        if version != mage_ds.__version__:
            raise UserError(f"{hostfile}: host {name} has mage_ds {version}, this one {mage_ds.__version__}")
    return " ".join(answers[wanted[0].name].stdout.split()[-2:])


def ended(run: str, before: str, code: str) -> str:
    """`WORD STEP REASON` of the start that has just ended: finished, stopped (by a signal, saved), refused (the user
    can mend it), died, or nothing (it died before it began to train).

    before: the `time` of status.json before the start; code: of `deepspeed`, for starts that wrote nothing.
    """
    status = status_of(run)
    step, reason = status.get("step", 0), " ".join(str(status.get("reason", "")).split())
    if str(status.get("time", 0)) == before:
        if code == "0" and status.get("state") == "finished":
            return f"finished {step}"
        return f"refused {step}" if code == str(EXIT_USER) else f"nothing {step} it ended before it began to train"
    if status.get("exit_code") == EXIT_USER:
        return f"refused {step} {reason}"
    if status["state"] == "finished" or (status["state"] == "stopped" and not reason.startswith("launcher died")):
        return f"{status['state']} {step} {reason}"
    return f"died {step} {reason or 'killed'}"


def since(run: str) -> str:
    """When status.json was last written, 0 where there is none."""
    return str(status_of(run).get("time", 0))


def status_of(run: str) -> dict:
    """status.json of a run folder; empty where it has none."""
    try:
        return json.loads(Path(run, "status.json").read_text())
    except (OSError, ValueError):
        return {}


# --- processes of a start ------------------------------------------------------------------------------------


def tell(mark: str, number: str, hostfile: str = "", port: str = "") -> None:
    """Send a signal to the ranks of a start, not to what launched them, which would not wait for the save."""
    if hostfile:
        hosts.ask(hosts.read_hostfile(hostfile), _here("tell", mark, number), _port(port))
        return
    for pid, words in _marked(mark).items():
        if any(word.startswith("--local_rank=") for word in words):
            _kill(pid, int(number))


def gone(mark: str, hostfile: str = "", port: str = "") -> None:
    """Wait until no process of a start is left, then kill what is; the ranks get the time to save."""
    if hostfile:
        for pid, words in _marked(mark).items():
            if Path(words[0]).name in ("pdsh", "ssh"):  # they outlive `deepspeed`; ranks whose ssh is gone save and end
                _kill(pid, signal.SIGKILL)
        hosts.ask(hosts.read_hostfile(hostfile), _here("gone", mark), _port(port), seconds=_SAVING_S + 30)
        return
    end = time.monotonic() + _SAVING_S
    while living := _marked(mark):
        if time.monotonic() > end:
            for pid in living:
                _kill(pid, signal.SIGKILL)
        time.sleep(0.2)


def _marked(mark: str) -> dict[int, list[str]]:
    """The processes of a start on this machine: their command lines by process id."""
    found, wanted = {}, f"MAGE_DS_LAUNCH={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found[int(folder.name)] = (folder / "cmdline").read_text(errors="replace").split("\0")
        except OSError:  # another user's, or it ended meanwhile
            continue
    return found


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _here(*question: str) -> list[str]:
    return [sys.executable, "-m", "mage_ds.engine.starts", *question]


def _port(text: str) -> int | None:
    return int(text) if text else None


# --- command lines for other hosts ---------------------------------------------------------------------------


def quoted(*words: str) -> str:
    """Words as `deepspeed` must get them, each ended by NUL, so that a remote shell behind pdsh reads them unchanged:
    DeepSpeed puts words with blanks into double quotes and leaves the others as they are; pdsh expands `%`."""
    within = [re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word) for word in words]
    return "".join(word.replace("%", "%%") + "\0" for word in within)


def ssh(hostfile: str, port: str, address: str, master_port: str, *words: str) -> None:
    """Start DeepSpeed's launcher on every host by plain ssh, as `deepspeed` does by pdsh; return when all have ended.

    words: the module and its arguments. The environment is that of the file DS_ENV_FILE. Raises SystemExit with the
    largest exit code. A host that ends takes the others along: their ranks cannot go on.
    """
    wanted = hosts.read_hostfile(hostfile)
    world = base64.urlsafe_b64encode(json.dumps({host.name: list(range(host.slots)) for host in wanted}).encode())
    exports = ""
    for line in Path(os.environ["DS_ENV_FILE"]).read_text().splitlines():
        name, _, value = line.partition("=")
        exports += f'export {name}="{value}"; '
    launches = []
    for rank, host in enumerate(wanted):
        line = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world.decode()}"]
        line += [f"--node_rank={rank}", f"--master_addr={address}", f"--master_port={master_port}", "--module", *words]
        remote = f"{exports}cd {shlex.quote(os.getcwd())} && exec {shlex.join(line)}"
        launches.append(subprocess.Popen([*hosts.ssh_command(host, [], _port(port))[:-1], remote]))
    end = None
    while any(launch.poll() is None for launch in launches):
        if end is None and any(launch.returncode is not None for launch in launches):
            end = time.monotonic() + _LAST_S
        if end is not None and time.monotonic() > end:
            for launch in launches:
                launch.kill()
        time.sleep(0.5)
    raise SystemExit(max(launch.returncode if launch.returncode >= 0 else 1 for launch in launches))


_QUESTIONS = {call.__name__: call for call in (ready, ended, since, tell, gone, quoted, ssh)}


if __name__ == "__main__":
    try:
        print(_QUESTIONS[sys.argv[1]](*sys.argv[2:]) or "", end="")
    except UserError as error:
        sys.exit(print(f"mage-ds: error: {error}", file=sys.stderr) or EXIT_USER)
