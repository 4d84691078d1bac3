"""Reading and writing an engine's full float32 state by parameter name, whatever the ZeRO stage.

DeepSpeed shards weights and moments into flat tensors; its per-parameter accessors join them again. What they
leave to the caller stands here: states that do not exist before the first update, the link between a parameter
and its moments, the low-precision copy beside the master, and float32 stage 0, which they do not serve.
"""

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


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


def ensure_moments(engine) -> None:
    """Create the moments where no update has happened yet, as the optimizer would, and link them to parameters.

    In stages 1 and 2 DeepSpeed links after the first group's update only: a second group's moments are then
    "not found", so the link is made anew.
    """
    base = base_of(engine)
    for flat in flats(engine):
        state = base.state[flat]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)  # where the fused kernel wants it
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def updates(engine) -> int:
    """How many updates the optimizer has made (skipped steps are not counted)."""
    counts = {int(base_of(engine).state[flat]["step"]) for flat in flats(engine)}
    if len(counts) != 1:
        raise RuntimeError(f"the optimizer's shards disagree on the number of updates: {sorted(counts)}")
    return counts.pop()


def set_updates(engine, count: int) -> None:
    for flat in flats(engine):
        base_of(engine).state[flat]["step"].fill_(float(count))


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
            parameter.data.copy_(value)  # the copy that computes; the master alone shows only after an update
        else:
            safe_set_full_optimizer_state(parameter, value, key)


def _plain(parameter) -> bool:
    """Stage 0: neither sharded nor mapped to a master."""
    return not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")


def _set_sharded(parameter, value: torch.Tensor, key: str | None) -> None:
    """ZeRO 3: this rank's slice, padded as DeepSpeed pads (its own setter refuses sizes that do not divide)."""
    from deepspeed import zero
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    padded = torch.zeros(size * torch.distributed.get_world_size(), dtype=value.dtype, device=value.device)
    padded[: value.numel()] = value.flatten()
    mine = padded[size * rank : size * (rank + 1)]
    if key is None:
        safe_set_local_fp32_param(parameter, mine)
        with zero.GatheredParameters([parameter], modifier_rank=0):
            if rank == 0:
                parameter.data.copy_(value)
    else:
        safe_set_local_optimizer_state(parameter, mine, key)
