"""Which checkpoints stay: the newest, every so many, the pinned ones; and what a run goes back behind."""

import shutil
import subprocess

import pytest

from mage_ds.engine import checkpoint, retention
from mage_ds.errors import UserError


@pytest.fixture
def run(tmp_path):
    """A folder of checkpoints that are names only: 10, 20, ..., 80, and one that a stop left at 84."""
    for step in [*range(10, 90, 10), 84]:
        checkpoint.folder_of(tmp_path, step).mkdir(parents=True)
    return tmp_path


def names(run) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("keep", "every", "stay"),
    [
        (2, 0, [80, 84]),
        (1, 0, [84]),
        (9, 0, [10, 20, 30, 40, 50, 60, 70, 80, 84]),
        (1, 30, [30, 60, 84]),
        (3, 40, [40, 70, 80, 84]),
    ],
)
def test_the_newest_and_every_so_many_stay(run, keep, every, stay):
    retention.prune(run, 84, keep, every)
    assert retention.steps(run) == stay
    assert len(names(run)) == len(stay)


def test_a_pinned_one_stays(run):
    folder = checkpoint.folder_of(run, 20)
    assert retention.pin(folder, "sampled into out") and retention.pin(folder, "sampled into other")
    assert retention.pin(folder, "sampled into out")
    assert retention.pins(folder) == ["sampled into out", "sampled into other"]
    retention.prune(run, 84, 1, 0)
    assert retention.steps(run) == [20, 84]
    (folder / "pinned").unlink()
    retention.prune(run, 84, 1, 0)
    assert retention.steps(run) == [84]


def test_what_lies_beyond_leaves_the_run_and_a_pinned_one_stays_on_the_disk(run):
    retention.pin(checkpoint.folder_of(run, 80), "sampled")
    retention.leave_behind(run, 50)
    assert retention.steps(run) == [10, 20, 30, 40, 50]
    assert [path.name for path in retention.left(run)] == [f"step_0000{n}.left1" for n in (60, 70, 80, 84)]
    checkpoint.folder_of(run, 80).mkdir()  # the run came there again, and went back again
    retention.pin(checkpoint.folder_of(run, 80), "sampled again")
    retention.leave_behind(run, 50)
    checkpoint.folder_of(run, 55).mkdir()
    retention.prune(run, 55, 2, 0)
    assert names(run) == ["step_000050", "step_000055", "step_000080.left1", "step_000080.left2"]
    assert [retention.pins(path) for path in retention.left(run)] == [["sampled"], ["sampled again"]]


def test_a_folder_that_cannot_be_written_is_not_pinned(run):
    folder = checkpoint.folder_of(run, 20)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        assert not retention.pin(folder, "sampled")
        assert retention.pins(folder) == []
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    assert not retention.pin(checkpoint.folder_of(run, 25), "no such checkpoint")


def test_finding(run):
    (run / "checkpoints" / ".step_000090.part").mkdir()
    (run / "checkpoints" / "step_000090.left1").mkdir()
    assert retention.find(run).name == "step_000084" and retention.find(run, 10).name == "step_000010"
    with pytest.raises(UserError, match=r"--checkpoint 90: not in .*; there are 10, 20"):
        retention.find(run, 90)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        retention.find(run)


def test_a_pin_is_taken_back_and_those_of_others_stay(run):
    folder = checkpoint.folder_of(run, 20)
    retention.unpin(folder, "sampled")  # there is none
    for why in ("sampled into out", "evaluated into out", "sampled into outside"):
        retention.pin(folder, why)
    before = (folder / "pinned").stat()
    retention.unpin(folder, "evaluated into out")
    assert retention.pins(folder) == ["sampled into out", "sampled into outside"]
    after = (folder / "pinned").stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)  # in place: an append meanwhile is not lost
    for why in ("sampled into out", "sampled into outside"):
        retention.unpin(folder, why)
    retention.prune(run, 84, 1, 0)
    assert retention.steps(run) == [84]
