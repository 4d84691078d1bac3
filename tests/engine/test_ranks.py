"""Two ranks over gloo: training in every stage and precision, steps that are skipped, stops, and moved checkpoints."""

import pytest
import tiny

pytestmark = pytest.mark.processes
MODES = ["0 float32", "1 float32", "2 float32", "3 float32", "1 bf16", "2 bf16", "3 bf16"]


@pytest.fixture(scope="module")
def plain(me):
    """Losses of the plain loop at batch 16, by precision."""
    numbers = tiny.recipe("batch=16")
    return {precision: tiny.plain(numbers, 20, precision=precision) for precision in ("float32", "bf16")}


@pytest.mark.parametrize("mode", MODES)
def test_a_stage_equals_the_plain_loop(two, plain, mode):
    first, second = (rank["stages"][mode] for rank in two.ranks)
    assert first == second
    assert plain["float32"][-1] < plain["float32"][0] - 0.1  # it learns: a wrong update would show
    precision = mode.split()[1]
    tolerance = 1e-6 if precision == "float32" else 2e-3
    assert tiny.worst(first["losses"], plain[precision]) < tolerance


def test_the_norm_is_the_one_before_clipping(two):
    norms = [two.ranks[0]["stages"][mode]["norms"] for mode in MODES[:4]]
    assert max(norms[0]) > 0.3  # the recipe's clip
    for other in norms[1:]:
        assert tiny.worst(other, norms[0]) < 1e-4


@pytest.mark.parametrize("stage", [1, 3])
def test_accumulation_on_one_rank_equals_two_ranks(two, stage):
    numbers = tiny.recipe()
    assert numbers.model.dropout > 0
    alone = tiny.train(tiny.engine_of(numbers, stage), numbers, 20).losses
    assert tiny.worst(two.ranks[0]["one_micro_batch"][str(stage)], alone) < 1e-5


# --- steps that are not finite


@pytest.mark.parametrize("mode", [*(f"{mode} gradient" for mode in MODES), "0 float32 loss", "1 float32 loss"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(two, mode):
    for rank in two.ranks:
        found = rank["not_finite"][mode]
        assert found["kept"] and found["moved"]
        assert found["updates"] == [1, 1, 2, 3]
        assert found["skipped"] == 1
        assert [norm is None for norm in found["norms"]] == [False, True, False, False]
    numbers, precision = tiny.recipe("batch=16"), mode.split()[1]
    skipped = tiny.plain(numbers, 4, precision=precision, skip=[1])
    told = two.ranks[0]["not_finite"][mode]["losses"]
    told[1] = told[1] if "gradient" in mode else skipped[1]  # a loss of inf is shown as it is
    assert tiny.worst(told, skipped) < (1e-6 if precision == "float32" else 2e-3)


def test_skipped_steps_are_said(two):
    assert two.screens[0].count("step 2: the gradient is not finite, step skipped (1 in a row)") == 9
    assert "not finite" not in two.screens[1]


def test_too_many_skipped_steps_end_the_run_and_keep_the_checkpoint(two):
    for rank in two.ranks:
        found = rank["too_many"]
        assert "3 steps in a row without a finite gradient" in found["message"]
        assert "checkpoint of step 3 is kept" in found["message"]
        assert (found["steps"], found["step"], found["skipped"]) == ([3], 5, 3)


# --- checkpoints


@pytest.mark.parametrize("mode", ["1 float32", "3 float32", "1 bf16", "3 bf16"])
def test_a_continued_run_is_bit_identical(two, mode):
    for rank in two.ranks:
        found = rank["continued"][mode]
        assert found["loaded"]  # weights and moments as they were, and as the files say
        assert found["decays"] == [0.1, 0.0]
        assert found["updates"] == 3
        assert found["parts"] == found["whole"]
        assert found["same end"]
        assert found["files"] > 6  # several of each kind: both ranks wrote


def test_a_run_moves_between_stages_and_world_sizes(two):
    first = two.ranks[0]
    whole = first["stages"]["1 float32"]["losses"][:18]
    parts = first["leg_1"]["losses"] + two.leg_2["losses"] + first["leg_3"]["losses"] + two.leg_4["losses"]
    assert tiny.worst(parts, whole) < 1e-5
    for found, updates in ((two.leg_2, 5), (first["leg_3"], 10), (two.ranks[1]["leg_3"], 10), (two.leg_4, 14)):
        assert found["loaded"]
        assert found["updates"] == updates
        assert found["decays"] == [0.1, 0.0]


@pytest.mark.full
def test_and_on_to_four_ranks_with_the_optimizer_on_the_host(two, four):
    whole = two.ranks[0]["stages"]["1 float32"]["losses"][18:]
    for rank in four:
        found = rank["leg_5"]
        assert (found["loaded"], found["updates"], found["decays"]) == (True, 18, [0.1, 0.0])
        assert tiny.worst(found["losses"], whole) < 1e-5


@pytest.mark.parametrize("mode", ["1 float32", "3 float32", "2 bf16", "3 bf16"])
def test_offload_changes_no_loss_and_no_checkpoint(two, mode):
    plain = two.ranks[0]["stages"][mode]["losses"][:12]
    for rank in two.ranks:
        found = rank["offloaded"][mode]
        assert found["offloads"] and found["kept on"] == ["cpu"]  # here without meaning; on a GPU not
        assert found["loaded"] == [True, True]
        assert found["decays"] == [0.1, 0.0]
        assert tiny.worst(found["losses"], plain) < (1e-6 if "float32" in mode else 1e-4)


def test_zero_3_never_holds_the_whole_model(two):
    for rank in two.ranks:
        found = rank["sharded_from_the_start"]
        assert found["share"] < 0.51  # of two ranks
        assert found["same"] and found["parameters"] > 40


def test_a_full_disk_on_one_rank_leaves_the_last_checkpoint(two):
    for rank in two.ranks:
        found = rank["failed_write"]
        assert "No space left" in found["message"] and "cannot be saved" in found["message"]
        assert found["left"] == ["latest", "step_000001"]


# --- memory and number formats


def test_optimizer_state_is_halved_on_two_ranks(two):
    first, second = (rank["optimizer_bytes"] for rank in two.ranks)
    for stage in ("1", "2", "3"):
        for one in (first, second):
            assert one[stage] == pytest.approx(first["0"] / 2, rel=0.01)


def test_bf16_gradients_accumulate_in_float32(two):
    errors = two.ranks[0]["accumulated"]
    assert errors["1 bf16"] > 3e-3  # what the test would see otherwise
    assert errors["1 default"] < 1e-5
    assert errors["3 default"] < 1e-5


# --- stopping and saying


def test_all_ranks_stop_before_the_same_micro_batch(two):
    first, second = (rank["stopped"] for rank in two.ranks)
    assert first == second
    assert first["message"] == "SIGTERM: saved after step 3"
    assert (first["step"], first["position"]) == (3, 3 * 64)
    assert 3 * 8 + 3 <= first["micros"] < 4 * 8  # the open accumulation of eight was left behind


def test_an_error_is_said_once_or_by_its_rank(two):
    said = [line for screen in two.screens for line in screen.splitlines() if line.startswith("mage-ds: error")]
    assert sorted(said) == ["mage-ds: error: everywhere", "mage-ds: error: rank 1: only here"]
