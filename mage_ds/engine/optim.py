"""The optimizer and its schedule (paper.md 4; Tables 10 and 13)."""

import math

import torch

from mage_ds.recipes.sections import Optimizer


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: decayed, and those without decay: tensors of one dimension and names that end in `.bias`.

    Shapes are read through `ds_shape` where ZeRO-3 has already sharded a parameter to nothing.
    """
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (free if len(shape) <= 1 or name.endswith(".bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(model: torch.nn.Module, numbers: Optimizer, lr: float) -> torch.optim.AdamW:
    """torch's AdamW over the two parameter groups: one fused kernel, also on a CPU, where the others make three
    temporaries of the size of a rank's whole share."""
    groups = parameter_groups(model, numbers.weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(numbers.betas), eps=numbers.eps, fused=True)


def cosine(step: int, *, peak: float, floor: float, steps: int, warmup: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear from 0 to `peak`, then a cosine to `floor`."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(engine, lr: float) -> None:
    """Give every parameter group of a DeepSpeed engine's optimizer this learning rate."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
