"""Jobs of a table, done one after the other: by a program that stands for mage_ds, and is killed and told to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import environment

from mage_ds.engine import jobs
from mage_ds.errors import UserError
from mage_ds.recipes.jobs import Graph, Job

pytestmark = pytest.mark.processes

# `train NAME... --out RUN`: notes that it was started; a `slow` one waits until it is told, and says by what.
STANDS_FOR = """
import json, os, pathlib, signal, sys, time
words = sys.argv[sys.argv.index("train"):]
run = pathlib.Path(words[-1])
run.mkdir(parents=True, exist_ok=True)
with open(run.parent / "started", "a") as file:
    file.write(f"{run.name} {os.getpid()}\\n")
def told(number, frame):
    (run / "told").write_text(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGINT, told)
if "slow" in words and not (run.parent / "go").exists():
    print("step 1/2", flush=True)
    time.sleep(60)
if "wrong" in words:
    print("a line\\nmage-ds: error: --data x: no such data folder\\nand one more")
    sys.exit(2)
(run / "status.json").write_text(json.dumps({"state": "finished"}))
"""
RUN = """
import json, sys
from pathlib import Path
from mage_ds.engine import jobs
from mage_ds.errors import Stopped
listed = {job.name: job for job in jobs.read(Path("jobs.json"))}
try:
    print("LOST", json.dumps(jobs.run_all(listed, Path("."), json.loads(sys.argv[1]), print)))
except Stopped as stopped:
    print("STOPPED", stopped)
"""


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a program and jobs: b needs a, d needs c, e needs nothing; c is wrong, e is slow."""
    (tmp_path / "stands_for.py").write_text(STANDS_FOR)
    needs = {"a": [], "b": ["a"], "c": [], "d": ["c"], "e": []}
    words = {"c": ["wrong"], "e": ["slow"]}
    listed = {
        name: Job(name, ["train", *words.get(name, []), "--out", f"runs/{name}"], its, f"runs/{name}", ["row"])
        for name, its in needs.items()
    }
    jobs.write(tmp_path / "jobs.json", listed)
    return tmp_path


def begin(place: Path) -> subprocess.Popen:
    launch = [sys.executable, "stands_for.py", "--local_rank=0"]  # a rank, as launchers mark theirs
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-u", "-c", RUN, json.dumps(launch)],
        cwd=place,
        env=environment(PYTHONPATH=root),
        stdout=open(place / "said", "a"),
        stderr=subprocess.STDOUT,
    )


def started(place: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    if (place / "runs" / "started").exists():
        for line in (place / "runs" / "started").read_text().splitlines():
            found.setdefault(line.split()[0], []).append(int(line.split()[1]))
    return found


def until(condition, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def test_killed_told_and_gone_on_with(place):
    """A kill of what runs the jobs ends the running one too; a signal is passed on to it; what is done stays so; a
    failed job stops what needs it and nothing else."""
    running = begin(place)
    [slow] = until(lambda: started(place).get("e"))
    running.kill()
    running.wait()
    until(lambda: (place / "runs" / "e" / "told").exists())
    assert (place / "runs" / "e" / "told").read_text() == "SIGTERM"
    until(lambda: not Path(f"/proc/{slow}").exists())

    (place / "runs" / "e" / "told").unlink()
    running = begin(place)
    until(lambda: len(started(place)["e"]) == 2 and "step 1/2" in (place / "logs" / "e.log").read_text())
    running.send_signal(signal.SIGINT)
    running.wait(60)
    assert (place / "runs" / "e" / "told").read_text() == "SIGINT"
    assert "STOPPED SIGINT: e was told" in (place / "said").read_text()

    (place / "runs" / "go").touch()
    (place / "said").unlink()
    begin(place).wait(60)
    said = (place / "said").read_text()
    lost = json.loads(said.partition("LOST ")[2])
    assert lost == {"c": "--data x: no such data folder (all of it: logs/c.log)", "d": "needs c"}
    assert "5 jobs in ., 2 of them done" in said and "c FAILED: --data x" in said
    assert {name: len(pids) for name, pids in started(place).items()} == {"a": 1, "b": 1, "c": 3, "e": 3}


def test_by_index(place, monkeypatch):
    """As a task of an array asks: words, nothing where it is done, an error where what it needs is not."""
    monkeypatch.chdir(place)
    assert jobs.words_of("jobs.json", "0") == ["train", "--out", "runs/a"]
    with pytest.raises(UserError, match="b: needs a, which is not done"):
        jobs.words_of("jobs.json", "1")
    for name in ("a", "b"):
        (place / "runs" / name).mkdir(parents=True)
        (place / "runs" / name / "status.json").write_text('{"state": "finished"}')
    assert jobs.words_of("jobs.json", "1") == []
    asked = subprocess.run(
        [sys.executable, "-m", "mage_ds.engine.jobs", "jobs.json", "3"],
        env=environment(PYTHONPATH=str(Path(__file__).parents[2])),
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 2 and asked.stderr == (
        "mage-ds: error: d: needs c, which is not done (see the job of it); submit again when it is\n"
    )


def test_when_a_job_is_done(tmp_path):
    for verb, file in (("prepare", "prepared.json"), ("evaluate", "results.json"), ("fewshot", "fewshot.json")):
        job = Job(verb, [verb], [], str(tmp_path / verb), [])
        assert not jobs.done(job) and (verb == "prepare" or jobs.results(job) is None)
        (tmp_path / verb).mkdir()
        (tmp_path / verb / file).write_text("{}")
        assert jobs.done(job)
    run = Job("run", ["train"], [], str(tmp_path / "run"), [])
    (tmp_path / "run").mkdir()
    for state in ("running", "stopped", "failed"):
        (tmp_path / "run" / "status.json").write_text(json.dumps({"state": state}))
        assert not jobs.done(run)


def test_stages():
    job = lambda name, *needs: (name, Job(name, [], [*needs], "", []))  # noqa: E731
    graph = Graph(dict([job("a"), job("b"), job("c", "a"), job("d", "c", "b"), job("e", "b")]), {}, [])
    assert graph.stages() == [["a", "b"], ["c", "e"], ["d"]]


def test_slurm_without_and_with_a_cluster(place, monkeypatch):
    """An sbatch that writes down how it was called, and a queue."""
    from mage_ds.engine import arrays

    listed = {job.name: job for job in jobs.read(place / "jobs.json")}
    graph = Graph(listed, {}, [])
    monkeypatch.setenv("PATH", str(place / "bin"))
    with pytest.raises(UserError, match="there is no sbatch here"):
        arrays.submit(graph, "table", place, [], print)
    (place / "bin").mkdir()
    book = place / "called"
    for name, does in (
        (
            "sbatch",
            f'echo "$@" >>{book}; [ "$2" = --bad ] && echo "sbatch: error: no such" >&2 && exit 1; echo 1$RANDOM',
        ),
        ("squeue", f"cat {place}/queue"),
    ):
        (place / "bin" / name).write_text(f"#!/bin/bash\nPATH=/bin:/usr/bin\n{does}\n")
        (place / "bin" / name).chmod(0o755)
    with pytest.raises(UserError, match=r"sbatch refuses \(sbatch: error: no such\)"):
        arrays.submit(graph, "table", place, ["--bad"], print)
    book.unlink()
    (place / "queue").write_text("")
    os.makedirs(place / "runs" / "e")
    (place / "runs" / "e" / "status.json").write_text('{"state": "finished"}')
    monkeypatch.chdir(place)
    numbers = arrays.submit(graph, "table", place, ["--nodes=2"], print)
    calls = [line.split() for line in book.read_text().splitlines()]
    assert [call[:-3] for call in calls] == [
        ["--parsable", "--nodes=2", "--array=0,2", "--job-name=table"],
        ["--parsable", "--nodes=2", "--array=1,3", "--job-name=table", f"--dependency=afterany:{numbers[0]}"],
    ]
    script, file, launch = calls[0][-3:]
    assert Path(script) == Path(launch, "slurm_sweep.sbatch") and Path(script).is_file()
    assert [job.name for job in jobs.read(Path(file))] == [*listed]
    (place / "queue").write_text(f"{numbers[1]}\n")
    with pytest.raises(UserError, match=f"arrays {numbers[1]} of this table are in the queue"):
        arrays.submit(graph, "table", place, [], print)
