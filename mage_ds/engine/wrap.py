"""From a plain model to a DeepSpeed engine: everything that is done to a model from outside, in one order."""

import contextlib
import io
from collections.abc import Callable, Mapping

import torch
from torch.utils.checkpoint import checkpoint

from mage_ds import keyed
from mage_ds.engine import optim, state
from mage_ds.models import initialize
from mage_ds.models.transformer import Block
from mage_ds.models.vqgan import ResidualBlock
from mage_ds.recipes.schema import Recipe


def build(
    make: Callable[[], torch.nn.Module], seed: int, config: dict, given: Mapping[str, torch.Tensor] | None = None
) -> torch.nn.Module:
    """The model that `make` makes, with its initial values; given: full, by name, those that are others. All ranks call
    it.

    Under ZeRO 3 each module is sharded as soon as it is made, so that no rank ever holds the whole model; the values
    are those of a plain build (in bf16 rounded, as DeepSpeed rounds a plain one).
    """
    if config["zero_optimization"]["stage"] != 3:
        model = make()
        initialize_weights(model, seed)
        model.load_state_dict(given or {}, strict=False)
        return model
    from deepspeed import zero

    with zero.Init(config_dict_or_path=config):
        model = make()
    for name, parameter in model.named_parameters():
        with torch.no_grad(), zero.GatheredParameters([parameter], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                if given and name in given:
                    parameter.copy_(given[name])
                else:
                    parameter.copy_(model.initial_value(name, parameter.ds_shape, _generator_of(seed, name)))
    return model


def initialize_weights(model: torch.nn.Module, seed: int) -> None:
    """Initial values of a model that is whole, each a function of (seed, the parameter's name)."""
    initialize(model, lambda name: _generator_of(seed, name))


def _generator_of(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(keyed.seed_of(seed, "initial value", name))


def wrap(model: torch.nn.Module, recipe: Recipe, config: dict, device: torch.device):
    """The DeepSpeed engine around `model`, which is changed in place; no parameter changes its name.

    Checkpointing is patched in before compilation, so that what is compiled is the whole block.
    """
    import deepspeed

    model.to(device).train()
    for block in recomputed(blocks(model), recipe.machine.activation_checkpointing):
        recompute(block)
    if recipe.machine.compile:
        # Compiled dropout otherwise draws other numbers than the plain one.
        torch._inductor.config.fallback_random = True
        for block in blocks(model):
            block.compile()
    optimizer = optim.build(model, recipe)
    with contextlib.redirect_stdout(io.StringIO()):  # a page of memory figures
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if recipe.optimizer.ema is not None:
        state.ensure_moments(engine)  # the average begins with the initial weights
    return engine


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What is recomputed or compiled as one piece, in the model's order."""
    return [module for module in model.modules() if isinstance(module, Block | ResidualBlock)]


def recomputed(blocks: list, which: str) -> list:
    """Of a model's blocks those that machine.activation_checkpointing computes again in the backward pass."""
    return {"none": [], "selective": blocks[::2], "full": blocks}[which]


def recompute(block: torch.nn.Module) -> None:
    """Replace the block's forward by one that keeps its input only and computes the rest again for backward."""
    forward = block.forward

    def checkpointed(*args):
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False)

    block.forward = checkpointed
