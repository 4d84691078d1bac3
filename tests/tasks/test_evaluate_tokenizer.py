"""`mage-ds evaluate TOKENIZER`: its figures against a plain loop, on one rank and two, and what a user gets wrong."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import random_weights
import torch
from launched import Launch, mage_ds, several
from PIL import Image
from skimage import metrics

from mage_ds.tasks.evaluate_tokenizer import evaluate_tokenizer

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def few(made, tmp_path_factory):
    """A flat folder of 9 digits of different classes and one file that is no picture."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted(made[0].glob("val/*/*.jpg"))[::40][:9]:
        os.link(path, folder / path.name)
    (folder / "broken.jpg").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def place(made, few, tmp_path_factory):
    """What the command line made: `one` and `few` by one rank, and what it said."""
    root = tmp_path_factory.mktemp("evaluated")
    data, tokenizer = made
    (root / "file").write_text("")
    (root / "empty").mkdir()
    random_weights.vgg(root / "vgg.pth")
    lines = {
        "one": [tokenizer, "--data", data, "--against", few, "--out", root / "one"],
        "default": [tokenizer, "--data", few, "--lpips-weights", root / "vgg.pth"],
        "missing": [root / "nothing", "--data", few],
        "pictures": [few, "--data", data],
        "no data": [tokenizer, "--data", root / "empty"],
        "same": [tokenizer, "--data", few, "--against", few],
        "inception": [tokenizer, "--data", few, "--inception", root / "file"],
        "lpips": [tokenizer, "--data", few, "--lpips-weights", root / "none.pth"],
        "out": [tokenizer, "--data", few, "--out", root / "file"],
        "reference": [tokenizer, "--reference", data],
    }
    answers = several(*(["evaluate", *line] for line in lines.values()), cwd=root)
    return root, dict(zip(lines, answers, strict=True))


def results(folder):
    return json.loads((folder / "results.json").read_text())


def by_a_plain_loop(tokenizer, paths):
    """Figures of pictures that have the tokenizer's size, one after the other."""
    from mage_ds.engine import stored

    model, info = stored.load_tokenizer(tokenizer)
    rows, counts, pairs = [], np.zeros(info["model"]["codes"]), []
    for path in paths:
        image = np.asarray(Image.open(path).convert("RGB"))
        with torch.no_grad():
            tokens = model.tokenize(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255)
            drawn = model.detokenize(tokens)[0].clamp(0, 1).permute(1, 2, 0).double().numpy()
        counts += np.bincount(tokens[0], minlength=len(counts))
        x = image / 255
        error = np.mean((x - drawn) ** 2)
        flat = np.mean((x - x.mean((0, 1))) ** 2)
        ssim = metrics.structural_similarity(
            x,
            drawn,
            channel_axis=2,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        rows.append([np.abs(x - drawn).mean(), -10 * np.log10(error), -10 * np.log10(flat), ssim])
        pairs.append((image, np.round(255 * drawn).astype(np.uint8)))
    p = counts[counts > 0] / counts.sum()
    names = ("l1", "psnr", "psnr_flat", "ssim")
    figures = dict(zip(names, np.mean(rows, axis=0), strict=True))
    figures |= {"codes_used": (counts > 0).mean(), "perplexity": np.exp(-(p * np.log(p)).sum()), "n": len(paths)}
    return figures, [row[1] for row in rows], pairs


def test_figures_are_those_of_a_plain_loop(made, place):
    data, tokenizer = made
    paths = sorted(data.glob("val/*/*.jpg"))
    figures, psnr, _ = by_a_plain_loop(tokenizer, paths)
    found = results(place[0] / "one")["data"]
    assert found["split"] == "val" and found["unreadable"] == 0
    # A code may be another where two are as near, because float32 depends on how many are computed together.
    assert found["figures"] == pytest.approx(figures, rel=1e-3)
    worst = [str(paths[i].relative_to(data)) for i in np.argsort(psnr, kind="stable")[:8]]
    assert {row["name"] for row in found["worst"]} >= set(worst[:5])
    assert [row["psnr"] for row in found["worst"]] == pytest.approx(sorted(psnr)[:8], rel=1e-3)


def test_what_is_printed_and_written(place, few, made):
    root, answers = place
    code, said, _ = answers["one"]
    found = results(root / "one")
    assert code == 0 and {path.name for path in (root / "one").iterdir()} == {
        "results.json",
        "pictures.png",
        "worst.png",
    }
    lines = {line.split("  ")[0]: line.split()[-2:] for line in said.splitlines()}
    assert lines["pictures"] == ["340", "9"]
    assert lines["PSNR (dB)"] == [f"{found[name]['figures']['psnr']:.2f}" for name in ("data", "against")]
    assert "LPIPS is not computed: " in said and "rFID is not computed: give Inception's weights" in said
    assert f"{made[0]}: its val/" in said and f"{few}: all of it" in said
    assert f"{few}: 1 unreadable pictures left out" in said and found["against"]["unreadable"] == 1
    assert said.splitlines()[-2] == f"verdict: {found['verdict']}" and found["verdict"] in ("use", "fine-tune")
    for name in ("pictures", "worst"):
        picture = np.asarray(Image.open(root / "one" / f"{name}.png"))
        high, wide = picture.shape[:2]
        assert wide > 8 * 64 and high > 4 * 64  # two rows of eight for each set


def test_the_default_place_and_lpips(place, made, few, tmp_path):
    code, said, _ = place[1]["default"]
    folder = made[1] / "evaluated" / few.name
    assert code == 0 and f"written to {folder}" in said
    figures = results(folder)["data"]["figures"]
    assert figures["n"] == 9 and figures["lpips"] > 0 and "LPIPS is not" not in said
    assert "verdict" not in results(folder)
    # Other pictures of the same name do not take its place; the same ones do.
    other = tmp_path / few.name
    shutil.copytree(few, other, ignore=shutil.ignore_patterns("broken.jpg"))
    found = evaluate_tokenizer(made[1], data=other)
    assert found["data"]["fingerprint"] != results(folder)["data"]["fingerprint"]
    assert results(folder.with_name(f"{few.name}-{found['data']['fingerprint'][:8]}")) == found
    assert evaluate_tokenizer(made[1], data=few) == results(folder)


@pytest.mark.parametrize(
    "name, parts",
    [
        ("missing", ["nothing: no such tokenizer"]),
        ("pictures", ["neither a tokenizer's run folder"]),
        ("no data", ["empty folder"]),
        ("same", ["--against", "name others"]),
        ("inception", ["weights-inception-2015-12-05-6726825d.pth"]),
        ("lpips", ["none.pth: no such file", "VGG-16"]),
        ("out", ["--out", "cannot be written", "name another folder"]),
        ("reference", ["is a run folder", "--data DATA"]),
    ],
)
def test_mistakes_are_one_line(place, name, parts):
    code, _, wrong = place[1][name]
    assert code == 2 and len(wrong.strip().splitlines()) == 1
    assert all(part in wrong for part in parts), wrong


def test_two_ranks_find_the_same(place, made, few, tmp_path):
    line = ["evaluate", made[1], "--data", made[0], "--against", few, "--out", tmp_path / "two"]
    with Launch(*line, cwd=tmp_path) as launch:
        assert launch.ended() == 0, launch.output
        assert launch.output.count("verdict: ") == 1
    one, two = results(place[0] / "one"), results(tmp_path / "two")
    assert two["ranks"] == 2 and two["verdict"] == one["verdict"]
    for name in ("data", "against"):
        assert two[name]["figures"] == pytest.approx(one[name]["figures"], rel=1e-9)
        assert [row["name"] for row in two[name]["worst"]] == [row["name"] for row in one[name]["worst"]]
        assert two[name]["unreadable"] == one[name]["unreadable"]
    for name in ("pictures.png", "worst.png"):
        assert (tmp_path / "two" / name).read_bytes() == (place[0] / "one" / name).read_bytes()


@pytest.mark.full
def test_rfid(made, few, tmp_path):
    from mage_ds.evaluation import features

    random_weights.inception(tmp_path / "inception.pth")
    out = tmp_path / "out"
    mage_ds("evaluate", made[1], "--data", few, "--inception", tmp_path / "inception.pth", "--out", out)
    _, _, pairs = by_a_plain_loop(made[1], sorted(Path(few).glob("[0-9]*.jpg")))
    model = features.load_inception(tmp_path / "inception.pth")
    with torch.no_grad():
        originals, drawn = (torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2) for some in zip(*pairs, strict=True))
        x, y = (model(some)[0].double().numpy() for some in (originals, drawn))
    (m, p), (n, q) = ((z.mean(0), (z - z.mean(0)) / np.sqrt(len(z) - 1)) for z in (x, y))
    crossed = np.linalg.svd(p @ q.T, compute_uv=False).sum()
    expected = ((m - n) ** 2).sum() + (p**2).sum() + (q**2).sum() - 2 * crossed
    assert results(out)["data"]["figures"]["rfid"] == pytest.approx(expected, rel=0.01)
