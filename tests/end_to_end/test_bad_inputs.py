"""What a user gets wrong, alone and on two ranks: one line that names it and the remedy, exit code 2, nothing lost."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launched import OFTEN, TINY, Launch, environment, run, several, status, tree

pytestmark = pytest.mark.processes

FEW = ["duration.steps=2", *TINY, *OFTEN]
LONGER = ["duration.steps=5", "--extend", "--data", "data", "--micro-batch", "auto"]


@pytest.fixture(scope="module")
def place(made, tmp_path_factory):
    """A folder with everything that can be wrong; `data` and `tokenizer` are right."""
    root = tmp_path_factory.mktemp("bad")
    data, tokenizer = made
    for name, target in (("data", data), ("tokenizer", tokenizer)):
        (root / name).symlink_to(target)
    (root / "empty").mkdir()
    for ending in ("txt", "jpg"):
        folder = root / f"text_{ending}" / "a"
        folder.mkdir(parents=True)
        for i in range(40):
            (folder / f"{i}.{ending}").write_text(f"page {i}")
    _small_tokenizer(root / "other_tokenizer")
    shutil.copytree(tokenizer, root / "damaged")
    weights = next((root / "damaged/checkpoints/step_000003").glob("*.weight.*"))
    bad = bytearray(weights.read_bytes())
    bad[len(bad) // 2] ^= 1
    weights.write_bytes(bad)
    return root


@pytest.fixture(scope="module")
def read_only(place):
    """A folder on a file system that is mounted read-only: root writes through permissions."""
    folder = place / "read_only"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a read-only file system needs root")
    try:
        shutil.copytree(place / "tokenizer", folder / "run", symlinks=True)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def _small_tokenizer(folder):
    """A tokenizer that makes 8 x 8 tokens of a picture of 32 px, not 4 x 4."""
    from mage_ds.engine import stored
    from mage_ds.models import Vqgan

    model = {"channels": 8, "multipliers": [1, 1, 1], "blocks": 1, "code_dim": 4, "codes": 128}
    stored.save_tokenizer(folder, Vqgan(**model), model, 32)


def mage(*words, data="data", tokenizer="tokenizer"):
    return ["train", "digits_mage", *FEW, *words, "--data", data, "--tokenizer", tokenizer, "--out", "OUT"]


# name -> the command line (OUT becomes a folder of its own), what the line must name, and what it must propose
CASES = {
    "missing data": (mage(data="nowhere"), ["nowhere", "no such data folder"], "mage-ds prepare"),
    "empty folder": (mage(data="empty"), ["empty", "empty folder"], "mage-ds prepare"),
    "unknown recipe": (
        ["train", "digits_magee", "--data", "data", "--tokenizer", "tokenizer", "--out", "OUT"],
        ["digits_magee"],
        "did you mean digits_mage?",
    ),
    "misspelt key": (mage("optimizer.base_rl=1e-3"), ["optimizer.base_rl"], "did you mean"),
    "batch that does not divide": (mage("batch=14", "--micro-batch", "4"), ["--micro-batch 4", "14"], "choose"),
    "tokenizer of the wrong size": (mage(tokenizer="other_tokenizer"), ["other_tokenizer", "64 tokens"], "choose"),
    "damaged checkpoint": (
        ["train", "damaged/recipe.yaml", *LONGER, "--out", "damaged"],
        ["damaged/checkpoints/step_000003", ".safetensors"],
        "",
    ),
    "wrong image size": (mage("inputs.image_size=30", "inputs.evaluation_resize=30"), ["30"], "image_size"),
    "text files": (mage(data="text_txt"), ["text_txt", "no pictures"], "mage-ds prepare"),
    "text in pictures": (mage(data="text_jpg"), ["unreadable", "quarantine.jsonl"], "mage-ds prepare"),
}
READ_ONLY = {
    "new run": (
        ["train", "digits_tokenizer", *OFTEN, "--data", "data", "--out", "read_only/new"],
        ["read_only/new"],
        "choose another",
    ),
    "old run": (
        ["train", "read_only/run/recipe.yaml", *LONGER, "--out", "read_only/run"],
        ["read_only/run"],
        "choose another",
    ),
    "prepare": (["prepare", "--sample", "digits", "--out", "read_only/data"], ["read_only"], "choose"),
}
STARTED = {"text in pictures"}  # what is wrong shows only once the training runs
DAMAGED = "damaged checkpoint"


def with_out(line: list, name: str, suffix: str = "") -> list:
    return [f"out of {name}{suffix}" if word == "OUT" else word for word in line]


def check_line(text: str, names: list[str], remedy: str) -> None:
    errors = [line for line in text.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, text
    assert errors[0].startswith("mage-ds: error: "), text
    assert "Traceback" not in text
    for part in (*names, remedy):
        assert part in errors[0], errors[0]


def check_left(place, name: str, out: Path, before: dict) -> None:
    """Nothing new, or, where the training had begun, a run that says how it ended."""
    if name in STARTED:
        state = status(out)
        assert (state["state"], state["exit_code"]) == ("failed", 2)
        assert "unreadable" in state["reason"]
        listed = [json.loads(line)["name"] for line in (out / "quarantine.jsonl").read_text().splitlines()]
        assert listed and set(listed) <= {f"a/{i}.jpg" for i in range(40)}
    else:
        assert not out.exists()
    if name == DAMAGED:  # the refused start is written down, the rest is as it was
        after, told = tree(place / "damaged"), ("status.json", "recipe.yaml", "environment.json", "ds_config.json")
        changed = [path for path in before if after.get(path) != before[path]]
        assert [path for path in changed if not path.endswith(told)] == []
        assert [path for path in after.keys() - before.keys() if "/logs" not in path] == []
        assert status(place / "damaged")["exit_code"] == 2


@pytest.fixture(scope="module")
def alone(place):
    before = tree(place / "damaged")
    results = several(*(with_out(line, name) for name, (line, _, _) in CASES.items()), cwd=place)
    return dict(zip(CASES, results, strict=True)), before


@pytest.mark.parametrize("name", CASES)
def test_alone(name, alone, place):
    results, before = alone
    code, _, err = results[name]
    _, names, remedy = CASES[name]
    assert code == 2
    check_line(err, names, remedy)
    check_left(place, name, place / f"out of {name}", before)


def test_nothing_is_left_lying_about(alone, place):
    known = {"data", "tokenizer", "empty", "text_txt", "text_jpg", "other_tokenizer", "damaged", "read_only"}
    left = {entry.name for entry in place.iterdir() if not entry.name.startswith(("launch-", "out of text in"))}
    assert left <= known
    assert list((place / "empty").iterdir()) == []


def test_read_only_output(read_only, place):
    before = tree(read_only)
    for (code, _, err), (_, names, remedy) in zip(
        several(*(line for line, _, _ in READ_ONLY.values()), cwd=place), READ_ONLY.values(), strict=True
    ):
        assert code == 2
        check_line(err, names, remedy)
    assert tree(read_only) == before


def on_two_ranks(name: str, line: list, names: list[str], remedy: str, place) -> None:
    line = with_out(line, name, ", two ranks")
    with Launch(*line, cwd=place) as launch:
        code = launch.ended()
        assert code == 2, launch.output  # DeepSpeed's launcher passes on what the first rank to end says
        check_line("\n".join(launch.said), names, remedy)


@pytest.mark.parametrize(
    "name",
    [name if name in ("missing data", DAMAGED) else pytest.param(name, marks=pytest.mark.full) for name in CASES],
)
def test_two_ranks(name, place):
    line, names, remedy = CASES[name]
    if name == "batch that does not divide":
        line, names, remedy = mage("batch=15"), ["batch = 15", "2 ranks"], "batch=14 or batch=16"
    before = tree(place / "damaged")
    on_two_ranks(name, line, names, remedy, place)
    check_left(place, name, place / f"out of {name}, two ranks", before)


@pytest.mark.full
@pytest.mark.parametrize("name", READ_ONLY)
def test_read_only_output_on_two_ranks(name, read_only, place):
    before = tree(read_only)
    on_two_ranks(name, *READ_ONLY[name], place)
    assert tree(read_only) == before


def test_a_port_in_use(place):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        line = [sys.executable, "-m", "mage_ds", *with_out(mage(), "port")]
        done = subprocess.run(line, cwd=place, env=environment(**ranks), capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    check_line(done.stderr, [f"port {port} ", "in use"], "--master_port")
    assert not (place / "out of port").exists()


# --- a bug is no user's mistake

PLANTED = """
import sys
from mage_ds import cli
from mage_ds.tasks import pretrain

def tokenize(*_):
    raise RuntimeError("planted")

pretrain.tokenize = tokenize
sys.exit(cli.main())
"""


def test_a_bug_keeps_its_traceback(place):
    line = [sys.executable, "-c", PLANTED, *with_out(mage(), "bug")]
    done = subprocess.run(line, cwd=place, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.rstrip().endswith("RuntimeError: planted")
    assert "mage-ds: error" not in done.stderr
    state = status(place / "out of bug")
    assert (state["state"], state["exit_code"], state["reason"]) == ("failed", 1, "RuntimeError: planted")
    shutil.rmtree(place / "out of bug")


@pytest.mark.full
def test_a_bug_on_two_ranks_keeps_its_traceback(place):
    script = place / "planted.py"
    script.write_text(PLANTED)
    launch = run(*with_out(mage(), "bug"), cwd=place, script=script, code=1)
    assert "Traceback (most recent call last)" in launch.text and "RuntimeError: planted" in launch.text
    assert status(place / "out of bug")["exit_code"] == 1
    script.unlink()
    shutil.rmtree(place / "out of bug")
