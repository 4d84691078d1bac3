"""launch/slurm_train.sbatch, as it is, on a real cluster of two nodes: jobs go back into the queue and continue."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from launched import OFTEN, TINY, losses, mage_ds, run, status
from slurm import Cluster, missing

pytestmark = [pytest.mark.full, pytest.mark.processes, pytest.mark.skipif(bool(missing()), reason=missing())]

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm_train.sbatch"
SAMPLE = SCRIPT.with_name("slurm_sample.sbatch")
# What the head asks for and this machine lacks; two nodes, one rank on each.
HERE = ["--partition=main", "--account=none", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1"]
ASK = """
import os, sys
from mage_ds.engine import launched
launched.adopt()
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR")
print(sys.argv[1], *(os.environ.get(name, "-") for name in names), flush=True)
"""


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as one:
        yield one


@pytest.fixture
def line(made, tmp_path):
    data, tokenizer = made
    return ["digits_mage", *TINY, *OFTEN, "--data", data, "--tokenizer", tokenizer]


def again(job, count: int) -> str:
    """What the start number `count` (from 1) has said by now; empty before it."""
    starts = job.output.split(f"slurm_train: job {job.number}, start ")
    return starts[count] if len(starts) > count else ""


def has_trained(job, folder: Path, start: int, steps: int = 20) -> None:
    """Wait until this start has trained for some steps."""
    job.until(lambda: "\nstep " in again(job, start))
    before = losses(folder)[-1][0]
    job.until(lambda: losses(folder)[-1][0] >= before + steps)


def test_who_is_a_rank(cluster, tmp_path):
    """In a batch script and in a shell on a node a program is one process; as several tasks of srun it is ranks."""
    (tmp_path / "ask.py").write_text(ASK)
    ask = f"{sys.executable} ask.py"
    (tmp_path / "job").write_text(
        f"#!/bin/bash\n{ask} script\nsrun {ask} step\nsrun --ntasks=1 --nodes=1 {ask} alone\n"
        f"script -qc 'srun --pty bash -c \"{ask} shell\"' /dev/null\n"
    )
    job = cluster.submit("--nodes=2", "--ntasks=3", "job", cwd=tmp_path)
    facts = job.ended(60)
    assert facts["JobState"] == "COMPLETED", job.output
    said = sorted(re.findall(r"(?:alone|script|shell|step)(?: [\w.-]+){5}", job.output))
    assert said == [
        "alone - - - - -",
        "script - - - - -",
        "shell - - - - -",
        "step 0 3 0 2 127.0.0.1",
        "step 1 3 1 2 127.0.0.1",
        "step 2 3 0 1 127.0.0.1",
    ], job.output


def test_a_job_that_was_disturbed_three_times_ends_as_an_undisturbed_run(cluster, line, tmp_path):
    line = [*line, "duration.steps=400", "report.checkpoint_every.steps=50"]
    run("train", *line, "--out", tmp_path / "undisturbed", cwd=tmp_path)
    folder = tmp_path / "run"
    job = cluster.submit(*HERE, SCRIPT, *line, "--out", "run", cwd=tmp_path)

    has_trained(job, folder, 1)
    assert cluster.run("scontrol", "requeue", job.number, cwd=tmp_path).returncode == 0  # as a preemption does
    has_trained(job, folder, 2)
    assert "resumed run at step" in again(job, 2)
    assert cluster.run("scancel", "--signal=USR1", job.number, cwd=tmp_path).returncode == 0  # as --signal does
    has_trained(job, folder, 3)
    assert "SIGUSR1: stopping; saving step" in again(job, 2) and "queued again" in again(job, 2)
    os.kill(cluster.rank(1), signal.SIGKILL)
    facts = job.ended()

    assert "exit code 137" in again(job, 3) and "queued again" in again(job, 3)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "3"), job.output
    assert status(folder)["state"] == "finished"
    assert losses(folder) == losses(tmp_path / "undisturbed")
    noted = json.loads((folder / "environment.json").read_text())["slurm"]
    assert noted["SLURM_JOB_ID"] == job.number and noted["SLURM_RESTART_COUNT"] == "3"
    assert noted["SLURM_STEP_NODELIST"] == "127.0.0.[1-2]" and "127.0.0.[1-2]" in again(job, 1)

    sample = ["mage_ds", "sample", "run", "-n", "12", "--batch", "4"]
    python = [sys.executable, "-m"]
    done = cluster.run("srun", "--nodes=2", "--ntasks=2", *python, *sample, "--out", "by_two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mage_ds(*sample[1:], "--out", "by_one", cwd=tmp_path)
    for picture in sorted((tmp_path / "by_one").glob("0*.png")):
        assert picture.read_bytes() == (tmp_path / "by_two" / picture.name).read_bytes()


def test_a_job_saves_before_its_time_is_up_and_stays_away_when_cancelled(cluster, line, tmp_path):
    line = [*line, "duration.steps=1000000", "report.checkpoint_every.steps=1000000"]
    folder = tmp_path / "run"
    # SLURM looks at the clock twice a minute: the signal comes up to a minute early.
    job = cluster.submit(*HERE, "--time=2", "--signal=USR1@60", SCRIPT, *line, "--out", "run", cwd=tmp_path)
    has_trained(job, folder, 2)
    assert "SIGUSR1: stopping; saving step" in again(job, 1)
    assert "queued again" in again(job, 1) and "resumed run at step" in again(job, 2)
    assert cluster.run("scancel", job.number, cwd=tmp_path).returncode == 0
    facts = job.ended(60)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "1"), job.output
    job.until(lambda: cluster.rank(0) is None and cluster.rank(1) is None, 60)
    assert "queued again" not in again(job, 2)
    steps = [step for step, _ in losses(folder)]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize(
    "words, says",
    [
        (["no_such_recipe", "--data", "x", "--out", "run"], "mage-ds: error: recipe no_such_recipe"),
        (
            ["digits_mage", "--data", "x", "--tokenizer", "random", "--out=run"],
            "mage-ds: error: x: no such data folder",
        ),
        (["digits_mage", "--data", "x"], "slurm_train: error: --out RUN is missing"),
    ],
    ids=["recipe", "data", "out"],
)
def test_a_mistake_ends_the_job(cluster, tmp_path, words, says):
    job = cluster.submit(*HERE, SCRIPT, *words, cwd=tmp_path)
    facts = job.ended(120)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), job.output
    assert says in job.output and "Traceback" not in job.output
    assert not (tmp_path / "run").exists()


def test_deaths_that_bring_no_checkpoint_end_the_job(cluster, tmp_path):
    """A Python that dies as a rank, and answers the script's questions."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\n[ "$2" = mage_ds ] && kill -9 $$\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    job = cluster.submit(*HERE, SCRIPT, "any", "--out", "run", cwd=tmp_path, VIRTUAL_ENV=str(tmp_path / "env"))
    facts = job.ended(120)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "137:0", "3"), job.output
    assert "not queued again: 4 starts without a checkpoint after step 0" in job.output


def test_a_sweep_trains_each_line_of_a_file(cluster, line, tmp_path):
    """Each member goes back into the queue by itself, the last one too, which has the array's own number."""
    (tmp_path / "sweep.txt").write_text("\nseed=7\n'model.encoder={depth: 2, width: 32, heads: 2}' seed=8\n")
    line = [*line, "duration.steps=400", "--out", "runs"]
    jobs = cluster.submit(*HERE, "--array=1-3", SCRIPT, *line, cwd=tmp_path, SWEEP="sweep.txt")
    folders = {task: tmp_path / "runs" / str(task) for task in (1, 2, 3)}
    waiting = [2, 3]
    while waiting:  # in whichever order they get the nodes
        task = jobs.until(lambda: next((each for each in waiting if len(losses(folders[each])) > 20), None))
        name = f"{jobs.number}_{task}"
        assert cluster.run("scancel", "--signal=USR1", name, cwd=tmp_path).returncode == 0
        waiting.remove(task)
    jobs.until(lambda: not cluster.squeue())
    said = {task: (tmp_path / f"slurm-{jobs.number}_{task}.out").read_text() for task in (1, 2, 3)}
    for task, seed, depth in ((2, 7, 1), (3, 8, 2)):
        assert status(folders[task])["state"] == "finished", said[task]
        assert [step for step, _ in losses(folders[task])] == list(range(1, 401))
        assert said[task].count("queued again") == 1 and "resumed runs" in said[task], said[task]
        recipe = (folders[task] / "recipe.yaml").read_text()
        assert f"seed: {seed}\n" in recipe and f"depth: {depth}" in recipe
    assert "SWEEP=sweep.txt: has no line 1" in said[1]
    assert not folders[1].exists()


def test_an_array_of_two_jobs_makes_one_set(cluster, line, tmp_path):
    """Each task is one job of two workers on one node; one worker is killed, and the others make its tiles."""
    mage_ds("train", *line, "duration.steps=2", "--out", tmp_path / "run", cwd=tmp_path)
    sample = ["run", "-n", "600", "--batch", "4", "--class-label", "1"]
    job = cluster.submit(*HERE, SAMPLE, *sample, "--out", "refused", cwd=tmp_path)
    facts = job.ended()
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), job.output
    assert "--class-label 1: run knows no classes" in job.output and not (tmp_path / "refused").exists()

    sample = [*sample[:-2], "--format", "tar"]
    mage_ds("sample", *sample, "--out", "by_one", cwd=tmp_path)
    here = [*HERE, "--ntasks-per-node=2", "--array=1-2"]
    jobs = cluster.submit(*here, SAMPLE, *sample, "--out", "by_four", cwd=tmp_path)
    jobs.until(lambda: len(list((tmp_path / "by_four" / ".tiles").glob("*"))) > 2)
    os.kill(cluster.rank(1), signal.SIGKILL)
    jobs.until(lambda: not cluster.squeue(), 300)
    said = [(tmp_path / f"slurm-{jobs.number}_{task}.out").read_text() for task in (1, 2)]
    assert sum("600 pictures in by_four" in each for each in said) >= 1, said
    one, four = (
        {p.name: p.read_bytes() for p in (tmp_path / name).glob("*") if p.is_file()} for name in ("by_one", "by_four")
    )
    assert one == four and "00000.tar" in one
