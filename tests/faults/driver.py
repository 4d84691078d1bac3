"""Started in place of `--module mage_ds`: the same program, but at given places of its life a rank meets a fault.

deepspeed driver.py FAULTS mage_ds's arguments. FAULTS is JSON: {"marker": file that a fault is noted in, "faults":
[{"place", "rank", "at": at the how many-th passage in this life, "times": and the following ones, "does", ...}]}.
"""

import ctypes
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

PASSED: dict[str, int] = {}
RANK = int(os.environ["RANK"])


def main() -> None:
    first, *rest = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    plant(json.loads(first))
    sys.argv = ["mage-ds", *rest]
    from mage_ds import cli

    cli.entry()


def plant(planned: dict) -> None:
    """Put a hook at every place."""
    from mage_ds.engine import checkpoint, held_out, wrap
    from mage_ds.tasks import pretrain

    mine = [fault for fault in planned["faults"] if fault["rank"] == RANK]

    def passing(place: str, loss=None, file: Path | None = None):
        PASSED[place] = PASSED.get(place, 0) + 1
        for fault in mine:
            if fault["place"] == place and 0 <= PASSED[place] - fault.get("at", 1) < fault.get("times", 1):
                Path(planned["marker"]).write_text(f"{time.time()} {place} {fault['does']} {RANK}")
                loss = meet(fault, loss, file)
        return loss

    def before(module, name: str, place: str) -> None:
        real = getattr(module, name)
        setattr(module, name, lambda *args, **options: (passing(place), real(*args, **options))[1])

    before(wrap, "wrap", "start-up")
    before(held_out, "batches", "validation")
    checkpoint._FILE_BYTES = 12000  # so that both ranks write files of a tiny model
    save_file, rename, step_fn = checkpoint.save_file, os.rename, pretrain.step_fn
    begun = set()

    def save_and_pass(tensors, path):
        save_file(tensors, path)
        if path.parent not in begun:  # the first file of this rank
            begun.add(path.parent)
            passing("save", file=path)

    def rename_and_pass(source, target, **options):
        published = re.fullmatch(r"step_\d+", Path(target).name) and Path(source).name.endswith(".part")
        if published:
            passing("publish", file=sorted(Path(source).glob("*.safetensors"))[0])
        rename(source, target, **options)
        if published:
            passing("published")

    def step_and_pass(*args, **options):
        for name, loss, logs in step_fn(*args, **options):
            yield name, passing("step", loss), logs

    checkpoint.save_file, os.rename, pretrain.step_fn = save_and_pass, rename_and_pass, step_and_pass


def meet(fault: dict, loss, file: Path | None):
    match fault["does"]:
        case "signal":
            for pid in targets(fault["to"]):
                os.kill(pid, signal.Signals[fault["signal"]])
        case "fill":
            fill(Path(fault["disk"]))
        case "nan":
            loss = loss * float("nan")
        case "truncate":
            os.truncate(file, file.stat().st_size // 2)
        case "sleep":
            time.sleep(1000)
        case "hold":  # in C, with the lock of the interpreter: a mutex that is locked twice, which no signal ends
            library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
            library.pthread_mutex_lock(mutex)
            library.pthread_mutex_lock(mutex)
    return loss


def targets(who: str) -> list[int]:
    launcher = os.getppid()
    if who == "ranks":
        return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    outer = int(Path(f"/proc/{launcher}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return [{"me": os.getpid(), "launch.py": launcher, "deepspeed": outer}[who]]


def fill(disk: Path) -> None:
    """Leave no byte free: what is written from now on fails, as it does for everybody on a full disk."""
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError:
                continue


if __name__ == "__main__":
    main()
