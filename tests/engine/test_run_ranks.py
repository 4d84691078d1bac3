"""A run on two ranks: both go back at a spike, stop at the same held-out batch, and end together on a full disk."""

import json
from pathlib import Path

import pytest
from launched import run

pytestmark = [pytest.mark.processes, pytest.mark.full]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run_ranks")
    text = run(folder, cwd=folder, script=Path(__file__).with_name("run_ranks.py")).text
    assert "Traceback" not in text
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_spike_in_one_ranks_samples_takes_both_back(ranks, stage):
    for rank in ranks:
        found = rank[f"spiked {stage}"]
        assert found["same"] and found["same end"]
        [note] = map(json.loads, found["notes"])
        assert (note["spike"], note["back_to"], note["left_out"]) == (13, 10, [80, 104])


def test_both_ranks_leave_a_held_out_pass_before_the_same_batch(ranks):
    first, second = (rank["cut_off"] for rank in ranks)
    assert first == second
    assert first["message"] == "SIGTERM: saved after step 3" and 6 <= first["batches"] <= 9
    assert (first["step"], first["due"]) == (3, ["evaluate"])


def test_logs_on_a_full_disk_end_both_ranks_after_saving(ranks):
    first, second = (rank["full_disk"] for rank in ranks)
    assert first == second
    assert "cannot be written (No space left on device)" in first["message"]
    assert len(first["steps"]) == 1 and f"step {first['steps'][0]} is saved" in first["message"]
