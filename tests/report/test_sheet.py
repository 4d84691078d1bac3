"""The picture sheet: every picture has its place, rows that are not full stay white."""

import numpy as np
import pytest
from PIL import Image

from mage_ds.report import sheet


def flat(*values, side=64):
    return np.stack([np.full((side, side, 3), value, np.uint8) for value in values])


def row(shown, value):
    """Whether the sheet has, somewhere, a whole picture of this grey."""
    return (shown[..., 0] == value).sum() >= 64 * 64


@pytest.mark.parametrize("whole", [True, False])
def test_places(tmp_path, whole):
    random = flat(*range(10, 50))[: 32 if whole else 11]
    more = {}
    if whole:
        near = [(flat(*range(60 + 10 * i, 68 + 10 * i)), [f"{i}.5"] * 8) for i in range(3)]
        more = {"samples": flat(*range(50, 58)), "nearest": near}
    best, worst = (flat(100, 101, 102), ["1", "2", "3"]), (flat(110), ["9"])
    sheet.save(tmp_path / "sheet.png", random=random, best=best, worst=worst, **more)
    shown = np.asarray(Image.open(tmp_path / "sheet.png"))
    wanted = [*random[:, 0, 0, 0], 100, 101, 102, 110]
    wanted += [*range(50, 58), *range(60, 68), *range(70, 78), *range(80, 88)] if whole else []
    assert all(row(shown, value) for value in wanted)
    lines = (4 if whole else 2) + 2 + (4 if whole else 0)
    assert shown.shape[0] >= lines * 64 and shown.shape[1] >= 8 * 64
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
