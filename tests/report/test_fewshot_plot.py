"""The plot of few-shot classification, of made figures."""

import numpy as np
import pytest
from PIL import Image

from mage_ds.report import fewshot_plot


def rows(sets, sources, shots=(1, 5, 10), std=0.03):
    return [
        {"data": f"set {k}", "source": f"source {s}", "shots": few, "top1": 0.2 + 0.1 * s + few / 50, "std": std}
        for k in range(sets)
        for s in range(sources)
        for few in shots[: len(shots) - (k == 1)]
    ]


@pytest.mark.parametrize("sets, sources, panels", [(1, 1, 1), (3, 2, 3), (8, 3, 4)])
def test_every_panel_has_every_line(tmp_path, sets, sources, panels):
    fewshot_plot.save(tmp_path / "a.png", rows(sets, sources), "made")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    wide = picture.shape[1]
    assert wide == (640 * panels if panels > 1 else 896)
    for number in range(sources):
        colour = np.round(255 * np.array(fewshot_plot.colour(number)[:3]))
        for panel in np.array_split(picture[:500], panels, axis=1):
            assert (np.abs(panel - colour).max(2) <= 2).sum() > 50


def test_the_band_is_as_wide_as_the_spread(tmp_path):
    """Of one trial there is none."""
    covered = []
    for std in (None, 0.02, 0.08):
        fewshot_plot.save(tmp_path / "a.png", rows(1, 1, std=std), "made")
        picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
        blue = 0.18 * np.round(255 * np.array(fewshot_plot.colour(0)[:3])) + 0.82 * 255
        covered.append((np.abs(picture - blue).max(2) <= 3).sum())
    assert covered[0] < 100 < covered[1] and covered[2] > 1.5 * covered[1]
