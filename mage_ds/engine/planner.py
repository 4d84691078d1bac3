"""What one image costs: operations and activation memory, counted on the meta device without computing anything."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

_SHARE = 0.5  # of the memory of a rank: the rest holds weights, moments, gradients, buffers and the input queue
_ENOUGH = {"cpu": 32, "cuda": 1024}  # larger micro-batches no longer gain speed


def forward_flops(forward: Callable[[], object]) -> int:
    """Operations of one call (a multiply-add counts as two), attention products included."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


def activation_bytes(forward: Callable[[], object], model: torch.nn.Module) -> int:
    """Bytes that autograd keeps of one call for the backward pass, each tensor once, without the parameters.

    Of the plain model: recomputing blocks keeps far less.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}  # also of their views, as a transpose
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held.append(forward())  # alive until counted, or storages would be numbered twice
    return sum(kept.values())


def largest_micro_batch(bytes_per_image: float, device: torch.device, local_world: int) -> int:
    """Images whose activations fit a rank's memory. From the memory that is built in, not what is free just now:
    a start on the same machine gives the same number."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        import psutil

        memory = psutil.virtual_memory().total / local_world
    return max(1, min(_ENOUGH[device.type], int(memory * _SHARE / max(1.0, bytes_per_image))))
