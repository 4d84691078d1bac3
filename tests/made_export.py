"""For tests: an export of a small MAGE with random weights, with or without classes, with or without its tokenizer."""

from pathlib import Path

import torch

from mage_ds.interop import exported
from mage_ds.interop.parts import Parts
from mage_ds.models import Mage, Vqgan
from mage_ds.recipes.sections import Sampling

SIDE, FACTOR, CODES = 32, 4, 64  # pixels, pixels of a token, codes
TOKENS = (SIDE // FACTOR) ** 2


def make_export(
    folder: Path, classes: int | None = None, tokenizer: bool = True, label_dropout: float | None = None, **sampling
) -> Path:
    stack = {"depth": 1, "width": 32, "heads": 2}
    numbers = {"encoder": stack, "decoder": stack, "tokens": TOKENS, "codes": CODES, "vocabulary": CODES + 2}
    numbers |= {"dropout": 0.1, "padding": "cls", "classes": classes}
    drawn = {"channels": 32, "multipliers": [1, 1, 1], "blocks": 1, "code_dim": 8, "codes": CODES}
    parts = []
    for model in (Mage(**numbers), Vqgan(**drawn)):
        with torch.no_grad():
            for i, (name, parameter) in enumerate(model.named_parameters()):
                std = 1.0 if "attn" in name else 0.2  # sharp attention: a label, one token among many, is seen
                parameter.normal_(0, std, generator=torch.Generator().manual_seed(i))
        parts.append(model.state_dict())
    fields = Sampling(steps=4, temperature=2.0, **sampling).model_dump()
    beside = Parts("tokenizer", drawn, parts[1], SIDE, origin="") if tokenizer else None
    folder.mkdir(parents=True)
    side = SIDE if tokenizer else 16 * SIDE // FACTOR  # without one a token is held to be 16 px
    facts = {} if label_dropout is None else {"recipe": {"label_dropout": label_dropout}}
    made = Parts("mage", numbers, parts[0], side, origin="", tokenizer=beside, sampling=fields, facts=facts)
    exported.write(folder, made)
    return folder
