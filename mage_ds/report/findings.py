"""What `doctor` makes of the facts of one or several hosts: findings, each red one with its remedy.

facts: host name -> {check: its value, or {"error": why there is none}}, or {"unreachable": why, "remedy"}. The
checks are those of engine/machine.py, and `clock` {"offset", "within"} in seconds and `shared` {"missing": [hosts]}.
Nothing here asks a machine.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

OK, NOTE, RED = "ok", "note", "RED"
SAME = ("torch", "deepspeed", "timm", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120")  # on every host, or RED
CLOCK_NOTE, CLOCK_RED = 0.2, 2.0  # seconds
SLOW_DISK = 50  # MB/s
LEAST_MEMORY, LEAST_SHM, LEAST_FREE = 2.0, 0.5, 20.0  # GiB: of a host, of /dev/shm, on the shared path
LEAST_LIMITS = {"open_files": (1024, "n"), "processes": (4096, "u")}  # soft limit, `ulimit`'s letter


class Finding(NamedTuple):
    level: str
    topic: str
    text: str
    host: str | None = None
    remedy: str = ""

    def __str__(self) -> str:
        where, remedy = f"{self.host}: " if self.host else "", f": {self.remedy}" if self.remedy else ""
        return f"{where}{self.text}{remedy}"


def judge(facts: dict, *, slots: dict | None = None, wire: dict | None = None, asked: tuple = ()) -> list[Finding]:
    """All findings, topic by topic; a topic without a note or a red line gets one `ok` line.

    slots: host -> slots of the hostfile; wire: the report of the all-reduce, {"error"}, or None where there was none;
    asked: of "shared" and "data" those that were asked for.
    """
    there = {host: each for host, each in facts.items() if "unreachable" not in each}
    topics = {
        "hosts": lambda: _hosts(facts),
        "versions": lambda: _versions(there),
        "GPUs": lambda: _gpus(there, slots or {}),
        "machine": lambda: _machine(there),
        "op builds": lambda: _builds(there),
        "clocks": lambda: _clocks(there),
        "shared path": lambda: _shared(there, "shared" in asked),
        "data": lambda: _data(there) if "data" in asked else (),
        "decoding": lambda: _decoding(there),
        "all-reduce": lambda: _wire(wire, there),
    }
    findings = []
    for topic, look in topics.items():
        found = [*_errors(there, topic)]
        try:
            found += look()
        except Exception as error:  # an answer of another version of this package, say
            reason = f"the answers do not fit together ({type(error).__name__}: {error})"
            found.append(Finding(RED, topic, reason, remedy="install the same version of mage_ds on all hosts"))
        good = "" if found or not there else _good(topic, there, wire)
        findings += found or ([Finding(OK, topic, good)] if good else [])
    return findings


def _good(topic: str, there: dict, wire: dict | None) -> str:
    """What is said where nothing is wrong; nothing, where there is nothing to say."""
    many = len(there) > 1
    return {
        "hosts": f"{len(there)} answer" if many else "",
        "versions": "as required, and the same on all hosts" if many else "as required",
        "GPUs": "as many as the hostfile's slots" if many else "torch sees them",
        "machine": "memory, /dev/shm and limits suffice",
        "op builds": f"a compiler is there; possible: {_ops(there)}",
        "clocks": f"within {CLOCK_NOTE:g} s" if many else "",
        "shared path": "written on each host, seen on all" if many else "can be written",
        "data": ("the same on all hosts" if many else "can be listed") if _of(there, "listing") else "",
        "decoding": "works",
        "all-reduce": said_of_wire(wire) if topic == "all-reduce" else "",
    }[topic]


def _ops(facts: dict) -> str:
    return next((", ".join(each["fit"]) for each in _of(facts, "ops").values()), "")


_CHECKS = {  # topic -> its checks, and what to try where one of them gives no answer
    "versions": (("packages",), "install mage_ds and its requirements there as on the other hosts"),
    "GPUs": (("gpus",), "see what `python -c 'import torch; torch.cuda.init()'` says there"),
    "machine": (("system",), "see `free -m`, `df /dev/shm` and `ulimit -a` there"),
    "op builds": (("build", "ops"), "see what `python -c 'import deepspeed'` says there"),
    "clocks": (("clock",), "see what `date` says there"),
    "shared path": (("shared", "disk"), "make the folder on storage that all hosts mount, writable for this user"),
    "data": (("listing",), "give the path of the data set as that host sees it"),
    "decoding": (("decode",), "see what `python -c 'import nvidia.dali.fn'` says there"),
}


def _of(facts: dict, check: str) -> dict:
    """host -> value, of the hosts where the check gave one."""
    answers = {host: each[check] for host, each in facts.items() if check in each}
    return {host: value for host, value in answers.items() if "error" not in value}


def _errors(facts: dict, topic: str) -> Iterator[Finding]:
    checks, remedy = _CHECKS.get(topic, ((), ""))
    for host, each in facts.items():
        wrong = [each[check]["error"] for check in checks if "error" in each.get(check, {})]
        if wrong:  # a second one of a topic has the first one's cause
            yield Finding(RED, topic, wrong[0], host, remedy)


def _usual(values: dict):
    """The most common value; of equally common ones that of the first host."""
    counts = Counter(values.values())
    return max(values.values(), key=lambda value: counts[value])  # max returns the first of equals


def _odd(values: dict) -> Iterator[tuple[str, object, object, str]]:
    """(host, its value, the usual value, a host that has it) of the hosts that differ."""
    if values:
        usual = _usual(values)
        model = next(host for host, value in values.items() if value == usual)
        yield from ((host, value, usual, model) for host, value in values.items() if value != usual)


# --- topics ----------------------------------------------------------------------------------------------------


def _hosts(facts: dict) -> Iterator[Finding]:
    for host, each in facts.items():
        if "unreachable" in each:
            yield Finding(RED, "hosts", each["unreachable"], host, each["remedy"])


def _versions(facts: dict) -> Iterator[Finding]:
    answers = _of(facts, "packages")
    odd = []

    def differ(level, name, values, remedy):
        for host, value, usual, model in _odd(values):
            odd.append((host, name))
            has = f"{name} is {value or 'missing'}, on {model} {usual or 'missing'}"
            yield Finding(level, "versions", has, host, remedy.format(usual=usual, name=name))

    same = "install the same build of torch, which brings it"
    minors = {host: ".".join(each["python"].split(".")[:2]) for host, each in answers.items()}
    yield from differ(RED, "python", minors, "make its environment with Python {usual}")
    ours = {host: each["mage_ds"] for host, each in answers.items()}
    yield from differ(RED, "mage_ds", ours, "install mage_ds {usual} there")
    files = {host: each["files"] for host, each in answers.items() if each["mage_ds"] == _usual(ours)}
    yield from differ(RED, "the code of mage_ds", files, "bring both to the same commit")
    for name in sorted({name for each in answers.values() for name in _required(each["requires"])}):
        values = {host: each["installed"].get(name) for host, each in answers.items()}
        if "dali" not in name:  # what is missing is below its floor
            values = {host: value for host, value in values.items() if value}
        yield from differ(RED if name in SAME else NOTE, name, values, "`pip install '{name}=={usual}'` there")
    for key, name in (("cuda", "torch's CUDA"), ("nccl", "NCCL")):
        yield from differ(RED, name, {host: each[key] for host, each in _of(facts, "gpus").items()}, same)
    drivers = {host: each["nvidia_smi"][0]["driver"] for host, each in _of(facts, "gpus").items() if each["nvidia_smi"]}
    yield from differ(NOTE, "the NVIDIA driver", drivers, "install the same on all")
    for host, each in answers.items():
        yield from _floors(host, each["requires"], each["installed"], [name for h, name in odd if h == host])


def _required(requires: list[str]) -> dict:
    """What a run needs as packaging's Requirement by name, DALI's two wheels (extras of ours) among it."""
    from packaging.requirements import Requirement  # may be missing on a host

    needs = [Requirement(line) for line in requires]
    return {x.name: x for x in needs if "dali" in x.name or not x.marker or x.marker.evaluate({"extra": ""})}


def _floors(host: str, requires: list[str], installed: dict, said: list[str]) -> Iterator[Finding]:
    """What is missing or too old; but for those names of which `said` has it that other hosts have another."""
    needs = _required(requires)
    for name, need in needs.items():
        wanted, has = f"{name}{need.specifier}", installed.get(name)
        if has is None and "dali" not in name:
            yield Finding(RED, "versions", f"{name} is missing", host, f"`pip install '{wanted}'` there")
        elif has is not None and name not in said and not need.specifier.contains(has, prereleases=True):
            yield Finding(RED, "versions", f"{name} {has} does not do", host, f"`pip install '{wanted}'` there")
    dali = [name for name in needs if "dali" in name and name in installed]
    if not dali:
        yield Finding(RED, "versions", "DALI is missing", host, "`pip install nvidia-dali-cuda130` there (or -cuda120)")
    if len(dali) > 1:
        both = f"{' and '.join(dali)} overwrite each other"
        yield Finding(RED, "versions", both, host, f"`pip uninstall {' '.join(dali)}`, then install one of them")


def _gpus(facts: dict, slots: dict) -> Iterator[Finding]:
    answers = _of(facts, "gpus")
    counts = {host: len(each["gpus"]) for host, each in answers.items()}
    for host, each in answers.items():
        smi = each["nvidia_smi"] or []
        if smi and not counts[host]:
            remedy = (
                "install a CUDA build of torch" if not each["cuda"] else "look at CUDA_VISIBLE_DEVICES and `nvidia-smi`"
            )
            yield Finding(RED, "GPUs", f"the driver has {len(smi)}, torch {each['torch']} sees none", host, remedy)
        for k, gpu in enumerate(smi):
            if gpu["used_gib"] > 1:
                text = f"{gpu['used_gib']} GiB of GPU {k} are in use"
                yield Finding(NOTE, "GPUs", text, host, "`nvidia-smi` names the process")
    if not any(counts.values()):
        if not any(each["nvidia_smi"] for each in answers.values()) and answers:
            yield Finding(NOTE, "GPUs", "none: ranks run on the CPU, over gloo")
        return
    for host, count in counts.items():
        wanted = slots.get(host, count or 1)
        if count < wanted:
            text = f"{count} GPUs" + (
                f", the hostfile has slots={wanted}" if host in slots else ", other hosts have some"
            )
            remedy = f"write slots={count} or mend the GPUs that `nvidia-smi` lacks" if count else "leave the host out"
            yield Finding(RED, "GPUs", text, host, remedy)
        elif count > wanted:
            text = f"{count} GPUs, the hostfile has slots={wanted}"
            yield Finding(NOTE, "GPUs", text, host, "the others stay idle")
    kinds = {host: each["gpus"][0]["name"] for host, each in answers.items() if each["gpus"]}
    for host, kind, usual, model in _odd(kinds):
        yield Finding(NOTE, "GPUs", f"{kind}, on {model} {usual}", host, "the slowest sets the pace")


def _machine(facts: dict) -> Iterator[Finding]:
    gpus = {host: len(each["gpus"]) for host, each in _of(facts, "gpus").items()}
    for host, each in _of(facts, "system").items():
        if each["available"] < LEAST_MEMORY:
            text = f"{each['available']} GiB of memory are free, a rank takes about {LEAST_MEMORY:g}"
            yield Finding(RED, "machine", text, host, "end what uses it (`top -o %MEM`)")
        if each["shm"] < LEAST_SHM:
            level = RED if gpus.get(host, 0) > 1 else NOTE  # NCCL passes data between the GPUs of a host through it
            text = f"/dev/shm holds {each['shm'] * 1024:.0f} MiB"
            yield Finding(level, "machine", text, host, "`docker run --shm-size=8g`, or remount it with size=8G")
        for name, (least, letter) in LEAST_LIMITS.items():
            limit = each["limits"][name]
            if limit is not None and limit < least:
                text = f"{limit} {name.replace('_', ' ')} are allowed, {least} are needed"
                remedy = f"`ulimit -{letter} {16 * least}`, or /etc/security/limits.conf"
                yield Finding(RED, "machine", text, host, remedy)
        if each["infiniband"] and each["limits"]["locked_memory"] is not None:
            text = "locked memory is limited, which InfiniBand does not bear"
            yield Finding(RED, "machine", text, host, "`memlock unlimited` in /etc/security/limits.conf")
    memories = {host: round(each["memory"]) for host, each in _of(facts, "system").items()}
    for host, memory, usual, model in _odd(memories):
        if memory < 0.9 * usual:
            yield Finding(NOTE, "machine", f"{memory} GiB of memory, {usual} on {model}", host)


def _builds(facts: dict) -> Iterator[Finding]:
    for host, each in _of(facts, "build").items():
        if not each["compiler"]:
            yield Finding(RED, "op builds", "no C++ compiler", host, "`apt-get install g++` there, or set CXX")
        if not each["python_h"]:
            yield Finding(RED, "op builds", "no Python.h", host, "`apt-get install python3-dev` there")
        if not each["ninja"]:
            remedy = f"`pip install ninja` there, and {each['bin']} in PATH (a line PATH=... in .deepspeed_env)"
            yield Finding(RED, "op builds", "no ninja on the PATH of a command that comes through ssh", host, remedy)
    for host, each in _of(facts, "gpus").items():
        if each["gpus"] and not facts[host].get("build", {}).get("nvcc", True):
            text = "no nvcc, so DeepSpeed's own CUDA ops cannot be built; the recipes need none of them"
            yield Finding(NOTE, "op builds", text, host)
    compilers = {host: each["compiler"] for host, each in _of(facts, "build").items() if each["compiler"]}
    for host, compiler, usual, model in _odd(compilers):
        yield Finding(NOTE, "op builds", f"{compiler}, on {model} {usual}", host)
    for host, fit, usual, model in _odd({host: tuple(each["fit"]) for host, each in _of(facts, "ops").items()}):
        other = ", ".join(sorted({*fit} ^ {*usual}))
        yield Finding(NOTE, "op builds", f"not the ops of {model}: they differ in {other}", host)


def _clocks(facts: dict) -> Iterator[Finding]:
    """Against the first host's clock, since all are measured against this machine's."""
    answers = _of(facts, "clock")
    for host, each in answers.items():
        first = next(iter(answers.values()))
        ahead = each["offset"] - first["offset"]
        sure = abs(ahead) - each["within"] - first["within"]
        if sure > CLOCK_NOTE:
            text = f"its clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} {next(iter(answers))}'s"
            yield Finding(RED if sure > CLOCK_RED else NOTE, "clocks", text, host, "`timedatectl set-ntp true` there")


def _shared(facts: dict, asked: bool) -> Iterator[Finding]:
    if not asked:
        yield Finding(NOTE, "shared path", "not looked at", remedy="name the folder of your runs: --shared PATH")
    for host, each in _of(facts, "shared").items():
        if each["missing"]:
            text = f"does not see what {', '.join(each['missing'])} wrote"
            yield Finding(RED, "shared path", text, host, "mount the same storage at this path on all hosts")
    for host, each in _of(facts, "disk").items():
        if each["free"] < LEAST_FREE:
            yield Finding(NOTE, "shared path", f"{each['free']} GiB are free", host, "two checkpoints of ViT-L take 11")
        if each["write"] < SLOW_DISK:
            text = f"takes {each['write']:.0f} MB/s, so saving ViT-L {5300 / max(each['write'], 1) / 60:.0f} minutes"
            yield Finding(NOTE, "shared path", text, host, "save less often (report.checkpoint_every), or elsewhere")


def _data(facts: dict) -> Iterator[Finding]:
    answers = {host: (each["n"], each["fingerprint"]) for host, each in _of(facts, "listing").items()}
    for host, (n, _), (usual, _), model in _odd(answers):
        text = (
            f"{n:,} pictures, {usual:,} on {model}" if n != usual else f"other names or sizes of files than on {model}"
        )
        yield Finding(RED, "data", text, host, "copy the data set anew, or use the shared one")


def _decoding(facts: dict) -> Iterator[Finding]:
    answers = _of(facts, "decode")
    fastest = max((each["rate"] for each in answers.values()), default=0)
    for host, each in answers.items():
        if each["rate"] < fastest / 2:
            text = f"{each['rate']:,.0f} pictures/s, elsewhere {fastest:,.0f}"
            yield Finding(NOTE, "decoding", text, host, "see what else runs there (`top`)")
        if each["broken"]:
            text = f"{each['broken']} unreadable pictures among those that were decoded"
            yield Finding(NOTE, "decoding", text, host, "`mage-ds prepare DATA --verify full` lists them")


def _wire(wire: dict | None, there: dict) -> Iterator[Finding]:
    across = len(there) > 1
    if wire is None:
        yield Finding(NOTE, "all-reduce", "not tried: no host is fit for it")
    elif "error" in wire:
        where = (
            "open the ports between the hosts, and name their network in .deepspeed_env (NCCL_ or GLOO_SOCKET_IFNAME)"
        )
        if "pdsh" in wire["error"]:
            where = "`apt-get install pdsh` on this machine"
        yield Finding(RED, "all-reduce", wire["error"], remedy=where if across else "NCCL_DEBUG=INFO says more")
    elif wire["wrong"]:
        text = f"wrong sums on ranks {', '.join(map(str, wire['wrong']))} of {wire['ranks']}"
        yield Finding(
            RED, "all-reduce", text, remedy="run their GPUs' diagnosis (`dcgmi diag -r 3`), or leave the host out"
        )
    elif wire["backend"] == "nccl" and across and wire["gb_per_s"] < 1:
        text = f"{wire['gb_per_s']} GB/s is slow for GPUs"
        yield Finding(NOTE, "all-reduce", text, remedy="NCCL_DEBUG=INFO says which network it took")


def said_of_wire(wire: dict) -> str:
    ranks = f"right on {wire['ranks']} rank{'s' * (wire['ranks'] > 1)} over {wire['backend']}"
    speed = f", {wire['gb_per_s']} GB/s a rank, {wire['latency_ms']} ms for one number"
    return ranks + (speed if wire["ranks"] > 1 else "")


# --- on paper --------------------------------------------------------------------------------------------------

_COLOURS = {OK: "\033[32m", NOTE: "\033[33m", RED: "\033[31m"}


def lines(findings: list[Finding], colour: bool) -> list[str]:
    shown = []
    for each in findings:
        level = f"{each.level:4}"
        level = f"{_COLOURS[each.level]}{level}\033[0m" if colour else level
        shown.append(f"{level}  {each.topic:11}  {each}")
    return shown
