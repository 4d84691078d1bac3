"""`mage-ds doctor`: what is made of the facts of hosts, how a host is asked, and one real look at this machine."""

import contextlib
import copy
import os
import subprocess
import sys
import uuid
from importlib import metadata
from pathlib import Path

import pytest
from launched import environment

from mage_ds.engine import machine, wire
from mage_ds.errors import UserError
from mage_ds.report import findings, host_table
from mage_ds.tasks import doctor

REQUIRES = [
    "torch>=2.14",
    "deepspeed>=0.19.8",
    "scikit-learn<1.11,>=1.4",
    'pytest>=8; extra == "test"',
    'nvidia-dali-cuda130>=2.4; extra == "cuda13"',
    'nvidia-dali-cuda120>=2.4; extra == "cuda12"',
]
INSTALLED = {"torch": "2.14.1", "deepspeed": "0.19.8", "scikit-learn": "1.5", "nvidia-dali-cuda130": "2.4.0"}
GPU = {"name": "NVIDIA H100 80GB HBM3", "gib": 79.1}
SMI = {"name": GPU["name"], "used_gib": 0.0, "driver": "580.65"}
GOOD = {
    "packages": {
        "python": "3.11.7",
        "executable": "/venv/bin/python",
        "mage_ds": "0.1.0",
        "files": "abcd1234",
        "requires": REQUIRES,
        "installed": INSTALLED,
    },
    "gpus": {"torch": "2.14.1+cu130", "cuda": "13.0", "nccl": "2.30.7", "gpus": [GPU] * 8, "nvidia_smi": [SMI] * 8},
    "system": {
        "host": "node",
        "cores": 96,
        "memory": 1000.0,
        "available": 900.0,
        "shm": 500.0,
        "shm_free": 500.0,
        "limits": {"open_files": 65536, "locked_memory": None, "processes": None},
        "infiniband": True,
    },
    "build": {"compiler": "c++ 12.2.0", "ninja": "1.13", "python_h": True, "nvcc": True, "bin": "/venv/bin"},
    "ops": {"fit": ["cpu_adam", "fused_adam"], "all": 3},
    "decode": {"rate": 1000.0, "device": "cuda", "broken": 0},
    "listing": {"n": 100, "fingerprint": "f"},
    "disk": {"write": 500.0, "read": 900.0, "free": 800.0},
    "clock": {"offset": 0.01, "within": 0.001},
    "shared": {"missing": []},
}
WIRE = {"backend": "nccl", "ranks": 24, "hosts": [], "wrong": [], "gb_per_s": 40.0, "latency_ms": 0.1}
SLOTS = {"node-1": 8, "node-2": 8, "node-3": 8}
ALL = ("shared", "data")


def changed(**changes) -> dict:
    """Three good hosts, but node-2 with `check__key=value` changed; check=None: without it."""
    facts = {name: copy.deepcopy(GOOD) for name in SLOTS}
    for where, value in changes.items():
        check, _, key = where.partition("__")
        if key:
            facts["node-2"][check][key] = value
        else:
            facts["node-2"][check] = value
    return facts


def looked_at(facts, level: str | None = None, **options) -> list[str]:
    """The findings of a level as they are said, all but `ok` without one."""
    found = findings.judge(facts, **({"slots": SLOTS, "wire": WIRE, "asked": ALL} | options))
    for each in found:
        assert each.level != findings.RED or each.remedy, f"no remedy: {each}"
    return [f"{x.level} {x.topic}: {x}" for x in found if x.level == level or (level is None and x.level != "ok")]


def installed(**versions) -> dict:
    return {k: v for k, v in (INSTALLED | {k.replace("_", "-"): v for k, v in versions.items()}).items() if v}


# ---- comparison


def test_good_hosts_are_ok_in_every_topic():
    assert looked_at(changed()) == []
    said = looked_at(changed(), "ok")
    topics = ["hosts", "versions", "GPUs", "machine", "op builds", "clocks", "shared path", "data", "decoding"]
    assert [line.split(":")[0] for line in said] == [f"ok {topic}" for topic in [*topics, "all-reduce"]]


RED_AND_NOTE = {
    "another version": (
        {"packages__installed": installed(torch="2.15.0")},
        "RED versions: node-2: torch is 2.15.0, on node-1 2.14.1: `pip install 'torch==2.14.1'` there",
    ),
    "another version of what matters less": (
        {"packages__installed": installed(scikit_learn="1.6")},
        "note versions: node-2: scikit-learn is 1.6, on node-1 1.5: `pip install 'scikit-learn==1.5'` there",
    ),
    "missing package": (
        {"packages__installed": installed(deepspeed=None)},
        "RED versions: node-2: deepspeed is missing: `pip install 'deepspeed>=0.19.8'` there",
    ),
    "python": (
        {"packages__python": "3.10.1"},
        "RED versions: node-2: python is 3.10, on node-1 3.11: make its environment with Python 3.11",
    ),
    "python's patch": ({"packages__python": "3.11.8"}, None),
    "our code": (
        {"packages__files": "ffff"},
        "RED versions: node-2: the code of mage_ds is ffff, on node-1 abcd1234: bring both to the same commit",
    ),
    "NCCL": (
        {"gpus__nccl": "2.20"},
        "RED versions: node-2: NCCL is 2.20, on node-1 2.30.7: install the same build of torch, which brings it",
    ),
    "too few GPUs": (
        {"gpus__gpus": [GPU] * 7},
        "RED GPUs: node-2: 7 GPUs, the hostfile has slots=8: write slots=7 or mend the GPUs that `nvidia-smi` lacks",
    ),
    "too many GPUs": (
        {"gpus__gpus": [GPU] * 9},
        "note GPUs: node-2: 9 GPUs, the hostfile has slots=8: the others stay idle",
    ),
    "other GPUs": (
        {"gpus__gpus": [GPU | {"name": "A100"}] * 8},
        f"note GPUs: node-2: A100, on node-1 {GPU['name']}: the slowest sets the pace",
    ),
    "small /dev/shm": (
        {"system__shm": 0.0625},
        "RED machine: node-2: /dev/shm holds 64 MiB: `docker run --shm-size=8g`, or remount it with size=8G",
    ),
    "open files": (
        {"system__limits": GOOD["system"]["limits"] | {"open_files": 256}},
        "RED machine: node-2: 256 open files are allowed, 1024 are needed: "
        "`ulimit -n 16384`, or /etc/security/limits.conf",
    ),
    "locked memory": (
        {"system__limits": GOOD["system"]["limits"] | {"locked_memory": 65536}},
        "RED machine: node-2: locked memory is limited, which InfiniBand does not bear: "
        "`memlock unlimited` in /etc/security/limits.conf",
    ),
    "compiler": (
        {"build__compiler": None},
        "RED op builds: node-2: no C++ compiler: `apt-get install g++` there, or set CXX",
    ),
    "ninja": (
        {"build__ninja": None},
        "RED op builds: node-2: no ninja on the PATH of a command that comes through ssh: "
        "`pip install ninja` there, and /venv/bin in PATH (a line PATH=... in .deepspeed_env)",
    ),
    "clock behind": (
        {"clock__offset": -3.99},
        "RED clocks: node-2: its clock is 4.0 s behind node-1's: `timedatectl set-ntp true` there",
    ),
    "clock a little ahead": (
        {"clock__offset": 1.01},
        "note clocks: node-2: its clock is 1.0 s ahead of node-1's: `timedatectl set-ntp true` there",
    ),
    "clock not known well": ({"clock": {"offset": 3.0, "within": 3.0}}, None),
    "not shared": (
        {"shared__missing": ["node-1", "node-3"]},
        "RED shared path: node-2: does not see what node-1, node-3 wrote: "
        "mount the same storage at this path on all hosts",
    ),
    "unwritable": (
        {"shared": {"error": "cannot be written (Permission denied)"}, "disk": {"error": "Permission denied"}},
        "RED shared path: node-2: cannot be written (Permission denied): "
        "make the folder on storage that all hosts mount, writable for this user",
    ),
    "slow shared path": (
        {"disk__write": 20.0},
        "note shared path: node-2: takes 20 MB/s, so saving ViT-L 4 minutes: "
        "save less often (report.checkpoint_every), or elsewhere",
    ),
    "other data": (
        {"listing": {"n": 99, "fingerprint": "g"}},
        "RED data: node-2: 99 pictures, 100 on node-1: copy the data set anew, or use the shared one",
    ),
    "same number of other files": (
        {"listing__fingerprint": "g"},
        "RED data: node-2: other names or sizes of files than on node-1: copy the data set anew, or use the shared one",
    ),
    "slow decoding": (
        {"decode__rate": 400.0},
        "note decoding: node-2: 400 pictures/s, elsewhere 1,000: see what else runs there (`top`)",
    ),
    "check that failed": (
        {"gpus": {"error": "ImportError: libcudart.so.13"}},
        "RED GPUs: node-2: ImportError: libcudart.so.13: "
        "see what `python -c 'import torch; torch.cuda.init()'` says there",
    ),
}


@pytest.mark.parametrize("changes, line", RED_AND_NOTE.values(), ids=RED_AND_NOTE)
def test_one_thing_is_wrong_on_one_host(changes, line):
    assert looked_at(changed(**changes)) == ([line] if line else [])


def test_floors_on_a_single_host():
    facts = {"localhost": changed(packages__installed=installed(torch="2.9.1+cpu", scikit_learn="1.11"))["node-2"]}
    found = looked_at(facts, "RED", slots=None)
    assert [line.partition(": localhost: ")[2] for line in found] == [
        "torch 2.9.1+cpu does not do: `pip install 'torch>=2.14'` there",
        "scikit-learn 1.11 does not do: `pip install 'scikit-learn<1.11,>=1.4'` there",
    ]


@pytest.mark.parametrize(
    "versions, what",
    [
        ({"nvidia_dali_cuda130": None}, "DALI is missing"),
        ({"nvidia_dali_cuda130": None, "nvidia_dali_cuda120": "2.4"}, None),
        ({"nvidia_dali_cuda120": "2.4"}, "overwrite each other"),
        ({"nvidia_dali_cuda130": "1.49"}, "nvidia-dali-cuda130 1.49 does not do"),
    ],
)
def test_exactly_one_dali(versions, what):
    """No extra of ours is asked for by name, but one of DALI's wheels must be there."""
    facts = {"localhost": changed(packages__installed=installed(**versions))["node-2"]}
    found = looked_at(facts, slots=None)
    assert (len(found) == 1 and what in found[0]) if what else not found


def test_the_most_common_value_is_the_right_one():
    facts = changed()
    facts["node-1"]["packages"]["installed"] = installed(deepspeed="0.20")
    assert looked_at(facts) == [
        "RED versions: node-1: deepspeed is 0.20, on node-2 0.19.8: `pip install 'deepspeed==0.19.8'` there"
    ]


def test_unreachable_host_is_named_and_the_others_are_compared():
    facts = changed(packages__files="ffff")
    facts["node-3"] = {"unreachable": "cannot be reached (no route)", "remedy": "make `ssh node-3 true` work"}
    found = looked_at(facts)
    assert found[0].startswith("RED hosts: node-3: cannot be reached") and "node-2: the code of mage_ds" in found[1]
    assert len(found) == 2
    assert host_table.table(facts, 160, SLOTS)[1].split() == ["python", "3.11.7", "3.11.7", "?"]


def test_cpu_hosts_need_no_gpus():
    none = {"torch": "2.14.1", "cuda": None, "nccl": None, "gpus": [], "nvidia_smi": None}
    facts = {name: changed(gpus=none)["node-2"] for name in SLOTS}
    assert looked_at(facts) == ["note GPUs: none: ranks run on the CPU, over gloo"]
    mixed = changed(gpus=none)
    assert any("node-2: 0 GPUs, the hostfile has slots=8: leave the host out" in line for line in looked_at(mixed))


def test_driver_without_torch():
    facts = changed(gpus=GOOD["gpus"] | {"gpus": [], "cuda": None, "torch": "2.14.1+cpu"})
    assert any(
        "node-2: the driver has 8, torch 2.14.1+cpu sees none: install a CUDA" in x for x in looked_at(facts, "RED")
    )


@pytest.mark.parametrize(
    "report, line",
    [
        (WIRE | {"wrong": [3, 9]}, "RED all-reduce: wrong sums on ranks 3, 9 of 24"),
        ({"error": "no answer within 140 s"}, "RED all-reduce: no answer within 140 s: open the ports"),
        ({"error": "launcher 'pdsh' not installed."}, "RED all-reduce: launcher 'pdsh' not installed.: `apt-get"),
        (WIRE | {"gb_per_s": 0.3}, "note all-reduce: 0.3 GB/s is slow for GPUs"),
        (None, "note all-reduce: not tried"),
    ],
)
def test_all_reduce(report, line):
    [found] = looked_at(changed(), wire=report)
    assert found.startswith(line)


def test_answers_of_another_version_are_a_red_line():
    facts = changed(packages={"python": "3.11"}, system={}, decode={"speed": 3})
    found = looked_at(facts, "RED")
    assert [line.split(":")[0] for line in found] == ["RED versions", "RED machine", "RED decoding"]
    assert all("install the same version of mage_ds on all hosts" in line for line in found)
    assert host_table.table(facts, 200)


# ---- the table


def test_table_marks_differences_and_breaks_into_blocks():
    wide = host_table.table(changed(packages__installed=installed(deepspeed="0.20")), 200, SLOTS)
    [row] = [line for line in wide if line.startswith("deepspeed")]
    assert row.split() == ["deepspeed", "*", "0.19.8", "0.20", "0.19.8"]
    assert not any("*" in line for line in wide if line.startswith("decoding"))
    narrow = host_table.table(changed(), 60, SLOTS)
    heads = [line.split() for line in narrow if line.split() and line.split()[0] in SLOTS]
    assert heads == [["node-1"], ["node-2"], ["node-3"]] and max(map(len, narrow)) <= 60


def test_colour_is_asked_for():
    found = [findings.Finding(findings.RED, "hosts", "away", "node-1")]
    assert findings.lines(found, False) == ["RED   hosts        node-1: away"]
    assert findings.lines(found, True)[0].startswith("\033[31mRED")


# ---- asking a host


def session(program: str) -> doctor.Session:
    return doctor.Session("node", [sys.executable, "-c", program])


ANSWERS = f"""
import json, os, sys, time
sys.path.insert(0, {os.path.dirname(os.path.dirname(os.path.dirname(machine.__file__)))!r})
from mage_ds.engine import machine
def check(what):
    if what == "crash": os._exit(7)
    if what == "hang": time.sleep(60)
    if what == "raise": raise ValueError("no good")
    print("chatter of a library")
    return what
machine.CHECKS["system"] = machine.Check(check, 1)
print("a login shell's greeting")
machine.answer()
"""


def test_a_check_that_fails_costs_its_own_answer_only():
    one = session(ANSWERS)
    try:
        for what, why in (
            ("raise", "ValueError: no good"),
            ("crash", "ended with exit code 7"),
            ("hang", "took too long"),
        ):
            with pytest.raises(doctor.NoAnswer, match=why):
                one.ask("system", what=what)
            assert one.ask("system", what=f"after {what}") == f"after {what}"
        one._process.kill()  # between two questions: a broken connection, say
        one._process.wait()
        assert one.ask("system", what="again") == "again"
    finally:
        one.close()


@pytest.mark.parametrize(
    "program, why",
    [
        ("import sys; sys.exit('/venv/bin/python: No module named mage_ds')", "no mage_ds of this version"),
        ("import sys; print('sh: 1: exec: /venv/bin/python: not found', file=sys.stderr); sys.exit(127)", "no /"),
        ("import sys; sys.exit('Host key verification failed.')", "exit code 1: Host key verification failed."),
    ],
)
def test_a_host_without_our_package_is_said_once(program, why):
    one = session(program)
    _, answers = doctor._ask_all(one, None, None)
    assert [*answers] == ["unreachable", "remedy"] and why in answers["unreachable"]
    assert "at the same path" in answers["remedy"]


def test_exports_reach_the_host(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text("PATH=/somewhere/bin:$PATH\nA=b c\n")
    line = doctor._words("node", None, remote=True)
    assert line[0] == "ssh" and "-n" not in line
    shown = line[-1].replace("mage_ds doctor --json", "os").replace(sys.executable, "echo $A $PATH;")
    said = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert said.stdout.startswith("b c /somewhere/bin:/usr/bin:/bin")
    (tmp_path / ".deepspeed_env").write_text("A=b\n# a comment\n")
    with pytest.raises(UserError, match="'# a comment' is no NAME=VALUE"):
        doctor._words("node", None, remote=True)


# ---- small parts


def test_disk_measures_and_leaves_nothing(tmp_path):
    found = machine.disk(str(tmp_path), mib=8)
    assert found["write"] > 0 and found["read"] > 0 and found["free"] > 0
    assert not [*tmp_path.iterdir()]
    with pytest.raises(OSError):
        machine.disk(str(tmp_path / "absent"))


def test_reason_of_a_failed_launch():
    lines = [
        "[2026-01-01 00:00:00,000] [INFO] [runner.py:1:main] cmd = x",
        "Traceback (most recent call last):",
        "torch.distributed.DistNetworkError: connection refused",
        "[2026-01-01 00:00:00,000] [ERROR] [launch.py:1:sigkill_handler] exits with return code = 1",
    ]
    assert wire._reason(lines, 1) == "torch.distributed.DistNetworkError: connection refused"
    assert wire._reason([], 3) == "exit code 3"


@pytest.mark.processes
def test_a_launch_that_hangs_is_ended(monkeypatch):
    monkeypatch.setenv("MAGE_DS_TEST", mark := uuid.uuid4().hex)
    assert wire.launch({"localhost": 2}, gpus=False, port=29999, seconds=1) == {"error": "no answer within 1 s"}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            ours = f"MAGE_DS_TEST={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
            assert not ours or folder.name == str(os.getpid())


# ---- the whole


@pytest.mark.processes
def test_this_machine(made, tmp_path):
    """Real checks: with nothing wrong exit code 0, no red line, and no file or colour left behind."""
    words = [sys.executable, "-m", "mage_ds", "doctor", "--shared", tmp_path, "--data", made[0]]
    done = subprocess.run(
        [str(word) for word in words], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [line for line in done.stdout.splitlines() if line.startswith("RED")]
    rows = {line[:13].strip(): line[16:] for line in done.stdout.split("\n\n")[0].splitlines()}
    for title, package in (("deepspeed", "deepspeed"), ("timm", "timm"), ("mage_ds", "mage_ds")):
        assert rows[title].split()[0] == metadata.version(package)
    pictures = len([*(made[0] / "train").rglob("*.jpg")])
    assert rows["data"] == f"{pictures:,} pictures"
    assert float(rows["decoding"].split()[0].replace(",", "")) > 0
    assert "right on 2 ranks over gloo" in done.stdout and "\033" not in done.stdout
    assert "doctor: localhost: decoding pictures ..." in done.stderr
    assert not [*tmp_path.iterdir()]
