"""Bytes of a training on one rank by kind, on disk and over the network, for each ZeRO stage: computed, not measured.

What DeepSpeed holds follows from sizes of parameters, the numbers of the JSON and the number of ranks; the formulas
are those of its optimizers as installed, and `mage-ds bench scale` shows them beside a real step.
"""

from itertools import accumulate
from typing import NamedTuple

from mage_ds.engine import ds_config
from mage_ds.engine.memory import KINDS
from mage_ds.recipes.schema import Recipe

_REDUCED_AT_ONCE = 500_000_000  # values that DeepSpeed reduces at once where ZeRO does not shard gradients
_LIVE = 1_000_000_000  # stage 3's default of how many parameters stay gathered, and are updated together
_BUCKET = 500_000_000  # DeepSpeed's default of reduce_bucket_size
_FLOAT32 = 4


class Held(NamedTuple):
    """Bytes of one rank. device, host: by kind (memory.KINDS); where the device is a CPU, both are the same memory.
    update: what the last reduction and the update need at once beside weights, gradients and optimizer. reducing:
    what one reduction within the backward pass needs beside the buffers, after a share `first` of the pass. passing:
    what gathers in the buffers until the pass ends, when the activations are gone."""

    device: dict[str, float]
    host: dict[str, float]
    update: float
    reducing: float = 0.0
    first: float = 1.0
    passing: float = 0.0

    def on_cpu(self) -> "Held":
        """All in the memory of the host, which is the device."""
        both = {kind: self.device[kind] + self.host[kind] for kind in KINDS}
        return self._replace(device=both, host=dict.fromkeys(KINDS, 0.0))


def states(recipe: Recipe) -> int:
    """Float32 tensors that are kept of a parameter beside its weight: moments, and the average of the weights."""
    return (2 if recipe.optimizer.name == "adamw" else 1) + (recipe.optimizer.ema is not None)


def held(sizes: list[int], zero: dict, *, precision: str, world: int, states: int = 2) -> Held:
    """What a rank holds. sizes: of the parameters, in the model's order; zero: the JSON's zero_optimization block;
    precision: bf16 or float32; states: see `states`."""
    stage, width = zero.get("stage", 0), 2 if precision == "bf16" else _FLOAT32
    away = ds_config.offload(zero, "offload_optimizer") == "cpu"
    if stage == 0 or (stage == 1 and precision == "bf16"):
        return _reduced_whole(sizes, stage, width, world, states)
    if stage == 3:
        return _sharded_weights(sizes, zero, width, world, away, states)
    return _reduced_in_buckets(sizes, zero, width, world, away, states)


def _reduced_whole(sizes: list[int], stage: int, width: int, world: int, states: int) -> Held:
    """Float32 stage 0; bf16 stage 1, which has a float32 gradient beside the bf16 one."""
    count, shard = sum(sizes), sum(sizes) / world
    device = dict.fromkeys(KINDS, 0.0)
    device["weights"] = width * count
    device["gradients"] = _FLOAT32 * count + (width * count if stage else 0)
    device["optimizer"] = (1 + states) * _FLOAT32 * shard if stage else states * _FLOAT32 * count  # 0: no other master
    return Held(device, dict.fromkeys(KINDS, 0.0), _FLOAT32 * min(count, _REDUCED_AT_ONCE))


def _reduced_in_buckets(sizes: list[int], zero: dict, width: int, world: int, away: bool, states: int) -> Held:
    """Float32 stage 1, and stage 2."""
    stage, count, shard = zero["stage"], sum(sizes), sum(sizes) / world
    bucket, largest = _bucket(zero, width), width * max(sizes)
    device, host = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    device["weights"], device["buffers"] = width * count, bucket
    (host if away else device)["optimizer"] = (1 + states) * _FLOAT32 * shard
    # A bucket is flattened anew, and once more where its format is not that of the reduction.
    together = min(count, zero.get("reduce_bucket_size", _BUCKET))
    reducing = together * (width + (0 if width == _FLOAT32 else _FLOAT32))
    if away:
        host["gradients"], host["buffers"] = 2 * _FLOAT32 * shard + largest, width * shard
        device["gradients"] = largest  # on their way
        return Held(device, host, 0.0, reducing, together / count)
    part = _FLOAT32 * (_straddled(sizes, world) if width == _FLOAT32 else shard)
    copied = _FLOAT32 * shard if width == _FLOAT32 else 0  # for the update
    if stage == 2:
        device["gradients"] = part
        # In float32 a micro-batch's share is joined to that of those before it when the pass ends.
        passing = part if width == _FLOAT32 else 0.0
        return Held(device, host, max(0.0, copied - part), reducing, together / count, passing)
    device["gradients"] = _FLOAT32 * count
    return Held(device, host, part + bucket)


def _sharded_weights(sizes: list[int], zero: dict, width: int, world: int, away: bool, states: int) -> Held:
    """Stage 3: each rank has its share, small parameters whole, and what forward and backward have gathered."""
    count, shard = sum(sizes), sum(sizes) / world
    whole = sum(size for size in sizes if size <= zero.get("stage3_param_persistence_threshold", 100_000))
    gathered = max(0, min(count, zero.get("stage3_max_live_parameters", _LIVE)) - whole)
    if world == 1:
        whole = gathered = 0  # its share is all there is
    device, host = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    (host if ds_config.offload(zero, "offload_param") == "cpu" else device)["weights"] = width * shard
    device["weights"] += width * whole
    (host if away else device)["optimizer"] = (1 + states) * _FLOAT32 * shard
    (host if away else device)["gradients"] = _FLOAT32 * shard * (2 if away else 1)
    bucket = _bucket(zero, _FLOAT32)
    device["buffers"] = bucket + width * gathered
    at_once = _FLOAT32 * min(shard, zero.get("sub_group_size", _LIVE))  # updated together, its gradient copied first
    # A bucket is laid out anew by ranks to be reduced; weights of other blocks are gathered meanwhile.
    together = min(count, zero.get("reduce_bucket_size", _BUCKET))
    return Held(device, host, bucket + (0 if away else at_once), _FLOAT32 * together, together / count)


def _bucket(zero: dict, width: int) -> float:
    """Gradients lie here until they are reduced."""
    if not zero.get("contiguous_gradients", True):
        return 0.0
    return width * zero.get("reduce_bucket_size", _BUCKET) * (2 if zero.get("overlap_comm") else 1)


def _straddled(sizes: list[int], world: int) -> int:
    """Largest sum of the parameters that lie in one rank's share, those on its borders in full."""
    ends = list(accumulate(sizes))
    share, sums = -(-ends[-1] // world), [0] * world
    for size, end in zip(sizes, ends, strict=True):
        for rank in range((end - size) // share, (end - 1) // share + 1):
            sums[rank] += size
    return max(sums)


def kinds(held: Held, activations, frozen, micro: int) -> dict[str, float]:
    """Bytes on the device by kind, each at its largest, for micro-batches of `micro` images.

    activations: planner.Activations; frozen: planner.frozen_bytes, counted with the forward pass that takes most.
    """
    weights, forward = _frozen(frozen, micro)
    more = {"activations": activations.kept(micro) + activations.working(micro), "frozen": weights + forward}
    return {**held.device, "buffers": held.device["buffers"] + held.passing, **more}


def peak(held: Held, activations, frozen, micro: int) -> float:
    """Most bytes on the device at once: frozen models, forward and backward, and update come one after the other."""
    weights, forward = _frozen(frozen, micro)
    lasting = sum(held.device[kind] for kind in ("weights", "gradients", "optimizer")) + weights
    active = activations.kept(micro) + activations.working(micro)
    reducing = held.reducing + (1 - held.first) * active
    backward = held.device["buffers"] + max(active, reducing, held.reducing + held.passing)
    return lasting + max(backward, held.device["buffers"] + forward, held.update)


def _frozen(frozen: dict, micro: int) -> tuple[float, float]:
    """Weights of all, and the most that one of their forward passes takes: they come one after the other."""
    forwards = [forward(micro) for _, forward in frozen.values()]
    return sum(weights for weights, _ in frozen.values()), max(forwards, default=0)


def sent(count: int, zero: dict, *, precision: str, world: int, accumulation: int) -> float:
    """Bytes that one rank sends in a step of `accumulation` micro-batches, by ring algorithms; `count` parameters.

    Stages 0 and 1 reduce gradients once a step, 2 and 3 for every micro-batch; 3 gathers weights for every one,
    twice where not all of them may stay gathered between forward and backward.
    """
    stage, width, ring = zero.get("stage", 0), 2 if precision == "bf16" else _FLOAT32, (world - 1) / world
    gradients, weights = _FLOAT32 * count * ring, width * count * ring
    if stage == 0:
        return 2 * gradients
    if stage == 1:
        return (2 if precision == "bf16" else 1) * gradients + weights
    if stage == 2:
        return accumulation * gradients + weights
    twice = 2 if count > zero.get("stage3_max_live_parameters", _LIVE) else 1
    return accumulation * (gradients + twice * weights)


def on_disk(count: int, states: int = 2) -> int:
    """Bytes of a checkpoint: float32 weights and what is kept of each (see `states`), whatever the stage."""
    return (1 + states) * _FLOAT32 * count
