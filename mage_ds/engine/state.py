"""Reading and writing an engine's full float32 state by parameter name, whatever the ZeRO stage.

DeepSpeed shards weights and moments into flat tensors; its per-parameter accessors join them again. What they
leave to the caller stands here: states that do not exist before the first update, the link between a parameter
and its moments, the low-precision copy beside the master, and float32 stage 0, which they do not serve.

A moving average of the weights (EMA) is one more state of the optimizer, which the optimizer itself leaves alone: in
float32, on its own shards, saved, loaded and sharded anew as the moments are.
"""

from contextlib import contextmanager
from functools import partial

import torch

EMA = "ema"


def parameters(engine) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of a DeepSpeed engine by name, in the model's order."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def shape_of(parameter) -> torch.Size:
    """A parameter's full shape, also where ZeRO-3 has sharded it to nothing."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def base_of(engine) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def flats(engine) -> list[torch.Tensor]:
    """The tensors that the optimizer really updates on this rank: flat shards, or the parameters at stage 0."""
    for name in (
        "fp32_partitioned_groups_flat",  # ZeRO 3
        "single_partition_of_fp32_groups",  # ZeRO 1 and 2
        "fp32_groups_flat_partition",  # ZeRO 1 with bf16 and float32 gradients
    ):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return list(parameters(engine).values())


def kinds(engine) -> tuple[str, ...]:
    """What is kept of every parameter beside its weight: the optimizer's moments, the average where there is one."""
    moments = ("exp_avg", "exp_avg_sq") if isinstance(base_of(engine), torch.optim.AdamW) else ("momentum_buffer",)
    return moments if ema_of(engine) is None else (*moments, EMA)


def ema_of(engine) -> float | None:
    """The averaging factor a step of the engine's second set of weights; None where it has none."""
    return base_of(engine).param_groups[0].get("ema")


def ensure_moments(engine) -> None:
    """Create the moments where no update has happened yet, as the optimizer would, and link them to parameters. The
    average begins as the weights are now.

    In stages 1 and 2 DeepSpeed links after the first group's update only: a second group's moments are then
    "not found", so the link is made anew.
    """
    base = base_of(engine)
    for flat in flats(engine):
        state = base.state[flat]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)  # where the fused kernel wants it
        for key in kinds(engine):
            if key not in state:
                start = flat.detach().clone if key == EMA else partial(torch.zeros_like, flat)
                state[key] = start(memory_format=torch.preserve_format)
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def updates(engine) -> int:
    """How many updates AdamW has made (skipped steps are not counted). LARS needs no such number, and says 0."""
    counts = {int(base_of(engine).state[flat]["step"]) for flat in flats(engine)}
    if len(counts) != 1:
        raise RuntimeError(f"the optimizer's shards disagree on the number of updates: {sorted(counts)}")
    return counts.pop()


def set_updates(engine, count: int) -> None:
    for flat in flats(engine):
        base_of(engine).state[flat]["step"].fill_(float(count))


@torch.no_grad()
def follow(engine) -> None:
    """After an update: the average, where there is one, moves towards the weights. Each rank does its own share."""
    if (decay := ema_of(engine)) is not None:
        for flat in flats(engine):
            base_of(engine).state[flat][EMA].lerp_(flat, 1 - decay)


@contextmanager
def averaged(engine):
    """Within it the engine computes with the average of its weights, where there is one. All ranks call it; no update
    may be made meanwhile, and afterwards everything is as before, to the bit."""
    if ema_of(engine) is None:
        yield
        return
    kept = {}
    for name, parameter in parameters(engine).items():
        if _plain(parameter):  # the master itself computes
            kept[name] = parameter.detach().clone()
        _show(parameter, get_full(engine, parameter, EMA))
    try:
        yield
    finally:
        for name, parameter in parameters(engine).items():
            _show(parameter, kept[name] if _plain(parameter) else get_full(engine, parameter))


@torch.no_grad()
def _show(parameter, value: torch.Tensor) -> None:
    """Write a full value into what computes, in its number format; a master beside it stays."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(value.reshape(parameter.shape))
        return
    from deepspeed import zero

    with zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.data.copy_(value.reshape(shape_of(parameter)))


@torch.no_grad()
def get_full(engine, parameter, key: str | None = None) -> torch.Tensor:
    """The float32 master weight (key None) or a moment, full shape. Collective: every rank calls it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if _plain(parameter):
        return (parameter if key is None else base_of(engine).state[parameter][key]).detach()
    if key is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, key)


@torch.no_grad()
def set_full(engine, parameter, value: torch.Tensor, key: str | None = None) -> None:
    """Write what `get_full` reads. Every rank calls it with the same full float32 value."""
    value = value.to(parameter.device).reshape(shape_of(parameter))
    if _plain(parameter):
        (parameter if key is None else base_of(engine).state[parameter][key]).copy_(value)
    elif hasattr(parameter, "ds_id"):
        _set_sharded(parameter, value, key)
    else:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is None:
            safe_set_full_fp32_param(parameter, value)
            _show(parameter, value)  # the master alone shows only after an update
        else:
            safe_set_full_optimizer_state(parameter, value, key)


def _plain(parameter) -> bool:
    """Stage 0: neither sharded nor mapped to a master."""
    return not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")


def _set_sharded(parameter, value: torch.Tensor, key: str | None) -> None:
    """ZeRO 3: this rank's slice, padded as DeepSpeed pads (its own setter refuses sizes that do not divide)."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    padded = torch.zeros(size * torch.distributed.get_world_size(), dtype=value.dtype, device=value.device)
    padded[: value.numel()] = value.flatten()
    mine = padded[size * rank : size * (rank + 1)]
    if key is None:
        safe_set_local_fp32_param(parameter, mine)
        _show(parameter, value)
    else:
        safe_set_local_optimizer_state(parameter, mine, key)
