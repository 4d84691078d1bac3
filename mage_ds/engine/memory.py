"""How many bytes of tensors a process holds, and for what: counted on living tensors, whoever keeps them."""

import gc
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mage_ds.engine import state

KINDS = ("weights", "gradients", "optimizer", "buffers")


class Live(TorchDispatchMode):
    """While on, follows every storage that an operation makes until it is freed.

    now, peak: bytes alive, with those of the tensors `before`, which lived when the mode was made. Works on fake
    tensors as well, and sees what autograd keeps, which has no Python object.
    """

    def __init__(self, before: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now, self.peak, self._known = 0, 0, {}
        for tensor in before:
            self._see(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, made)
        return made

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def living() -> Iterator[torch.Tensor]:
    """Every tensor of this process that Python knows of and that takes memory, gradients included."""
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device.type != "meta":  # isinstance would wake up proxies
            yield each
            if each.is_leaf and each.grad is not None:
                yield each.grad


def by_kind(engine, outside: dict[int, torch.UntypedStorage]) -> dict[str, int]:
    """Bytes that a DeepSpeed engine holds on this rank now, by kind; each storage counts once, for the first that
    holds it in the order: weights that compute, optimizer (float32 master and moments), gradients, the rest without
    what autograd made.

    outside: `storages` of tensors that lived before the engine was built.
    """
    parts = {"weights": _weights(engine), "optimizer": _optimizer(engine), "gradients": _gradients(engine)}
    counted, found = set(outside), {}
    for kind, tensors in (*parts.items(), ("buffers", (each for each in living() if each.grad_fn is None))):
        found[kind] = 0
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage._cdata not in counted:
                counted.add(storage._cdata)
                found[kind] += storage.nbytes()
    return {kind: found[kind] for kind in KINDS}


def storages() -> dict[int, torch.UntypedStorage]:
    """The storages of every living tensor by their address, which none made later can have while they are held."""
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in living())}


def release(outside: dict[int, torch.UntypedStorage]) -> None:
    """Give back the memory of every tensor that is not `outside`: DeepSpeed's stage 3 leaves cycles that are never
    collected. What refers to them is useless afterwards."""
    for storage in [tensor.untyped_storage() for tensor in living()]:
        if storage._cdata not in outside and storage.resizable():
            storage.resize_(0)
    gc.collect()


def resident_peak(reset: bool = False) -> int:
    """Most resident bytes of this process since the last reset (0 where the system does not say). Linux only."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _weights(engine) -> Iterator[torch.Tensor]:
    for tensor in (*engine.module.parameters(), *engine.module.buffers()):
        yield tensor
        if hasattr(tensor, "ds_tensor"):
            yield tensor.ds_tensor
    for gathering in getattr(engine.module, "ds_inflight_param_registry", {}).values():  # stage 3, ahead of their use
        for handle in getattr(gathering, "handles", [gathering]):
            yield from _tensors(getattr(handle, "partitions", []))


def _optimizer(engine) -> Iterator[torch.Tensor]:
    for flat in state.flats(engine):
        yield flat
        yield from state.base_of(engine).state[flat].values()


def _gradients(engine) -> Iterator[torch.Tensor]:
    for parameter in (*engine.module.parameters(), *state.flats(engine)):
        if parameter.grad is not None:
            yield parameter.grad
    for name, value in vars(engine.optimizer).items():
        if "grad" in name:
            yield from _tensors(value)
    for parameter in engine.module.parameters():
        yield from _tensors([value for name, value in vars(parameter).items() if "grad" in name])


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
