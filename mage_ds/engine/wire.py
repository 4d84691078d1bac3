"""Do the ranks reach each other, do their sums come out right, and how fast: a small launch as a training's."""

import contextlib
import faulthandler
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from mage_ds.engine import launched, process

LIMIT_S = 120  # for the ranks, which end by themselves then, on whichever host they are
MIB = {"gloo": 16, "nccl": 256}  # summed per repetition
TIMES = 5
_MARK = "mage-ds wire "


def rank() -> None:
    """One rank of the check: sums numbers whose total is known; rank 0 prints what all found."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    import torch

    me = process.start(threads=1)
    backend = torch.distributed.get_backend()
    numbers = (torch.arange(MIB[backend] * 2**18, device=me.device) % 1024).float()  # exact in float32, sums too
    total = numbers * (me.world * (me.world + 1) // 2)

    def summed():
        mine = numbers * (me.rank + 1)
        return mine, _seconds(torch, me, lambda: process.sum_over_ranks(mine))

    wrong = int((summed()[0] != total).sum())
    one = torch.zeros(1, device=me.device)
    latency = statistics.median(_seconds(torch, me, lambda: process.sum_over_ranks(one)) for _ in range(20))
    seconds = statistics.median(summed()[1] for _ in range(TIMES))
    found = process.gather_objects({"host": socket.gethostname(), "wrong": wrong})
    moved = 2 * (me.world - 1) / me.world * numbers.numel() * 4  # bytes that each rank must send at least
    report = {
        "backend": backend,
        "ranks": me.world,
        "hosts": sorted({each["host"] for each in found}),
        "wrong": [k for k, each in enumerate(found) if each["wrong"]],
        "gb_per_s": round(moved / seconds / 1e9, 3),
        "latency_ms": round(latency * 1e3, 3),
    }
    process.say(_MARK + json.dumps(report))


def _seconds(torch, me, action) -> float:
    process.barrier()
    if me.device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    action()
    if me.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def launch(
    slots: dict[str, int],
    *,
    gpus: bool,
    ssh_port: int | None = None,
    address: str | None = None,
    port: int,
    seconds: float,
) -> dict:
    """Start the ranks as a user would and return their report, {"error": why} where there is none.

    slots: ranks per host name, started through ssh; `localhost` alone: here. address, port: where they meet (of the
    first host); gpus: over nccl, else gloo. After `seconds` the launcher is ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        hostfile, log = f"{folder}/hostfile", f"{folder}/log"
        with open(hostfile, "w") as file:
            file.writelines(f"{name} slots={n}\n" for name, n in slots.items())
        where = ["--hostfile", os.devnull, "--num_gpus", str(slots.get("localhost", 0))]
        if list(slots) != ["localhost"]:
            where = ["--hostfile", hostfile, "--force_multi", "--no_ssh_check", "--master_addr", address]
            where += ["--ssh_port", str(ssh_port)] if ssh_port else []
        words = [sys.executable, "-m", "deepspeed.launcher.runner", *where, "--master_port", str(port)]
        code = _run([*words, "--module", "mage_ds", "doctor", "--wire"], log, gpus, seconds)
        with open(log, errors="replace") as file:
            text = file.read()
    report = re.search(rf"{_MARK}({{.*}})", text)
    if report:
        return json.loads(report[1])
    return {"error": f"no answer within {seconds:.0f} s" if code is None else _reason(text.splitlines(), code)}


def _run(words: Sequence[str], log: str, gpus: bool, seconds: float) -> int | None:
    """Its exit code, None where it had to be ended."""
    env = launched.without_rank() | {"PYTHONUNBUFFERED": "1"}
    if not gpus:
        env.setdefault("DS_ACCELERATOR", "cpu")
    with open(log, "w") as file:
        running = subprocess.Popen(
            words, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return running.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Not SIGTERM: DeepSpeed answers it by a `pkill -f` on every host that hits other runs of this user too.
            if running.poll() is None:
                _kill_tree(running.pid)
                running.wait()


def _kill_tree(pid: int) -> None:
    """End a process and all below it: pdsh gives each ssh a process group of its own."""
    import psutil

    parent = psutil.Process(pid)
    parent.suspend()  # or it starts others meanwhile
    for each in [*parent.children(recursive=True), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def _reason(lines: Sequence[str], code: int) -> str:
    """The telling line of a launch that failed."""
    ours = [line for line in lines if "mage-ds: error:" in line]
    named = [
        line for line in lines if re.search(r"[A-Za-z]*(Error|Exception)\b.*: |not installed|command not found", line)
    ]
    last = [line for line in lines if line.strip() and "] [" not in line]
    found = (ours or named or last or [f"exit code {code}"])[-1].strip()
    return found if len(found) <= 300 else found[:297] + "..."
