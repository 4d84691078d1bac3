"""The book of an evaluation beside a training: what a run goes back behind, and two writers of metrics.jsonl."""

import json
import multiprocessing
import socket

import pytest

from mage_ds.engine import checkpoint, retention, run
from mage_ds.engine.run_folder import write_aside, write_status
from mage_ds.engine.watched import Book
from mage_ds.errors import UserError
from mage_ds.report import grids


def publish(folder, step, weights="a"):
    """A checkpoint that is nothing but its meta.json."""
    place = retention.folder_of(folder, step)
    place.mkdir(parents=True)
    files = {"mage.weight.00000.safetensors": {"bytes": 1, "sha256": weights}}
    meta = {"format": checkpoint.FORMAT, "step": step, "engines": {"mage": {}}, "files": files, "time": step}
    (place / "meta.json").write_text(json.dumps(meta | {"digest": checkpoint._digest(meta)}))


def opened(folder, settings=None) -> Book:
    book = Book(folder, folder / "evaluated" / "watch")
    book.open(settings or {"num": 5})
    return book


def add(book, step, fid=1.5) -> bool:
    return book.add({"step": step, "fid": fid, "n": 5, "seconds": 0.1}, book.place(step))


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    for step in (5, 10, 15):
        publish(tmp_path, step)
    write_status(tmp_path, "running")
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {i}, "loss": 2.0, "seconds": 1.0}}\n' for i in range(1, 16))
    )
    return tmp_path


def test_what_the_run_goes_back_behind_is_forgotten(folder, capsys):
    book = opened(folder)
    assert book.new() == [5, 10, 15] and all(add(book, step) for step in (10, 15)) and book.new() == [5]
    retention.leave_behind(folder, 10)
    assert book.new() == [5] and [each["step"] for each in book.records] == [10]
    publish(folder, 15, "b")  # the same step with other weights is another checkpoint
    assert book.new() == [5, 15] and add(book, 15, 2.5)
    assert [(each["step"], each["fid"]) for each in opened_again(book)] == [(10, 1.5), (15, 2.5)]
    retention.leave_behind(folder, 5)  # unseen: it is back at 15 already
    publish(folder, 10)
    publish(folder, 15, "c")
    assert book.new() == [5, 15] and "went back; figures from step 15 on" in capsys.readouterr().out
    place = book.place(15)
    retention.leave_behind(folder, 10)  # while it is looked at
    assert not book.add({"step": 15, "fid": 1.0, "n": 5, "seconds": 0.1}, place) and [
        e["step"] for e in book.records
    ] == [10]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / "watch"))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("evaluated/fid")] == [(10, 1.5), (15, 2.5)]


def test_what_cannot_be_read_is_passed_over_once(folder):
    book = opened(folder)
    place = retention.folder_of(folder, 10)
    assert "00000.safetensors: damaged checkpoint" in book.problem(10) and book.new() == [5, 15]
    (retention.folder_of(folder, 15) / "meta.json").write_text("{")
    assert book.new() == [5, 15]
    assert "meta.json: damaged checkpoint" in book.problem(15) and book.new() == [5]
    retention.remove(place)
    assert book.problem(10) == "the training has removed it"


def opened_again(book) -> list[dict]:
    book._lock.close()
    return opened(book.run).records


def test_one_watch_a_folder_and_one_kind_of_figures(folder):
    book = opened(folder)
    with pytest.raises(UserError, match="another process watches it"):
        opened(folder)
    book._lock.close()
    with pytest.raises(UserError, match="num 5 there, 6 here"):
        opened(folder, {"num": 6})


def test_pins_are_taken_back_also_those_of_a_killed_one(folder):
    book = opened(folder)
    at = retention.folder_of(folder, 10)
    for why in ("sampled into out", f"evaluated into {book.place(10)}", f"evaluated into {folder}/elsewhere"):
        retention.pin(at, why)
    retention.pin(retention.folder_of(folder, 15), f"evaluated into {book.place(15)}")
    retention.leave_behind(folder, 10)
    book._lock.close()
    opened(folder)
    assert retention.pins(at) == ["sampled into out", f"evaluated into {folder}/elsewhere"]
    assert [retention.pins(each) for each in retention.left(folder)] == [[]]


def test_lines_are_added_where_that_does_no_harm(folder):
    book, path = opened(folder), folder / "metrics.jsonl"
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"host": "elsewhere"}))
    assert add(book, 5)
    assert len(lines(folder)) == 15  # two hosts' appends may overwrite each other
    (folder / "status.json").write_text(json.dumps(status | {"host": "elsewhere", "state": "stopped"}))
    book.share()
    assert lines(folder)[15:] == book.records
    write_status(folder, "running")
    assert json.loads((folder / "status.json").read_text())["host"] == socket.gethostname()
    whole = path.read_text()
    path.write_text(whole.replace(json.dumps(book.records[0]) + "\n", '{"step": 16, "lo'))  # cut off by a kill
    before = path.read_text()
    book.share()
    assert path.read_text() == before
    path.write_text("".join(f"{line}\n" for line in before.splitlines()[:-1]))  # as a start does
    book.share()
    book.share()
    assert lines(folder)[15:] == book.records


def test_readers_of_the_trainings_lines_are_not_misled(folder):
    book = opened(folder)
    assert add(book, 15)
    assert run.owed(folder, {"step": 15, "due": ["evaluate", "pictures"]}) == ["evaluate", "pictures"]
    grids.loss_curve(folder / "metrics.jsonl", folder / "loss.png")


def _train(folder, times):
    """What a training does to the file: appends, and goes back to step 100 as `run.Run._rewind` does."""
    path = folder / "metrics.jsonl"
    for time in range(times):
        if time:
            kept = [line for line in path.read_text().splitlines() if run._step_of(line) <= 100]
            write_aside(path, "".join(f"{line}\n" for line in kept))
        with open(path, "a", buffering=1) as file:
            for step in range(101 if time else 1, 400):
                file.write(json.dumps({"step": step, "loss": 1.0, "more": "x" * 50}) + "\n")


def test_a_training_that_goes_back_while_lines_are_added(folder):
    (folder / "metrics.jsonl").unlink()
    publish(folder, 500)
    book = opened(folder)
    book.records = [{"step": step, "fid": 1.0, "n": 5, "seconds": 0.1} for step in (5, 10, 15)]
    training = multiprocessing.get_context("fork").Process(target=_train, args=(folder, 40))
    training.start()
    shared = 0
    while training.is_alive():
        book.share()
        shared += 1
    assert training.exitcode == 0 and shared > 1
    book.share()
    found = lines(folder)  # every line is whole
    assert [each["step"] for each in found if "loss" in each] == list(range(1, 400))
    ours = [each for each in found if "fid" in each]
    assert sorted(ours, key=lambda each: each["step"]) == book.records
