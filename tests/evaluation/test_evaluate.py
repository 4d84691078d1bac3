"""The evaluate task on folders of small pictures, without a run; what is wrong is one line."""

import json

import numpy as np
import pytest
from PIL import Image

from mage_ds.errors import UserError
from mage_ds.report import joined, pictures
from mage_ds.tasks import evaluate as task


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One process without a process group."""
    monkeypatch.setattr(task.process, "start", lambda: None)
    monkeypatch.setattr(task.process, "on_first", lambda action: action())


def draw(kind, rng):
    """A bright bar, upright (0) or lying (1), with noise."""
    picture = rng.integers(0, 60, (32, 32), dtype=np.uint8)
    at = rng.integers(10, 18)
    picture[(slice(None), slice(at, at + 5)) if kind == 0 else slice(at, at + 5)] += 180
    return picture[..., None].repeat(3, axis=2)


def fill(folder, kind, count, rng):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(draw(kind, rng)).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("bars"), np.random.default_rng(0)
    for kind, name in enumerate(["upright", "lying"][::-1]):
        fill(root / "train" / name, 1 - kind, 30, rng)
        fill(root / "val" / name, 1 - kind, 10, rng)
    return root


@pytest.fixture
def samples(tmp_path):
    """As `sample` leaves them: 12 upright bars and 4 lying ones, and a grid that is not one of them."""
    out, rng = tmp_path / "samples", np.random.default_rng(1)
    out.mkdir()
    for i in range(16):
        Image.fromarray(draw(int(i % 4 == 0), rng)).save(out / f"{i:06d}.png")
    Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(out / "grid.png")
    np.savez(out / "tokens.npz", tokens=np.zeros((16, 4), np.uint16), index=np.arange(16))
    manifest = {"num": 16, "complete": True, "run": str(tmp_path / "gone"), "tokenizer": "x", "seed": 0}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def test_figures_table_and_file(reference, samples, tmp_path, capsys):
    results = task.evaluate(samples, reference=reference, out=tmp_path / "figures")
    rows = results["readable"]["rows"]
    assert results["readable"]["class_names"] == ["lying", "upright"]
    assert rows["samples"]["pictures"] == 16 and rows["samples"]["classes"] == [0.25, 0.75]
    assert rows["samples"]["readable"] > 0.9 and "right" not in rows["samples"]
    assert rows["validation pictures"]["right"] == 1.0 and rows["validation pictures"]["classes"] == [0.5, 0.5]
    assert json.loads((tmp_path / "figures" / "results.json").read_text()) == results
    assert results["sampling"]["seed"] == 0 and results["copies"] == {}
    shown = capsys.readouterr().out
    for part in ["samples", "validation pictures", "lying", "75.0%", "gone is gone", "results.json"]:
        assert part in shown, part


def test_any_folder_of_pictures(reference, tmp_path):
    fill(tmp_path / "mine" / "deep", 0, 5, np.random.default_rng(2))
    results = task.evaluate(tmp_path / "mine", reference=reference)
    assert results["readable"]["rows"]["samples"]["pictures"] == 5
    assert (tmp_path / "mine" / "results.json").is_file()


def one_line(caught, *parts):
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, (part, text)


def test_unknown_metric(reference, samples):
    with pytest.raises(UserError) as caught:
        task.evaluate(samples, reference=reference, metrics=["readble"])
    one_line(caught, "readble", "did you mean readable?")


def test_missing_folders(reference, samples, tmp_path):
    with pytest.raises(UserError) as caught:
        task.evaluate(tmp_path / "none", reference=reference)
    one_line(caught, "none")
    with pytest.raises(UserError) as caught:
        task.evaluate(samples, reference=tmp_path / "none")
    one_line(caught, "none")


def test_reference_without_labels(samples, tmp_path):
    fill(tmp_path / "flat", 0, 4, np.random.default_rng(0))
    with pytest.raises(UserError) as caught:
        task.evaluate(samples, reference=tmp_path / "flat")
    one_line(caught, "no labels", "class folders")
    fill(tmp_path / "thin" / "a", 0, 4, np.random.default_rng(0))
    fill(tmp_path / "thin" / "b", 0, 1, np.random.default_rng(0))
    with pytest.raises(UserError) as caught:
        task.evaluate(samples, reference=tmp_path / "thin")
    one_line(caught, "class b", "fewer than 2")


def test_unfinished_damaged_and_foreign_sources(reference, samples, tmp_path):
    (samples / "000003.png").write_bytes(b"text")
    with pytest.raises(UserError) as caught:
        task.evaluate(samples, reference=reference)
    one_line(caught, "000003.png")
    (samples / "000003.png").unlink()
    with pytest.raises(UserError) as caught:
        task.evaluate(samples, reference=reference)
    one_line(caught, "000003.png", "mage-ds sample")
    manifest = json.loads((samples / "manifest.json").read_text()) | {"complete": False}
    (samples / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        task.evaluate(samples, reference=reference)
    one_line(caught, "not complete")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("task: pretrain")
    with pytest.raises(UserError) as caught:
        task.evaluate(run, reference=reference)
    one_line(caught, "run folder", "--features run:RUN", "mage-ds sample")
    with pytest.raises(UserError) as caught:
        task.evaluate(reference / "val", reference=reference, run=tmp_path / "none")
    one_line(caught, "none")


@pytest.mark.parametrize("form", pictures.FORMATS)
def test_sets_of_any_format_asked_for_by_class(reference, tmp_path, capsys, form):
    """Of the lying bars (the reference's class 0, the model's class 1) every fourth is drawn upright."""
    book, rng = pictures.Pictures(tmp_path, form, 4, 0, [0, 1]), np.random.default_rng(3)
    names = {"class_label": "0..1", "classes": ["upright", "lying"]}
    pictures.open_folder(book, {**names, "batch": 4, "format": form}, 16, pixels=1)
    for start in range(0, 16, 4):
        tile = np.arange(start, start + 4)
        drawn = np.stack([draw(int(i % 2 == 1 and i % 8 != 1), rng) for i in tile])
        book.write(tile, 16, np.zeros((4, 4)), drawn)
    for at in book.due(16):
        joined.join(book, at, 16)
    joined.finish(book, 16, names["classes"])
    book.seal(16)
    rows = task.evaluate(tmp_path, reference=reference)["readable"]["rows"]
    assert list(rows) == ["samples", "asked for upright", "asked for lying", "validation pictures"]
    assert (rows["samples"]["pictures"], rows["samples"]["right"]) == (16, 14 / 16)
    assert rows["samples"]["classes"] == [6 / 16, 10 / 16]
    upright, lying = rows["asked for upright"], rows["asked for lying"]
    assert (upright["pictures"], upright["right"], upright["classes"]) == (8, 1.0, [0.0, 1.0])
    assert (lying["pictures"], lying["right"], lying["classes"]) == (8, 0.75, [0.75, 0.25])
    assert "asked for lying" in capsys.readouterr().out


def test_a_set_of_a_model_that_is_no_run(reference, samples, tmp_path):
    (tmp_path / "export").mkdir()
    manifest = json.loads((samples / "manifest.json").read_text())
    (samples / "manifest.json").write_text(json.dumps(manifest | {"run": str(tmp_path / "export"), "checkpoint": None}))
    assert set(task.evaluate(samples, reference=reference)["readable"]["rows"]) == {"samples", "validation pictures"}
