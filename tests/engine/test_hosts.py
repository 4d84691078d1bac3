"""Hostfiles, ssh command lines, and words that must survive the shells between here and another host."""

import shlex
import subprocess

import pytest
from deepspeed.launcher import multinode_runner, runner

from mage_ds.engine import hosts, starts
from mage_ds.engine.hosts import Host
from mage_ds.errors import UserError


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# ours\n\nnode-1 slots=8   # the first\n  10.0.0.2\tslots=2\nuser@gpu.example.org slots=4\n")
    assert hosts.read_hostfile(path) == [Host("node-1", 8), Host("10.0.0.2", 2), Host("user@gpu.example.org", 4)]
    assert {host.name: host.slots for host in hosts.read_hostfile(path)} == dict(runner.fetch_hostfile(str(path)))


@pytest.mark.parametrize(
    "text, named",
    [
        ("a slots=1\nb slots=x\n", "line 2"),
        ("a\n", "line 1"),
        ("a slots=0\n", "line 1"),
        ("a slots=1 more\n", "line 1"),
        ("-oProxyCommand=x slots=1\n", "line 1"),
        ("a slots=1\n\na slots=2\n", "line 3 names a again"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_wrong_hostfile_is_one_line_that_names_the_place(tmp_path, text, named):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        hosts.read_hostfile(path)
    assert named in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_hostfile(tmp_path):
    with pytest.raises(UserError, match="cannot be read as a hostfile"):
        hosts.read_hostfile(tmp_path / "none")


def test_the_example_is_a_hostfile():
    assert hosts.read_hostfile(hosts.__file__.replace("mage_ds/engine/hosts.py", "hostfile.example"))[0].slots == 8


def test_ssh_obeys_the_setting_of_pdsh(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F 'my config' -p 1")
    line = hosts.ssh_command(Host("node-1", 2), ["echo", "a b"], port=2222)
    assert line[0] == "ssh" and line[-2:] == ["node-1", "echo 'a b'"]
    assert line.index("2222") < line.index("1")  # ssh takes the first of two
    assert line[line.index("-F") + 1] == "my config"


def test_words_reach_another_host_unchanged():
    """Through DeepSpeed's own quoting, pdsh's expansion of % and a shell."""
    words = [
        "a",
        "model.encoder={depth: 1, width: 32}",
        "x={a,b}",
        "$HOME",
        "a $HOME `id` \\ \"b\" 'c'",
        "a'b",
        "*",
        "50%",
        "%h b",
    ]

    class Arguments:
        user_args = starts.quoted(*words).split("\0")[:-1]

    pdsh = multinode_runner.PDSHRunner.__new__(multinode_runner.PDSHRunner)
    pdsh.args = Arguments
    sent = " ".join(pdsh.parse_user_args())
    line = sent.replace("%%", "%")  # as pdsh does
    assert "%" not in sent.replace("%%", "")
    got = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True).stdout
    assert got.split("\0")[:-1] == words
    assert shlex.split(line, posix=True)  # what a plain sh makes of it is well formed too


def test_how_a_start_ended_is_read_from_what_it_wrote(tmp_path):
    write = (tmp_path / "status.json").write_text
    assert starts.ended(str(tmp_path), "0", "1").startswith("nothing 0")
    assert starts.ended(str(tmp_path), "0", "2").startswith("refused")
    write('{"state": "stopped", "step": 4, "time": 7.5, "reason": "launcher died: saved after step 4"}')
    assert starts.since(str(tmp_path)) == "7.5"
    assert starts.ended(str(tmp_path), "1.5", "0").startswith("died 4")
    assert starts.ended(str(tmp_path), "7.5", "0").startswith("nothing 4")
    write('{"state": "stopped", "step": 4, "time": 8.5, "reason": "SIGTERM: saved after step 4"}')
    assert starts.ended(str(tmp_path), "7.5", "1").startswith("stopped 4")
    write('{"state": "finished", "step": 9, "time": 9.5, "reason": "--out: differs", "exit_code": 2}')
    assert starts.ended(str(tmp_path), "8.5", "1").startswith("refused 9")
