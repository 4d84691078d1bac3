"""For tests: pictures of six patterns, a MAGE of them, and a tiny classifier of each kind, trained as a user does."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from classify_workers import Lines
from PIL import Image

from mage_ds.engine import stored

CLASSES, TRAIN, STEPS, BATCH, MICRO = 6, 29, 6, 8, 4
HELD = {"0": 3, "1": 1, "2": 2, "3": 3, "4": 2, "5": 2}  # 13, which two ranks share unevenly, and one is broken
COMMON = [
    f"batch={BATCH}",
    f"duration.steps={STEPS}",
    "warmup.steps=2",
    "inputs={image_size: 16, augmentation: none, interpolation: linear, evaluation_resize: 16, broken_limit: 0.5}",
    f"model.classes={CLASSES}",
    "model.encoder={depth: 2, width: 32, heads: 2}",
    "report.log_every=1",
    "report.evaluate_every.steps=3",
    "report.checkpoint_every.steps=2",
    "report.pictures_every.steps=6",
    "report.keep=9",
]
MACHINE = ["machine.precision=float32", f"machine.micro_batch={MICRO}"]
TOKENS = [
    "tokenizer={channels: 8, multipliers: [1, 1, 1], blocks: 1, code_dim: 4, codes: 32}",
    "model.tokens=16",
    "model.vocabulary=34",
]
MAGE = [*COMMON[:1], COMMON[3], COMMON[5], *MACHINE, *TOKENS, "model.codes=32", "report.log_every=1", "warmup.steps=0"]
MAGE += ["duration.steps=2", "model.decoder={depth: 1, width: 32, heads: 2}", "optimizer.base_lr=0.1"]
MINE = [*COMMON, *MACHINE]
KINDS = {
    "probe": ["digits_probe", *MINE, *TOKENS, "optimizer.base_lr=1.6"],
    "finetune": ["digits_finetune", *MINE, *TOKENS, "optimizer.base_lr=0.03", "optimizer.layer_decay=0.75"],
    "scratch": ["digits_scratch", *MINE, *TOKENS, "optimizer.ema=0.7"],
    "vit": ["digits_vit_scratch", *MINE, "model.patch=4"],
}


def draw(root) -> None:
    """Train and held-out pictures of six patterns with noise; one held-out picture cannot be read."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (CLASSES, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    for split, counts in (("train", {str(i): (TRAIN + 5 - i) // 6 for i in range(CLASSES)}), ("val", HELD)):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture = np.clip(rng.normal(patterns[int(name)], 60), 0, 255).astype(np.uint8)
                Image.fromarray(picture).save(root / split / name / f"{i}.png")
    whole = (root / "val" / "2" / "0.png").read_bytes()
    (root / "val" / "2" / "broken.png").write_bytes(whole[: len(whole) // 2])


@contextmanager
def made(root: Path):
    """In `root`: data/, mage/, and a run of each of KINDS, never cut off, on one rank; `lines` starts others, `line` is
    what trains such a run."""
    draw(root / "data")
    data = ["--data", root / "data"]
    given = {
        "probe": [*data, "--init", root / "mage"],
        "finetune": [*data, "--init", root / "mage"],
        "scratch": [*data, "--tokenizer", root / "mage"],
        "vit": data,
    }
    with Lines(root) as lines:
        lines.done("train", "digits_mage", *MAGE, *data, "--tokenizer", "random", "--out", root / "mage")

        def line(kind, out, *more):
            return ["train", *KINDS[kind], *more, *given[kind], "--out", root / out]

        said = lines.all_done({kind: line(kind, kind) for kind in KINDS})
        yield SimpleNamespace(root=root, data=root / "data", lines=lines, line=line, said=said)


def pictures(root, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All that PIL can read, in the order of their names: float32 (n, 3, 16, 16) in [0, 1], labels int64 (n,)."""
    found, labels = [], []
    for path in sorted((root / split).glob("*/*.png")):
        try:
            found.append(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1))
        except OSError:
            continue
        labels.append(int(path.parent.name))
    return torch.stack(found).float() / 255, torch.tensor(labels)


def seen(place, split: str, run) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (or pixels) of all pictures, labels."""
    opened, (found, labels) = stored.open_model(run), pictures(place.data, split)
    return found if opened.tokenizer is None else opened.tokenizer.tokenize(found), labels
