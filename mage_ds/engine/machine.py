"""What one host is: versions, GPUs, limits, compilers, and how fast it decodes and writes.

Another process asks (`Session` in tasks/doctor.py), through ssh where that is another machine: one JSON object a
line in, one out. So a check that hangs or crashes costs its own answer only.
"""

import faulthandler
import functools
import hashlib
import io
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import mage_ds

MARK = "mage-ds answers "  # begins our lines: a login shell may have its own to say
GRACE_S = 10  # after a check's limit; then the process ends, whatever it waits for
_IDLE_S = 300  # without a question: the asker's machine is gone
_GIB = 2**30


# --- what is installed ---------------------------------------------------------------------------------------


def packages() -> dict:
    """Python, the package's files, its requirements as they stand in its metadata, and what of them is installed."""
    try:
        requires = metadata.requires("mage_ds") or []
    except metadata.PackageNotFoundError:
        raise RuntimeError(f"mage_ds is not installed for {sys.executable}: `pip install -e .` in its folder") from None
    names = {re.match(r"[\w.-]+", line)[0] for line in requires}
    installed = {}
    for name in sorted(names):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "mage_ds": mage_ds.__version__,
        "files": _digest(Path(mage_ds.__file__).parent),
        "requires": requires,
        "installed": installed,
    }


def _digest(folder: Path) -> str:
    """Of the package's files: two checkouts of one version may differ."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".yaml")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def gpus() -> dict:
    """torch as it imports, the CUDA and NCCL it was built with, and the GPUs that it and the driver see."""
    import torch

    seen = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    found = [torch.cuda.get_device_properties(k) for k in seen]
    nccl = torch.cuda.nccl.version() if torch.version.cuda and torch.distributed.is_nccl_available() else None
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "gpus": [{"name": each.name, "gib": round(each.total_memory / _GIB, 1)} for each in found],
        "nvidia_smi": _nvidia_smi(),
    }


def _nvidia_smi() -> list[dict] | None:
    """The driver's own view, or None where there is no driver."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.used,driver_version", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 2]
    return [{"name": name, "used_gib": round(float(used) / 1024, 1), "driver": driver} for name, used, driver in rows]


# --- the machine ---------------------------------------------------------------------------------------------


def system() -> dict:
    """Cores, memory, shared memory in GiB, and the limits of a process (None: unlimited)."""
    import psutil

    memory, shm = psutil.virtual_memory(), os.statvfs("/dev/shm")
    most = min(memory.total, _cgroup_memory() or memory.total)
    limits = {
        "open_files": resource.RLIMIT_NOFILE,
        "locked_memory": resource.RLIMIT_MEMLOCK,
        "processes": resource.RLIMIT_NPROC,
    }
    soft = {name: resource.getrlimit(number)[0] for name, number in limits.items()}
    return {
        "host": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": round(most / _GIB, 1),
        "available": round(min(most, memory.available) / _GIB, 1),
        "shm": round(shm.f_frsize * shm.f_blocks / _GIB, 3),
        "shm_free": round(shm.f_frsize * shm.f_bavail / _GIB, 3),
        "limits": {name: None if value == resource.RLIM_INFINITY else value for name, value in soft.items()},
        "infiniband": Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()),
    }


def _cgroup_memory() -> int | None:
    """A container's limit, in bytes."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):  # another version, or `max`
            continue
    return None


def build() -> dict:
    """What compiles DeepSpeed's ops at their first use."""
    return {
        "compiler": _first_line([os.environ.get("CXX", "c++"), "--version"]),  # torch's choice
        "ninja": _first_line(["ninja", "--version"]),
        "python_h": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        "nvcc": _first_line(["nvcc", "--version"]) is not None,
        "bin": str(Path(sys.executable).parent),
    }


def ops() -> dict:
    """Which of DeepSpeed's ops could be compiled here, as it says itself; nothing is compiled."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.ops.op_builder.builder import probe_is_compatible

    real = {name: builder for name, builder in ALL_OPS.items() if name != "deepspeed_not_implemented"}
    fits = {name: probe_is_compatible(builder) for name, builder in real.items()}
    return {"fit": sorted(name for name, good in fits.items() if good), "all": len(fits)}


def _first_line(words: list[str]) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0] if done.returncode == 0 else None


# --- speed ---------------------------------------------------------------------------------------------------


class _Made:
    """A catalog of pictures that lie in memory: JPEGs of 256 to 500 pixels, blurred shapes with some grain."""

    n = 64

    def __init__(self):
        import numpy as np
        from PIL import Image

        draw, self._files = np.random.default_rng(0), []
        for _ in range(self.n):
            width, height = draw.integers(256, 501, size=2)
            coarse = Image.fromarray(draw.integers(0, 256, size=(8, 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
            grain = draw.integers(-8, 9, size=smooth.shape, dtype=np.int16)
            stream = io.BytesIO()
            Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
            self._files.append(stream.getvalue())

    def read(self, i: int) -> bytes:
        return self._files[i]

    def name(self, i: int) -> str:
        return f"made {i}"

    def label(self, i: int) -> int:
        return -1


def decode(data: str | None = None, seconds: float = 3.0) -> dict:
    """Pictures a second through the training's own pipeline, for one rank: made ones, or the data set's."""
    import torch

    from mage_ds import recipes
    from mage_ds.inputs import dali
    from mage_ds.inputs.catalog import open_catalog
    from mage_ds.inputs.quarantine import Quarantine

    catalog = open_catalog(data, "train") if data else _Made()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    broken, batch = Quarantine(None, 1.0, catalog.n), 32
    stream = dali.stream(
        catalog,
        seed=0,
        position=0,
        batch=batch,
        micro_batch=batch,
        rank=0,
        world=1,
        inputs=recipes.load_recipe("pretrain_vit_base").inputs,
        device=device,
        quarantine=broken,
    )
    try:
        for _ in range(dali.AHEAD + 1):  # what was made while nobody waited would flatter
            next(stream)
        begin, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - begin) < seconds:
            next(stream)
            done += batch
    finally:
        stream.close()
    return {"rate": round(done / spent, 1), "device": device, "broken": broken.count}


def listing(data: str) -> dict:
    """The training pictures of a data set, as every host must see them."""
    from mage_ds.inputs.catalog import open_catalog

    catalog = open_catalog(data, "train")
    return {"n": catalog.n, "fingerprint": catalog.fingerprint}


def disk(folder: str, mib: int = 64, seconds: float = 5.0) -> dict:
    """MB/s of writing a file in the folder down to its disk, and of reading it back, each for 5 s at most."""
    path, block = Path(folder, f".mage-ds-doctor-{socket.gethostname()}-{os.getpid()}"), os.urandom(2**22)
    try:
        begin, written = time.perf_counter(), 0
        with open(path, "wb", buffering=0) as file:
            while written < mib * 2**20 and time.perf_counter() - begin < seconds:
                written += file.write(block)
                os.fsync(file.fileno())
            write = written / (time.perf_counter() - begin)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read from the disk, not from memory
        begin, read = time.perf_counter(), 0
        with open(path, "rb", buffering=0) as file:
            while (part := len(file.read(2**22))) and time.perf_counter() - begin < seconds:
                read += part
        read /= time.perf_counter() - begin
    finally:
        path.unlink(missing_ok=True)
    return {"write": round(write / 1e6, 1), "read": round(read / 1e6, 1), "free": _free(folder)}


def _free(folder: str) -> float:
    return round(shutil.disk_usage(folder).free / _GIB, 1)


# --- what several hosts do together, step by step --------------------------------------------------------------


def clock() -> float:
    return time.time()


def leave_file(path: str, text: str) -> None:
    """Write a new file, down to the disk."""
    with open(path, "x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def see_files(paths: list[str], patience: float) -> list[str | None]:
    """What the files hold (None: not there). Network file systems may show a new file after seconds."""
    end = time.monotonic() + patience
    while True:
        found = [_text(path) for path in paths]
        if None not in found or time.monotonic() > end:
            return found
        time.sleep(0.2)


def _text(path: str) -> str | None:
    try:
        os.listdir(Path(path).parent)  # asks a network file system anew
        return Path(path).read_text()
    except OSError:
        return None


def take_file(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def meeting_place() -> dict:
    """An address of this host that others reach, and a free port."""
    with socket.socket() as one:
        one.bind(("", 0))
        port = one.getsockname()[1]
    reached = os.environ.get("SSH_CONNECTION", "").split()
    address = reached[2] if len(reached) == 4 else ""
    if not address or address.startswith("127.") or address == "::1":
        own = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10).stdout.split()
        address = own[0] if own else "127.0.0.1"
    return {"address": address, "port": port}


# --- questions and answers -------------------------------------------------------------------------------------


class Check(NamedTuple):
    """seconds: its limit; shown: what the user is told while it runs, where that takes a while."""

    run: object
    seconds: int
    shown: str = ""


CHECKS = {
    "packages": Check(packages, 20),
    "gpus": Check(gpus, 60, "torch and GPUs"),
    "system": Check(system, 20),
    "build": Check(build, 60),
    "ops": Check(ops, 90, "DeepSpeed's ops"),
    "decode": Check(decode, 60, "decoding pictures"),
    "listing": Check(listing, 120, "listing the data set"),
    "disk": Check(disk, 60, "writing and reading the shared path"),
    "clock": Check(clock, 10),
    "leave_file": Check(leave_file, 20),
    "see_files": Check(see_files, 30),
    "take_file": Check(take_file, 20),
    "meeting_place": Check(meeting_place, 20),
}


def answer() -> None:
    """Answer questions {"check", ...its arguments} from stdin with {"value"} or {"error"} until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    signal.signal(signal.SIGALRM, _too_long)
    nowhere = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives)
    until = functools.partial(faulthandler.dump_traceback_later, exit=True, file=nowhere)

    def say(what: dict) -> None:
        out.write(MARK + json.dumps(what) + "\n")
        out.flush()

    until(_IDLE_S)
    say({"value": "ready"})
    for line in sys.stdin:
        question = json.loads(line)
        check = CHECKS[question.pop("check")]
        until(check.seconds + GRACE_S)  # also where a library holds the interpreter
        signal.alarm(check.seconds)
        try:
            reply = {"value": check.run(**question)}
        except BaseException as error:  # a check's failure is its result
            reply = {"error": _short(error)}
        signal.alarm(0)
        until(_IDLE_S)
        say(reply)
    os._exit(0)  # threads of a check that did not end do not matter any more


def _too_long(number, frame):
    raise TimeoutError("took too long")


def _short(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    plain = isinstance(error, RuntimeError | TimeoutError) or type(error).__name__ == "UserError"
    return text if plain and text else f"{type(error).__name__}: {text}".removesuffix(": ")
