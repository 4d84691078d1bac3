"""`mage-ds evaluate RUN --sweep`: each row is the evaluation that it says, a killed sweep goes on, a finished one is
reused, and what a user gets wrong."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from launched import environment, run, several
from made_export import SIDE, make_export
from PIL import Image

from mage_ds.errors import UserError
from mage_ds.tasks.score_sweep import combinations

pytestmark = pytest.mark.processes
NUM, BATCH = 24, 8
SWEEP = ["--sweep", "steps=2,3", "token-temperature=0.5,1"]
MANY = ["steps=" + ",".join(map(str, range(1, 17))), "temperature=" + ",".join(map(str, range(13)))]
MISTAKES = {  # the words after --sweep -> what the line says
    "step=2,4": ["step=2,4", "did you mean steps?"],
    "nothing=2,4": ["nothing", "keys are steps, temperature"],
    "steps": ["steps", "KEY=VALUE", "SOURCE stands before"],
    "steps=2 steps=4,5": ["steps=4,5", "before"],
    "steps=2,3 --steps 4": ["steps=2,3", "--steps"],
    "temperature=2,2.0": ["temperature 2 is given twice"],
    "steps=0,2": ["steps=0", "greater than or equal to 1"],
    "steps=2,2.5": ["steps=2.5", "integer"],
    "temperature=1,hot": ["temperature=hot", "number"],
    "temperature=1,inf": ["temperature=inf", "finite"],
    "order=halton,random": ["order=random", "'halton'"],
    "steps=2,65": ["--steps 65", "64 tokens"],
    "guidance=0,2": ["--guidance 2", "needs a model with classes"],
    " ".join(MANY): ["208 rows", "200"],
    "steps=2": ["one row"],
    "steps=2,3 --keep kept": ["--keep", "--sweep"],
    "steps=2,3 --metrics is": ["--metrics is"],
    "steps=2,3 --per-class 5": ["--per-class 5", "--num"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a MAGE and of real pictures, and the command line of an evaluation of the one beside the others."""
    root = tmp_path_factory.mktemp("swept")
    make_export(root / "mage")
    rng = np.random.default_rng(0)
    (root / "real").mkdir()
    for i in range(40):
        ground = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(ground).resize((SIDE, SIDE), Image.BICUBIC).save(root / "real" / f"{i}.png")
    line = ["evaluate", root / "mage", "--reference", root / "real", "--features", f"run:{root / 'mage'}"]
    return root, [*line, "-n", NUM, "--batch", BATCH, "--metrics", "fid,prc,kid"]


@pytest.fixture(scope="module")
def swept(base):
    """A sweep that was killed in its second row, then ended, and what came after: name -> (exit code, stdout, stderr);
    and the tiles that were there when it was killed, with their times."""
    root, line = base
    words = [*line, *SWEEP, "--out", "swept"]
    program = [sys.executable, "-m", "mage_ds", *map(str, words)]
    with subprocess.Popen(program, cwd=root, env=environment(), stdout=subprocess.DEVNULL) as lone:
        limit = time.monotonic() + 120
        while not [*(root / "swept").glob("steps=2,token_temperature=1/features/samples/tiles/*.npz")]:
            assert lone.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
        lone.send_signal(signal.SIGKILL)
    assert not (root / "swept" / "sweep.json").exists()
    before = tiles(root / "swept")
    lines = {
        "ended": words,
        "single": [*line, "--steps", 3, "--token-temperature", 0.5, "--out", "single"],
        "again": words,
        "more": [*line, "--sweep", "steps=2,4", "token-temperature=0.5", "--out", "swept"],
        "other": [*line, *SWEEP, "--seed", 5, "--out", "swept"],
        "pictures": ["evaluate", "real", *line[2:6], *SWEEP, "--out", "never"],
        "default place": [*line, "--sweep", "steps=1,2", "--neighbours", "off"],
    }
    lines |= {name: [*line, "--sweep", *name.split(), "--out", "never"] for name in MISTAKES}
    return root, dict(zip(lines, several(*lines.values(), cwd=root), strict=True)), before


def tiles(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("tiles/*.npz")}


def results(folder, name="results.json"):
    return json.loads((folder / name).read_text())


def said(swept, name) -> str:
    code, out, err = swept[1][name]
    assert code == 0, err
    return out


def test_rows_are_single_evaluations(swept):
    root, _, _ = swept
    said(swept, "ended"), said(swept, "single")
    folder, single = root / "swept" / "steps=3,token_temperature=0.5", root / "single"
    assert results(folder)["figures"] == results(single)["figures"]
    for section in ("source", "reference", "extractor", "options"):
        assert results(folder)[section] == results(single)[section], section
    noise = [results(root / "swept" / f"steps={t},token_temperature=1")["source"]["seed"] for t in (2, 3)]
    assert noise == [0, 0]


def test_the_reference_is_extracted_once(swept):
    root, _, _ = swept
    assert len([*(root / "swept" / "features" / "reference").glob("tiles/*.npz")]) == 5
    assert not [*(root / "swept").glob("*/features/reference")]
    assert said(swept, "ended").count("looked at 40/40") == 0  # it was there before the kill


def test_a_killed_sweep_goes_on(swept):
    root, _, before = swept
    after = tiles(root / "swept")
    assert len(before) >= 9 and {path: after[path] for path in before} == before


def test_a_finished_row_is_not_drawn_again(swept):
    root, _, _ = swept
    assert "looked at" not in said(swept, "again")
    assert said(swept, "more").count("looked at 24/24") == 1  # steps=4
    assert [row["name"] for row in results(root / "swept", "sweep.json")["rows"]] == [
        "steps=2,token_temperature=0.5",
        "steps=4,token_temperature=0.5",
    ]


def test_what_is_said_and_written(swept):
    root, _, _ = swept
    text = said(swept, "ended")
    lines = text.splitlines()
    [head] = [i for i, line in enumerate(lines) if line.startswith("steps  token_temperature")]
    assert [line.split()[:2] for line in lines[head + 1 : head + 5]] == [
        ["2", "0.5"],
        ["2", "1"],
        ["3", "0.5"],
        ["3", "1"],
    ]
    assert sum(line.count("*") for line in lines[head : head + 5]) == 4  # fid, precision, recall, kid
    for part in ("4 rows of 24 pictures", "row 4/4: steps=3, token_temperature=1", "biased upwards", "jackknife"):
        assert part in text, part
    found = results(root / "swept", "sweep.json")
    for row in found["rows"]:
        assert row["figures"] == results(root / "swept" / row["name"])["figures"]
    values = {row["name"]: row["figures"]["fid"]["value"] for row in found["rows"]}
    assert found["best"]["fid"] == min(values, key=values.get)
    assert "steps" not in found["source"] and found["source"]["temperature"] == 2.0
    assert (root / "swept" / "sweep.md").read_text().count("\n") == 2 + len(values)
    assert Image.open(root / "swept" / "sweep.png").width == 1840


def test_the_default_place(swept):
    root, _, _ = swept
    said(swept, "default place")
    [place] = (root / "mage" / "evaluated").iterdir()
    assert place.name.startswith("sweep-real-") and (place / "steps=2" / "results.json").is_file()


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(swept, name):
    root, answers, _ = swept
    code, _, err = answers[name]
    assert code == 2 and err.count("\n") == 1 and all(part in err for part in MISTAKES[name]), err
    assert not (root / "never").exists()


def test_what_cannot_be_swept(swept):
    _, answers, _ = swept
    for name, parts in (("other", ["seed 0 there, 5 here"]), ("pictures", ["real: --sweep", "is none"])):
        code, out, err = answers[name]
        assert code == 2 and err.count("\n") == 1 and all(part in err for part in parts), err
        assert "looked at" not in out


def test_combinations():
    assert combinations(["steps=8,12", "guidance-schedule=linear", "temperature=1e-1,3"], {"seed": 1}) == [
        {"steps": steps, "guidance_schedule": "linear", "temperature": temperature}
        for steps in (8, 12)
        for temperature in (0.1, 3.0)
    ]
    with pytest.raises(UserError, match="208"):
        combinations(MANY, {})


@pytest.mark.full
def test_two_ranks_give_the_same_table(swept, base, tmp_path):
    root, line = base
    assert run(*line, *SWEEP, "--out", tmp_path / "out", cwd=tmp_path).text.count("written to") == 1
    for steps in (2, 3):
        name = f"steps={steps},token_temperature=1"
        assert results(tmp_path / "out" / name)["figures"] == results(root / "swept" / name)["figures"]
