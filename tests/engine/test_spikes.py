"""Losses that leap: the rule, the way back, and that the run goes on as one whose samples were left out."""

import json
import math

import pytest
import tiny
from made_runs import BATCH, OFTEN, SPIKE, LeftOut, leaping, losses, opened

from mage_ds.engine import checkpoint
from mage_ds.engine.spikes import Rule
from mage_ds.errors import UserError
from mage_ds.recipes.sections import Spike

FULL = pytest.mark.full
MODES = [
    (1, "float32"),
    *(pytest.param(*mode, marks=FULL) for mode in ((0, "float32"), (3, "float32"), (2, "bf16"))),
]


def rule(window=4, factor=2.0):
    return Rule(Spike(action="rewind", factor=factor, window=window))


def test_the_rule():
    one = rule()
    assert [one.median(loss) for loss in (9.0, 1.0, 2.0, 3.0)] == [None] * 4  # no rule before the window is full
    assert one.median(4.9) is None  # the median of 9, 1, 2, 3 is 2.5
    assert one.median(5.1) == 2.5  # of 1, 2, 3, 4.9
    assert one.median(5.1) == 2.5  # a spike is not taken in
    assert one.median(math.inf) is None and one.median(math.nan) is None  # such steps are skipped elsewhere
    assert one.median(5.0) is None
    other = rule()
    other.restore(json.loads(json.dumps(one.facts())))
    assert other.facts() == one.facts() and other.median(8.0) == one.median(8.0) == 3.95


def bad_data(step, position):
    """The 13th step of a run that nothing was left out of."""
    return 12 * BATCH <= position < 13 * BATCH


@pytest.mark.parametrize(("stage", "precision"), MODES)
def test_a_run_goes_back_and_leaves_the_samples_out(me, tmp_path, capsys, stage, precision):
    numbers, path = tiny.recipe(SPIKE, OFTEN), tmp_path / "run"
    engine = tiny.engine_of(numbers, stage, precision)
    run = opened(path, numbers, engine)
    tiny.train(engine, numbers, 20, run, leaping(numbers, bad_data))
    end = tiny.full_state(engine)
    said = capsys.readouterr().out
    assert "back to step 10; samples 80 to 103 of the stream, those of steps 11 to 13, are left out" in said
    assert [step for step, _ in losses(path)] == list(range(1, 21))
    other = tiny.engine_of(numbers, stage, precision)
    told = LeftOut(numbers)
    tiny.train(other, numbers, 10, told)
    told.left_out = 3 * BATCH
    tiny.train(other, numbers, 20, told)
    assert [loss for _, loss in losses(path)] == told.losses
    assert tiny.equal(end, tiny.full_state(other))
    meta = checkpoint.read_meta(checkpoint.find(path))
    assert (meta["step"], meta["position"], meta["spikes"]["rewinds"]) == (20, 20 * BATCH + 24, 0)
    [note] = [json.loads(line) for line in (path / "spikes.jsonl").read_text().splitlines()]
    assert (note["spike"], note["back_to"], note["left_out"]) == (13, 10, [80, 104])


@pytest.mark.parametrize("cut", [14, 17])
def test_a_killed_run_with_a_spike_goes_on_exactly(me, tmp_path, cut):
    """Killed after it went back: before anything was saved beyond (the spike is lived through again), and after."""
    numbers, path = tiny.recipe(SPIKE, OFTEN), tmp_path / "run"

    def part(path, end, source=None):
        engine = tiny.engine_of(numbers, 1)
        tiny.train(engine, numbers, end, opened(path, numbers, engine, source), leaping(numbers, bad_data))

    part(tmp_path / "whole", 20)
    part(path, cut)
    part(path, 20, checkpoint.find(path))
    assert losses(path) == losses(tmp_path / "whole")
    files = [checkpoint.read_meta(checkpoint.find(each))["files"] for each in (path, tmp_path / "whole")]
    assert files[0] == files[1]


def test_spikes_without_progress_go_further_back_and_then_end_the_run(me, tmp_path):
    numbers, path = tiny.recipe(SPIKE, OFTEN), tmp_path / "run"
    engine = tiny.engine_of(numbers, 1)
    run = opened(path, numbers, engine)
    with pytest.raises(UserError, match=r"step 13: loss .*3 times the run went back.*checkpoint of step 10 is kept"):
        tiny.train(engine, numbers, 20, run, leaping(numbers, lambda step, position: step >= 12))
    notes = [json.loads(line) for line in (path / "spikes.jsonl").read_text().splitlines()]
    assert [(note["spike"], note["back_to"]) for note in notes] == [(13, 10), (13, 5), (13, 5)]
    assert [note["left_out"] for note in notes] == [[80, 104], [40, 128], [40, 192]]
    assert checkpoint.steps(path) == [5, 10]
    checkpoint.verified(checkpoint.find(path))


def test_stop_ends_the_run_and_keeps_the_checkpoint(me, tmp_path):
    numbers, path = tiny.recipe(SPIKE.replace("rewind", "stop"), OFTEN), tmp_path / "run"
    engine = tiny.engine_of(numbers, 1)
    with pytest.raises(UserError, match=r"step 13: loss .* above 2 x .*report.spike.action=rewind.*step 10 is kept"):
        tiny.train(engine, numbers, 20, opened(path, numbers, engine), leaping(numbers, bad_data))
    assert checkpoint.steps(path) == [5, 10] and not (path / "spikes.jsonl").exists()


def test_without_a_checkpoint_a_spike_ends_the_run(me, tmp_path):
    numbers, path = tiny.recipe(SPIKE, "report.checkpoint_every={steps: 50}"), tmp_path / "run"
    engine = tiny.engine_of(numbers, 1)
    with pytest.raises(UserError, match="there is no checkpoint to go back to"):
        tiny.train(engine, numbers, 20, opened(path, numbers, engine), leaping(numbers, bad_data))


def test_off_by_default(me, tmp_path):
    numbers, path = tiny.recipe(OFTEN), tmp_path / "run"
    engine = tiny.engine_of(numbers, 1)
    run = opened(path, numbers, engine)
    tiny.train(engine, numbers, 20, run, leaping(numbers, bad_data))
    assert run.spikes is None and run.step == 20 and run.position == 20 * BATCH
