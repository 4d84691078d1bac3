"""launch/slurm_evaluate.sbatch, as it is, on a cluster of two nodes: arrays of jobs, deaths, the queue, a watch."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from launched import OFTEN, TINY, mage_ds, metrics
from made_export import make_export
from slurm import Cluster, missing

pytestmark = [pytest.mark.full, pytest.mark.processes, pytest.mark.skipif(bool(missing()), reason=missing())]

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm_evaluate.sbatch"
HERE = ["--partition=main", "--account=none", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1"]
LOOK = ["--reference", "real", "--features", "run:mage", "--batch", 4, "--neighbours", "off", "--metrics", "fid,prc"]


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as one:
        yield one


@pytest.fixture(scope="module")
def place(made, tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluated")
    make_export(place / "mage")
    (place / "real").mkdir()
    for picture in sorted((made[0] / "val").glob("*/*"))[::8][:40]:
        shutil.copy(picture, place / "real")
    return place


def figures(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["figures"]


def tiles(folder: Path) -> int:
    return len(list((folder / "features" / "samples" / "tiles").glob("*")))


def test_an_array_makes_the_figures_of_one_process(cluster, place):
    """Two jobs of two workers; one worker is killed, and its job makes up for it."""
    look = ["mage", *LOOK, "--num", 1200]
    jobs = cluster.submit(*HERE, "--array=1-2", SCRIPT, *look, "--out", "by_four", cwd=place)
    jobs.until(lambda: tiles(place / "by_four") > 2)
    os.kill(cluster.rank(1), signal.SIGKILL)
    jobs.until(lambda: not cluster.squeue(), 300)
    said = [(place / f"slurm-{jobs.number}_{task}.out").read_text() for task in (1, 2)]
    assert sum("one more does what is left" in each for each in said) == 1, said
    assert all("written to" in each and "recall" in each for each in said), said
    shown = cluster.run("scontrol", "--oneliner", "show", "job", jobs.number, cwd=place).stdout
    assert shown.count("JobState=COMPLETED") == shown.count("ExitCode=0:0") == 2, shown
    mage_ds("evaluate", *look, "--out", "by_one", cwd=place)
    assert figures(place / "by_one") == figures(place / "by_four")


def test_a_job_goes_on_after_the_queue_and_when_its_time_is_up(cluster, place):
    look = ["mage", *LOOK, "--num", 1600, "--out", "queued"]
    job = cluster.submit(*HERE, SCRIPT, *look, cwd=place)
    job.until(lambda: tiles(place / "queued") > 2)
    assert cluster.run("scontrol", "requeue", job.number, cwd=place).returncode == 0  # as a preemption does
    before = job.until(lambda: job.facts()["Restarts"] == "1" and tiles(place / "queued"))
    job.until(lambda: tiles(place / "queued") > before + 2)
    assert cluster.run("scancel", "--signal=USR1", "--batch", job.number, cwd=place).returncode == 0  # as --signal does
    facts = job.ended()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "2"), job.output
    assert job.output.count("the time is up: queued again") == 1 and job.output.count("written to") == 1
    assert figures(place / "queued")["fid"]["n"] == 1600


@pytest.mark.parametrize(
    "words, says",
    [
        (["--out", "refused", "--class-label", "1"], "mage-ds: error: --class-label 1: mage knows no classes"),
        ([], "slurm_evaluate: error: --out OUT is missing"),
    ],
)
def test_a_mistake_ends_the_job(cluster, place, words, says):
    job = cluster.submit(*HERE, SCRIPT, "mage", *LOOK, "--num", 8, *words, cwd=place)
    facts = job.ended(120)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), job.output
    assert says in job.output.replace(str(place) + "/", "") and "Traceback" not in job.output, job.output
    assert not (place / "refused").exists()


def test_a_job_watches_a_training(cluster, place, made):
    """One of two workers, submitted before the run exists, and queued again on its way."""
    look = ["run", *LOOK, "--num", 16, "--steps", 4, "--watch"]
    arrays = cluster.submit(*HERE, "--array=1-1", SCRIPT, *look, cwd=place)
    job = cluster.submit(*HERE, SCRIPT, *look, cwd=place)
    job.until(lambda: "waiting for it" in job.output)
    assert "leave --array out" in (place / f"slurm-{arrays.number}_1.out").read_text()
    train = ["train", "digits_mage", *TINY, *OFTEN, "report.keep=1", "--data", made[0], "--tokenizer", made[1]]
    train += ["--out", "run", "duration.steps=60", "report.checkpoint_every.steps=20"]
    mage_ds(*train, cwd=place)
    facts = job.ended()
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), job.output
    assert "run: has finished" in job.output and [r["step"] for r in metrics(place / "run") if "fid" in r][-1] == 60
