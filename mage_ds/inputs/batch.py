"""What the inputs hand to a training or evaluation step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass
class Batch:
    """One micro-batch of B samples in V views (one of images, tokens, features).

    images: uint8 (B, V, 3, H, W) RGB on the device, or None; tokens: int64 (B, V, N) or None; features: float32
    (B, width) of a frozen encoder, or None;
    labels: int64 (B,) on the device, -1 = none; index: int64 numpy (B,), the sample in the catalog, -1 = padding;
    epoch: int64 numpy (B,); valid: float32 (B,) on the device, 0 where a placeholder stands for an unreadable
    picture or fills up the last batch.
    """

    labels: torch.Tensor
    index: np.ndarray
    epoch: np.ndarray
    valid: torch.Tensor
    images: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    features: torch.Tensor | None = None
