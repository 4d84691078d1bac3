"""Two hosts on one machine, for tests: network namespaces on a bridge, each with a host name and an sshd of its own.

They share the disk and the list of processes with this machine. Needs root, iproute2 and openssh-server.
"""

import contextlib
import itertools
import os
import pwd
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PORT = 2222  # of the hosts' sshd
_TOOLS = ("ip", "ssh", "sshd", "ssh-keygen", "unshare")
_letters = itertools.cycle("acdefghijklmnopqrstuwxyz")  # several pairs of hosts at the same time
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def why_not() -> str | None:
    """Why this machine cannot make the hosts, None where it can."""
    if os.geteuid() != 0:
        return "needs root: makes network namespaces"
    if missing := [tool for tool in _TOOLS if not shutil.which(tool, path=_PATH)]:
        return f"needs {', '.join(missing)}: apt-get install iproute2 openssh-server openssh-client"
    probe = f"probe{os.getpid()}"
    made = _ip("link", "add", probe, "type", "bridge", check=False)
    _ip("link", "del", probe, check=False)
    if made.returncode:
        return f"cannot make network devices here: {made.stderr.strip()}"
    made = _ip("netns", "add", probe, check=False)
    _ip("netns", "del", probe, check=False)
    return f"cannot make network namespaces here: {made.stderr.strip()}" if made.returncode else None


@dataclass
class Hosts:
    """names: as ssh and the hostfile know them, and their own host names; addresses: the same, on the bridge
    eth0; environment: what a command here needs to reach them by ssh and pdsh, and gloo to find the bridge."""

    folder: Path
    names: list[str]
    addresses: list[str]
    environment: dict[str, str]
    port: int = PORT
    _spaces: dict[str, str] = field(default_factory=dict)

    def hostfile(self, slots: int = 1, *more: str) -> Path:
        """A hostfile of the hosts, and of lines `more`."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{line}\n" for line in (*(f"{name} slots={slots}" for name in self.names), *more)))
        return path

    def processes(self, name: str) -> dict[int, str]:
        """The command lines of the processes of one host by process id, without its sshd's."""
        found = {}
        for pid in _ip("netns", "pids", self._spaces[name], check=False).stdout.split():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if words[0] and not words[0].startswith(("sshd", "/usr/sbin/sshd")):
                    found[int(pid)] = " ".join(words).strip()
        return found

    def cut(self, name: str) -> None:
        """Pull the network cable of one host; `plug` mends it."""
        _ip("-n", self._spaces[name], "link", "set", "eth0", "down")

    def plug(self, name: str) -> None:
        _ip("-n", self._spaces[name], "link", "set", "eth0", "up")


@contextlib.contextmanager
def two_hosts(folder: Path, private: Path | None = None) -> Iterator[Hosts]:
    """Hosts node-1 and node-2 for as long as the context lasts; `folder` takes their keys and configuration.

    private: an existing folder that node-2 sees as an empty one of its own, as if it were not shared.
    """
    _sweep()
    mark, net = f"md{os.getpid()}{next(_letters)}", f"10.{random.randint(16, 250)}.{random.randint(0, 255)}"
    spaces = {f"node-{number}": f"{mark}{number}" for number in (1, 2)}
    addresses = [f"{net}.{number}" for number in (1, 2)]
    bridge = f"{mark}b"
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{net}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        config = _ssh_config(folder, list(spaces), addresses)
        for (name, space), address in zip(spaces.items(), addresses, strict=True):
            _network(space, bridge, address)
            _sshd(folder, name, space, private if name == "node-2" else None)
        environment = {"PDSH_SSH_ARGS_APPEND": f"-F {config}", "GLOO_SOCKET_IFNAME": "eth0", "DS_ACCELERATOR": "cpu"}
        hosts = Hosts(folder, list(spaces), addresses, environment, _spaces=spaces)
        for name in spaces:
            _await_sshd(folder, name, config)
        yield hosts
    finally:
        for space in spaces.values():
            _remove(space)
        _ip("link", "del", bridge, check=False)


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    line = ["ip", *words]
    return subprocess.run(line, env=os.environ | {"PATH": _PATH}, capture_output=True, text=True, check=check)


def _sweep() -> None:
    """Remove what tests left that were killed themselves."""
    for line in _ip("netns", "list").stdout.splitlines():
        match = re.match(r"md(\d+)([a-z])[12]\b", line)
        if match and not Path(f"/proc/{match[1]}").exists():
            _remove(match[0])
            _ip("link", "del", f"md{match[1]}{match[2]}b", check=False)


def _network(space: str, bridge: str, address: str) -> None:
    _ip("netns", "add", space)
    _ip("link", "add", f"{space}v", "type", "veth", "peer", "name", "eth0", "netns", space)
    _ip("link", "set", f"{space}v", "master", bridge, "up")
    _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", space, "link", "set", device, "up")


def _ssh_config(folder: Path, names: list[str], addresses: list[str]) -> Path:
    """A key that opens both hosts, and the configuration of the ssh that uses it."""
    for key in ("user", "host"):
        (folder / f"{key}_key").unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / f"{key}_key"], check=True)
    config = folder / "ssh_config"
    known = " ".join((folder / "host_key.pub").read_text().split()[:2])
    entries = (
        f"Host {pair[0]} {pair[1]}\n  HostName {pair[1]}\n  Port {PORT}\n"
        for pair in zip(names, addresses, strict=True)
    )
    (folder / "known_hosts").write_text("".join(f"[{address}]:{PORT} {known}\n" for address in addresses))
    config.write_text(
        f"{''.join(entries)}Host *\n  User {pwd.getpwuid(os.geteuid()).pw_name}\n  IdentityFile {folder}/user_key\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n  LogLevel ERROR\n"
    )
    return config


def _sshd(folder: Path, name: str, space: str, private: Path | None) -> None:
    """Start the host's sshd, under a host name and, with `private`, a view of the disk of its own."""
    Path("/run/sshd").mkdir(exist_ok=True)  # where it leaves its privileges; Debian's service makes it
    config = folder / f"sshd_{name}"
    config.write_text(
        f"Port {PORT}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nMaxStartups 100\n"
    )
    hide = f"mount -t tmpfs none {private} && " if private else ""
    inside = f"hostname {name} && {hide}exec $(command -v sshd) -D -e -f {config}"
    with open(folder / f"{name}.log", "w") as log:
        subprocess.Popen(
            ["ip", "netns", "exec", space, "unshare", "--mount", "--uts", "sh", "-c", inside],
            env={"PATH": _PATH},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _await_sshd(folder: Path, name: str, config: Path) -> None:
    line = ["ssh", "-F", config, "-o", "BatchMode=yes", "-o", "ConnectTimeout=2", name, "hostname"]
    for _ in range(50):
        answer = subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if answer.stdout.strip() == name:
            return
        time.sleep(0.1)
    raise RuntimeError(f"{name}: {answer.stderr} sshd says: {(folder / f'{name}.log').read_text()}")


def _remove(space: str) -> None:
    """End everything that runs in a namespace, then the namespace."""
    while pids := _ip("netns", "pids", space, check=False).stdout.split():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)
    _ip("netns", "del", space, check=False)
    _ip("link", "del", f"{space}v", check=False)
