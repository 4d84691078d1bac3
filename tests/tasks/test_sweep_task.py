"""mage-ds sweep: from nothing to a table with real trainings, killed and continued; what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import BIN, environment, living, mage_ds, several
from made_sweep import HEAD, MAGE, SIZE

from mage_ds import recipes
from mage_ds.report import bands

pytestmark = pytest.mark.processes

TABLE = f"""{HEAD}
trend: {{axis: padding, figures: [fid, top1]}}
rows:
  cls:
    at: 0
    published: {{fid: 11.6, top1: 73.3}}
    digits: {{train: {{recipe: digits_mage, set: [{MAGE}, duration.steps=2]}}}}
  mask:
    at: 1
    published: {{fid: 12.4}}
    digits: {{train: {{recipe: digits_mage, set: [{MAGE}, duration.steps=400, model.padding=mask]}}}}
  none:
    at: 2
"""


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "table.yaml").write_text(TABLE)
    return tmp_path


def test_what_is_refused(place):
    """One process; each a line that names it and the remedy, and nothing is made."""
    wrong = {
        ("tabel8",): "sweep tabel8: no such table; did you mean table8?",
        ("table.yaml",): "--out DIR: is missing",
        ("table.yaml", "--out", "x"): "--scale paper: none of the rows stands at this scale",
        ("table.yaml", "--scale", "digits", "--out", "x", "--only", "clss"): "--only clss: there is no such row",
        ("table.yaml", "--scale", "digits", "--out", "x", "--record"): "has no finished run of a packaged recipe",
        ("table.yaml", "--scale", "digits", "--seeds", "0", "--out", "x"): "--seeds: 0: must be a whole number",
        ("table.yaml", "--scale", "digits", "--out", "/proc/x"): "--out /proc/x: cannot be written",
        ("table.yaml", "--scale", "digits", "--out", "x", "--launch", "nosuch -n 2"): "--launch nosuch: there is no",
        ("table.yaml", "--scale", "digits", "--out", "x", "--launch", "deepspeed '"): "no closing quotation",
        ("table.yaml", "--scale", "digits", "--out", "x", "--slurm=--a '"): "--slurm --a ': no closing quotation",
    }
    results = several(*(["sweep", *words] for words in wrong), cwd=place)
    for (code, _, said), wanted in zip(results, wrong.values(), strict=True):
        assert code == 2 and wanted in said and said.count("\n") == 1, said
    assert [path.name for path in place.iterdir()] == ["table.yaml"]


def test_a_table_of_nothing_and_what_was_given(place):
    """Without --out all is blank. What was given is known from then on, and something else is refused."""
    (place / "x").mkdir()
    known = {"data": str(place / "data"), "scale": "digits", "seeds": {"table": 2}}
    (place / "x" / "inputs.json").write_text(json.dumps(known))
    table = ["sweep", "table.yaml", "--scale", "digits"]
    blank, listed, refused, told, other, rows = several(
        [*table, "--table"],
        ["sweep"],
        [*table, "--out", "x", "--data", "other"],
        ["sweep", "table.yaml", "--out", "x", "--table"],
        ["sweep", "table.yaml", "--out", "x", "--scale", "paper", "--table"],
        [*table, "--out", "x", "--table", "--only", "cls"],
        cwd=place,
    )
    lines = blank[1].splitlines()
    assert blank[0] == 0 and lines[2].split() == ["cls", "11.6", "73.3"] and lines[4].split() == ["none"]
    assert "0 of 8 jobs are done" in blank[1]
    assert "table8" in listed[1] and "lambda" in listed[1]
    assert refused[0] == 2 and f"(data {place}/data there, {place}/other here)" in refused[2]
    assert told[0] == 0 and "(--scale digits)" in told[1] and "0 of 14 jobs are done" in told[1], told
    assert other[0] == 2 and "(scale digits there, paper here)" in other[2]
    assert rows[0] == 2 and "--only: chooses what is made" in rows[2]
    assert sorted(path.name for path in place.iterdir()) == ["table.yaml", "x"]


def test_curves_are_of_recipes_as_they_are(place, monkeypatch, tmp_path):
    """--record takes the finished runs of digits_mage, which the table trains unchanged, of both seeds, and none of the
    changed ones; a probe counts on the unchanged one only."""
    from mage_ds.recipes.jobs import Inputs, expand
    from mage_ds.recipes.sweep import load_sweep
    from mage_ds.tasks import sweep as task

    plain = TABLE
    for changes in (f"{MAGE}, duration.steps=2", f"{MAGE}, duration.steps=400, model.padding=mask"):
        plain = plain.replace(f"[{changes}]", "[model.padding=mask]" if "mask" in changes else "[]")
    plain = plain.replace(f"set: [batch=16, duration.steps=2, {SIZE}]", "set: []")
    (place / "table.yaml").write_text(plain)
    asked, folder = load_sweep(str(place / "table.yaml")), place / "x"
    graph = expand(asked, "digits", Inputs(), folder, seeds=2, told=True)
    for job in graph.jobs.values():
        if job.words[0] == "train":
            run = Path(job.out)
            run.mkdir(parents=True)
            recipe = recipes.load_recipe(job.words[1], job.words[2 : job.words.index("--data")])
            (run / "recipe.yaml").write_text(recipes.dump(recipe))
            (run / "status.json").write_text('{"state": "finished"}')
            init = job.words[job.words.index("--init") + 1] if "--init" in job.words else None
            (run / "facts.json").write_text(json.dumps({"init": init}))
            (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": float(recipe.seed), "lr": 0.1}) + "\n")
    monkeypatch.setattr(bands, "path_of", lambda recipe: tmp_path / "curves" / f"{recipe.stem}.json")
    monkeypatch.setattr(task, "_dataset", lambda run: 1457)
    task.sweep(name=str(place / "table.yaml"), scale="digits", out=str(folder), seeds=2, record=True)
    kept = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "curves").iterdir()}
    assert sorted(kept) == ["digits_mage", "digits_probe"]  # the tokenizer has another batch
    mage = recipes.load_recipe("digits_mage")
    for name, curve in kept.items():
        assert curve["upon"] == (bands.identity(mage) if name == "digits_probe" else None)
        assert curve["seeds"] == [0, 1] and curve["figures"]["loss"]["mean"] == [0.5]
        assert (curve["figures"]["loss"]["low"], curve["figures"]["loss"]["high"]) == ([0.0], [1.0])


@pytest.mark.full
def test_from_nothing_to_the_table_with_a_kill_and_a_signal(place):
    """SIGKILL to the sweep while a MAGE is trained: the training saves and ends, as one process and as two ranks of a
    launcher. SIGTERM is passed on. Then the same command ends with a table; of the jobs that were done none is done
    again."""
    table = ["sweep", "table.yaml", "--scale", "digits", "--out", "x"]
    mark = "MAGE_DS_TEST=sweep"
    ranks = ["--launch", f"{BIN / 'deepspeed'} --num_accelerators 2 --module mage_ds"]
    for number, how in [(number, how) for how in ([], ranks) for number in (signal.SIGKILL, signal.SIGTERM)]:
        line = [sys.executable, "-m", "mage_ds", *table, *how]
        running = subprocess.Popen(line, cwd=place, env=environment(MAGE_DS_TEST="sweep"), stderr=subprocess.PIPE)
        _until(lambda: _trains(place / "x", "mask"))
        os.kill(running.pid, number)
        code = running.wait(120)
        _until(lambda: not living(mark))
        assert code == (-9 if number == signal.SIGKILL else 75)
        [run] = _runs(place / "x", "mask")
        state = json.loads((run / "status.json").read_text())
        if state["state"] == "finished":
            pytest.skip("it was faster than the signal")
        assert state["state"] == "stopped"
        (place / "x" / "logs" / f"{run.name}.log").unlink()  # so that what is waited for is the next start's
    logs = {path.name: path.read_text() for path in (place / "x" / "logs").iterdir() if run.name not in path.name}
    done = mage_ds(*table, cwd=place)
    assert "8 jobs in x, 5 of them done" in done.stdout, done.stdout
    assert {name: text for name, text in logs.items() if (place / "x" / "logs" / name).read_text() != text} == {}
    assert "resumed" in (place / "x" / "logs" / f"{run.name}.log").read_text()
    rows = {
        line.split()[0]: line.split()[1:]
        for line in done.stdout.splitlines()
        if line.startswith(("cls", "mask", "none"))
    }
    assert len(rows["cls"]) == 4 and len(rows["mask"]) == 3 and rows["none"] == []
    for label, value in (("cls", rows["cls"][1]), ("mask", rows["mask"][1])):
        scores = [json.loads(path.read_text()) for path in (place / "x" / "scores").glob("*/results.json")]
        assert float(value) in [round(each["figures"]["fid"]["value"], 2) for each in scores], label
    assert (place / "x" / "table.md").read_text().count("|") > 20 and (
        place / "x" / "table.png"
    ).stat().st_size > 10_000
    again = mage_ds(*table, "--table", cwd=place)
    assert again.stdout.splitlines()[1:5] == done.stdout.splitlines()[-8:-4] or "8 of 8 jobs" in again.stdout


def _runs(folder: Path, padding: str) -> list[Path]:
    found = []
    for path in (folder / "runs").glob("digits_mage-*"):
        if (path / "recipe.yaml").is_file() and f"padding: {padding}" in (path / "recipe.yaml").read_text():
            found.append(path)
    return found


def _trains(folder: Path, padding: str) -> bool:
    runs = _runs(folder, padding) if (folder / "runs").is_dir() else []
    log = folder / "logs" / f"{runs[0].name}.log" if runs else folder
    return log.is_file() and "step " in log.read_text().partition("parameters")[2]


def _until(condition, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
