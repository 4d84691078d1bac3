"""`mage-ds evaluate RUN --watch` beside a real training: begun before it, through its kill and its resume, to its end;
what stands in which file then, and what a user gets wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from launched import OFTEN, TINY, Launch, environment, losses, metrics, run, several, status
from made_export import make_export

from mage_ds.engine import retention
from mage_ds.engine.run_folder import write_status

pytestmark = pytest.mark.processes
STEPS, SAVED, NUM = 200, 30, 16


@contextmanager
def started(*argv, cwd):
    """A process in the background; `.said()` is what it has printed."""
    log = cwd / f"{argv[0]}-{time.monotonic_ns()}.log"
    with open(log, "w") as file:
        line = [sys.executable, "-m", "mage_ds", *map(str, argv)]
        one = subprocess.Popen(line, cwd=cwd, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    one.said = log.read_text
    try:
        yield one
    finally:
        one.kill()
        one.wait()


def until(condition, *alive, seconds=120.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        dead = [one for one in alive if one.poll() is not None]
        assert not dead and time.monotonic() < end, [one.said() for one in (dead or alive)]
        time.sleep(0.02)
    return value


def last(folder) -> int:
    return losses(folder)[-1][0] if losses(folder) else 0


def book(folder, name="watch") -> list[dict]:
    path = folder / "evaluated" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def root(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("watched")
    make_export(root / "other")
    for i, picture in enumerate(sorted((made[0] / "val").glob("*/*"))[::8][:40]):
        (root / "real" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, root / "real" / str(i % 2))
    return root


@pytest.fixture(scope="module")
def words():
    look = ["--reference", "real", "--features", "run:other", "-n", NUM, "--batch", 8, "--steps", 4]
    return [*look, "--metrics", "fid,prc", "--neighbours", "off"]


@pytest.fixture(scope="module")
def watched(root, made, words):
    """(folder of the run, all that the watch said, the step up to which the killed training had come)."""
    train = ["train", "digits_mage", *TINY, *OFTEN, f"duration.steps={STEPS}", f"report.checkpoint_every.steps={SAVED}"]
    train += ["report.keep=1", "--data", made[0], "--tokenizer", made[1], "--out", "run"]
    folder = root / "run"
    with started("evaluate", "run", *words, "--watch", cwd=root) as watch:
        until(lambda: "waiting for it" in watch.said(), watch)
        assert not folder.exists()  # a folder that is no run would be refused by the training
        with started(*train, cwd=root) as training:
            until(lambda: last(folder) > SAVED, watch, training)
            training.send_signal(signal.SIGSTOP)  # it could have finished before the first figures
            until(lambda: book(folder), watch, training)
            training.send_signal(signal.SIGKILL)
        killed = last(folder)
        with started(*train, cwd=root) as training:
            until(lambda: status(folder)["state"] == "finished", watch, training)
        assert watch.wait(60) == 0, watch.said()
        return folder, watch.said(), killed


def test_the_training_is_as_if_nobody_watched(watched):
    folder, _, killed = watched
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1)) and killed > SAVED
    assert retention.steps(folder)[-1] == STEPS and len(retention.steps(folder)) <= 2  # one was read at the last save
    assert not any(retention.pins(retention.folder_of(folder, step)) for step in retention.steps(folder))
    assert retention.left(folder) == []
    assert (folder / "pictures" / "loss.png").is_file()


def test_figures_are_in_the_book_the_metrics_and_the_board(watched):
    folder, said, _ = watched
    found = book(folder)
    steps = [record["step"] for record in found]
    assert (
        steps == sorted({*steps})
        and steps[-1] == STEPS
        and len(steps) >= 2
        and all(step % SAVED == 0 for step in steps[:-1])
    )
    assert sorted((r for r in metrics(folder) if "fid" in r), key=lambda record: record["step"]) == found
    for record in found:
        assert record["n"] == NUM and {"fid", "precision", "recall", "seconds", "weights"} < {*record}
        assert f"step {record['step']:6d}  fid {record['fid']:.5g} (" in said
        place = folder / record["evaluated"]
        assert json.loads((place / "results.json").read_text())["figures"]["fid"]["value"] == record["fid"]
        assert (place / "sheet.png").is_file() and not (place / "features").exists()
    board = scalars(folder / "tensorboard" / "watch")
    assert [step for step, _ in board["evaluated/fid"]] == steps
    assert [value for _, value in board["evaluated/fid"]] == pytest.approx([r["fid"] for r in found], rel=1e-6)
    own = scalars(folder / "tensorboard")
    assert [step for step, _ in own["train/loss"]] == list(range(1, STEPS + 1)) and "evaluated/fid" not in own


def test_a_finished_run_is_evaluated_once_and_mistakes_are_one_line(watched, root, words, made):
    folder, _, _ = watched
    before = book(folder), metrics(folder)
    watch = ["evaluate", "run", *words, "--watch"]
    lines = {
        "again": watch,
        "on a new place": [*watch, "--out", "elsewhere", "--every", STEPS - 1],
        "other settings": [*watch, "--seed", 3],
        "itself": ["evaluate", "run", "--reference", "real", "--features", "run:run", "--watch"],
        "reference": ["evaluate", "run", "--reference", "unreal", "--features", "run:other", "--watch"],
        "extractor": ["evaluate", "run", "--reference", "real", "--watch"],
        "keep": [*watch, "--keep", "kept"],
        "file": ["evaluate", "real/0", *words, "--watch", "--patience", 0],
        "tokenizer": ["evaluate", made[1], *words, "--watch"],
        "nothing": ["evaluate", "never", *words, "--watch", "--patience", 0.0001],
        "alone": ["evaluate", "run", *words, "--checkpoint", STEPS, "--out", "alone"],
    }
    answers = dict(zip(lines, several(*lines.values(), cwd=root), strict=True))
    assert answers["again"][0] == 0 and "step" not in answers["again"][1].replace("steps", ""), answers["again"]
    assert (book(folder), metrics(folder)[: len(before[1])]) == before
    assert answers["on a new place"][0] == 0 and f"step {STEPS:6d}" in answers["on a new place"][1]
    assert len([r for r in metrics(folder) if r["step"] == STEPS and "fid" in r]) == 2
    for name, parts in {
        "other settings": ["evaluated/watch", "seed 0 there, 3 here"],
        "itself": ["--features run:", "while it is watched"],
        "reference": ["unreal", "no such"],
        "extractor": ["--inception", "--features"],
        "keep": ["--keep goes with", "leave it out"],
        "file": ["real/0: is no run yet after 0 hours"],
        "tokenizer": ["is a run of task tokenizer"],
        "nothing": ["never: is no run yet", "--patience"],
    }.items():
        code, _, err = answers[name]
        assert code == 2 and err.count("\n") == 1 and all(part in err for part in parts), (name, err)
    assert not (root / "never").exists()
    alone = json.loads((root / "alone" / "results.json").read_text())["figures"]
    assert {name: figure["value"] for name, figure in alone.items()} == {
        name: book(folder)[-1][name] for name in ("fid", "precision", "recall")
    }


@pytest.fixture
def copied(watched, root):
    """A run that has trained alone, and is to be looked at 400 times."""

    def copy(name):
        folder = root / name
        shutil.copytree(root / "run", folder, ignore=shutil.ignore_patterns("evaluated", "pinned", "watch"))
        (folder / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(1, STEPS + 1)))
        return folder

    return copy


def stop(folder, words, number):
    """A signal in the middle of an evaluation."""
    pin = lambda: retention.pins(retention.folder_of(folder, STEPS))  # noqa: E731
    with started("evaluate", folder.name, *words, "-n", 400, "--watch", "--every", STEPS, cwd=folder.parent) as watch:
        until(lambda: any((folder / "evaluated" / "watch").glob("step_*/features/samples/tiles/*")), watch)
        assert len(pin()) == 1 and "evaluated into" in pin()[0]
        watch.send_signal(number)
        assert watch.wait(60) == 75, watch.said()
        name = signal.Signals(number).name
        assert watch.said().endswith(f"{name}: stopped watching; the same command goes on\n"), watch.said()
        assert "Traceback" not in watch.said() and pin() == []


def test_a_signal_ends_it_in_one_line(copied, words):
    stop(copied("terminated"), words, signal.SIGTERM)


@pytest.mark.full
def test_what_was_interrupted_goes_on_by_two_ranks(copied, words):
    folder = copied("interrupted")
    stop(folder, words, signal.SIGINT)
    line = ["evaluate", folder.name, *words, "-n", 400, "--watch", "--every", STEPS]
    said = run(*line, cwd=folder.parent).text
    assert said.count(f"step {STEPS:6d}  fid") == 1 and [r["n"] for r in book(folder)] == [400], said
    assert os.listdir(folder / "tensorboard" / "watch")
    with Launch(*line, "--out", "later", "--patience", 1, cwd=folder.parent) as launch:  # ranks that wait
        write_status(folder, "running")
        launch.until(lambda: f"step {STEPS:6d}  fid" in launch.output)
        write_status(folder, "finished")
        assert launch.ended() == 0 and launch.output.count("has finished") == 1, launch.output
