"""Mask ratios and masks (paper section 3). The random numbers come in as arguments."""

import math

import torch
from torch import Tensor


def mask_ratio(u: Tensor, *, mean: float, std: float, low: float, high: float) -> Tensor:
    """Mask ratios by the inverse CDF of a normal truncated to [low, high].

    Args: u: (B,) uniform in (0, 1); mean, std: of the normal before it is truncated, std > 0.
    Returns: float64 (B,).
    """
    # The CDF at both ends as numbers: a tensor made of them would be copied to the device, a synchronisation.
    below, above = (0.5 * math.erfc((mean - end) / (std * math.sqrt(2.0))) for end in (low, high))
    ratio = mean + std * torch.special.ndtri(below + u.double() * (above - below))
    return ratio.clamp(low, high)  # the inverse is exact to rounding only


def masks(noise: Tensor, ratio: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    """Which positions are masked, and which enter the encoder.

    The ceil(ratio N) positions of smallest noise are masked, the ceil(drop N) of smallest noise are dropped
    from the encoder's input; equal noise counts in the order of positions. Where ratio >= drop, all dropped
    positions are masked.
    Args: noise: (B, N); ratio: (B,) in [0, 1]; drop: in [0, 1).
    Returns: masked bool (B, N); keep int64 (B, N - ceil(drop N)), positions in ascending order.
    """
    count = noise.shape[1]
    order = noise.argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)
    masked = rank < torch.ceil(ratio * count)[:, None]
    keep = order[:, math.ceil(drop * count) :].sort(dim=1).values
    return masked, keep
