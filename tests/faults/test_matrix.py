"""Places in a run's life x causes of death: each is noticed, leaves nothing behind, and the next start goes on exactly.

A row of the table is one run that dies at one place after the other and then finishes: every start but the first is
the recovery from the death before, and in the end losses, held-out losses and the last checkpoint's checksums are
those of a run that was left alone.

  place ->               step       save       publish    validation  start-up
  SIGKILL of a rank      rank 1     rank 1     rank 0     rank 1      rank 0
  SIGKILL of a launcher  launch.py  deepspeed  launch.py  deepspeed   launch.py
  SIGTERM to             launch.py  rank 1     deepspeed  rank 0      rank 1
  SIGUSR1 to             all ranks  all ranks  all ranks  all ranks   rank 0
  full disk              yes        yes        yes        yes         yes
  NaN on one rank        yes        1          1          2           3
  a rank that hangs      yes, also  in C, with yes        in C, with  yes
                         SIGSTOP    the GIL               the GIL
  truncated checkpoint   4          yes        yes        4           yes

1: no gradient is computed there, and what is saved is checked by its step before.
2: a figure of the log, which nothing is decided by; it is written as null.
3: initial values are drawn finite; a checkpoint's are guarded by checksums ("truncated").
4: nobody reads a published checkpoint while the run goes on; the next start does ("start-up").
`save` is before publishing, while files are written; `publish` is just before or after the rename that publishes.
"""

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
from launched import TINY, Launch, losses, metrics, status

pytestmark = pytest.mark.processes

DRIVER = Path(__file__).parent / "driver.py"
STEPS, HANG_S, NOTICED_S = 36, 20, 60
FIELDS = [
    f"duration.steps={STEPS}",
    *TINY,
    "report.log_every=1",
    "report.evaluate_every.steps=3",
    "report.evaluate_samples=16",
    "report.pictures_every.steps=1000",
    "report.checkpoint_every.steps=2",
    "report.max_skipped=1",
]


class Lives:
    """A run folder and its starts, each of which meets what is planned for it."""

    def __init__(self, made, folder: Path, *fields: str, disk: Path | None = None):
        self.cwd, self.run = folder, (disk or folder) / "run"
        self.words = [*FIELDS, *fields, "--data", made[0], "--tokenizer", made[1], "--out", self.run]
        self.saved = 0

    def live(self, *faults: dict, resume: str = "auto", patience: float = 0) -> tuple[Launch, int]:
        """One start until its end. Fails where something is left over, or after NOTICED_S (+ patience) in vain."""
        marker = self.cwd / "marker"
        marker.unlink(missing_ok=True)
        plan = json.dumps({"marker": str(marker), "faults": faults})
        line = [plan, "train", "digits_mage", *self.words, "--resume", resume]
        with Launch(*line, cwd=self.cwd, script=DRIVER) as launch:
            if faults:
                launch.until(marker.exists)
            code = launch.ended(NOTICED_S + patience if faults else 240)
            launch.text = launch.output
        self.saved = newest(self.run)
        return launch, code

    def dies(self, fault: dict, codes, states, reason: str = "", patience: float = 0) -> str:
        before = self.saved
        launch, code = self.live(fault, patience=patience)
        said = f"{fault}\n{launch.text}"
        assert code in codes, (code, said)
        if before and fault["place"] != "start-up":
            assert f"at step {before} " in launch.text, said
        now = status(self.run)
        assert now["state"] in states and re.search(reason, now["reason"]), (now, said)
        assert newest(self.run) >= before
        return launch.text

    def finishes_like(self, other: "Lives", **options) -> str:
        launch, code = self.live(**options)
        assert code == 0 and status(self.run)["state"] == "finished", launch.text
        assert losses(self.run) == losses(other.run)
        assert held_out(self.run) == held_out(other.run)
        assert digests(self.run) == digests(other.run)
        assert not list((self.run / "checkpoints").glob(".*"))
        return launch.text


def newest(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")), default=0)


def digests(run: Path) -> dict:
    """Checksums of the newest checkpoint's files: weights and moments."""
    meta = json.loads((run / f"checkpoints/step_{newest(run):06d}/meta.json").read_text())
    return {name: file["sha256"] for name, file in meta["files"].items()}


def held_out(run: Path) -> list:
    return [(record["step"], record["val_loss"]) for record in metrics(run) if "val_loss" in record]


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    lives = Lives(made, tmp_path_factory.mktemp("undisturbed"))
    launch, code = lives.live()
    assert code == 0 and [step for step, _ in losses(lives.run)] == list(range(1, STEPS + 1)), launch.text
    return lives


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a disk that can be filled must be mounted, which needs root: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fault(place: str, rank: int, does: str, **more) -> dict:
    return {"place": place, "rank": rank, "does": does, "at": 3 if place == "step" else 1, **more}


def sends(place: str, rank: int, number: str, to: str) -> dict:
    return fault(place, rank, "signal", signal=number, to=to)


def test_three_deaths_in_two_lives(made, tmp_path):
    """The fast part: a kill before publishing, a step of NaN on one rank, SIGTERM during a validation."""
    lives = Lives(made, tmp_path)
    lives.dies(sends("save", 1, "SIGKILL", "me") | {"at": 2}, (1, 247), ("running", "failed"))
    first, saved = losses(lives.run), lives.saved
    assert 0 < saved < first[-1][0]
    poison = fault("step", 1, "nan", at=first[-1][0] - saved + 1)
    launch, code = lives.live(poison, sends("validation", 0, "SIGTERM", "me") | {"at": 2})
    assert code == 75 and f"at step {saved} " in launch.text, launch.text
    joined, last = losses(lives.run), status(lives.run)
    assert joined[: len(first)] == first and [step for step, _ in joined] == list(range(1, last["step"] + 1))
    assert last["state"] == "stopped" and last["step"] == newest(lives.run) > first[-1][0]
    assert [record["skipped"] for record in metrics(lives.run) if "loss" in record][-1] == 1


@pytest.mark.full
def test_sigkill_of_a_rank(made, tmp_path, undisturbed):
    lives = Lives(made, tmp_path)
    for place, rank in (("step", 1), ("save", 1), ("publish", 0), ("validation", 1), ("start-up", 0)):
        # 247 is -9; 1 where the launcher first sees the other rank, whose collective failed
        lives.dies(sends(place, rank, "SIGKILL", "me"), (1, 247), ("running", "failed"))
    # A collective that notices nothing, as on GPUs of one host: rank 0 does not wait for the launcher to kill it.
    plan = [sends("step", 1, "SIGKILL", "me"), fault("step", 0, "sleep")]
    launch, code = lives.live(*plan)
    assert code in (1, 247), launch.text
    assert re.search("another rank has ended: .*rank 0 in meet", status(lives.run)["reason"]), launch.text
    assert "in meet" in (lives.run / "logs/stack_rank_0.txt").read_text()
    lives.finishes_like(undisturbed)


@pytest.mark.full
def test_sigkill_of_a_launcher(made, tmp_path, undisturbed):
    """The ranks stop by themselves. DeepSpeed's own code is 0 then: status.json says what happened."""
    lives = Lives(made, tmp_path)
    for place, rank, to in (
        ("step", 0, "launch.py"),
        ("save", 1, "deepspeed"),
        ("published", 0, "launch.py"),
        ("validation", 1, "deepspeed"),
        ("start-up", 0, "launch.py"),
    ):
        codes = (0,) if to == "launch.py" else (-signal.SIGKILL,)
        lives.dies(sends(place, rank, "SIGKILL", to), codes, ("stopped",), "launcher died: saved after step")
    lives.finishes_like(undisturbed)


@pytest.mark.full
def test_sigterm(made, tmp_path, undisturbed):
    lives = Lives(made, tmp_path)
    codes = {"me": (75,), "launch.py": (1,), "deepspeed": (-signal.SIGTERM,)}
    for place, rank, to in (
        ("step", 0, "launch.py"),
        ("save", 1, "me"),
        ("publish", 0, "deepspeed"),
        ("validation", 0, "me"),
        ("start-up", 1, "me"),
    ):
        reason = "launcher died|SIGTERM" if to == "deepspeed" else "SIGTERM: saved after step"
        lives.dies(sends(place, rank, "SIGTERM", to), codes[to], ("stopped",), reason)
    lives.finishes_like(undisturbed)


@pytest.mark.full
def test_sigusr1(made, tmp_path, undisturbed):
    lives = Lives(made, tmp_path)
    for place, to in (("step", "ranks"), ("save", "ranks"), ("publish", "ranks"), ("validation", "ranks")):
        lives.dies(sends(place, 0, "SIGUSR1", to), (75,), ("stopped",), "SIGUSR1: saved after step")
    # One rank only: others may still be on their way to their signal handlers.
    lives.dies(sends("start-up", 0, "SIGUSR1", "me"), (75,), ("stopped",), "SIGUSR1: saved after step")
    lives.finishes_like(undisturbed)


@pytest.mark.full
def test_full_disk(made, tmp_path, undisturbed, small_disk):
    lives = Lives(made, tmp_path, disk=small_disk)
    for place, rank in (("step", 1), ("save", 1), ("publish", 0), ("validation", 0), ("start-up", 0)):
        # `running` where no room was left for another word
        said = lives.dies(fault(place, rank, "fill", disk=str(small_disk)), (2,), ("running", "failed"))
        assert "Traceback" not in said and re.search("make room|mend the disk", said), said
        (small_disk / "filler").unlink()
    lives.finishes_like(undisturbed)


@pytest.mark.full
def test_nan_on_one_rank(made, tmp_path, undisturbed):
    """More steps in a row than report.max_skipped; what they left out is not in the checkpoint that is kept."""
    lives = Lives(made, tmp_path)
    lives.dies(fault("step", 1, "nan", at=5, times=9), (2,), ("failed",), "without a finite gradient")
    assert lives.saved == 4
    lives.finishes_like(undisturbed)


@pytest.mark.full
def test_a_rank_that_hangs(made, tmp_path, undisturbed):
    lives = Lives(made, tmp_path, f"machine.hang_timeout={HANG_S}")
    for place, rank, how in (
        ("step", 1, "sleep"),
        ("save", 0, "hold"),
        ("publish", 0, "sleep"),
        ("validation", 1, "hold"),
        ("start-up", 1, "sleep"),
        ("step", 0, "stop"),
        ("step", 1, "stop"),
    ):
        stopped = how == "stop"
        planned = sends(place, rank, "SIGSTOP", "me") if stopped else fault(place, rank, how)
        for old in (lives.run / "logs").glob("stack_*"):
            old.unlink()
        # Three times as long before the first step of a start; a validation that the last life owes is there, too.
        said = lives.dies(planned, (1,), ("failed",), "no progress for", patience=3 * HANG_S)
        stacks = {path.name[11]: path.read_text() for path in (lives.run / "logs").glob("stack_rank_?.txt")}
        stacks = {number: text for number, text in stacks.items() if text}  # a stopped rank's is empty
        assert stacks.keys() == {"0", "1"} - ({str(rank)} if stopped else set()), stacks.keys()
        assert stopped or "in meet" in stacks[str(rank)], stacks
        assert all(re.search(r"\nThread .*most recent call first", text) for text in stacks.values())
        line = re.findall(r"^mage-ds: error: no progress for .*", said, re.MULTILINE)
        assert len(line) == 1 and f"rank {rank} " in line[0] and "stack_rank_" in line[0], said
    lives.finishes_like(undisturbed)


@pytest.mark.full
def test_a_truncated_checkpoint(made, tmp_path, undisturbed):
    lives = Lives(made, tmp_path)
    # Found while it is saved: files are read again.
    lives.dies(fault("save", 1, "truncate", at=3), (2,), ("failed",), "cannot be saved")
    good = lives.saved
    assert good == 4
    # A disk that forgets: published with half a file, then the power fails.
    plan = [fault("publish", 0, "truncate", at=2), fault("published", 0, "signal", at=2, signal="SIGKILL", to="me")]
    launch, _ = lives.live(*plan)
    assert lives.saved == good + 4, launch.text
    said = lives.finishes_like(undisturbed)  # from the one before
    assert re.search(rf"step_{good + 4:06d}\S*: damaged checkpoint .*looking at the one before", said)
