"""What a training will need, before anything is bought or queued: memory, time, money, disk, network, and its command.

Nothing is allocated and no process group is joined: sizes are computed, activations counted on fake tensors.
"""

import shlex
from typing import NamedTuple

from mage_ds import recipes
from mage_ds.engine import budget, ds_config, made, planner
from mage_ds.engine.memory import KINDS
from mage_ds.errors import UserError
from mage_ds.recipes.schema import Recipe

_GIB = 2**30
_USABLE = 0.92  # of a GPU's memory: the rest is CUDA's own, NCCL's and what fragmentation takes
_WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
_ENOUGH = 32  # images a forward pass keeps a GPU busy with; fewer where a rank has no more
_ASSUMED_MFU = 0.35
_H100 = {"bf16": 989.0, "float32": 67.0}  # TFLOP/s, dense
_NAMES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


class Row(NamedTuple):
    """One way to run: a file of ds_configs/ and a choice of checkpointing, at the largest micro batch that fits
    (1 where none does). kinds: bytes on the GPU; host: bytes a rank in the host's memory."""

    name: str
    checkpointing: str
    micro_batch: int
    kinds: dict[str, float]
    total: float
    host: float
    fits: bool


def plan(
    name: str,
    overrides: list[str],
    *,
    gpus: int,
    gpu_memory: float,
    hosts: int = 1,
    mfu: float | None = None,
    peak: float | None = None,
    price: float | None = None,
    samples: int = 1_281_167,
) -> None:
    """Print the plan of recipe `name` with `overrides` on `gpus` GPUs of `gpu_memory` GiB, on `hosts` hosts.

    peak: TFLOP/s of a GPU in the recipe's number format (None: an H100's); mfu: its used share (assumed where None);
    price: of a GPU's hour; samples: of the data set. Raises UserError for what cannot be.
    """
    recipe = recipes.load_recipe(name, overrides)
    if gpus % hosts:
        raise UserError(
            f"--gpus {gpus} --hosts {hosts}: hosts must have equally many GPUs; choose a multiple of {hosts}"
        )
    whole = recipe.optimizer.name == "lars"  # see ds_config.check_norms
    precision = "float32" if whole or recipe.machine.precision == "float32" else "bf16"
    sizes = planner.parameters(recipe)
    rows = table(recipe, sizes, precision, gpus, gpu_memory * _GIB)
    lines = [*_head(recipe, sizes, precision, gpus, gpu_memory), *_shown(rows), ""]
    best = choose(rows, recipe.batch // gpus)
    lines += _time(recipe, samples, gpus, mfu, peak or _H100[_most_in(recipe, precision)], price)
    lines += _disk(recipe, sizes)
    lines += _network(recipe, sizes, precision, best.micro_batch)
    lines += _command(name, overrides, recipe, best, gpus, hosts, precision)
    print("\n".join(lines), flush=True)


# --- memory


def table(recipe: Recipe, sizes: list[int], precision: str, gpus: int, memory: float) -> list[Row]:
    """Every file of ds_configs/ that the number format allows, with every choice of checkpointing.

    memory: bytes of a GPU. Raises UserError where the recipe's batch does not divide.
    """
    dtype = ds_config.dtype_of(precision)
    activations = planner.activations(recipe, dtype, gpu=True)
    frozen = planner.frozen_bytes(recipe, ds_config.dtype_of(_most_in(recipe, precision)))
    micros = _micro_batches(recipe, gpus)
    rows = []
    for name in _names(recipe, precision):
        states = budget.states(recipe)
        held = budget.held(sizes, zero_block(name), precision=precision, world=gpus, states=states)
        for which in planner.CHECKPOINTING:
            rows.append(_row(name, which, held, activations[which], frozen, micros, memory * _USABLE))
    return rows


def _most_in(recipe: Recipe, precision: str) -> str:
    """The number format of the frozen models: a probe's, nearly all that it computes, need not be its head's."""
    return "bf16" if _probes(recipe) and recipe.machine.precision != "float32" else precision


def _probes(recipe: Recipe) -> bool:
    return getattr(recipe, "protocol", None) == "probe"


def _names(recipe: Recipe, precision: str) -> list[str]:
    """The files of ds_configs/ that the recipe and the number format allow."""
    if recipe.optimizer.name == "lars":
        return [ds_config.default(recipe)]
    names = _NAMES[1:] if precision == "bf16" else _NAMES
    whole = ds_config.needs_whole_weights(recipe)
    return [name for name in names if not (whole and name.startswith("zero3"))]


def zero_block(name: str) -> dict:
    return ds_config.read(name)[1]["zero_optimization"]


def _micro_batches(recipe: Recipe, gpus: int) -> list[int]:
    """The micro batches that divide, largest first."""
    share = ds_config.share(recipe, gpus, 1)
    each = share.batch // gpus
    if getattr(recipe, "contrastive", None):
        return [share.micro_batch]
    if recipe.machine.micro_batch != "auto":
        return [recipe.machine.micro_batch]
    return [size for size in range(each, 0, -1) if each % size == 0]


def _row(name, which, held, activations, frozen, micros, usable) -> Row:
    for micro in micros:
        kinds = budget.kinds(held, activations, frozen, micro)
        total = budget.peak(held, activations, frozen, micro)
        if total <= usable:
            break
    return Row(name, which, micro, kinds, total, sum(held.host.values()), total <= usable)


def choose(rows: list[Row], each: int) -> Row:
    """The way to recommend: in GPU memory before offload, without computing blocks again before with, low stages
    before high ones; of these the first whose micro batch keeps a GPU busy, else the one with the largest.

    each: images of a rank in a step.
    """
    order = sorted(rows, key=lambda row: ("offload" in row.name, planner.CHECKPOINTING.index(row.checkpointing)))
    fitting = [row for row in order if row.fits]
    busy = [row for row in fitting if row.micro_batch >= min(_ENOUGH, each)]
    if busy:
        return busy[0]
    return max(fitting, key=lambda row: row.micro_batch) if fitting else min(order, key=lambda row: row.total)


# --- what is printed


def _head(recipe, sizes, precision, gpus, gpu_memory) -> list[str]:
    return [
        f"{recipe.description}",
        f"parameters   {sum(sizes):,}",
        f"one step     {recipe.batch} images = {recipe.batch // gpus} on each of {gpus} GPUs",
        f"memory       GiB on a GPU of {gpu_memory:g} ({_USABLE:.0%} usable), {precision}, at the largest micro batch",
        "             that fits; the peak can be less than the sum: frozen models, backward and update come in turn",
        "",
    ]


def _shown(rows: list[Row]) -> list[str]:
    kinds = (*KINDS, "activations", "frozen")
    lines = [f"{'config':14} {'checkpointing':13} {'micro':>6}" + "".join(f"{kind:>12}" for kind in kinds)]
    lines[0] += f"{'peak':>8}{'host':>8}  fits"
    for row in rows:
        numbers = "".join(f"{row.kinds[kind] / _GIB:12.2f}" for kind in kinds)
        micro = row.micro_batch if row.fits else "-"
        lines.append(
            f"{row.name:14} {row.checkpointing:13} {micro:>6}{numbers}"
            f"{row.total / _GIB:8.2f}{row.host / _GIB:8.2f}  {'yes' if row.fits else 'no'}"
        )
    return lines


def _time(recipe, samples, gpus, mfu, peak, price) -> list[str]:
    steps, _, _ = recipes.schedule(recipe, samples)
    flops = planner.flops_per_image(recipe)
    used = _ASSUMED_MFU if mfu is None else mfu
    parts = ["forward and backward"]
    if _probes(recipe) or (recipe.task == "pretrain" and recipe.model.classes is not None):
        parts.append("the frozen encoder")
    if made.tokenizer_of(recipe):
        parts.append("the tokenizer's encoder")
    hours = steps * recipe.batch * flops / (gpus * peak * 1e12 * used) / 3600
    how = "MFU assumed: a short run's metrics.jsonl has it, for --mfu" if mfu is None else "MFU as given"
    lines = [
        f"operations   {flops / 1e9:,.1f} GFLOP an image ({', '.join(parts)})",
        f"time         {hours / 24:,.2f} days: {steps:,} steps on {samples:,} pictures, "
        f"at {used:.0%} of {peak:g} TFLOP/s ({how})",
    ]
    if price is not None:
        lines.append(f"cost         ${hours * gpus * price:,.0f}: {hours * gpus:,.0f} GPU hours at ${price:g}")
    return lines


def _disk(recipe, sizes) -> list[str]:
    one, keep = budget.on_disk(sum(sizes), budget.states(recipe)), recipe.report.keep
    extra = f", and every {recipe.report.keep_every}th for good" if recipe.report.keep_every else ""
    # One more than is kept stands there while the next is written.
    return [
        f"disk         {one / _GIB:.2f} GiB a checkpoint in every stage; {(keep + 1) * one / _GIB:.2f} GiB at most "
        f"with report.keep={keep}{extra}",
        "",
    ]


def _network(recipe, sizes, precision, micro) -> list[str]:
    worlds = [world for world in _WORLDS if recipe.batch % world == 0]
    if not worlds:
        return []
    lines = ["GiB that a GPU sends in one step (ring algorithms), by number of GPUs"]
    lines.append(f"{'':14}" + "".join(f"{world:>9}" for world in worlds))
    for name in _names(recipe, precision):
        if "offload" in name:
            continue
        each = [
            budget.sent(
                sum(sizes),
                zero_block(name),
                precision=precision,
                world=world,
                accumulation=max(1, recipe.batch // world // micro),
            )
            for world in worlds
        ]
        lines.append(f"{name:14}" + "".join(f"{volume / _GIB:9.2f}" for volume in each))
    return [*lines, ""]


def _command(name, overrides, recipe, row, gpus, hosts, precision) -> list[str]:
    if not row.fits:
        return [
            f"Nothing fits: {row.name} with machine.activation_checkpointing={row.checkpointing} comes nearest, "
            f"{row.total / _GIB:.2f} GiB at a micro batch of {row.micro_batch}. More or larger GPUs are needed."
        ]
    front = f"--hostfile HOSTFILE --num_nodes {hosts} --num_gpus {gpus // hosts}" if hosts > 1 else f"--num_gpus {gpus}"
    kept = [
        each for each in overrides if not each.startswith(("machine.activation_checkpointing=", "machine.micro_batch="))
    ]
    words = [name, *kept, f"machine.activation_checkpointing={row.checkpointing}"]
    given = " --tokenizer TOKENIZER" if made.tokenizer_of(recipe) else ""
    if (recipe.task == "pretrain" and recipe.model.classes) or getattr(recipe, "protocol", "scratch") != "scratch":
        given = " --init MAGE"
    number = "" if _most_in(recipe, precision) != precision else f"--precision {precision} "
    lines = [
        f"deepspeed {front} --module mage_ds train {shlex.join(words)} \\",
        f"    {number}--micro-batch {row.micro_batch} --deepspeed_config {row.name} \\",
        f"    --data DATA{given} --out RUN",
    ]
    if hosts > 1:
        lines.append(f"(HOSTFILE: {hosts} lines `NAME slots={gpus // hosts}`, see hostfile.example)")
    return lines
