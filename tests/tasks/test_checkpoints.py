"""mage-ds checkpoints: what a run has, what keeps it, and what is damaged."""

import hashlib
import json

import pytest

from mage_ds import cli, recipes
from mage_ds.engine import checkpoint, retention

N = 1000


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints of one small file; no engine is needed to look at them."""
    recipe = recipes.load_recipe(
        "digits_mage", ["report.keep=2", "report.checkpoint_every={steps: 100}", "report.keep_every=2"]
    )
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipe))
    for step in (100, 200, 300, 400):
        add(tmp_path, step)
    return tmp_path


def add(run, step):
    folder = checkpoint.folder_of(run, step)
    folder.mkdir(parents=True)
    data = bytes([step % 251]) * 2_500_000
    (folder / "mage.weight.00000.safetensors").write_bytes(data)
    files = {"mage.weight.00000.safetensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    meta = {"format": 1, "step": step, "position": 64 * step, "dataset": N, "engines": {}, "files": files}
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps({**meta, "digest": digest}))


def shown(capsys, *argv) -> tuple[int, dict[str, str], str]:
    """(exit code, step -> its row, what was said on stderr)."""
    code = cli.main(["checkpoints", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, {line.split()[0]: line for line in out.splitlines()[1:]}, err


def test_the_table(run, capsys):
    retention.pin(checkpoint.folder_of(run, 100), "sampled into out")
    code, rows, err = shown(capsys, run)
    assert (code, err) == (0, "") and list(rows) == ["100", "200", "300", "400"]
    assert rows["100"].split()[1:5] == ["6", "400", "2.5", "MB"]  # 6400 samples: epoch 6, sample 400
    assert "pinned: sampled into out" in rows["100"] and "newest" not in rows["100"]
    assert rows["200"].endswith("  kept for good") and rows["400"].endswith("newest 1 of 2; kept for good")
    assert rows["300"].endswith("newest 2 of 2")
    assert all(" sizes" in row for row in rows.values())


def test_verify(run, capsys):
    code, rows, err = shown(capsys, run, "--verify")
    assert code == 0 and err == "" and all(" checksums" in row for row in rows.values())


@pytest.mark.parametrize("damage", ["flip", "cut", "lost", "meta"])
def test_damage_is_found_and_the_file_named(run, capsys, damage):
    folder = checkpoint.folder_of(run, 300)
    path = folder / ("meta.json" if damage == "meta" else "mage.weight.00000.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else data)
    code, rows, err = shown(capsys, run, "--verify")
    assert code == 2 and "DAMAGED" in rows["300"] and "DAMAGED" not in rows["400"]
    assert err.startswith(f"mage-ds: error: {path}: damaged checkpoint") and err.count("\n") == 1
    if damage == "flip":  # only --verify reads
        assert shown(capsys, run)[0] == 0
    else:
        assert shown(capsys, run)[0] == 2


def test_left_behind(run, capsys):
    retention.leave_behind(run, 200)
    code, rows, _ = shown(capsys, run)
    assert code == 0 and "newest 1 of 2" in rows["200"] and "left behind" in rows["400"]


def test_no_run(tmp_path, capsys):
    assert cli.main(["checkpoints", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_no_checkpoint_yet(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipes.load_recipe("digits_mage")))
    assert cli.main(["checkpoints", str(tmp_path)]) == 0
    assert "no checkpoint yet" in capsys.readouterr().out
