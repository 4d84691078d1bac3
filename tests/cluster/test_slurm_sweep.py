"""A table on a real cluster of two nodes: arrays that wait for each other, a task that goes back into the queue, one
that is cancelled, and the same command given again."""

import json
from pathlib import Path

import pytest
from launched import status
from made_sweep import HEAD, MAGE
from slurm import Cluster, missing

pytestmark = [pytest.mark.full, pytest.mark.processes, pytest.mark.skipif(bool(missing()), reason=missing())]

# What the head asks for and this machine lacks; one node and one rank for each job.
HERE = "--partition=main --account=none --gpus-per-node=0 --ntasks-per-node=1 --cpus-per-task=1"
TABLE = f"""{HEAD}
rows:
  cls:
    digits: {{train: {{recipe: digits_mage, set: [{MAGE}, duration.steps=2]}}}}
  mask:
    digits: {{train: {{recipe: digits_mage, set: [{MAGE}, duration.steps=400, model.padding=mask]}}}}
"""
LINE = ["table.yaml", "--scale", "digits", "--out", "x"]


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as one:
        yield one


def submit(cluster, place: Path) -> list[str]:
    """The numbers of the arrays."""
    asked = cluster.run("mage-ds", "sweep", *LINE, f"--slurm={HERE}", cwd=place)
    assert asked.returncode == 0, asked.stderr
    assert "then: mage-ds sweep table.yaml --out x --table" in asked.stdout
    return [line.split()[1].rstrip(":") for line in asked.stdout.splitlines() if line.startswith("array ")]


def masked(place: Path) -> Path | None:
    """The run of the second row, once it has begun."""
    for path in (place / "x" / "runs").glob("digits_mage-*/recipe.yaml"):
        if "padding: mask" in path.read_text():
            return path.parent
    return None


def step(run: Path | None) -> int:
    log = run / "metrics.jsonl" if run else None
    lines = log.read_text().split("\n")[:-1] if log and log.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait(cluster, place: Path, condition, seconds: float = 240.0) -> None:
    said = lambda: "\n".join(path.read_text()[-1500:] for path in place.glob("slurm-*.out"))  # noqa: E731
    assert cluster._wait(condition, seconds), f"{cluster.squeue()}\n{said()}"


def test_from_nothing_to_the_table(cluster, tmp_path):
    (tmp_path / "table.yaml").write_text(TABLE)
    arrays = submit(cluster, tmp_path)
    assert len(arrays) == 4  # data; tokenizer; both MAGEs; two scores and two probes
    again = cluster.run("mage-ds", "sweep", *LINE, f"--slurm={HERE}", cwd=tmp_path)
    assert again.returncode == 2 and "of this table are in the queue" in again.stderr, again.stderr

    wait(cluster, tmp_path, lambda: step(masked(tmp_path)) > 10)
    run = masked(tmp_path)
    listed = json.loads(next((tmp_path / "x" / "jobs").glob("table-*.json")).read_text())
    task = f"{arrays[2]}_{next(i for i, job in enumerate(listed) if job['name'] == run.name)}"
    output = tmp_path / f"slurm-{task}.out"
    assert cluster.run("scancel", "--signal=USR1", task, cwd=tmp_path).returncode == 0  # as --signal does
    wait(cluster, tmp_path, lambda: "resumed" in output.read_text())
    assert "SIGUSR1: stopping; saving step" in output.read_text() and "queued again" in output.read_text()
    before = step(run)
    wait(cluster, tmp_path, lambda: step(run) > before + 5)
    assert cluster.run("scancel", task, cwd=tmp_path).returncode == 0
    wait(cluster, tmp_path, lambda: not cluster.squeue())

    # What does not need the cancelled job is done, what needs it says so.
    assert status(run)["state"] != "finished"
    told = cluster.run("mage-ds", "sweep", *LINE, "--table", cwd=tmp_path).stdout
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line.startswith(("cls", "mask"))}
    assert len(rows["cls"]) == 2 and rows["mask"] == [] and "5 of 8 jobs are done" in told
    refused = [path.read_text() for path in tmp_path.glob(f"slurm-{arrays[3]}_*.out")]
    assert sum(f"needs {run.name}, which is not done" in text for text in refused) == 2

    done = {path: path.stat().st_mtime for path in (tmp_path / "x").glob("*/*/*.json") if run not in path.parents}
    assert len(submit(cluster, tmp_path)) == 2
    wait(cluster, tmp_path, lambda: not cluster.squeue())
    assert {path: path.stat().st_mtime for path in done} == done
    told = cluster.run("mage-ds", "sweep", *LINE, "--table", cwd=tmp_path).stdout
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line.startswith(("cls", "mask"))}
    assert [len(row) for row in rows.values()] == [2, 2] and "8 of 8 jobs are done" in told, told
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if "lr" in line]
    assert steps == [*range(1, 401)]
    nothing = cluster.run("mage-ds", "sweep", *LINE, f"--slurm={HERE}", cwd=tmp_path)
    assert "all 8 jobs are done already" in nothing.stdout and not cluster.squeue()
