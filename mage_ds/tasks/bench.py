"""Measurements of the system itself. `scale`: what a training step holds and how fast it is, beside the plan."""

import time

import torch

from mage_ds import recipes
from mage_ds.engine import budget, ds_config, made, memory, planner, process, wrap
from mage_ds.engine.memory import KINDS
from mage_ds.errors import UserError
from mage_ds.recipes.schema import Recipe

_ACCUMULATED = 2  # micro-batches of a step: gradients then live on as in a real one
_MIB = 2**20
_COLUMNS = (*KINDS, "activations", "peak")


def scale(name: str, overrides: list[str], *, stages: list[str], checkpointing: list[str]) -> None:
    """Print a row of a Markdown table for each of ds_configs/zero{stage}.json with each choice of checkpointing.

    Each takes three steps of two micro-batches on random inputs: one to create the optimizer's state, one to count,
    one to time. Runs alone or under `deepspeed`, on CPUs. Raises UserError for what cannot be.
    """
    recipe = recipes.load_recipe(name, overrides)
    me = process.start()
    if me.device.type != "cpu":
        raise UserError("bench scale: follows single operations on a CPU; set DS_ACCELERATOR=cpu")
    micro = 1 if recipe.machine.micro_batch == "auto" else recipe.machine.micro_batch
    batch = micro * _ACCUMULATED * me.world
    machine = recipe.machine.model_copy(update={"micro_batch": micro})
    recipe = recipe.model_copy(update={"batch": batch, "machine": machine})
    precision = ds_config.choose_precision(machine.precision, me.device)
    configs = {f"zero{stage}": _config(recipe, f"zero{stage}", precision, me.world) for stage in stages}
    dtype = ds_config.dtype_of(precision)
    sizes = planner.parameters(recipe)
    activations = planner.activations(recipe, dtype, gpu=False)
    process.say(
        f"{name}: {sum(sizes):,} parameters, {precision}, {me.world} ranks, {micro} images a forward pass\n\n"
        "MiB a rank, measured / planned; resident: the whole process\n\n"
        f"| config | checkpointing | {' | '.join(_COLUMNS)} | resident | images/s |\n|{'---|' * (len(_COLUMNS) + 4)}"
    )
    for config_name, config in configs.items():
        zero, states = config["zero_optimization"], budget.states(recipe)
        held = budget.held(sizes, zero, precision=precision, world=me.world, states=states).on_cpu()
        for which in checkpointing:
            machine = recipe.machine.model_copy(update={"activation_checkpointing": which})
            measured = _largest(_measure(recipe.model_copy(update={"machine": machine}), config, dtype))
            # Frozen models are measured once, by themselves.
            planned = budget.kinds(held, activations[which], {}, micro)
            planned["activations"] = activations[which].kept(micro)  # without what the backward pass takes beside them
            planned["peak"] = budget.peak(held, activations[which], {}, micro)
            cells = [f"{measured[column] / _MIB:,.1f} / {planned[column] / _MIB:,.1f}" for column in _COLUMNS]
            rate = batch / measured["seconds"]
            cells += [f"{measured['resident'] / _MIB:,.0f}", f"{rate:.3g}"]
            process.say(f"| {config_name} | {which} | {' | '.join(cells)} |")
    _frozen(recipe, dtype, micro)


def _config(recipe: Recipe, name: str, precision: str, world: int) -> dict:
    config = ds_config.alone(name, recipe, world, precision)
    for block in ("offload_optimizer", "offload_param"):
        if block in config["zero_optimization"]:
            config["zero_optimization"][block]["pin_memory"] = False  # needs a GPU
    return config


def _measure(recipe: Recipe, config: dict, dtype: torch.dtype) -> dict[str, float]:
    """Bytes by kind of this rank, and the seconds of a step."""
    outside = memory.storages()
    model = wrap.build(lambda: made.model_of(recipe), recipe.seed, config)
    engine = wrap.wrap(model, recipe, config, process.start().device)
    step = _Step(engine, recipe, dtype, outside)
    step.take()
    found = step.count()
    process.barrier()
    began = time.perf_counter()
    step.take()
    found["seconds"] = time.perf_counter() - began
    engine.destroy()
    del engine, model, step
    memory.release(outside)
    return found


class _Step:
    """A training step, plain or counted."""

    def __init__(self, engine, recipe: Recipe, dtype: torch.dtype, outside: dict):
        self.engine, self.recipe, self.dtype, self.outside = engine, recipe, dtype, outside

    def take(self, forward=lambda: None, backward=lambda: None) -> None:
        """forward(): called around each forward pass; backward(): after each backward pass."""
        for _ in range(_ACCUMULATED):
            forward()
            loss = made.loss_on_made_inputs(self.recipe, self.engine, self.recipe.machine.micro_batch, self.dtype)
            forward()
            self.engine.backward(loss)
            del loss
            backward()
            self.engine.step()

    def count(self) -> dict[str, float]:
        """Lasting kinds after a backward pass, activations at the end of a forward pass, buffers within a backward
        pass, the peak of the whole step. Weights that stage 3 has gathered count as buffers."""
        shots, within, alive = [], [], []
        first = next(iter(wrap.blocks(self.engine.module)))

        def shoot(shots):
            shots.append(memory.by_kind(self.engine, self.outside))

        # Where the gradient reaches the first block's output, most of the backward pass is over.
        hook = first.register_forward_hook(lambda block, args, output: _call_once(output, lambda: shoot(within)))
        mine = [t for t in memory.living() if t.untyped_storage()._cdata not in self.outside]
        with memory.Live(mine) as live:
            del mine
            memory.resident_peak(reset=True)

            def forward():
                alive.append((live.now, memory.by_kind(self.engine, self.outside)["weights"]))

            self.take(forward, lambda: shoot(shots))
        hook.remove()
        found = {kind: max(shot[kind] for shot in shots) for kind in KINDS}
        gathered = [after[1] - before[1] for before, after in zip(alive[::2], alive[1::2], strict=True)]
        made = [after[0] - before[0] for before, after in zip(alive[::2], alive[1::2], strict=True)]
        found["activations"] = min(all_ - weights for all_, weights in zip(made, gathered, strict=True))
        # Within the pass gradients lie in buffers; what is more than gradients in the end is buffers.
        passing = max(shot["gradients"] + shot["buffers"] for shot in within) - found["gradients"]
        found["buffers"] = max(found["buffers"], passing) + max(gathered)
        return {**found, "peak": live.peak, "resident": memory.resident_peak()}


def _call_once(output: torch.Tensor, action) -> None:
    if output.requires_grad:
        output.register_hook(lambda gradient: action())


def _largest(found: dict[str, float]) -> dict[str, float]:
    """Of each figure the largest over the ranks."""
    every = process.gather_objects(found)
    return {key: max(one[key] for one in every) for key in found}


def _frozen(recipe: Recipe, dtype: torch.dtype, micro: int) -> None:
    planned = planner.frozen_bytes(recipe, dtype)
    for name, (module, call) in planner.frozen_calls(recipe, dtype).items():
        wrap.initialize_weights(module, recipe.seed)
        module.to(dtype).requires_grad_(False)
        weights, forward = planned[name]
        with memory.Live(module.parameters()) as live, torch.no_grad():
            own = live.now
            call(micro)
        process.say(
            f"\n{name}, beside these: weights {own / _MIB:,.1f} / {weights / _MIB:,.1f}, "
            f"forward {(live.peak - own) / _MIB:,.1f} / {forward(micro) / _MIB:,.1f}"
        )
