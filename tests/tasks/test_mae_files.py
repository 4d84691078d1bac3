"""Table 2's baselines: files of MAE's published layouts through the commands that take our own runs."""

import json

import made_mae
import numpy as np
import pytest
import torch
from launched import metrics, several
from PIL import Image
from safetensors.torch import load_file

from mage_ds.evaluation import few_shot

CLASSES, TRAIN, VAL = 3, 6, 4
PROBE = [
    "batch=6",
    "duration.steps=4",
    "warmup.steps=1",
    "tokenizer=null",
    "model.tokens=null",
    "model.vocabulary=null",
    f"model.patch={made_mae.PATCH}",
    f"model.encoder={{depth: {made_mae.DEPTH}, width: {made_mae.WIDTH}, heads: 2}}",
    f"model.classes={CLASSES}",
    "report.log_every=1",
    "machine.precision=float32",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, timm's model by file name): pictures, both kinds of files, a probe of each, few-shot figures."""
    root = tmp_path_factory.mktemp("mae")
    rng = np.random.default_rng(0)
    side = made_mae.SIDE * made_mae.PATCH
    for label in range(CLASSES):
        for split, number in (("train", TRAIN), ("val", VAL)):
            (root / "data" / split / str(label)).mkdir(parents=True)
            for i in range(number):
                picture = np.clip(rng.normal(60 + 50 * label, 60, (side, side, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(picture).save(root / "data" / split / str(label) / f"{i}.png")
    files = {"mae_pretrain_vit.pth": False, "mae_visualize_vit_ganloss.pth": True}
    models = {name: made_mae.save(root / name, gan) for name, gan in files.items()}
    sources = [f"mae:{name}" for name in files]
    lines = [
        ["train", "digits_probe", *PROBE, "--data", "data", "--init", source, "--out", f"probe {i}"]
        for i, source in enumerate(sources)
    ]
    lines.append(["fewshot", *sources, "--data", "data", "--shots", "2,4", "--trials", 2, "--out", "few"])
    for code, _, error in several(*lines, cwd=root):
        assert code == 0, error
    return root, models


def pictures(root, split: str) -> tuple[torch.Tensor, np.ndarray]:
    paths = sorted((root / "data" / split).glob("*/*.png"))
    images = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2)
    return images.float() / 255, np.array([int(path.parent.name) for path in paths])


@pytest.mark.parametrize("number", [0, 1])
def test_a_probe_judges_by_what_timm_sees(made, number):
    root, models = made
    images, labels = pictures(root, "val")
    run = root / f"probe {number}"
    head = load_file(run / "checkpoints" / "step_000004" / "head.weight.00000.safetensors")
    features = made_mae.features([*models.values()][number], images)
    features = (features - head["norm.running_mean"]) / (head["norm.running_var"] + 1e-6).sqrt()
    scores = features @ head["linear.weight"].T + head["linear.bias"]
    expected = torch.nn.functional.cross_entropy(scores.double(), torch.from_numpy(labels)).item()
    assert metrics(run)[-1]["val_loss"] == pytest.approx(expected, rel=1e-4)


def test_few_shot_figures_are_those_of_timms_features(made):
    root, models = made
    found = json.loads((root / "few" / "fewshot.json").read_text())["results"]
    assert [row["shots"] for row in found] == [2, 4, 2, 4]
    (train, labels), (held, answers) = pictures(root, "train"), pictures(root, "val")
    for row, model in zip(found, [model for model in models.values() for _ in range(2)], strict=True):
        features, seen = made_mae.features(model, train), made_mae.features(model, held)
        expected = []
        for trial in range(2):
            drawn = torch.from_numpy(few_shot.draw(labels, CLASSES, row["shots"], trial, 0))
            expected.append(few_shot.answer(features[drawn], seen, torch.from_numpy(answers)).top1)
        assert [each["top1"] for each in row["trials"]] == pytest.approx(expected, abs=1.01 / (CLASSES * VAL))
