"""From a plain model to a DeepSpeed engine: everything that is done to a model from outside, in one order."""

import contextlib
import io

import torch
from torch.utils.checkpoint import checkpoint

from mage_ds import keyed
from mage_ds.engine import optim
from mage_ds.models import initialize
from mage_ds.models.transformer import Block
from mage_ds.models.vqgan import ResidualBlock
from mage_ds.recipes.schema import Recipe


def initialize_weights(model: torch.nn.Module, seed: int) -> None:
    """Initial values, each a function of (seed, the parameter's name)."""

    def generator_of(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(keyed.seed_of(seed, "initial value", name))

    initialize(model, generator_of)


def wrap(model: torch.nn.Module, recipe: Recipe, config: dict, device: torch.device):
    """The DeepSpeed engine around `model`, which is changed in place; no parameter changes its name.

    Checkpointing is patched in before compilation, so that what is compiled is the whole block.
    """
    import deepspeed

    model.to(device).train()
    if recipe.machine.activation_checkpointing == "full":
        for block in _blocks(model):
            _recompute(block)
    if recipe.machine.compile:
        # Compiled dropout otherwise draws other numbers than the plain one.
        torch._inductor.config.fallback_random = True
        for block in _blocks(model):
            block.compile()
    optimizer = optim.adamw(model, recipe.optimizer, recipe.effective_lr())
    with contextlib.redirect_stdout(io.StringIO()):  # a page of memory figures
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def _blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, Block | ResidualBlock)]


def _recompute(block: torch.nn.Module) -> None:
    """Replace the block's forward by one that keeps its input only and computes the rest again for backward."""
    forward = block.forward

    def checkpointed(*args):
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False)

    block.forward = checkpointed
