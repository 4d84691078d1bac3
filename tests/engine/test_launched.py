"""Who a process is by its environment: the environments were recorded in SLURM 22.05 (a step, a script, a shell)."""

import os
import socket

import pytest

from mage_ds.engine import launched

JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[08-10]",
    "SLURM_NTASKS": "7",
    "SLURM_NTASKS_PER_NODE": "3",
    "SLURM_TASKS_PER_NODE": "3(x2),1",
}
SCRIPT = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASK_PID": "99"}
STEP = JOB | {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "gpu[08-10]",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}


def adopted(environ: dict) -> dict:
    """What was added or changed."""
    after = dict(environ)
    launched.adopt(after)
    assert set(environ) <= set(after)
    return {name: value for name, value in after.items() if environ.get(name) != value}


def test_a_task_of_srun_is_a_rank():
    found = adopted(STEP)
    assert 1024 < int(found.pop("MASTER_PORT")) < 32768  # Linux hands out ports from 32768 on
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "2",
        "LOCAL_SIZE": "3",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu08",
    }
    assert adopted(STEP | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"})["LOCAL_SIZE"] == "1"


def test_adopting_twice_changes_nothing_more():
    environ = dict(STEP)
    launched.adopt(environ)
    assert adopted(environ) == {}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        SCRIPT,
        JOB,  # the shell of salloc
        STEP
        | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},  # srun --ntasks 1, salloc's shell on a node
        STEP | {"RANK": "0", "WORLD_SIZE": "16"},  # a launcher, started by srun
    ],
    ids=["no SLURM", "batch script", "salloc", "step of one task", "launcher"],
)
def test_all_else_stays_as_it_is(environ):
    assert adopted(environ) == {}


def test_a_shell_on_a_terminal_is_no_rank_but_what_it_starts_by_srun_is(monkeypatch):
    shell = STEP | {"SLURM_PTY_PORT": "12345"}
    monkeypatch.setattr(os, "isatty", lambda number: number == 0)
    assert adopted(shell) == {}
    monkeypatch.setattr(os, "isatty", lambda number: False)
    assert adopted(shell)["RANK"] == "5"


def test_what_the_user_has_set_stays():
    chosen = {"MASTER_ADDR": "ib-gpu08", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "3"}
    assert not set(adopted(STEP | chosen | {"SLURM_CPUS_PER_TASK": "8"})) & set(chosen)
    assert adopted(STEP | {"WORLD_SIZE": "2"})["WORLD_SIZE"] == "7"  # without a RANK it is a leftover


def test_the_cores_that_slurm_gives_a_task():
    assert adopted(STEP | {"SLURM_CPUS_PER_TASK": "8"})["OMP_NUM_THREADS"] == "8"
    assert "OMP_NUM_THREADS" not in adopted(STEP)


@pytest.mark.parametrize("visible, device", [("3", "0"), ("0,1,2", "2"), ("", "2"), (None, "2")])
def test_a_task_that_sees_one_gpu_only_uses_that(visible, device):
    assert adopted(STEP if visible is None else STEP | {"CUDA_VISIBLE_DEVICES": visible})["LOCAL_RANK"] == device


def test_ports():
    def port(job, step):
        return adopted(STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]

    near = [port(job, step) for job in range(4711, 4721) for step in range(8)]
    assert len(set(near)) == len(near)
    assert 1024 < int(port(67_043_328, 4_294_967_290)) < 32768  # the largest
    with socket.socket() as one:
        one.bind(("127.0.0.1", int(port(4711, 3))))


@pytest.mark.parametrize(
    "text, counts",
    [("1", [1]), ("8(x2)", [8, 8]), ("2(x3),1", [2, 2, 2, 1]), ("1,4(x2),16", [1, 4, 4, 16]), ("8(x128)", [8] * 128)],
)
def test_tasks_per_node(text, counts):
    assert launched.tasks_per_node(text) == counts


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu08", "gpu08"),
        ("gpu08,gpu11", "gpu08"),
        ("gpu[08-11]", "gpu08"),
        ("gpu[08,11-12],login", "gpu08"),
        ("login,gpu[08-11]", "login"),
        ("r1-gpu-[003]", "r1-gpu-003"),
        ("rack[1-2]gpu[4-7]", "rack1gpu4"),
        ("n[1-2].cluster.example", "n1.cluster.example"),
        ("127.0.0.[1-2]", "127.0.0.1"),
    ],
)
def test_first_host(nodes, first):
    assert launched.first_host(nodes) == first


def test_the_record():
    assert launched.slurm({"PATH": "/bin"}) == {}
    found = launched.slurm(STEP | {"SLURM_RESTART_COUNT": "3", "SLURM_JWT": "secret"})
    assert found["SLURM_JOB_ID"] == "4711" and found["SLURM_RESTART_COUNT"] == "3"
    assert "secret" not in found.values()
