"""What networks see of pictures, for figures made of their features: Inception as torch-fidelity has it (FID and KID
from its 2048, IS from its logits), and pictures brought to the size that other networks were trained on."""

import io
from pathlib import Path

import torch
import torch.nn.functional as F

from mage_ds.errors import UserError

FILE = "weights-inception-2015-12-05-6726825d.pth"  # as it is published, among torch-fidelity's releases
WIDTH = 2048
_KEYS, _LAST = 566, (1008, WIDTH)


def load_inception(path):
    """Inception v3 of 2015 on the CPU: uint8 (B, 3, H, W) -> features float32 (B, 2048), logits float32 (B, 1008).

    Frozen, in eval mode. It resizes to 299 pixels as TensorFlow 1 did: bilinear, without antialiasing. The logits are
    without their bias. Use float32: bf16 moves an FID by a quarter of a percent.
    Raises: UserError where `path` is no such file; a pickle that holds anything but tensors is not run.
    """
    path, checked = Path(path), io.BytesIO()
    # torch-fidelity reads with weights_only=False, so it gets a copy of what was checked and never sees the file.
    torch.save(_read(path), checked)
    checked.seek(0)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(WIDTH), "logits_unbiased"], feature_extractor_weights_path=checked
        )
    except RuntimeError as error:  # names or shapes that differ, one to a line
        text = " ".join(str(error).split("\n\t", 2)[1:2])[:400] or "its tensors do not fit"
        raise _wrong(path, "".join(c if c.isprintable() else "?" for c in text)) from None


@torch.no_grad()
def fused(model):
    """Inception with each batch norm inside of the convolution before it, in place: the same features up to rounding,
    no farther from those in float64, a fifth faster. Its weights are other ones then."""
    for block in model.modules():
        if hasattr(block, "conv") and hasattr(block, "bn"):
            conv, norm = block.conv, block.bn
            scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
            weight = conv.weight.double() * scale[:, None, None, None]
            shift = norm.bias.double() - norm.running_mean.double() * scale
            conv.weight, conv.bias = (torch.nn.Parameter(each.float(), False) for each in (weight, shift))
            block.bn = torch.nn.Identity()
    return model


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The file as tensors only, nothing in it is run."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _wrong(path, error.strerror or "cannot be read") from None
    except Exception as error:  # torch's unpickler meets made-up input with whatever Python raises
        raise _wrong(path, f"does not open as a file of tensors ({type(error).__name__})") from None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        raise _wrong(path, "is no flat dict of tensors")
    last = weights.get("fc.weight")
    if len(weights) != _KEYS or last is None or tuple(last.shape) != _LAST:
        shape = "no fc.weight" if last is None else f"fc.weight of {tuple(last.shape)}"
        raise _wrong(path, f"holds {len(weights)} tensors and {shape}, not {_KEYS} and one of {_LAST}")
    return {name: value.detach() for name, value in weights.items()}


def _wrong(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: {reason}; Inception's weights are {FILE}, from torch-fidelity's releases")


def fitted(images: torch.Tensor, size: int, *, short: int | None, interpolation: str = "bilinear") -> torch.Tensor:
    """Pictures at a network's size: uint8 (B, 3, H, W) -> float32 (B, 3, size, size), whole numbers from 0 to 255.

    Args: short: the short side is resized to so many pixels, with antialiasing and torchvision's rounding, then the
    centre is cut out; None: both sides to `size`, whatever their ratio; interpolation: "bilinear" or "bicubic". As
    Pillow does it, but for a level or two: Pillow rounds between the two axes.
    """
    high, wide = images.shape[2:]
    resized = (size, size) if short is None else tuple(short * side // min(high, wide) for side in (high, wide))
    x = images.float()
    if resized != (high, wide):
        x = F.interpolate(x, resized, mode=interpolation, antialias=True, align_corners=False).round().clamp(0, 255)
    top, left = (round((side - size) / 2) for side in resized)
    if top < 0 or left < 0:
        raise ValueError(f"a short side of {short} has no centre of {size}")
    return x[:, :, top : top + size, left : left + size]
