"""LPIPS' published weights: VGG-16 of torchvision, and the linear layers that the `lpips` package carries."""

from importlib.util import find_spec
from pathlib import Path

import torch

from mage_ds.errors import UserError
from mage_ds.interop import safe
from mage_ds.models import Lpips

_FILE = "vgg16-397923af.pth"
_WITHOUT = "or do without LPIPS (in training: loss.perceptual=0)"


def load_lpips(vgg_path: str | None = None) -> Lpips:
    """LPIPS (float32, CPU, frozen) with VGG-16 from `vgg_path`, None: the file in torchvision's cache.

    Raises UserError where a file is missing, damaged or another model's.
    """
    model = Lpips()
    weights = model.state_dict()
    found = _vgg(vgg_path) | _linear()
    wrong = [name for name in weights if name not in found or found[name].shape != weights[name].shape]
    if wrong:
        path = _cached() if vgg_path is None else vgg_path
        raise UserError(f"{path}: is not torchvision's VGG-16 ({wrong[0]} is missing or of another shape); {_remedy()}")
    model.load_state_dict({name: found[name].float() for name in weights})
    return model


def _cached() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", _FILE)


def _remedy() -> str:
    return (
        "fetch it with `python -c \"from torchvision.models import vgg16; vgg16(weights='IMAGENET1K_V1')\"`, which "
        f"writes {_cached()}; or give its path (in training: loss.perceptual_weights), {_WITHOUT}"
    )


def _vgg(given: str | None) -> dict[str, torch.Tensor]:
    path = _cached() if given is None else Path(given)
    if not path.is_file():
        raise UserError(f"{path}: no such file; LPIPS needs VGG-16's weights: {_remedy()}")
    found = safe.tensors(safe.read(path), path)
    return {name: value for name, value in found.items() if name.startswith("features.")}


def _linear() -> dict[str, torch.Tensor]:
    """Of the package only its file is touched: importing it would import all of torchvision and scipy."""
    package = find_spec("lpips")
    path = Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth" if package else None
    if path is None or not path.is_file():
        raise UserError(f"package lpips is missing; LPIPS needs the linear layers in it: pip install lpips, {_WITHOUT}")
    return safe.tensors(safe.read(path), path)
