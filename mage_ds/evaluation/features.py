"""Inception's features of pictures, as torch-fidelity computes them (FID and KID from the 2048, IS from the logits)."""

import pickle
from pathlib import Path

import torch

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
    path = Path(path)
    _check(path)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(WIDTH), "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    except RuntimeError as error:  # names or shapes that differ, one to a line
        raise _wrong(path, " ".join(str(error).split("\n\t", 2)[1:2]) or "its tensors do not fit") from None


def _check(path: Path) -> None:
    """Reads the file as tensors only: torch-fidelity's own reading would run whatever a pickle says."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _wrong(path, error.strerror or "cannot be read") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _wrong(path, f"does not open as a file of tensors ({type(error).__name__})") from None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise _wrong(path, "is no flat dict of tensors")
    last = weights.get("fc.weight")
    if len(weights) != _KEYS or last is None or tuple(last.shape) != _LAST:
        shape = "no fc.weight" if last is None else f"fc.weight of {tuple(last.shape)}"
        raise _wrong(path, f"holds {len(weights)} tensors and {shape}, not {_KEYS} and one of {_LAST}")


def _wrong(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: {reason}; Inception's weights are {FILE}, from torch-fidelity's releases")
