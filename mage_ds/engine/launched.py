"""Who started this process: a launcher that says so (RANK is set), `srun`, or nobody. Imports no torch.

`srun` needs no launcher besides: its tasks learn from SLURM's environment what `deepspeed` would have told them.
"""

import os
import re
from collections.abc import Mapping, MutableMapping

_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PORTS = (12_000, 20_000)  # first, count: below the ports that Linux hands out by itself
_RECORDED = (
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_ACCOUNT",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_STEP_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_TASKS_PER_NODE",
)


def adopt(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what a launcher sets (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR, MASTER_PORT) in a task of srun.

    Nothing is done where RANK is set, or where this is no step of several tasks. A MASTER_ADDR or MASTER_PORT stays.
    """
    if "RANK" in environ or not _in_step(environ):
        return
    local_size = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
    own_gpu = re.fullmatch("[^,]+", environ.get("CUDA_VISIBLE_DEVICES", ""))  # by --gpus-per-task: it is number 0
    environ.update(
        RANK=environ["SLURM_PROCID"],
        WORLD_SIZE=environ["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK="0" if own_gpu else environ["SLURM_LOCALID"],
        LOCAL_SIZE=str(local_size),
        LOCAL_WORLD_SIZE=str(local_size),
    )
    environ.setdefault("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"]))
    environ.setdefault("MASTER_PORT", str(_port(int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"]))))
    if "SLURM_CPUS_PER_TASK" in environ:  # the cores of the host are shared out already
        environ.setdefault("OMP_NUM_THREADS", environ["SLURM_CPUS_PER_TASK"])


def _in_step(environ: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of `srun`.

    A batch script and an `salloc` shell have SLURM_NTASKS too, the script even SLURM_PROCID, but no step of several
    tasks. `srun --ntasks 4 --pty bash` is one, and its shell is for one process at a time.
    """
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2 or "SLURM_STEP_ID" not in environ:
        return False
    return "SLURM_PTY_PORT" not in environ or not any(os.isatty(number) for number in (0, 1, 2))


def _port(job: int, step: int) -> int:
    """Steps of one job that run side by side, and jobs that share a host, have different ports."""
    start, count = _PORTS
    return start + (job * 8 + step) % count


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form of the number of tasks on each node: "2(x3),1" -> [2, 2, 2, 1]."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first name of SLURM's short form of a list of nodes: "gpu[08-11,20],login" -> "gpu08"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)[0]  # up to the first comma outside brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def without_rank(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for a process that is no rank of this one's launch."""
    return {name: value for name, value in environ.items() if name not in _OF_A_RANK}


def slurm(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What SLURM says about the job of this process, for the record; empty outside a job."""
    return {name: environ[name] for name in _RECORDED if name in environ}
