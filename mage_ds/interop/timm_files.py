"""Models of timm with their weights, out of files that are here: nothing is fetched, and nothing in a file is run."""

import difflib
from pathlib import Path

import torch
from torch import Tensor

from mage_ds.errors import UserError
from mage_ds.interop import safe

_INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model")  # where files of trainings keep the weights
_HUB = ("model.safetensors", "pytorch_model.bin")  # as timm publishes them


def built(name: str, file: Path | None = None):
    """timm's model of this name, float32, in eval mode, without gradients, with exactly the weights of `file`, or of
    the one in timm's cache. UserError for an unknown name, and where the weights are not there or are another's."""
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 1)
        hint = (
            f"did you mean {close[0]}?" if close else "`python -c 'import timm; print(timm.list_models())'` lists them"
        )
        raise UserError(f"timm:{name}: no such model; {hint}")
    path = file or _cached(name)
    weights, told = _weights(path), timm.get_pretrained_cfg(name)
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


def _cached(name: str) -> Path:
    """The file of a model's weights in timm's cache. UserError where it is not there."""
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
        f"timm:{name}: its weights, {what}, are not in timm's cache; copy that file here and give timm:{name}:FILE"
    )


def _weights(path: Path) -> dict[str, Tensor]:
    found = safe.read(path)
    inside = next((key for key in _INSIDE if isinstance(found.get(key), dict)), None)
    found = safe.tensors(found if inside is None else found[inside], path)
    return {key.removeprefix("module."): value for key, value in found.items()}
