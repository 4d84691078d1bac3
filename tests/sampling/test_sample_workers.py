"""Any number of workers on one folder, killed at any place: the set equals a single worker's, byte by byte."""

import json
import os
import random
import shutil
import tarfile
import time
from pathlib import Path

import forked
import launched
import numpy as np
import pytest
from made_models import make_export
from PIL import Image
from workers import Workers

from mage_ds.inputs.catalog import open_catalog
from mage_ds.sampling import claims

pytestmark = pytest.mark.processes
NUM, BATCH = 42, 4  # the last tile has padding, and tars are of three tiles
FORMATS = ("png", "tar", "npz")


@pytest.fixture(scope="module")
def workers():
    with Workers() as them:
        yield them


@pytest.fixture(scope="module")
def root(tmp_path_factory, workers):
    """A folder with a model of three classes, `alone`, where a single worker made a set of each format, and what it
    said of its number of changes, as (root, {format: number})."""
    folder = tmp_path_factory.mktemp("workers")
    make_export(folder / "model", classes=3)
    counts = {}
    for form in FORMATS:
        log = folder / f"{form}.log"
        assert workers.run(*line(folder, form), "--out", folder / "alone" / form, log=log, below=folder / "alone") == 0
        counts[form] = int(log.read_text().split("changes: ")[1])
    return folder, counts


def line(root: Path, form: str) -> list:
    return ["sample", root / "model", "-n", NUM, "--batch", BATCH, "--format", form, "--guidance", 1.5]


def same(made: Path, root: Path, form: str) -> None:
    forked.same(made, root / "alone" / form)


def test_formats_hold_the_same_pictures(root):
    folder = root[0] / "alone"
    pngs = [(folder / "png" / f"{i:06d}.png").read_bytes() for i in range(NUM)]
    pixels = []
    for i in range(NUM):
        with Image.open(folder / "png" / f"{i:06d}.png") as image:
            pixels.append(np.asarray(image))
    assert len(set(pngs)) > NUM // 2

    with np.load(folder / "npz" / "samples.npz") as file:
        assert list(file) == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8 and (file["arr_0"] == np.stack(pixels)).all()
        assert file["arr_1"].dtype == np.int64 and (file["arr_1"] == np.arange(NUM) % 3).all()

    shards = sorted(path.name for path in (folder / "tar").glob("*.tar"))
    assert shards == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
    names = []
    for shard in shards:
        with tarfile.open(folder / "tar" / shard) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                data, i = tar.extractfile(member).read(), int(member.name[:6])
                assert data == (pngs[i] if member.name.endswith(".png") else b"%d" % (i % 3))
                names.append(member.name)
    assert names == [f"{i:06d}.{ending}" for i in range(NUM) for ending in ("png", "cls")]
    assert {p.name for p in (folder / "tar" / ".tiles").iterdir()} == {f"{i:06d}.npz" for i in range(0, NUM, BATCH)}
    assert not (folder / "tar" / ".work").exists()

    moved = root[0] / "shards"  # a training reads the shards alone: beside them lies a grid
    moved.mkdir()
    for shard in shards:
        shutil.copy(folder / "tar" / shard, moved)
    catalog = open_catalog(moved)
    assert catalog.n == NUM and [catalog.read(i) for i in range(NUM)] == pngs
    assert [catalog.label(i) for i in range(NUM)] == [i % 3 for i in range(NUM)]


def test_three_workers_of_which_one_is_killed_twice(root, workers, tmp_path):
    for form in ("png", "npz"):
        out = tmp_path / form
        start = lambda: workers.start(*line(root[0], form), "--out", out, log=tmp_path / "log", below=out)  # noqa: B023, E731
        others = [start(), start()]
        for _ in range(2):
            victim = start()
            time.sleep(random.uniform(0.3, 0.8))
            workers.kill(victim)
        others.append(start())
        assert [workers.wait(pid) for pid in others] == [0, 0, 0], (tmp_path / "log").read_text()
        same(out, root[0], form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.full)])
def test_killed_anywhere(root, workers, tmp_path, form, rounds):
    """At a random change of a file in each of as many equal parts of the work as there are rounds."""
    folder, counts = root
    for number in range(rounds):
        out, log = tmp_path / f"{number}", tmp_path / f"{number}.log"
        at = 1 + int(counts[form] * random.uniform(number, number + 1) / rounds)
        code = workers.run(*line(folder, form), "--out", out, log=log, below=out, kill_at=min(at, counts[form]))
        assert code == -9, log.read_text()
        assert workers.run(*line(folder, form), "--out", out, log=log, below=out) == 0, (at, log.read_text())
        same(out, folder, form)


@pytest.mark.full
@pytest.mark.parametrize(
    ("form", "place"),
    [
        *(("png", place) for place in ("os.link", "/.work/end", "/000040.png", "/grid.png", "rmdir")),
        *(("tar", place) for place in ("/00000.tar", ".tiles/000004.png.npz", "/00003.tar", "/manifest.csv")),
        *(("npz", place) for place in ("/samples.npz", "remove {}/.tiles/000000.png.npz", "/tokens.npz", "rmdir")),
    ],
)
def test_killed_before_each_thing_that_happens_once(root, workers, tmp_path, form, place):
    out, log = tmp_path / "set", tmp_path / "log"
    for number in range(1, 99):  # at the first change that names the place, then at the second, ...
        place = place.format(out)
        if workers.run(*line(root[0], form), "--out", out, log=log, below=out, kill_at=f"{number} {place}") == 0:
            break
        shutil.copytree(out, tmp_path / "copy")
        assert workers.run(*line(root[0], form), "--out", tmp_path / "copy", log=log, below=tmp_path / "copy") == 0
        same(tmp_path / "copy", root[0], form)
        shutil.rmtree(tmp_path / "copy")
        shutil.rmtree(out)
    assert 1 < number < 99


def test_many_join_at_once_what_a_killed_worker_left(root, workers, tmp_path):
    """All tiles are there; the joining of a worker ended after its first file."""
    for form, place in (("tar", "1 manifest.csv"), ("npz", "1 tokens.npz")):
        out, log = tmp_path / form, tmp_path / "log"
        assert workers.run(*line(root[0], form), "--out", out, log=log, below=out, kill_at=place) == -9
        (out / ".work" / "end").unlink()  # so that nothing keeps them apart but their own claims
        them = [workers.start(*line(root[0], form), "--out", out, log=log, below=out) for _ in range(3)]
        assert [workers.wait(pid) for pid in them] == [0, 0, 0], log.read_text()
        same(out, root[0], form)


def test_what_is_damaged_in_a_complete_set_is_made_again(root, workers, tmp_path):
    out, log = tmp_path / "set", tmp_path / "log"
    shutil.copytree(root[0] / "alone" / "tar", out)
    with open(out / "00001.tar", "r+b") as file:
        file.truncate(5000)
    (out / "grid.png").unlink()
    assert workers.run(*line(root[0], "tar"), "--out", out, log=log, below=out) == 0, log.read_text()
    same(out, root[0], "tar")
    assert workers.run(*line(root[0], "tar"), "--out", out, log=log, below=out) == 0
    assert "complete; nothing to do" in log.read_text()


def test_a_worker_waits_for_the_living_only(root, workers, tmp_path):
    out, log = tmp_path / "set", tmp_path / "log"
    (out / ".work").mkdir(parents=True)
    mine, dead = out / ".work" / "000004", out / ".work" / "000008"
    owner = {"host": claims._host(), "pid": os.getpid(), "start": claims._started(os.getpid())}
    mine.write_text(json.dumps(owner))
    dead.write_text(json.dumps(owner | {"start": "1"}))  # another process had this number
    pid = workers.start(*line(root[0], "png"), "--out", out, log=log, below=out)
    end = time.monotonic() + 60
    while not log.exists() or "1 tiles that are left are being made by other processes" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    assert not (out / "000004.png").exists() and (out / "000008.png").exists()
    mine.unlink()
    assert workers.wait(pid) == 0
    same(out, root[0], "png")


def test_a_worker_that_wants_more_and_one_that_wants_other_settings(root, workers, tmp_path):
    out, log = tmp_path / "set", tmp_path / "log"
    less = ["sample", root[0] / "model", "-n", 9, "--batch", BATCH, "--format", "tar", "--guidance", 1.5, "--out", out]
    two = [workers.start(*less, log=log, below=out), workers.start(*less, "-n", NUM, log=log, below=out)]
    assert [workers.wait(pid) for pid in two] == [0, 0], log.read_text()
    same(out, root[0], "tar")
    refused = {
        "seed 0 there, 1 here": ["--seed", 1],
        "class_label 0..2 there, 1 here": ["--class-label", "dog"],
        "format tar there, png here": ["--format", "png"],
        "guidance 1.5 there, 0.0 here": ["--guidance", 0],
        "precision float32 there, bf16 here": ["--precision", "bf16"],
    }
    for said, words in refused.items():
        assert workers.run(*less, *words, log=tmp_path / "refused", below=out) == 2
        assert said in (tmp_path / "refused").read_text().splitlines()[-2]
    same(out, root[0], "tar")


def test_two_ranks(root, tmp_path):
    words = [*line(root[0], "png"), "--out", tmp_path / "set"]
    launched.run(*words, cwd=tmp_path)
    same(tmp_path / "set", root[0], "png")


PEAK = """
import resource, sys
from mage_ds.cli import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.full
@pytest.mark.parametrize("form", FORMATS)
def test_memory_does_not_grow_with_the_set(root, tmp_path, form):
    import subprocess
    import sys

    peaks = []
    for num in (200, 2000):
        words = ["sample", root[0] / "model", "-n", num, "--batch", 50, "--format", form, "--out", tmp_path / str(num)]
        command = [sys.executable, "-c", PEAK, *map(str, words)]
        done = subprocess.run(command, env=launched.environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split("peak ")[1]))
    print(form, [f"{peak / 1024:.1f} MiB" for peak in peaks])
    assert peaks[1] < peaks[0] * 1.04
