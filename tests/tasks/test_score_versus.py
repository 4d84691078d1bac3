"""`mage-ds evaluate --versus` as a user starts it, with looks at 32, 64, ... pictures instead of 500, 1,000, ...: its
figures are those of `evaluate`, nothing is drawn twice, and what a user gets wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from launched import environment, run
from made_export import SIDE, make_export
from PIL import Image

from mage_ds.interop import exported
from mage_ds.models import Vqgan
from mage_ds.tasks import score_versus

NUM, BATCH = 100, 8
EARLY = "from mage_ds.evaluation import paired\npaired.FIRST = 32\n"
PROGRAM = EARLY + "from mage_ds import cli\ncli.entry()\n"
SEVERAL = EARLY + (
    "import json, sys\n"
    "from mage_ds.cli import main\n"
    "for line in json.loads(sys.argv[1]):\n"
    "    code = main(line)\n"
    "    for stream in (sys.stdout, sys.stderr): print(f'RESULT {code}', file=stream, flush=True)"
)


def base(root, num=NUM) -> list[str]:
    words = ["evaluate", root / "mage", "--reference", root / "real", "--features", f"run:{root / 'mage'}"]
    return [str(word) for word in [*words, "--batch", BATCH, "--steps", 2, "-n", num]]


def altered(source, folder, brighter=0.0, levels=3):
    """The same MAGE with another tokenizer: of brighter pictures, or of fewer levels and so of smaller ones."""
    parts = exported.read(source)
    side, numbers = SIDE * 2**levels // 8, parts.tokenizer.model | {"multipliers": [1] * levels}
    weights = {name: value.clone() for name, value in parts.tokenizer.weights.items()}
    if levels < 3:
        weights = Vqgan(**numbers).state_dict()
    weights["decoder.conv_out.bias"] += brighter
    tokenizer = replace(parts.tokenizer, model=numbers, weights=weights, image_size=side)
    folder.mkdir()
    exported.write(folder, replace(parts, tokenizer=tokenizer, image_size=side))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of all that the command line made, and its answers by name: (exit code, stdout, stderr)."""
    root, rng = tmp_path_factory.mktemp("compared"), np.random.default_rng(0)
    make_export(root / "mage")
    shutil.copytree(root / "mage", root / "copy")
    altered(root / "mage", root / "brighter", brighter=1.0)
    altered(root / "mage", root / "smaller", levels=2)
    (root / "real" / "train").mkdir(parents=True)
    for i in range(30):
        pixels = np.kron(rng.integers(0, 255, (4, 4, 3)), np.ones((SIDE // 4, SIDE // 4, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(root / "real" / "train" / f"{i:02d}.png")
    never, ours = ["--out", "never"], base(root)
    lines = {
        "short": [*base(root, 64), "--versus", "temperature=2.2", "--metrics", "fid,kid", "--out", "v"],
        "longer": [*ours, "--versus", "temperature=2.2", "--metrics", "fid,kid", "--out", "v"],
        "again": [*ours, "--versus", "temperature=2.2", "--metrics", "fid,kid", "--out", "v"],
        "shorter": [*base(root, 40), "--versus", "temperature=2.2", "--metrics", "fid,kid", "--out", "v"],
        "A": [*ours, "--metrics", "fid", "--neighbours", "off", "--out", "a"],
        "B": [*ours, "--metrics", "fid", "--neighbours", "off", "--temperature", "2.2", "--out", "b"],
        "runs": [*base(root, 1000), "--versus", "brighter", "temperature=3", "--metrics", "kid"],
        "equal": [*base(root, 1000), "--versus", "guidance-schedule=linear", "--out", "e"],
        "other out": [*ours, "--versus", "temperature=2.2", "--out", "v"],
        "other setting": [*ours, "--versus", "temperature=2.3", "--metrics", "fid,kid", "--out", "v"],
        "same": [*ours, "--versus", "steps=2", *never],
        "same run": [*ours, "--versus", "copy", *never],
        "no checkpoint": [*ours, "--versus", "checkpoint=7", *never],
        "no step": [*ours, "--versus", "checkpoint=new", *never],
        "strange": [*ours, "--versus", "tau=3", *never],
        "twice": [*ours, "--versus", "steps=3", "steps=4", *never],
        "value": [*ours, "--versus", "steps=many", *never],
        "none": [*ours, "--versus", "nowhere", *never],
        "several": [*ours, "--versus", "brighter", "copy", *never],
        "smaller": [*ours, "--versus", "smaller", *never],
        "pictures": [*ours, "--versus", "real", *never],
        "prc": [*ours, "--versus", "steps=3", "--metrics", "prc", *never],
        "per class": [*ours, "--versus", "steps=3", "--per-class", "5", *never],
        "alone": ["evaluate", "mage", "--versus", "steps=3", *never],
    }
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(list(lines.values()))],
        cwd=root,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out, err = ([part.split("\n", 1) for part in text.split("RESULT ")] for text in (done.stdout, done.stderr))
    answers = {}
    for i, name in enumerate(lines):
        said, wrong = (parts[i][1] if i else "\n".join(parts[0]) for parts in (out, err))
        answers[name] = (int(out[i + 1][0]), said, wrong)
    return root, answers


def book(folder):
    return json.loads((Path(folder) / "versus.json").read_text())


def said(compared, name) -> str:
    code, out, err = compared[1][name]
    assert code == 0, err
    return out


@pytest.mark.processes
def test_the_figures_are_those_of_evaluate(compared):
    root, _ = compared
    said(compared, "A"), said(compared, "B")
    look = book(root / "v")["looks"][-1]
    for name, folder in (("a", "a"), ("b", "b")):
        figure = json.loads((root / folder / "results.json").read_text())["figures"]["fid"]
        assert look["fid"][name] == pytest.approx(figure["value"], rel=1e-9)
        assert look["fid"][f"{name}_error"] == pytest.approx(figure["error"], rel=1e-9)
    assert look["fid"]["difference"] == pytest.approx(look["fid"]["b"] - look["fid"]["a"])


@pytest.mark.processes
def test_a_larger_number_goes_on_and_nothing_is_made_twice(compared):
    """64 pictures, then up to 100: the first two looks stay as they are, and only what is new is drawn."""
    root, _ = compared
    short, longer = said(compared, "short"), said(compared, "longer")
    assert short.count("looked at 32/32") == 4 and "looked at 30/30" in short  # tiles of both, and the reference
    assert "cannot be told apart after 64 pictures of each, 2 looks" in short
    assert longer.count("looked at 36/36") == 2 and "32/32" not in longer and "30/30" not in longer
    rows = [[line for line in text.splitlines() if " to " in line and line[0] == " "] for text in (short, longer)]
    assert [line.split()[0] for line in rows[1]] == ["32", "64", "100"] and rows[1][:2] == rows[0]
    for name in ("again", "shorter"):
        text = said(compared, name)
        assert "looked at" not in text and "after 100 pictures of each, 3 looks" in text, text
    found = book(root / "v")
    assert [look["n"] for look in found["looks"]] == [32, 64, 100]
    assert found["names"] == {"a": "temperature=2.0", "b": "temperature=2.2"} and found["verdict"]["better"] is None
    assert (found["a"]["temperature"], found["b"]["temperature"]) == (2.0, 2.2)
    assert found["a"]["seed"] == found["b"]["seed"] and len(found["extractor"]["hash"]) == 64


@pytest.mark.processes
def test_another_run_is_told_apart_at_once(compared):
    """KID alone, in the default place: it decides, and the rest of 1,000 pictures is not drawn."""
    root, _ = compared
    text = said(compared, "runs")
    [place] = (root / "mage" / "evaluated").iterdir()
    found = book(place)
    look = found["looks"][-1]
    low, high = look["kid"]["interval"]
    best = found["verdict"]["better"]
    assert look["n"] <= 64 and (high < 0 if best == "b" else low > 0)
    names = ["mage temperature=2.0", "brighter temperature=3.0"]
    assert " is better than ".join(names if best == "a" else reversed(names)) in text
    assert "KID" in text and "FID" not in text
    assert len(list((place / "a" / "features" / "samples" / "tiles").iterdir())) == look["n"] // BATCH


@pytest.mark.processes
def test_equal_pictures_end_it(compared):
    assert "draw the same pictures: not one of 32 differs" in said(compared, "equal")


MISTAKES = {
    "other out": ["holds another comparison", "metrics", "choose another --out"],
    "other setting": ["holds another comparison", "b.temperature: 2.2 then, 2.3 now"],
    "same": ["nothing to compare"],
    "same run": ["nothing to compare", "copy"],
    "no checkpoint": ["mage", "checkpoint 7"],
    "no step": ["checkpoint=new", "mage-ds checkpoints"],
    "strange": ["tau=3", "steps", "temperature", "checkpoint"],
    "twice": ["steps=4", "twice"],
    "value": ["steps", "many"],
    "none": ["nowhere", "no such run"],
    "several": ["brighter copy", "one"],
    "smaller": ["smaller", "16 px", "32 px"],
    "pictures": ["real", "models that draw"],
    "prc": ["prc", "fid or kid"],
    "per class": ["--per-class", "--versus"],
    "alone": ["--reference"],
}


@pytest.mark.processes
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(compared, name):
    root, answers = compared
    code, _, err = answers[name]
    assert code == 2 and err.count("\n") == 1 and all(part in err for part in MISTAKES[name]), err
    assert not (root / "never").exists()


@pytest.mark.processes
def test_killed_and_on_two_ranks(compared, tmp_path):
    """A lone process that is killed after its first look, then two ranks of a launch: the same looks, to the digit."""
    root, _ = compared
    line = [*base(root), "--versus", "temperature=2.2", "--metrics", "fid,kid", "--out", str(tmp_path / "out")]
    with subprocess.Popen([sys.executable, "-c", PROGRAM, *line], env=environment(), stdout=subprocess.DEVNULL) as lone:
        tiles = tmp_path / "out" / "b" / "features" / "samples" / "tiles"
        while not (tiles.is_dir() and len(os.listdir(tiles)) > 4):
            assert lone.poll() is None
            time.sleep(0.005)
        lone.send_signal(signal.SIGKILL)
    before = book(tmp_path / "out")
    assert [look["n"] for look in before["looks"]] == [32] and before["verdict"] is None
    (tmp_path / "program.py").write_text(PROGRAM)
    text = run(*line, cwd=tmp_path, script=tmp_path / "program.py").text
    assert text.count("cannot be told apart") == 1 and "looked at 32/32" not in text.split("100")[0]
    found = book(tmp_path / "out")
    assert found["looks"] == book(root / "v")["looks"] and found["verdict"] == book(root / "v")["verdict"]
    assert not (tmp_path / "out" / ".work").exists()


@pytest.mark.full
@pytest.mark.processes
def test_independent_processes_of_unlike_numbers(compared, tmp_path):
    """Two that know of each other by the folder only, of which one wants more: both end, each look stands once."""
    root, _ = compared
    tail = ["--versus", "temperature=2.2", "--metrics", "fid,kid", "--out", str(tmp_path / "out")]
    program = [sys.executable, "-c", PROGRAM]
    both = [subprocess.Popen([*program, *base(root, num), *tail], env=environment()) for num in (64, NUM)]
    assert [each.wait(300) for each in both] == [0, 0]
    assert book(tmp_path / "out")["looks"] == book(root / "v")["looks"]


def test_what_two_are_called():
    common = {"source": "/runs/mage", "checkpoint": 600, "steps": 8, "temperature": 1.0}
    common |= dict.fromkeys(("token_temperature", "order", "drop", "guidance", "guidance_schedule"), 0)
    assert score_versus.names(common, common | {"checkpoint": 300}) == ["checkpoint=600", "checkpoint=300"]
    assert score_versus.names(common, common | {"steps": 4, "drop": 1}) == ["steps=8 drop=0", "steps=4 drop=1"]
    other = common | {"source": "/runs/next", "checkpoint": 9}
    assert score_versus.names(common, other) == ["mage", "next"]
    assert score_versus.names(common, other | {"steps": 4}) == ["mage steps=8", "next steps=4"]
    assert score_versus.names(common, other | {"source": "/old/mage"}) == ["/runs/mage", "/old/mage"]
