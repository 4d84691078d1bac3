"""`mage-ds doctor --hostfile` over two network namespaces with sshd, healthy and with one planted fault each."""

import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from launched import environment
from namespaces import two_hosts, why_not

pytestmark = [
    pytest.mark.full,
    pytest.mark.processes,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    with two_hosts(folder) as two:
        (folder / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
        yield two


def doctor(hosts, *argv, hostfile=None, code: int) -> tuple[str, list[str]]:
    """What it printed, and its red lines."""
    words = [sys.executable, "-m", "mage_ds", "doctor", "--hostfile", hostfile or hosts.hostfile(), *argv]
    done = subprocess.run(
        [str(word) for word in words],
        cwd=hosts.folder,
        env=environment(COLUMNS="160", **hosts.environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(done.stdout, done.stderr)  # shown where the test fails
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr and "\033" not in done.stdout
    return done.stdout, [line for line in done.stdout.splitlines() if line.startswith("RED")]


def on_node_2(hosts, *words) -> None:
    """Run a command in node-2's own view of the disk."""
    line = ["ip", "netns", "pids", hosts._spaces["node-2"]]
    pids = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()
    [sshd] = [pid for pid in pids if b"listener" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    subprocess.run(["nsenter", "-t", sshd, "-m", *map(str, words)], check=True)


def columns(text: str) -> dict[str, str]:
    """Title of a row -> the rest of it."""
    rows = text.split("\n\n")[0].splitlines()
    return {row[:13].strip(): row[13:].strip() for row in rows}


def test_healthy(hosts, tmp_path):
    text, red = doctor(hosts, "--shared", tmp_path, code=0)
    assert not red
    rows = columns(text)
    assert rows[""].split() == ["node-1", "node-2"]
    assert rows["deepspeed"].split() == [metadata.version("deepspeed")] * 2
    assert rows["slots"].split() == ["1", "1"] and rows["GPUs"].split() == ["none", "none"]
    assert rows["shared: sees"].split() == ["all", "all"]
    assert "right on 2 ranks over gloo" in text
    assert not [*tmp_path.iterdir()]
    end = time.monotonic() + 20
    while any(hosts.processes(name) for name in hosts.names):
        assert time.monotonic() < end, [hosts.processes(name) for name in hosts.names]
        time.sleep(0.1)


def test_wrong_version(hosts, tmp_path):
    [found] = [path for path in metadata.files("timm") if path.name == "METADATA"]
    real, fake = Path(metadata.distribution("timm").locate_file(found)), tmp_path / "METADATA"
    fake.write_text(real.read_text().replace(f"\nVersion: {metadata.version('timm')}\n", "\nVersion: 1.0.3\n"))
    on_node_2(hosts, "mount", "--bind", fake, real)
    try:
        text, [red] = doctor(hosts, code=2)
    finally:
        on_node_2(hosts, "umount", real)
    right = metadata.version("timm")
    assert f"node-2: timm is 1.0.3, on node-1 {right}: `pip install 'timm=={right}'` there" in red
    assert columns(text)["timm"].split() == ["*", right, "1.0.3"]


def test_unwritable_shared_path(hosts, tmp_path):
    on_node_2(hosts, "mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path)
    try:
        text, [red] = doctor(hosts, "--shared", tmp_path, code=2)
    finally:
        on_node_2(hosts, "umount", tmp_path)
    assert "node-2: cannot be written (Read-only file system" in red and "that all hosts mount" in red
    assert "right on 2 ranks" in text and not [*tmp_path.iterdir()]


def test_path_that_is_not_shared(hosts, tmp_path):
    on_node_2(hosts, "mount", "-t", "tmpfs", "none", tmp_path)
    try:
        _, red = doctor(hosts, "--shared", tmp_path, code=2)
    finally:
        on_node_2(hosts, "umount", tmp_path)
    assert [line.partition("  shared path  ")[2].partition(":")[0] for line in red] == ["node-1", "node-2"]
    assert "does not see what node-2 wrote" in red[0] and "does not see what node-1 wrote" in red[1]


def test_unreachable_host(hosts):
    """A name that nobody knows: the others are looked at all the same."""
    text, [red] = doctor(hosts, hostfile=hosts.hostfile(1, "node-3 slots=1"), code=2)
    assert "node-3: cannot be reached" in red and "`ssh node-3 true`" in red
    assert columns(text)["torch"].split()[-1] == "?"
    assert "right on 2 ranks over gloo" in text


def test_wrong_port(hosts):
    """Both are named, and nothing else is tried."""
    text, red = doctor(hosts, "--ssh_port", "2", code=2)
    assert len(red) == 2 and all(f"`ssh -p 2 {name} true`" in line for name, line in zip(hosts.names, red, strict=True))
    assert "all-reduce" in text and "right on" not in text
