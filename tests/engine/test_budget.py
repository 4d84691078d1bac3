"""Bytes by kind against counts by hand; tests/tasks/test_bench.py holds them against real steps."""

import pytest
import tiny

from mage_ds.engine import budget, ds_config, planner

SIZES = [600_000, 200_000, 150_000, 50_000]  # a million parameters
COUNT = sum(SIZES)


def zero(name: str, **changes) -> dict:
    return ds_config.read(name)[1]["zero_optimization"] | changes


def held(name: str, precision: str, world: int = 4, **changes) -> budget.Held:
    return budget.held(SIZES, zero(name, **changes), precision=precision, world=world)


def test_bytes_of_a_parameter():
    """Of weights, gradients and optimizer, for 4 ranks."""
    small = {"stage3_param_persistence_threshold": 0}
    found = {
        (name, precision): {kind: value / COUNT for kind, value in held(name, precision, **more).device.items()}
        for name, precision, more in (
            ("zero0", "float32", {}),
            ("zero1", "float32", {}),
            ("zero1", "bf16", {}),
            ("zero2", "bf16", {}),
            ("zero3", "bf16", small),
            ("zero3", "float32", small),
        )
    }
    by_hand = {
        ("zero0", "float32"): (4, 4, 8),  # the weights are the master
        ("zero1", "float32"): (4, 4, 12 / 4),
        ("zero1", "bf16"): (2, 4 + 2, 12 / 4),  # a float32 gradient beside the bf16 one
        ("zero2", "bf16"): (2, 4 / 4, 12 / 4),
        ("zero3", "bf16"): (2 / 4, 4 / 4, 12 / 4),
        ("zero3", "float32"): (4 / 4, 4 / 4, 12 / 4),
    }
    for key, kinds in by_hand.items():
        assert tuple(found[key][kind] for kind in ("weights", "gradients", "optimizer")) == pytest.approx(kinds), key


def test_small_parameters_stay_whole_in_stage_3():
    few = held("zero3", "bf16", stage3_param_persistence_threshold=100_000).device
    none = held("zero3", "bf16", stage3_param_persistence_threshold=0).device
    assert few["weights"] - none["weights"] == 2 * 50_000
    assert none["buffers"] == 4 * 50_000_000 + 2 * COUNT  # the bucket, and all weights while a step runs
    less = held("zero3", "bf16", stage3_param_persistence_threshold=0, stage3_max_live_parameters=300_000).device
    assert less["buffers"] == 4 * 50_000_000 + 2 * 300_000


def test_parameters_on_borders_count_in_full():
    """Shares of 250,000: the first parameter lies in three of them, and shares the third with the second."""
    assert budget._straddled(SIZES, 4) == 600_000 + 200_000
    assert budget._straddled(SIZES, 1) == COUNT


def test_shares_are_joined_when_a_pass_ends():
    """In float32 at stage 2: a second copy of the gradients' share, by when the activations are gone."""
    joined, plain = held("zero2", "float32"), held("zero2", "bf16")
    share = 4 * budget._straddled(SIZES, 4)
    assert (joined.passing, plain.passing) == (share, 0)
    none = planner.Activations(planner.Line(0, 0), planner.Line(0, 0))
    kinds = budget.kinds(joined, none, {}, 1)
    assert kinds["buffers"] == joined.device["buffers"] + share
    lasting = sum(joined.device.values()) + joined.reducing
    assert budget.peak(joined, none, {}, 1) == lasting + share


def test_offload_moves_to_the_host():
    plain, away = held("zero2", "bf16"), held("zero2_offload", "bf16")
    assert (plain.device["optimizer"], away.device["optimizer"]) == (3 * COUNT, 0)
    assert away.host["optimizer"] == 3 * COUNT and not any(plain.host.values())
    together = away.on_cpu()
    assert together.device["optimizer"] == 3 * COUNT and not any(together.host.values())
    assert held("zero3_offload", "bf16", stage3_param_persistence_threshold=0).device["weights"] == 0


def test_what_the_optimizer_keeps():
    """LARS one number of each weight, AdamW two; the average of the weights is one more."""
    lars = "{name: lars, base_lr: 0.3, min_lr: 0.0, weight_decay: 0.0, momentum: 0.9, trust: 0.001, clip: null}"
    kept = {
        2: tiny.recipe(),
        3: tiny.recipe("optimizer.ema=0.999"),
        1: tiny.recipe(f"optimizer={lars}"),
    }
    for number, recipe in kept.items():
        assert budget.states(recipe) == number
        assert budget.on_disk(COUNT, number) == 4 * (1 + number) * COUNT
        for name, each in (("zero0", number), ("zero1", (1 + number) / 4), ("zero3", (1 + number) / 4)):
            found = budget.held(SIZES, zero(name), precision="float32", world=4, states=number)
            assert found.device["optimizer"] == 4 * each * COUNT
    away = budget.held(SIZES, zero("zero2_offload"), precision="bf16", world=4, states=3)
    assert away.host["optimizer"] == 4 * COUNT


def test_sent():
    """Ring: an all-reduce sends 2 (n - 1) / n of its bytes, a reduce-scatter or an all-gather half of that."""

    def sent(name: str, precision: str, accumulation: int = 1, **changes) -> float:
        volume = budget.sent(COUNT, zero(name, **changes), precision=precision, world=4, accumulation=accumulation)
        return volume / COUNT / 0.75

    assert sent("zero0", "float32") == sent("zero0", "float32", 8) == pytest.approx(2 * 4)
    assert sent("zero1", "bf16") == sent("zero1", "bf16", 8) == pytest.approx(2 * 4 + 2)
    assert sent("zero2", "bf16", 8) == pytest.approx(8 * 4 + 2)
    assert sent("zero3", "bf16", 8) == pytest.approx(8 * (4 + 2))
    assert sent("zero3", "bf16", stage3_max_live_parameters=10) == pytest.approx(4 + 2 * 2)
    assert budget.sent(COUNT, zero("zero3"), precision="bf16", world=1, accumulation=1) == 0


def test_on_disk():
    assert budget.on_disk(COUNT) == 12 * COUNT


def test_frozen_models_lie_beside_each_other_and_run_in_turn():
    none = planner.Activations(planner.Line(0, 0), planner.Line(0, 0))
    frozen = {"encoder": (300, planner.Line(10, 1)), "tokenizer": (50, planner.Line(0, 100))}
    empty = budget.Held(dict.fromkeys(budget.KINDS, 0.0), {}, 0.0)
    assert budget.kinds(empty, none, frozen, 2)["frozen"] == budget.peak(empty, none, frozen, 2) == 350 + 200
    assert budget.kinds(empty, none, {}, 2)["frozen"] == 0
