"""For tests: small untrained models as exported folders, with and without classes."""

from pathlib import Path

import torch

from mage_ds import models
from mage_ds.interop import exported
from mage_ds.interop.parts import Parts

TOKENIZER = {"channels": 32, "multipliers": [1, 1, 1], "blocks": 1, "code_dim": 8, "codes": 32}
PART = {"depth": 1, "width": 32, "heads": 2}
MAGE = {"encoder": PART, "decoder": PART, "tokens": 16, "codes": 32, "vocabulary": 34, "dropout": 0.5, "padding": "cls"}
NAMES = ["cat", "dog", "owl"]  # of three classes


def make_export(path: Path, classes: int | None = None, label_dropout: float = 0.1) -> tuple[models.Mage, models.Vqgan]:
    """An export of untrained weights, pictures of 16 px, T = 4; returns its models."""
    numbers = MAGE | {"classes": classes}
    mage, vqgan = models.Mage(**numbers), models.Vqgan(**TOKENIZER)
    for model in (mage, vqgan):
        for i, parameter in enumerate(model.parameters()):
            with torch.no_grad():
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(i))
    tokenizer = Parts("tokenizer", TOKENIZER, dict(vqgan.state_dict()), 16, origin="")
    parts = Parts(
        "mage",
        numbers,
        dict(mage.state_dict()),
        16,
        origin="",
        tokenizer=tokenizer,
        sampling={"steps": 4, "temperature": 2.0},
        facts={"classes": NAMES, "recipe": {"label_dropout": label_dropout}} if classes == len(NAMES) else {},
    )
    path.mkdir(parents=True)
    exported.write(path, parts)
    return mage.eval(), vqgan.eval()
