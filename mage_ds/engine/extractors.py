"""Networks that turn pictures into the features that sets of pictures are compared by."""

import difflib
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
from mage_ds.interop import safe

_LOGITS = 1008  # of Inception
_KINDS = "timm:NAME, timm:NAME:FILE or run:PATH"
_INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model")  # where files of trainings keep the weights
_HUB = ("model.safetensors", "pytorch_model.bin")  # as timm publishes them

Call = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Extractor(NamedTuple):
    """name: "inception", "timm:NAME" or "run:NAME"; hash: of its weights; width, logits: of what it gives, logits None
    where it gives none; call: uint8 (B, 3, H, W) on the process's device -> features float32 (B, width), logits float32
    (B, logits) or None. Results depend on B (up to rounding), so use one."""

    name: str
    hash: str
    width: int
    logits: int | None
    call: Call


def open_extractor(inception: Path | None = None, features: str | None = None) -> Extractor:
    """The network on this process's device (call process.start() first), float32 without TF32.

    Args: inception: Inception's file, see `evaluation.features`; features: "timm:NAME", weights from timm's cache;
    "timm:NAME:FILE", from a file (tensors only); "run:PATH", a MAGE of ours, whatever `stored.open_model` opens. One of
    the two is given. Nothing is fetched.
    Raises: UserError.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if (inception is None) == (features is None):
        raise UserError(f"features of which network? give either --inception FILE or --features {_KINDS}")
    if inception is not None:
        return _inception(Path(inception))
    kind, _, rest = features.partition(":")
    if kind not in ("timm", "run") or not rest:
        raise UserError(f"--features {features}: must be {_KINDS}")
    if kind == "run":
        return _run(Path(rest))
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


def _run(path: Path) -> Extractor:
    """The representation of paper section 4, of pictures at the size that the model was trained on."""
    opened = stored.open_model(path)
    model = opened.mage if opened.classifier is None else opened.classifier
    if model is None:
        raise UserError(
            f"--features run:{path}: is a {opened.kind}; give a pre-trained MAGE or a fine-tuned classifier"
        )
    if opened.tokenizer is None:
        raise UserError(f"--features run:{path}: comes without a tokenizer; export it with one, or give its run folder")
    weights = [stored.weights_hash(each.state_dict()) for each in (model, opened.tokenizer)]
    size, tokenizer = opened.image_size, inference.frozen(opened.tokenizer)
    model = model.to(process.start().device)

    @torch.no_grad()
    def call(images: Tensor) -> tuple[Tensor, None]:
        seen = fitted(images, size, short=size).div(255)
        return model.features(inference.tokens_of(tokenizer, seen)).float(), None

    width = model.token_emb.word_embeddings.weight.shape[1]
    return Extractor(
        f"run:{path.resolve().name}", hashlib.sha256("".join(weights).encode()).hexdigest(), width, None, call
    )


# --- timm's ----------------------------------------------------------------------------------------------------------


def _timm(name: str, file: Path | None) -> Extractor:
    """What the last layer of a classifier of timm sees, of pictures prepared as timm's own evaluation does."""
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 1)
        hint = (
            f"did you mean {close[0]}?" if close else "`python -c 'import timm; print(timm.list_models())'` lists them"
        )
        raise UserError(f"--features timm:{name}: no such model; {hint}")
    path = file or _cached(name)
    weights = _weights(path)
    model = _built(name, weights, path)
    prepare = _preparation(name, model)
    digest = stored.weights_hash(model.state_dict())
    model = inference.frozen(model)

    @torch.no_grad()
    def call(images: Tensor) -> tuple[Tensor, None]:
        vectors = model.forward_head(model.forward_features(prepare(images)), pre_logits=True)
        return vectors.flatten(1).float(), None

    width = call(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=process.start().device))[0].shape[1]
    return Extractor(f"timm:{name}", digest, width, None, call)


def _cached(name: str) -> Path:
    """The file of a model's weights in timm's cache. UserError where it is not there: nothing is fetched."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    told = timm.get_pretrained_cfg(name)
    names = _HUB if told.hf_hub_filename is None else (told.hf_hub_filename,)
    if told.hf_hub_id:
        for each in names:
            found = try_to_load_from_cache(told.hf_hub_id, each)
            if isinstance(found, str):
                return Path(found)
    if told.url and (found := Path(torch.hub.get_dir(), "checkpoints", Path(told.url).name)).is_file():
        return found
    what = (
        f"{names[0]} of {told.hf_hub_id}" if told.hf_hub_id else Path(told.url).name if told.url else "(none published)"
    )
    raise UserError(
        f"--features timm:{name}: its weights, {what}, are not in timm's cache; copy that file here and give it: "
        f"--features timm:{name}:FILE"
    )


def _weights(path: Path) -> dict[str, Tensor]:
    """A file's tensors; nothing in it is run."""
    found = safe.read(path)
    inside = next((key for key in _INSIDE if isinstance(found.get(key), dict)), None)
    found = safe.tensors(found if inside is None else found[inside], path)
    return {key.removeprefix("module."): value for key, value in found.items()}


def _built(name: str, weights: dict[str, Tensor], path: Path):
    """The model with exactly these weights. UserError where they are another's."""
    import timm

    told = timm.get_pretrained_cfg(name)
    classes = told.num_classes
    if isinstance(told.classifier, str) and (last := weights.get(f"{told.classifier}.weight")) is not None:
        classes = last.shape[0]  # of one that was fine-tuned
    overlay = {"state_dict": weights, "custom_load": False, "num_classes": classes}
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        said = " ".join(safe.printable(str(error)).split())[:300]
        raise UserError(
            f"{path}: does not hold the weights of timm's {name} ({said}); give the file of this model"
        ) from None
    if bad := [key for key, value in model.state_dict().items() if not value.isfinite().all()]:
        raise UserError(f"{path}: {bad[0]} holds values that are no numbers; copy the file again")
    return model.eval().requires_grad_(False)


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
