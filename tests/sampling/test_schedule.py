"""The schedule against the specification in exact arithmetic and one picture at a time."""

import numpy as np
import pytest

from mage_ds.sampling import schedule


def plain_counts(initial, steps):
    """One picture, plain Python; cos from numpy, as the published code."""
    masked, out = initial, []
    for t in range(1, steps + 1):
        if t == steps or masked == 0:
            out.append(0)
            continue
        n = int(np.floor(initial * np.cos(np.pi / 2.0 * (1.0 * t / steps))))
        n = min(masked - 1, n)
        n = max(1, n)
        out.append(n)
        masked = n
    return out


def test_remaining_is_the_published_sequence():
    # floor(256 cos(pi t / 40)), t = 1..20
    expected = [255, 252, 248, 243, 236, 228, 218, 207, 194, 181, 166, 150, 133, 116, 97, 79, 59, 40, 20, 0]
    assert [int(schedule.remaining([256], t, 20)[0]) for t in range(1, 21)] == expected
    assert schedule.remaining([256, 1, 0], 3, 20).dtype == np.int64


def test_counts_per_picture():
    initial = np.array([256, 255, 100, 26, 25, 2, 1, 0])
    for steps in (1, 2, 3, 8, 20, 100, 300):
        table = schedule.counts(initial, steps)
        assert table.shape == (steps, len(initial)) and table.dtype == np.int64
        for i, n in enumerate(initial):
            assert table[:, i].tolist() == plain_counts(int(n), steps), (steps, n)


@pytest.mark.parametrize("initial", [3, 16, 25, 26, 256])
def test_each_step_finishes_something_until_one_is_left(initial):
    masked = initial
    for count in schedule.counts([initial], 20)[:-1, 0]:
        assert count < masked or masked == count == 1
        masked = count
    assert schedule.counts([initial], 20)[-1, 0] == 0


def test_lower_bound_wins_for_small_pictures():
    # Specification: at T = 20 one place stays masked and is sampled again for N_0 <= 25, not for 26.
    assert schedule.counts([25], 20)[18, 0] == 1
    assert [int(schedule.remaining([n], 19, 20)[0]) for n in (12, 13, 25, 26)] == [0, 1, 1, 2]
