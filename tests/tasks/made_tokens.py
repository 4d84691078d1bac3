"""Small pictures, tokenizers and a recipe, and their tokens, for the tests of `tokenize` and of what reads them."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from mage_ds import cli, recipes
from mage_ds.engine import stored, wrap
from mage_ds.models import Vqgan
from mage_ds.tasks import tokenize as task

MODEL = {"channels": 8, "multipliers": [1, 1, 1], "blocks": 1, "code_dim": 4, "codes": 32}
N, VAL, BATCH = 22, 5, 4
SMALL = [
    f"tokenizer={json.dumps(MODEL)}",
    "inputs.image_size=16",
    "inputs.evaluation_resize=18",
    "model.tokens=16",
    "model.codes=32",
    "model.vocabulary=34",
    *(f"model.{part}={{depth: 1, width: 32, heads: 2}}" for part in ("encoder", "decoder")),
    "batch=8",
    "duration={steps: 7}",  # 56 samples of 22: three epochs begun
    "report.evaluate_every={steps: 3}",
    "report.pictures_every={steps: 7}",
    "report.log_every=1",
    "machine={precision: float32, micro_batch: 4}",
]


def make(root: Path) -> SimpleNamespace:
    """In `root`: data/ of two classes and two splits, tokenizer/ and another/ with random values, recipe.yaml."""
    rng = np.random.default_rng(0)
    for i in range(N + VAL):
        path = root / "data" / ("val" if i >= N else "train") / f"class{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((20 + i % 5, 24 - i % 3), Image.Resampling.BICUBIC).save(path)
    for seed, name in enumerate(("tokenizer", "another")):
        vqgan = Vqgan(**MODEL)
        wrap.initialize_weights(vqgan, seed)
        with torch.no_grad():
            vqgan.quantize.embedding.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        stored.save_tokenizer(root / name, vqgan, MODEL, 16)
    full = {"activation_checkpointing": "none", "compile": "false", "hang_timeout": "60"}
    (root / "recipe.yaml").write_text(
        recipes.dump(recipes.load_recipe("digits_mage", [*SMALL, *(f"machine.{k}={v}" for k, v in full.items())]))
    )
    return SimpleNamespace(
        data=root / "data", tokenizer=root / "tokenizer", another=root / "another", recipe=root / "recipe.yaml"
    )


def tokenize(place, out, **more):
    options = {"recipe": str(place.recipe), "batch": BATCH, "precision": "float32", **more}
    task.tokenize(str(options.pop("data", place.data)), str(options.pop("tokenizer", place.tokenizer)), out, **options)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def mistake(capsys, *argv) -> str:
    code = cli.main([str(word) for word in argv])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("mage-ds: error: ")
    return lines[0]
