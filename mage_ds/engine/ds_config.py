"""The DeepSpeed configuration in force: the user's JSON with its "auto" values filled from the recipe.

The recipe owns what decides the result (batch, clip, optimizer, schedule), the JSON what decides how a machine
computes it (stage, buckets, communication). Where both speak, they must agree.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import mage_ds
from mage_ds.errors import UserError
from mage_ds.recipes.schema import Recipe

DEFAULT = "zero1"
_WHOLE = "zero0"

_REFUSED = {
    "optimizer": "the optimizer's numbers stand in the recipe (optimizer.*): remove the block",
    "scheduler": "the schedule stands in the recipe (duration, warmup, optimizer.*): remove the block",
    "fp16": "float16 needs loss scaling, which the recipes do not use: remove the block, choose --precision bf16",
    "amp": "Apex is not used: remove the block and choose --precision bf16",
    "activation_checkpointing": "by itself it has no effect: set machine.activation_checkpointing=full in the recipe",
    "elasticity": "a run already resumes on any number of ranks with the same batch: remove the block",
    "tensorboard": "every run writes RUN/tensorboard: remove the block",
    "csv_monitor": "every run writes RUN/metrics.jsonl: remove the block",
    "wandb": "every run writes RUN/metrics.jsonl and RUN/tensorboard: remove the block",
    "comet": "every run writes RUN/metrics.jsonl and RUN/tensorboard: remove the block",
    "torch_autocast": "precision is chosen by --precision: remove the block",
    "checkpoint": "checkpoints are written in a layout of ours, for every stage and world size: remove the block",
}
_ACCEPTED = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "zero_optimization",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "disable_allgather",
    "zero_force_ds_cpu_optimizer",
    "zero_allow_untested_optimizer",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "steps_per_print",
    "comms_logger",
    "flops_profiler",
    "aio",
}


@dataclass(frozen=True)
class Share:
    """How the recipe's global batch falls to ranks: batch = micro_batch * accumulation * world."""

    batch: int
    micro_batch: int
    accumulation: int
    world: int


def folder() -> Path:
    """The folder of the JSON files that come with the package: beside it in a checkout, inside it in a wheel."""
    package = Path(mage_ds.__file__).parent
    return package / "ds_configs" if (package / "ds_configs").is_dir() else package.parent / "ds_configs"


def read(name: str | None) -> tuple[Path, dict]:
    """The JSON file `name` (a path, or the name of one that comes with the package), and what it says.

    Raises UserError where there is no such file, it is no JSON object, or a block is unknown or refused.
    """
    path = _find(name or DEFAULT)
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: must be a JSON object, as {folder() / (DEFAULT + '.json')}")
    for key in config:
        _check_block(path, key, config[key])
    return path, config


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    packaged = folder() / f"{name}.json"
    if packaged.is_file():
        return packaged
    names = sorted(file.stem for file in folder().glob("*.json"))
    near = difflib.get_close_matches(path.stem, names, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--deepspeed_config {name}: no such file; {hint}known names: {', '.join(names)}")


def _check_block(path: Path, key: str, value) -> None:
    if key in _REFUSED:
        if isinstance(value, dict) and value.get("enabled") is False:
            return  # switched off: says the same as we do
        raise UserError(f"{path}: {key}: {_REFUSED[key]}")
    if key not in _ACCEPTED:
        near = difflib.get_close_matches(key, _ACCEPTED, 1)
        raise UserError(f"{path}: {key}: unknown block{f'; did you mean {near[0]}?' if near else ''}")


def default(recipe: Recipe) -> str:
    """The configuration of a training that names none: ZeRO 1; for LARS no sharding, see `check_norms`."""
    return _WHOLE if recipe.optimizer.name == "lars" else DEFAULT


def check_norms(path: Path, config: dict, recipe: Recipe) -> None:
    """LARS compares the norm of each tensor with that of its gradient, and ZeRO hands it flat shards of all tensors
    together, of which the norms are others, silently. UserError where a configuration would do that."""
    stage = config["zero_optimization"]["stage"]
    if recipe.optimizer.name == "lars" and stage:
        raise UserError(
            f"{path}: zero_optimization.stage = {stage}: optimizer.name = lars needs whole tensors; choose "
            f"--deepspeed_config {_WHOLE}, which it also gets without one"
        )


def choose_precision(asked: str, device, recipe: Recipe | None = None) -> str:
    """`bf16` or `float32` for `auto`: bf16 on a GPU and where the CPU multiplies it in hardware; float32 for LARS.

    Elsewhere a CPU emulates bf16, 7 to 100 times slower than float32. UserError for LARS in bf16, whose master weights
    are flat shards (see `check_norms`).
    """
    import torch

    if recipe is not None and recipe.optimizer.name == "lars":
        if asked == "bf16":
            raise UserError("--precision bf16: optimizer.name = lars needs whole tensors in float32; leave it out")
        return "float32"
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def dtype_of(precision: str):
    """The torch.dtype of `bf16` or `float32`."""
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32


def share(recipe: Recipe, world: int, largest: int) -> Share:
    """Split the recipe's batch over `world` ranks; `auto`: the largest micro batch that divides, at most `largest`.

    Raises UserError with values that would divide.
    """
    batch, micro = recipe.batch, recipe.machine.micro_batch
    if batch % world:
        lower, upper = batch - batch % world, batch + world - batch % world
        near = f"batch={upper}" if lower == 0 else f"batch={lower} or batch={upper}"
        raise UserError(
            f"batch = {batch}: does not divide over {world} ranks; choose {near}, "
            f"or a number of ranks that divides {batch}"
        )
    each = batch // world
    divisors = [size for size in range(1, each + 1) if each % size == 0]
    if contrast := getattr(recipe, "contrastive", None):
        return Share(batch, _contrasted(contrast.images, micro, world), batch // contrast.images, world)
    if micro == "auto":
        micro = max(size for size in divisors if size <= max(1, largest))
    if each % micro:
        near = sorted(sorted(divisors, key=lambda size: abs(size - micro))[:3])
        raise UserError(
            f"--micro-batch {micro}: does not divide the {each} samples of a rank "
            f"(batch {batch} over {world} ranks); choose {', '.join(map(str, near))} or auto"
        )
    return Share(batch, micro, each // micro, world)


def _contrasted(images: int, micro: int | str, world: int) -> int:
    """The micro batch with which the ranks contrast `images` pictures: their number decides what is learned."""
    if images % world:
        most = max(size for size in range(1, world) if images % size == 0)
        raise UserError(
            f"contrastive.images = {images}: does not divide over {world} ranks; choose {most} ranks or another number "
            f"that divides it (contrastive.images={images - images % world or world} would be another training)"
        )
    if micro not in ("auto", images // world):
        raise UserError(
            f"--micro-batch {micro}: with {world} ranks {micro * world} pictures would be contrasted, "
            f"contrastive.images is {images}; choose {images // world} or auto"
            + (f", or {images // micro} ranks" if images % micro == 0 else "")
        )
    return images // world


def in_force(path: Path, config: dict, share: Share, *, clip: float | None, precision: str) -> dict:
    """The configuration for deepspeed.initialize: "auto" filled, contradictions refused.

    Gradients accumulate and are reduced in float32 unless the JSON says otherwise: over many micro-batches bf16
    loses 1 % of a gradient. Any other "auto" leaves the choice to DeepSpeed. Raises UserError that names both sides.
    """
    for key in ("bf16", "zero_optimization", "data_types"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"{path}: {key} = {config[key]}: must be a block, as in {folder() / (DEFAULT + '.json')}")
    _check_zero(path, config.get("zero_optimization", {}), precision)
    config = _without_auto(config)
    own = {
        "train_batch_size": (share.batch, "the recipe's batch"),
        "train_micro_batch_size_per_gpu": (share.micro_batch, "--micro-batch"),
        "gradient_accumulation_steps": (share.accumulation, "batch / micro batch / ranks"),
        "gradient_clipping": (clip or 0.0, "the recipe's optimizer.clip"),
    }
    for key, (value, whose) in own.items():
        _agree(path, key, config.get(key, "auto"), value, whose)
        config[key] = value
    bf16 = config.setdefault("bf16", {})
    _agree(path, "bf16.enabled", bf16.get("enabled", "auto"), precision == "bf16", f"--precision {precision}")
    bf16["enabled"] = precision == "bf16"
    if bf16.get("check_grad_overflow") is False:
        raise UserError(f"{path}: bf16.check_grad_overflow: false lets one NaN reach the weights; remove the key")
    zero = config.setdefault("zero_optimization", {})
    zero.setdefault("stage", 0)
    if offload(zero, "offload_optimizer") == "cpu":
        # torch's fused AdamW works on the host as well as DeepSpeed's own, which a compiler has to build first.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    if precision == "bf16":
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        config["data_types"].setdefault("buffer_dtype", "bf16")  # spectral norm multiplies weights and buffers
        config.setdefault("communication_data_type", "fp32")
    config.setdefault("steps_per_print", 10**9)  # our own progress line says more
    return config


def needs_whole_weights(recipe: Recipe) -> str | None:
    """The field of a recipe that stage 3 cannot serve, which has no whole weight beside the passes of its engine."""
    return next((key for key in ("adversary", "reseed_after") if getattr(recipe, key, None)), None)


def alone(name: str, recipe: Recipe, world: int, precision: str) -> dict:
    """The configuration of `name` for a recipe outside of a training, with its own micro batch (auto: 1)."""
    path, config = read(name)
    return in_force(path, config, share(recipe, world, 1), clip=recipe.optimizer.clip, precision=precision)


def _agree(path: Path, key: str, theirs, ours, whose: str) -> None:
    if theirs != "auto" and theirs != ours:
        raise UserError(f'{path}: {key} = {theirs} contradicts {whose} ({ours}); write "auto" there')


def _without_auto(block: dict) -> dict:
    """A copy without the keys that say "auto", at any depth."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in block.items()
        if value != "auto"
    }


def _check_zero(path: Path, zero: dict, precision: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage = {stage}: must be 0, 1, 2 or 3")
    if stage == 0 and precision == "bf16":
        raise UserError(
            f"{path}: zero_optimization.stage = 0 with bf16: DeepSpeed's optimizer then makes one update on zero "
            f"gradients at start; choose zero1, or --precision float32"
        )
    _check_offload(path, stage, zero, precision)
    try:
        DeepSpeedZeroConfig(**_without_auto(zero))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: zero_optimization.{key} = {first['input']}: {first['msg']}") from None


def _check_offload(path: Path, stage: int, zero: dict, precision: str) -> None:
    # In bf16 at stage 1 DeepSpeed takes another optimizer class, which looks over the block.
    for key, least in (("offload_optimizer", 2 if precision == "bf16" else 1), ("offload_param", 3)):
        device = offload(zero, key)
        if device not in ("none", "cpu"):
            raise UserError(f'{path}: zero_optimization.{key}.device = {device}: only "cpu" is supported')
        if device == "cpu" and stage < least:
            raise UserError(
                f"{path}: zero_optimization.{key}: needs stage {least} at least in {precision}, not {stage}; "
                f"choose zero{max(2, least)}_offload"
            )


def offload(zero: dict, key: str) -> str:
    """Where a zero_optimization block keeps `offload_optimizer` or `offload_param`: none or cpu."""
    block = zero.get(key) or {}
    return str(block.get("device", "none")) if isinstance(block, dict) else str(block)
