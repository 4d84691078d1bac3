"""Sums and lists of tensors over the ranks, through which gradients flow."""

import torch
import torch.nn.functional as F

from mage_ds.engine import process


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum of `x` over the ranks. The gradient of x is the sum of those of all ranks, as their losses are summed."""
    return x if process.start().world == 1 else _Total.apply(x)


def gathered(x: torch.Tensor) -> torch.Tensor:
    """`x` (B, ...) of every rank in order of rank: (world * B, ...). All have the same shape. Gradients as of `total`.

    A sum with zeros, because it is exact and its gradient is a sum again, which every backend has; what is gathered
    here is small.
    """
    me, count = process.start(), len(x)
    before, after = me.rank * count, (me.world - 1 - me.rank) * count
    return total(F.pad(x, (0, 0) * (x.ndim - 1) + (before, after)))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return process.sum_over_ranks(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx, gradient):
        return process.sum_over_ranks(gradient.clone(memory_format=torch.contiguous_format))
