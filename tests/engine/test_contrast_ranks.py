"""The contrast of MAGE-C over two ranks is that of one process with all pictures."""

import contrast_ranks as made
import numpy as np
import pytest
import tiny
from conftest import ran

from mage_ds.engine import ds_config
from mage_ds.errors import UserError

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, me):
    return ran(tmp_path_factory.mktemp("contrast_ranks"), 2, script="contrast_ranks.py")


def test_what_is_gathered_and_its_gradient(ranks):
    """Rank r weighs value i by i (1 + r): its sum over the ranks is 3 i."""
    expected = [[float(i), i + 1.0] for i in (0, 2, 4, 10, 12, 14)]
    weights = 3 * np.arange(12.0).reshape(6, 2)
    for rank, found in enumerate(each["gathering"] for each in ranks):
        assert found["everyone"] == expected
        assert found["gradient"] == weights[3 * rank : 3 * rank + 3].tolist()


@pytest.mark.parametrize("objective", ["both", "contrastive"])
def test_gradients_equal_those_of_the_joined_batch(ranks, objective):
    """Negatives and batch norm's statistics of the other rank included: in float64, for every parameter."""
    whole = made.gradients(objective, 1, 0)
    assert 2 <= whole["pairs"] < 7  # some pictures do not count
    for found in (each["gradients"][objective] for each in ranks):
        assert found["loss"] == pytest.approx(whole["loss"], rel=1e-12)
        assert (found["top1"], found["pairs"]) == (pytest.approx(whole["top1"], abs=1e-12), whole["pairs"])
        assert found["gradients"].keys() == whole["gradients"].keys()
        for name, gradient in whole["gradients"].items():
            np.testing.assert_allclose(found["gradients"][name], gradient, rtol=0, atol=1e-12, err_msg=name)
    assert any(np.abs(gradient).max() > 1e-4 for name, gradient in whole["gradients"].items() if "projection" in name)


def test_training_on_two_ranks_equals_training_on_one(ranks):
    numbers = made.numbers_of("both")
    alone = {stage: made.train(made.engine_of(numbers, stage), numbers) for stage in (0, 3)}
    first, second = (each["trained"] for each in ranks)
    assert first == second
    for mode, figures in first.items():
        expected = alone[3 if mode.startswith("3") else 0]
        assert [each["pairs"] for each in figures] == [each["pairs"] for each in expected]
        if "bf16" in mode:  # of six to nine views: roundings grow with each update
            assert tiny.worst([each["loss"] for each in figures[:2]], [each["loss"] for each in expected[:2]]) < 0.06
            continue
        for key in ("loss", "contrast", "grad_norm"):
            assert tiny.worst([each[key] for each in figures], [each[key] for each in expected]) < 3e-5, (mode, key)
    losses = [each["loss"] for each in alone[0]]
    assert max(losses) - min(losses) > 0.1  # the updates move it


def test_the_number_of_pictures_in_a_contrast_is_the_recipes():
    numbers = made.numbers_of("both")
    assert ds_config.share(numbers, 2, 0) == ds_config.Share(16, 4, 2, 2)
    assert ds_config.share(numbers, 8, 0) == ds_config.Share(16, 1, 2, 8)
    with pytest.raises(UserError, match=r"contrastive.images = 8: does not divide over 16 ranks; choose 8 ranks"):
        ds_config.share(numbers, 16, 0)
    with pytest.raises(
        UserError, match=r"--micro-batch 2: with 2 ranks 4 pictures .* is 8; choose 4 or auto, or 4 ranks"
    ):
        ds_config.share(made.numbers_of("both", "machine.micro_batch=2"), 2, 0)
