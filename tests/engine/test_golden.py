"""Twenty losses of a whole pre-training: pictures, DALI, tokenizer, masks, dropout, AdamW, evaluation, a checkpoint.

A refactoring must reproduce golden_losses.json. Where a change is meant to alter the losses, write it anew:
MAGE_DS_WRITE_GOLDEN=1 pytest tests/engine/test_golden.py
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from mage_ds.engine import checkpoint, run_folder
from mage_ds.errors import Stopped
from mage_ds.tasks.pretrain import pretrain

_FILE = Path(__file__).with_name("golden_losses.json")


@pytest.fixture(scope="module")
def trained(me, tmp_path_factory):
    """The run folder of `tiny.yaml` on 24 pictures, one rank, ZeRO 1."""
    root = tmp_path_factory.mktemp("golden")
    for i in range(24):
        # PNG, whose pixels no decoder may change; smooth, so that the resampling filters hardly matter.
        x, y = np.meshgrid(np.linspace(0, 1, 40 + i), np.linspace(0, 1, 60 - i))
        bands = [np.sin(3 + i + 7 * x), np.cos(i * y + x), np.sin((i % 5) * x * y)]
        path = root / "data" / ("train" if i < 20 else "val") / str(i % 4) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((127.5 + 127 * np.stack(bands, -1)).astype(np.uint8)).save(path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mage_ds.engine.process.stop_on_signals", lambda: None)
        pretrain(tiny.recipe(), str(root / "data"), str(root / "run"), tokenizer="random")
    return root / "run"


def test_golden_losses(trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    found = {
        "losses": [record["loss"] for record in records if "loss" in record],
        "held out": [record["val_loss"] for record in records if "val_loss" in record],
    }
    if os.environ.get("MAGE_DS_WRITE_GOLDEN"):
        _FILE.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(_FILE.read_text())
    assert len(found["losses"]) == 20 and len(found["held out"]) == 2
    assert tiny.worst(found["losses"], golden["losses"]) < 1e-5
    assert tiny.worst(found["held out"], golden["held out"]) < 1e-5


def test_what_a_finished_run_leaves(trained):
    assert checkpoint.steps(trained) == [10, 20]
    assert run_folder.read_status(trained)["state"] == "finished"
    assert {entry.name for entry in (trained / "pictures").iterdir()} == {"step_000020.png", "loss.png"}
    assert (trained / "tokenizer" / "model.safetensors").exists()
    assert list((trained / "tensorboard").iterdir())


@pytest.mark.parametrize("state", ["finished", "running"])
def test_starting_again_says_that_it_is_done(trained, capsys, state):
    run_folder.write_status(trained, state)  # running: killed between the last checkpoint and the last word
    data = str(trained.parent / "data")
    pretrain(tiny.recipe(), data, str(trained))
    assert "already finished (20 steps)" in capsys.readouterr().out
    assert run_folder.read_status(trained)["state"] == "finished"


def test_a_resume_from_an_older_checkpoint_leaves_the_newer_ones_behind(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("mage_ds.engine.process.stop_on_signals", lambda: None)
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    older = str(run / "checkpoints" / "step_000010")
    data = str(trained.parent / "data")
    every = "report.checkpoint_every.steps=4"
    calls = iter([None, None, "SIGTERM"])  # before the two micro-batches of step 11 and the first of step 12
    monkeypatch.setattr("mage_ds.engine.process.Stop.due", lambda self, micro: next(calls))
    with pytest.raises(Stopped):
        pretrain(tiny.recipe(every, "report.keep=5"), data, str(run), resume=older)
    assert checkpoint.steps(run) == [10, 11]  # 20 is of another past
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 11
