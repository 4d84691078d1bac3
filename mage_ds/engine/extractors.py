"""Networks that turn pictures into the features that sets of pictures are compared by."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mage_ds.engine import inference, process, stored
from mage_ds.errors import UserError
from mage_ds.evaluation.features import WIDTH, fitted, fused, load_inception
from mage_ds.interop import timm_files
from mage_ds.models import PixelViT

_LOGITS = 1008  # of Inception
_KINDS = "timm:NAME, timm:NAME:FILE, mae:FILE or run:PATH"

Call = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Extractor(NamedTuple):
    """name: "inception", "timm:NAME", "mae:NAME" or "run:NAME"; hash: of its weights; width, logits: of what it gives,
    logits None where it gives none; call: uint8 (B, 3, H, W) on the process's device -> features float32 (B, width),
    logits float32 (B, logits) or None. Results depend on B (up to rounding), so use one."""

    name: str
    hash: str
    width: int
    logits: int | None
    call: Call


def open_extractor(inception: Path | None = None, features: str | None = None) -> Extractor:
    """The network on this process's device (call process.start() first), float32 without TF32.

    Args: inception: Inception's file, see `evaluation.features`; features: "timm:NAME", weights from timm's cache;
    "timm:NAME:FILE", from a file (tensors only); "run:PATH", a MAGE, classifier or encoder, whatever
    `stored.open_model` opens; "mae:FILE", a file of MAE's. One of the two is given. Nothing is fetched.
    Raises: UserError.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if inception is not None and features is not None:
        raise UserError(f"--inception {inception} and --features {features}: are two extractors; leave one out")
    if inception is None and features is None:
        raise UserError(f"features of which network? give either --inception FILE or --features {_KINDS}")
    if inception is not None:
        return _inception(Path(inception))
    kind, _, rest = features.partition(":")
    if kind not in ("timm", "run", "mae") or not rest:
        raise UserError(f"--features {features}: must be {_KINDS}")
    if kind != "timm":
        return _ours(features, rest if kind == "run" else features, f"{kind}:{Path(rest).resolve().name}")
    name, _, file = rest.partition(":")
    return _timm(name, Path(file) if file else None)


def _inception(path: Path) -> Extractor:
    model = load_inception(path)
    digest = stored.weights_hash(model.state_dict())
    model = inference.frozen(fused(model))

    @torch.no_grad()
    def call(images: Tensor) -> tuple[Tensor, Tensor]:
        return model(images)

    return Extractor("inception", digest, WIDTH, _LOGITS, call)


# --- ours ------------------------------------------------------------------------------------------------------------


def _ours(features: str, path: str, name: str) -> Extractor:
    """The representation of paper section 4, of pictures at the size that the model was trained on."""
    opened = stored.open_model(path)
    model = next((each for each in (opened.mage, opened.classifier, opened.encoder) if each is not None), None)
    if model is None:
        raise UserError(f"--features {features}: is a {opened.kind}; give a MAGE, a classifier or an encoder")
    parts, size = [model], opened.image_size
    if not isinstance(model, PixelViT):
        if opened.tokenizer is None:
            raise UserError(
                f"--features {features}: comes without a tokenizer; export it with one, or give its run folder"
            )
        parts.append(opened.tokenizer)
    weights = [stored.weights_hash(each.state_dict()) for each in parts]
    digest = weights[0] if len(weights) == 1 else hashlib.sha256("".join(weights).encode()).hexdigest()
    model = model.to(process.start().device)
    tokenizer = None if opened.tokenizer is None else inference.frozen(opened.tokenizer)

    @torch.no_grad()
    def call(images: Tensor) -> tuple[Tensor, None]:
        seen = fitted(images, size, short=size).div(255)
        return model.features(seen if tokenizer is None else inference.tokens_of(tokenizer, seen)).float(), None

    return Extractor(name, digest, model.blocks[0].norm1.weight.shape[0], None, call)


# --- timm's ----------------------------------------------------------------------------------------------------------


def _timm(name: str, file: Path | None) -> Extractor:
    """What the last layer of a classifier of timm sees, of pictures prepared as timm's own evaluation does."""
    model = timm_files.built(name, file)
    prepare = _preparation(name, model)
    digest = stored.weights_hash(model.state_dict())
    model = inference.frozen(model)

    @torch.no_grad()
    def call(images: Tensor) -> tuple[Tensor, None]:
        vectors = model.forward_head(model.forward_features(prepare(images)), pre_logits=True)
        return vectors.flatten(1).float(), None

    width = call(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=process.start().device))[0].shape[1]
    return Extractor(f"timm:{name}", digest, width, None, call)


def _preparation(name: str, model) -> Callable[[Tensor], Tensor]:
    """uint8 (B, 3, H, W) -> what the model takes, as its data configuration says."""
    from timm.data import resolve_model_data_config

    how = resolve_model_data_config(model)
    (_, high, wide), mode, kind = how["input_size"], how["crop_mode"], how["interpolation"]
    if high != wide or mode not in ("center", "squash") or kind not in ("bilinear", "bicubic"):
        raise UserError(
            f"--features timm:{name}: takes pictures {high} x {wide}, {mode}, {kind}: not built in; choose another"
        )
    short = math.floor(high / how["crop_pct"]) if mode == "center" else None
    device = process.start().device
    mean, std = (torch.tensor(how[key], device=device)[:, None, None] for key in ("mean", "std"))

    def prepare(images: Tensor) -> Tensor:
        seen = fitted(images, high, short=short, interpolation=kind).div(255)
        return ((seen - mean) / std).contiguous(memory_format=torch.channels_last)

    return prepare
