"""Regions in words, the tokens that a pixel mask hides, and how a border is blended: against plain loops."""

import numpy as np
import pytest
import torch

from mage_ds.errors import UserError
from mage_ds.sampling import regions


def loop(high, wide, hidden):
    return np.array([[hidden(x, y) for x in range(wide)] for y in range(high)])


@pytest.mark.parametrize(
    "text, hidden",
    [
        ("inpaint:5,2,7,9", lambda x, y: 5 <= x < 12 and 2 <= y < 11),
        ("inpaint:0,0,40,24", lambda x, y: True),
        ("inpaint:39,23,1,1", lambda x, y: (x, y) == (39, 23)),
        ("inpaint", lambda x, y: 10 <= x < 30 and 6 <= y < 18),
        ("outpaint", lambda x, y: not (10 <= x < 30 and 6 <= y < 18)),
        ("outpaint:0.75", lambda x, y: not (5 <= x < 35 and 3 <= y < 21)),
        ("uncrop", lambda x, y: not (15 <= x < 25 and 9 <= y < 15)),
        ("uncrop:0.05", lambda x, y: not (19 <= x < 21 and y == 11)),
    ],
)
def test_words(text, hidden):
    assert regions.is_region(text)
    mask = regions.region(text, 24, 40)
    assert mask.dtype == bool and (mask == loop(24, 40, hidden)).all()


@pytest.mark.parametrize(
    "text, said",
    [
        ("inpaint:1,2,3", "four whole numbers"),
        ("inpaint:1,2,3,x", "four whole numbers"),
        ("inpaint:", "four whole numbers"),
        ("inpaint:1,2,0,3", "is empty"),
        ("inpaint:1,2,3,-1", "is empty"),
        ("inpaint:30,0,11,4", "reaches out of the picture, which has 40 x 24 pixels"),
        ("inpaint:0,20,4,5", "reaches out"),
        ("inpaint:-1,0,4,4", "reaches out"),
        ("outpaint:0", "between 0 and 1"),
        ("outpaint:1", "between 0 and 1"),
        ("outpaint:half", "between 0 and 1"),
        ("uncrop:nan", "between 0 and 1"),
        ("outpaint:0.999", "is empty"),
        ("uncrop:0.001", "keeps no pixel"),
        ("inpant", "did you mean inpaint?"),
        ("outpait:0.5", "did you mean outpaint?"),
        ("alfa", "did you mean alpha?"),
        ("zzz", "give inpaint[:x,y,w,h], outpaint[:fraction], uncrop[:fraction]"),
    ],
)
def test_mistakes_are_one_line(text, said):
    with pytest.raises(UserError) as error:
        regions.region(text, 24, 40)
    assert said in str(error.value) and f"region {text}:" in str(error.value) and "\n" not in str(error.value)


def test_a_token_is_hidden_if_any_of_its_pixels_is():
    masks = np.random.default_rng(0).random((3, 12, 20)) < 0.05
    tokens = regions.token_mask(masks, 4)
    assert tokens.shape == (3, 3, 5) and 0 < tokens.mean() < 1
    for i in range(3):
        for y in range(3):
            for x in range(5):
                any_pixel = any(masks[i, 4 * y + dy, 4 * x + dx] for dy in range(4) for dx in range(4))
                assert tokens[i, y, x] == any_pixel
    assert (regions.token_mask(torch.from_numpy(masks), 4).numpy() == tokens).all()


@pytest.mark.parametrize("feather", [0, 1, 5])
def test_shares_are_distances_to_what_is_known(feather):
    mask = np.zeros((13, 17), bool)
    mask[2:11, 4:16] = True
    mask[6, 9] = False  # a known pixel within
    shares = regions.shares(mask, feather)
    known = [(y, x) for y in range(13) for x in range(17) if not mask[y, x]]
    for y in range(13):
        for x in range(17):
            distance = min(np.hypot(y - v, x - u) for v, u in known)
            assert shares[y, x] == pytest.approx(min(1, distance / (feather + 1)), abs=1e-12)
    assert (shares[~mask] == 0).all() and (shares.max() == 1) == (feather < 5)  # no pixel is far enough inside
    assert (regions.shares(np.ones((4, 4), bool), feather) == 1).all()
