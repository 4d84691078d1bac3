"""The whole line as a user walks it, tiny: digits -> tokenizer -> MAGE under `deepspeed` -> samples -> figures."""

import json

import numpy as np
import pytest
import yaml
from launched import OFTEN, TINY, mage_ds, metrics, run, several, status, tree
from PIL import Image

pytestmark = pytest.mark.processes

STEPS, NUM = 6, 8


@pytest.fixture(scope="module")
def mage(made, tmp_path_factory):
    """(run folder, what the screen showed) of a MAGE trained on two ranks."""
    data, tokenizer = made
    root = tmp_path_factory.mktemp("spine")
    every = [f"report.{what}_every.steps=3" for what in ("evaluate", "pictures", "checkpoint")]
    fields = [f"duration.steps={STEPS}", *TINY, *OFTEN[:1], *every]
    line = ["train", "digits_mage", *fields, "--data", data, "--tokenizer", tokenizer, "--out", "mage"]
    return root / "mage", run(*line, cwd=root).text


@pytest.fixture(scope="module")
def samples(mage):
    """Folders of pictures: by one process, by two, in other batches, of another seed."""
    path, _ = mage
    root = path.parent
    line = ["sample", path, "-n", NUM, "--batch", 4]  # --num is none for the launcher: it takes it for its own
    mage_ds(*line, "--out", "one", cwd=root)
    run(*line, "--out", "two", cwd=root)
    others = {"five": ("--batch", 5), "whole": ("--batch", 64), "seed": ("--batch", 64, "--seed", 1)}
    results = several(*(["sample", path, "--num", 40, "--out", n, *o] for n, o in others.items()), cwd=root)
    assert [code for code, _, _ in results] == [0, 0, 0], results
    return {name: root / name for name in ("one", "two", *others)}


def numbers(path) -> dict:
    return yaml.safe_load((path / "recipe.yaml").read_text())["model"]


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_metrics_hold_every_step_and_the_held_out_figures(mage):
    path, _ = mage
    records = metrics(path)
    trained = [record for record in records if "loss" in record]
    assert [record["step"] for record in trained] == list(range(1, STEPS + 1))
    for record in trained:
        assert abs(record["loss"] - np.log(numbers(path)["codes"])) < 0.3  # as good as untrained
        assert {"top1", "lr", "grad_norm", "skipped", "images_per_s", "memory_gib", "input_wait"} <= set(record)
    held_out = [record for record in records if "val_loss" in record]
    assert [record["step"] for record in held_out] == [3, 6]
    bands = [value for key, value in held_out[-1].items() if key.startswith("val_loss_")]
    assert bands and min(bands) <= held_out[-1]["val_loss"] <= max(bands)


def test_status_and_checkpoints(mage, made):
    path, _ = mage
    assert status(path)["state"] == "finished"
    assert (status(path)["step"], status(path)["steps"]) == (STEPS, STEPS)
    names = sorted(entry.name for entry in (path / "checkpoints").iterdir())
    assert names == ["latest", "step_000003", "step_000006"]
    assert json.loads((path / "checkpoints/latest/meta.json").read_text())["position"] == STEPS * 16
    assert (path / "tokenizer/model.safetensors").is_file()  # a run stands alone


def test_rank_0_speaks_and_rank_1_writes_to_its_file(mage):
    path, screen = mage
    assert [entry.name for entry in (path / "logs").iterdir()] == ["rank_1.log"]
    for step in range(1, STEPS + 1):
        assert screen.count(f"step {step}/{STEPS}  loss ") == 1
    assert screen.count("parameters") == 1
    assert "zero1.json" in screen and "ZeRO stage 1" in screen
    assert "Traceback" not in screen


def test_tensorboard_has_scalars_and_pictures(mage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, _ = mage
    board = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    losses = [(event.step, event.value) for event in board.Scalars("train/loss")]
    expected = [(record["step"], record["loss"]) for record in metrics(path) if "loss" in record]
    assert losses == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]
    assert [event.step for event in board.Scalars("val_loss")] == [3, 6]
    [tag] = board.Tags()["images"]
    shown = board.Images(tag)
    assert [event.step for event in shown] == [3, 6]
    for event in shown:  # the sheet of the same step
        with Image.open(path / "pictures" / f"step_{event.step:06d}.png") as sheet:
            assert (event.width, event.height) == sheet.size
            assert len(np.unique(np.asarray(sheet))) > 20


def test_one_and_two_processes_make_the_same_files(samples):
    one, two = contents(samples["one"]), contents(samples["two"])
    assert len([name for name in one if name.endswith(".png")]) >= NUM
    assert {"tokens.npz", "grid.png", "manifest.json"} <= set(one)
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []


def test_another_batch_draws_the_same_noise(samples):
    tokens = {name: np.load(samples[name] / "tokens.npz")["tokens"] for name in samples}
    pictures = {name: {k: v for k, v in contents(samples[name]).items() if k[0].isdigit()} for name in samples}
    assert tokens["whole"].shape == (40, numbers(samples["whole"].parent / "mage")["tokens"])
    assert len(pictures["whole"]) == 40
    same = [pictures["five"][name] == picture for name, picture in pictures["whole"].items()]
    assert np.mean(same) >= 0.95
    assert (tokens["five"] == tokens["whole"]).mean() >= 0.95
    assert (tokens["one"] == tokens["whole"][:NUM]).mean() >= 0.95
    # Equal they are by their noise alone: an untrained model is sure of nothing, other noise gives other tokens.
    assert (tokens["seed"] == tokens["whole"]).mean() < 0.1


def test_evaluate(samples, mage, made):
    data, _ = made
    done = mage_ds("evaluate", samples["whole"], "--reference", data, "--run", mage[0], "--metrics", "readable")
    results = json.loads((samples["whole"] / "results.json").read_text())
    rows = results["readable"]["rows"]
    assert set(rows) == {"samples", "validation pictures", "reconstructions"}
    assert rows["samples"]["pictures"] == 40
    assert rows["validation pictures"]["readable"] > 0.8 > rows["samples"]["readable"]
    for name in rows:
        assert name in done.stdout


def test_a_second_start_of_a_finished_run_changes_nothing(mage, made):
    path, _ = mage
    data, _ = made
    before = tree(path)
    line = ["train", "digits_mage", f"duration.steps={STEPS}", *TINY, "--data", data, "--out", path]
    assert "already finished" in mage_ds(*line).stdout
    assert tree(path) == before
    assert status(path)["state"] == "finished"
