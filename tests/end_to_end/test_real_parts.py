"""DALI and DeepSpeed are no decoration: training and sampling work with every way around them closed."""

import json
from pathlib import Path

import pytest
from launched import OFTEN, TINY, losses, run

pytestmark = pytest.mark.processes

STEPS = 3


@pytest.fixture(scope="module")
def reports(made, tmp_path_factory):
    """(the folder, what each of two ranks found): guarded.py trains, evaluates, draws, saves and samples."""
    data, tokenizer = made
    root = tmp_path_factory.mktemp("guarded")
    fields = [f"duration.steps={STEPS}", *TINY, OFTEN[0], "report.evaluate_every.steps=3"]
    train = ["train", "digits_mage", *fields, "--data", str(data), "--tokenizer", str(tokenizer), "--out", "mage"]
    sample = ["sample", "mage", "--num", "6", "--batch", "3", "--steps", "4", "--out", "samples"]
    lines = [json.dumps(line) for line in (train, sample)]
    run(root, *lines, cwd=root, script=Path(__file__).with_name("guarded.py"))
    return root, [json.loads((root / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


def test_training_and_sampling_go_through_dali_and_deepspeed(reports):
    root, ranks = reports
    for report in ranks:
        assert report["guards"] == [True] * 4  # the ways around are closed indeed
        assert report["codes"] == [0, 0]
        assert report["train"] >= STEPS  # a micro-batch each, and the held-out pictures
        assert report["inference"] >= 4  # a tile of three pictures, and its iterations
        assert report["dali"] >= STEPS
    assert [step for step, _ in losses(root / "mage")] == list(range(1, STEPS + 1))
    assert (root / "mage/pictures/step_000003.png").is_file()
    assert len(list((root / "samples").glob("0*.png"))) == 6


def test_each_of_two_ranks_holds_half_of_the_optimizer_state(reports):
    _, ranks = reports
    [whole] = {report["parameters"] for report in ranks}
    for key in ("exp_avg", "exp_avg_sq"):
        each = [report["moments"][key] for report in ranks]
        assert sum(each) >= whole
        assert max(each) <= whole / 2 + 64  # groups are padded to whole shards
    assert all(report["moments_moved"] and report["stage"] == 1 for report in ranks)
