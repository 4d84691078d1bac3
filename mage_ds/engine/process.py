"""One process of a run: its rank, its device, what it may say, when it must stop, and who watches over it."""

import atexit
import contextlib
import io
import logging
import os
import re
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from mage_ds.engine import launched, launcher
from mage_ds.errors import UserError


@dataclass(frozen=True)
class Process:
    """Who this process is. `store` is the key-value store of the group (torch.distributed)."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: Any
    store: Any

    @property
    def first(self) -> bool:
        return self.rank == 0


_process: Process | None = None
_stop_reason: str | None = None
_stop: "Stop | None" = None
_points = 0
_interrupted = False


def start(threads: int | None = None) -> Process:
    """Join the process group (gloo on the CPU, nccl on GPUs) once; later calls return the same Process.

    Ranks come from the environment of the launcher or of srun; without one this is a group of a single process. On
    a CPU the cores are shared out between the ranks of a host, because the launcher leaves every rank all of them;
    `threads` fixes the number instead (results depend on it).
    """
    global _process
    import torch

    if _process is None:
        _process = _join(torch)
        if _process.device.type == "cpu" and threads is None and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, len(os.sched_getaffinity(0)) // _process.local_world)
    if threads is not None:
        torch.set_num_threads(threads)
    return _process


def _join(torch) -> Process:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds it too, and warns
    _quiet()
    launched.adopt()
    rank, world = int(os.environ.setdefault("RANK", "0")), int(os.environ.setdefault("WORLD_SIZE", "1"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    local_world = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    asked = os.environ.get("DS_ACCELERATOR", "cuda")  # DeepSpeed's own switch: `cpu` on a machine with GPUs
    device = torch.device("cuda", local_rank) if asked == "cuda" and torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    launcher.watch(lambda: ask_to_stop("launcher died"))
    store = _store(torch, rank, world)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    atexit.register(_leave)

    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed

        # Serves tensor-parallel inference on CPUs alone, and every change of compiler or ninja builds it for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return Process(rank, world, local_rank, local_world, device, torch.distributed.PrefixStore("mage_ds", store))


def _store(torch, rank: int, world: int):
    if world == 1:
        return torch.distributed.HashStore()
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except KeyError as missing:
        raise UserError(
            f"WORLD_SIZE={world} but {missing} is not set: start with `deepspeed --module mage_ds ...` or srun"
        ) from None
    try:
        return torch.distributed.TCPStore(address, port, world, rank == 0, timedelta(minutes=5))
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {port} of {address} is in use, perhaps by another run: "
            f"add `--master_port {port + 1}` to `deepspeed`, or set MASTER_PORT={port + 1} for srun"
        ) from None


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End a rank of several with this exit code, without the interpreter's own way out: a thread of gloo that is
    still about aborts it at times, and a finished rank then counts as a dead one."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _quiet() -> None:
    """DeepSpeed and torch say dozens of lines at start; ours are the ones to read."""
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|deepspeed|timm)\b.*")
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)


# --- what is said, and by whom -------------------------------------------------------------------------------


def say(message: str) -> None:
    """Print one line, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def log_to_file(folder: Path) -> None:
    """From here on, what a rank other than 0 prints goes to `folder`/rank_N.log; its errors stay on the screen."""
    if _process is None or _process.first:
        return
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout = open(folder / f"rank_{_process.rank}.log", "a", buffering=1)  # noqa: SIM115 (lives as long as we do)


def say_error(message: str) -> None:
    """Print one error line: once by rank 0 if it is common to all ranks, else by the rank that has it.

    A rank with an error waits a little for rank 0: where rank 0 has the same, or is gone, it has been said.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"mage-ds: error: {message}", file=sys.stderr, flush=True)
        if _process is not None and _process.world > 1:
            _process.store.set("error/0", message)
            time.sleep(1)  # the store is rank 0's: let the others read before it goes
        return
    if _process is None:
        return
    try:
        _process.store.wait(["error/0"], timedelta(seconds=5))
        said = _process.store.get("error/0").decode()
        common = re.sub(r"\d", "", said) == re.sub(r"\d", "", message)  # counts may differ between ranks
    except Exception as reason:  # what a store raises differs between versions; a timeout means rank 0 is well
        common = "imeout" not in str(reason) and "imed out" not in str(reason)
    if not common:
        print(f"mage-ds: error: rank {_process.rank}: {message}", file=sys.stderr, flush=True)


# --- talking to the other ranks ------------------------------------------------------------------------------


def barrier() -> None:
    import torch

    if _process.world > 1:
        torch.distributed.barrier()


def broadcast_object(value, source: int = 0):
    """`value` of rank `source`, on every rank."""
    import torch

    if _process.world == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=source, device=_process.device)
    return box[0]


def gather_objects(value) -> list:
    """The `value` of every rank, in order of rank, on every rank."""
    import torch

    if _process.world == 1:
        return [value]
    values = [None] * _process.world
    torch.distributed.all_gather_object(values, value)
    return values


def sum_over_ranks(tensor):
    """`tensor` summed over the ranks, in place; returns it."""
    import torch

    if _process.world > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def device_name() -> str:
    """What results depend on, up to rounding, beside the settings: "cpu", or which GPU."""
    import torch

    device = start().device
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def on_first(action):
    """`action()` on rank 0 only; its result, or its UserError, on every rank (files are touched by one rank)."""
    outcome = None
    if _process.first:
        try:
            outcome = (action(), None)
        except UserError as error:
            outcome = (None, str(error))
    result, error = broadcast_object(outcome)
    if error is not None:
        raise UserError(error)
    return result


# --- stopping ------------------------------------------------------------------------------------------------


def stop_on_signals() -> None:
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop at the next micro-batch; a second SIGINT interrupts at once."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _on_signal)


def _on_signal(number, frame) -> None:
    global _stop_reason, _interrupted
    if number == signal.SIGINT and _interrupted:
        raise KeyboardInterrupt
    _interrupted = _interrupted or number == signal.SIGINT
    _stop_reason = signal.Signals(number).name


class Stop:
    """Agrees on the micro-batch before which all ranks stop, through the store, without a collective.

    A signal reaches the ranks one after the other, and a collective that only some of them enter hangs. So each
    rank notes the micro-batch that it is about to begin, then looks whether a stop is on; rank 0, once asked,
    announces the stop, reads what every rank has begun, and names the first that none has. Whoever sees the
    announcement waits for that number: rank 0 is then about to write it.
    """

    def __init__(self, process: Process):
        self._process = process
        self._at: int | None = None
        process.store.set(f"begun/{process.rank}", "-1")

    def due(self, micro: int) -> str | None:
        """The reason to stop before micro-batch `micro` (counted from the start of this process), or None."""
        store, first = self._process.store, self._process.first
        if self._process.world == 1:
            return _stop_reason
        store.set(f"begun/{self._process.rank}", str(micro))
        if _stop_reason is not None and not store.check(["stop_request"]):
            store.set("stop_request", _stop_reason)
        if self._at is None and first and store.check(["stop_request"]):
            store.set("stopping", "1")
            begun = [int(store.get(f"begun/{rank}")) for rank in range(self._process.world)]
            store.set("stop_at", str(max(begun) + 1))
        if self._at is None and store.check(["stopping"]):
            self._at = int(store.get("stop_at"))
        if self._at is None or micro < self._at:
            return None
        return store.get("stop_request").decode()


class StopAsked(Exception):
    """A stop is due, for the reason it says, and nothing has been saved yet."""


def begin_stops() -> None:
    """From here on `stop_point` counts; every rank calls it before the same work."""
    global _stop, _points
    _stop, _points = Stop(_process), 0


def stop_point() -> None:
    """Raises StopAsked where all ranks are to leave here. Every rank comes by the same points, in the same order:
    before each micro-batch, of training or held out."""
    global _points
    if _stop is None:
        return
    _points += 1
    if reason := _stop.due(_points - 1):
        raise StopAsked(reason)


def ask_to_stop(reason: str) -> None:
    """Ask for a stop at the next point, as a signal does."""
    global _stop_reason
    _stop_reason = _stop_reason or reason
