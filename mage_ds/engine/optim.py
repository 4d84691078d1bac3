"""The optimizer and its schedule (paper.md 4; Tables 10 to 13)."""

import math

import torch

from mage_ds.recipes.schema import Recipe


def build(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer of a recipe over `parameter_groups`, before DeepSpeed wraps it.

    AdamW is torch's with one fused kernel, also on a CPU, where the others make three temporaries of the size of a
    rank's whole share. LARS is timm's; it leaves tensors of one dimension out of its trust ratio, as the paper's does.
    """
    numbers, lr = recipe.optimizer, recipe.effective_lr()
    groups = parameter_groups(model, numbers.weight_decay, numbers.layer_decay)
    for group in groups:
        group["ema"] = numbers.ema  # DeepSpeed hands on what else a group says: see state.ema_of
    if numbers.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=tuple(numbers.betas), eps=numbers.eps, fused=True)
    from timm.optim import Lars

    for group in groups:
        group["always_adapt"] = not group["free"]  # without it, no trust ratio where nothing decays
    return Lars(groups, lr=lr, momentum=numbers.momentum, trust_coeff=numbers.trust)


def parameter_groups(model: torch.nn.Module, weight_decay: float, layer_decay: float | None = None) -> list[dict]:
    """Groups of parameters that are treated alike: decayed ones, and `free` ones, without decay: tensors of one
    dimension and names that end in `.bias`.

    layer_decay: of a model that is an encoder with a head; each layer then has groups of its own, whose `lr_scale` is
    layer_decay^(depth + 1 - layer), see `layer_of`. Shapes are read through `ds_shape` where ZeRO-3 has already sharded
    a parameter to nothing.
    """
    found: dict[tuple[int, bool], list] = {}
    depth = len(model.blocks) if layer_decay else 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        free = len(shape) <= 1 or name.endswith(".bias")
        found.setdefault((layer_of(name, depth) if layer_decay else 0, free), []).append(parameter)
    scales = {layer: layer_decay ** (depth + 1 - layer) if layer_decay else 1.0 for layer, _ in found}
    return [
        {
            "params": found[layer, free],
            "weight_decay": 0.0 if free else weight_decay,
            "free": free,
            "lr_scale": scales[layer],
        }
        for layer, free in sorted(found)
    ]


def layer_of(name: str, depth: int) -> int:
    """Which layer a parameter of an encoder with a head belongs to (paper.md 4): 0, the embeddings; N + 1, block N;
    depth + 1, what comes after the blocks."""
    first, _, rest = name.partition(".")
    if first == "blocks":
        return int(rest.partition(".")[0]) + 1
    return depth + 1 if first in ("norm", "fc_norm", "head") else 0


def cosine(step: int, *, peak: float, floor: float, steps: int, warmup: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear from 0 to `peak`, then a cosine to `floor`."""
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(engine, lr: float) -> None:
    """Give every parameter group of a DeepSpeed engine's optimizer this learning rate, times its layer's share."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
