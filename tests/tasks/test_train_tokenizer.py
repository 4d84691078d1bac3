"""Training of a tokenizer in one process, where it differs from that of a MAGE: its first codes, its figures."""

import json
import shutil

import numpy as np
import pytest
import random_weights
import torch
from PIL import Image

from mage_ds.engine import stored
from mage_ds.errors import UserError
from mage_ds.interop.lpips import load_lpips
from mage_ds.recipes import load_recipe
from mage_ds.tasks.train_tokenizer import train_tokenizer

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


def test_pictures_none_of_which_can_be_read_are_said(pictures, train):
    for path in pictures.glob("[01]*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"pictures are unreadable, more than inputs\.broken_limit=0\.5 allows"):
        train("run")


# --- beginning with given weights


ADVERSARY = "adversary={start: {steps: 1}, weight: 0.8, most: 10.0, layers: 2, channels: 8, norm: batch}"


@pytest.fixture
def train(pictures, tmp_path, monkeypatch):
    """train(name, *overrides, **options): the run folder, trained in this process."""
    monkeypatch.setattr("mage_ds.engine.process.stop_on_signals", lambda: None)

    def run(name: str, *overrides: str, **options):
        train_tokenizer(
            load_recipe("digits_tokenizer", [*SMALL, *overrides]), str(pictures), str(tmp_path / name), **options
        )
        return tmp_path / name

    return run


def weights(run) -> dict:
    return stored.load_tokenizer(run)[0].state_dict()


def facts(run) -> dict:
    return json.loads((run / "facts.json").read_text())


def test_a_run_begins_with_given_weights_and_needs_them_no_more(train):
    first = train("first", "codebook_init=uniform")
    none = "optimizer={base_lr: 1.0e-9, min_lr: 0.0, weight_decay: 0.0, betas: [0.5, 0.9], eps: 1.0, clip: null}"
    second = train("second", none, init=str(first))
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(second)[name], value, rtol=0, atol=1e-6)  # the codebook as well
    assert facts(second)["init"] == {"path": str(first), "hash": stored.load_tokenizer(first)[1]["hash"]}
    # To be continued by the same command, without --init, and not with another.
    shutil.rmtree(first)
    for options in ({"init": str(first)}, {}):
        train("second", none, "duration.steps=3", extend=True, **options)
    assert facts(second)["init"]["path"] == str(first)
    for name, init in (("second", "elsewhere"), ("third", None)):
        third = train("third") if init is None else None
        with pytest.raises(UserError, match="leave --init out, or choose another --out"):
            train(name, none, "duration.steps=3", extend=True, init=init or str(third))


@pytest.mark.full
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_with_them_again(train):
    first = train("first", "codebook_init=uniform")
    second = train("second", init=str(first))
    done = weights(second)
    shutil.rmtree(second / "checkpoints")
    train("second")
    assert all(torch.equal(value, done[name]) for name, value in weights(second).items())
    shutil.rmtree(second / "checkpoints")
    shutil.rmtree(first)
    train("first", "seed=1")
    with pytest.raises(UserError, match="its weights changed since"):
        train("second")


def test_given_weights_of_another_size_are_refused_in_one_line(train):
    first = train("first", "codebook_init=uniform")
    with pytest.raises(UserError) as caught:
        train("second", "model.codes=9", init=str(first))
    line = f"--init {first}: its codes is 8, the recipe's model.codes is 9; choose another tokenizer, or add "
    line += '"model.codes=8"'
    assert str(caught.value) == line


# --- what cannot be, said before anything is written


@pytest.mark.parametrize(
    "overrides, config, message",
    [
        ([ADVERSARY], "zero3", "--deepspeed_config zero3: adversary needs ZeRO 0, 1 or 2; choose zero2"),
        (["reseed_after=3"], "zero3", "--deepspeed_config zero3: reseed_after needs ZeRO 0, 1 or 2; choose zero2"),
        (
            ["loss.perceptual=1.0", "loss.perceptual_weights=/no/file"],
            "zero1",
            "/no/file: no such file; LPIPS needs VGG-16",
        ),
        (["report.inception=/no/file"], "zero1", "/no/file: No such file"),
    ],
)
def test_refused_in_one_line(train, tmp_path, overrides, config, message):
    with pytest.raises(UserError) as caught:
        train("run", *overrides, deepspeed_config=config)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# --- with a discriminator, and held-out pictures


def test_figures_and_pictures_of_the_held_out_split(pictures, train, monkeypatch):
    for split, names in (("train", "0123456789"), ("val", "ab")):
        (pictures / split).mkdir()
        for i, name in enumerate(names):
            (pictures / f"{i + (10 if split == 'val' else 0):02d}.png").rename(pictures / split / f"{name}.png")
    for broken in pictures.glob("z*"):
        broken.unlink()
    often = ["report.pictures_every.steps=1", "report.evaluate_every.steps=2", "report.log_every=1"]
    run = train("run", ADVERSARY, *often)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, held_out = ([r for r in records if key in r] for key in ("l1", "val_l1"))
    assert [("discriminator_loss" in r, "discriminator_grad_norm" in r) for r in steps] == [
        (False, False),
        (True, True),
    ]
    assert all({"tokenizer_grad_norm", "tokenizer_lr", "usage", "perplexity", "dead_codes"} <= r.keys() for r in steps)
    assert {
        "adversarial",
        "adaptive_weight",
        "reconstruction_norm",
        "adversarial_norm",
        "real_logit",
        "fake_logit",
    } <= (steps[1].keys())
    assert {r["skipped"] for r in steps} == {0}
    # The figures, from the stored weights by other means.
    vqgan, _ = stored.load_tokenizer(run)
    x = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(pictures / "val" / f"{name}.png"))).permute(2, 0, 1) / 255
            for name in "ab"
        ]
    )
    with torch.no_grad():
        drawn, tokens, *_ = vqgan(x)
    error = drawn.clamp(0, 1) - x
    last = held_out[-1]
    assert last["val_l1"] == pytest.approx(error.abs().mean().item(), rel=1e-4)
    psnr = (-10 * error.square().flatten(1).mean(1).log10()).mean().item()
    assert last["val_psnr"] == pytest.approx(psnr, rel=1e-4)
    assert last["val_codes_used"] == pytest.approx(len(tokens.unique()) / 8)
    # Four rows of pictures, of which the last two are the worst of the split, where it was measured: two pictures each.
    first, sheet = (np.array(Image.open(run / "pictures" / f"step_00000{step}.png")) for step in (1, 2))
    assert sheet.shape[0] > 4 * 64 > 3 * 64 > first.shape[0] and sheet.shape[1] > 2 * 64
    # Nothing is measured for the sake of a picture, nor again where a kill came between figures and picture.
    assert len(held_out) == 1
    (run / "pictures" / "step_000002.png").unlink()
    monkeypatch.setattr("mage_ds.tasks.train_tokenizer.HeldOut.evaluate", None)
    train("run", ADVERSARY, *often)
    assert np.array(Image.open(run / "pictures" / "step_000002.png")).shape[0] < 3 * 64


@pytest.mark.full
def test_lpips_and_rfid_where_their_files_are_there(pictures, train, tmp_path):
    random_weights.vgg(tmp_path / "vgg.pth")
    random_weights.inception(tmp_path / "inception.pth")
    (pictures / "zz.png").unlink()
    (pictures / "zy.png").unlink()
    for split, first in (("train", 0), ("val", 8)):
        (pictures / split).mkdir()
        for i in range(first, first + (8 if split == "train" else 4)):
            (pictures / f"{i:02d}.png").rename(pictures / split / f"{i:02d}.png")
    judged = ["loss.perceptual=0.5", f"loss.perceptual_weights={tmp_path / 'vgg.pth'}"]
    run = train("run", ADVERSARY, *judged, f"report.inception={tmp_path / 'inception.pth'}", "report.log_every=1")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [held_out] = [record for record in records if "val_l1" in record]
    assert held_out["val_rfid"] >= 0 and all(r["perceptual"] > 0 for r in records if "l1" in r)
    vqgan, lpips = stored.load_tokenizer(run)[0], load_lpips(str(tmp_path / "vgg.pth"))
    files = sorted((pictures / "val").iterdir())
    x = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 for file in files])
    with torch.no_grad():
        assert held_out["val_lpips"] == pytest.approx(lpips(x, vqgan(x)[0].clamp(0, 1)).mean().item(), rel=1e-3)
