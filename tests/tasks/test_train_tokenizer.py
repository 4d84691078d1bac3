"""Training of a tokenizer in one process, where it differs from that of a MAGE: its first codes, its figures."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from mage_ds.engine import stored
from mage_ds.recipes import load_recipe
from mage_ds.tasks.train_tokenizer import perplexity, train_tokenizer

SMALL = [
    "batch=8",
    "duration.steps=2",
    "model={channels: 8, multipliers: [1, 1], blocks: 1, code_dim: 4, codes: 8}",
    "inputs={image_size: 16, augmentation: none, interpolation: linear, evaluation_resize: 16, broken_limit: 0.5}",
]


@pytest.fixture
def pictures(tmp_path):
    """12 pictures, of which the stream meets a broken one at once."""
    for i in range(12):
        path = tmp_path / "data" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        shade = np.linspace(20 * i, 255 - 10 * i, 16)
        Image.fromarray(np.broadcast_to(shade[:, None, None], (16, 16, 3)).astype(np.uint8)).save(path)
    (tmp_path / "data" / "zz.png").write_bytes(b"")
    (tmp_path / "data" / "zy.png").write_bytes(b"no picture")
    return tmp_path / "data"


def test_broken_pictures_do_not_reach_the_first_codes(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("mage_ds.engine.process.stop_on_signals", lambda: None)
    run = tmp_path / "run"
    train_tokenizer(load_recipe("digits_tokenizer", SMALL), str(pictures), str(run))
    listed = {json.loads(line)["name"] for line in (run / "quarantine.jsonl").read_text().splitlines()}
    assert listed == {"zz.png", "zy.png"}
    model, info = stored.load_tokenizer(run)
    assert info["image_size"] == 16
    assert torch.isfinite(model.quantize.embedding.weight).all()


def test_perplexity():
    counts = {0: 1, 3: 2, 5: 5}
    tokens = torch.tensor([code for code, n in counts.items() for _ in range(n)])
    entropy = -sum(n / 8 * math.log(n / 8) for n in counts.values())
    assert perplexity(tokens.view(2, 4), 7).item() == pytest.approx(math.exp(entropy), rel=1e-6)
    assert perplexity(torch.arange(7)[None], 7).item() == pytest.approx(7)
    assert perplexity(torch.zeros(1, 9, dtype=torch.int64), 7).item() == pytest.approx(1)
