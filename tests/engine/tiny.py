"""What the tests of the engine share: a tiny recipe, a made stream, and a plain training loop to compare with."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from mage_ds import keyed, recipes
from mage_ds.engine import ds_config, loop, optim, process, state, wrap
from mage_ds.inputs.batch import Batch
from mage_ds.models import Mage
from mage_ds.models.mage import token_loss
from mage_ds.tasks import pretrain

CODES, TOKENS, DATASET = 24, 16, 40
_RECIPE = Path(__file__).with_name("tiny.yaml")


def recipe(*overrides: str):
    return recipes.load_recipe(_RECIPE, overrides)


def tokens_at(position: int) -> np.ndarray:
    """Five patterns, so that a few steps already lower the loss."""
    pattern = position % DATASET % 5
    return ((np.arange(TOKENS) * (pattern + 1) + 3 * pattern) % CODES).astype(np.uint8)


def batch_at(positions: np.ndarray) -> Batch:
    """Made pictures whose pixels are their tokens: `tokenize` reads them back."""
    images = torch.from_numpy(np.stack([tokens_at(p) for p in positions])).view(-1, 1, TOKENS)
    none = torch.full((len(positions),), -1)
    return Batch(none, positions % DATASET, positions // DATASET, torch.ones(len(positions)), images=images)


def tokenize(images: torch.Tensor) -> torch.Tensor:
    return images.long()


class Stream:
    """A rank's micro-batches of the made stream."""

    waited = 0.0
    batch_of = staticmethod(batch_at)

    def __init__(self, numbers, rank: int, world: int, position: int):
        self.batch, self.micro, self.rank, self.world = numbers.batch, numbers.machine.micro_batch, rank, world
        self.position, self.begun = position, 0

    def __next__(self) -> Batch:
        inside = self.begun * self.micro * self.world + self.rank * self.micro
        step, offset = divmod(inside, self.batch)
        self.begun += 1
        return self.batch_of(self.position + step * self.batch + offset + np.arange(self.micro))

    def close(self):
        pass


class Recorder:
    """What the loop needs of a run, in memory."""

    spikes = None

    def __init__(self, numbers, step: int = 0, hook=None):
        self.batch, self.seed, self.step, self.skipped, self.saved = numbers.batch, numbers.seed, step, 0, 0
        self.path, self.figures, self.hook = Path("recorded"), [], hook

    @property
    def position(self) -> int:
        return self.step * self.batch

    def log_due(self, step: int) -> bool:
        return True

    def catch_up(self, engines, evaluate, pictures) -> None:
        pass

    def end_of_step(self, step, engines, figures, evaluate, pictures) -> None:
        self.step = step
        self.figures.append(figures)
        if self.hook:
            self.hook(engines["mage"])

    @property
    def losses(self) -> list[float]:
        return [figures["loss"] for figures in self.figures]


def config_of(numbers, stage: int, precision: str = "float32", offload: tuple[str, ...] = (), **blocks) -> dict:
    path, config = ds_config.read(f"zero{stage}")
    config["zero_optimization"] |= {f"offload_{what}": {"device": "cpu"} for what in offload}
    if stage == 3:  # shard the smallest parameter too: in a full-size model most are large enough
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    share = ds_config.share(numbers, process.start().world, 1)
    return ds_config.in_force(path, config | blocks, share, clip=numbers.optimizer.clip, precision=precision)


def engine_of(numbers, stage: int, precision: str = "float32", offload: tuple[str, ...] = (), **blocks):
    """A DeepSpeed engine around a new Mage with its initial values. offload: of `optimizer`, `param`."""
    config = config_of(numbers, stage, precision, offload, **blocks)
    model = wrap.build(lambda: Mage(**numbers.model.model_dump()), numbers.seed, config)
    return wrap.wrap(model, numbers, config, process.start().device)


def schedule_of(numbers):
    return partial(
        optim.cosine,
        peak=numbers.effective_lr(),
        floor=numbers.optimizer.min_lr,
        steps=numbers.duration.steps,
        warmup=numbers.warmup.steps,
    )


def train(engine, numbers, steps: int, run=None, step_fn=None, **callbacks):
    """Train to `steps` by the real loop and the real step of pre-training; returns the run."""
    me, run = process.start(), run or Recorder(numbers)
    accumulation = numbers.batch // numbers.machine.micro_batch // me.world
    loop.train(
        {"mage": engine},
        lambda position: Stream(numbers, me.rank, me.world, position),
        step_fn or partial(pretrain.step_fn, recipe=numbers, tokenize=tokenize),
        {"mage": schedule_of(numbers)},
        run,
        loop.Limits(steps, accumulation, numbers.report.max_skipped),
        **callbacks,
    )
    return run


def full_state(engine) -> dict[str, torch.Tensor]:
    """Weights and moments by name. All ranks call it."""
    state.ensure_moments(engine)
    found = {}
    for name, parameter in state.parameters(engine).items():
        for kind, key in (("weight", None), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            found[f"{kind} {name}"] = state.get_full(engine, parameter, key).float().cpu().clone()
    return found


def stored_state(folder: Path) -> dict[str, torch.Tensor]:
    """What the files of a checkpoint say, read without our reader."""
    found = {}
    for path in sorted(folder.glob("mage.*.safetensors")):
        for name, value in load_file(path).items():
            found[f"{path.name.split('.')[1]} {name}"] = value
    return found


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# --- the reference: nothing of mage_ds.engine but the initial values


def whole(model, batch, tokens, masked, keep):
    return model(tokens, masked, keep)


def plain(
    numbers, steps: int, *, precision: str = "float32", skip=(), model=None, batch_of=batch_at, logits_of=whole
) -> list[float]:
    """Losses of a plain loop on one process: micro-batch after micro-batch, float32 master weights."""
    model = model or Mage(**numbers.model.model_dump())
    wrap.initialize_weights(model, numbers.seed)
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    if precision == "bf16":
        model.bfloat16()
    free = [name for name in masters if name.endswith("bias") or "norm" in name.lower() or ".ln." in name]
    settings, wd = numbers.optimizer, numbers.optimizer.weight_decay
    groups = [
        {"params": [value for name, value in masters.items() if name not in free], "weight_decay": wd},
        {"params": [masters[name] for name in free], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=settings.betas, eps=settings.eps, foreach=False)
    peak, warmup, last = settings.base_lr * numbers.batch / 256, numbers.warmup.steps, numbers.duration.steps
    micro, losses = numbers.machine.micro_batch, []
    for step in range(steps):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        gradients = {name: torch.zeros_like(value) for name, value in masters.items()}
        total = 0.0
        for g in range(numbers.batch // micro):
            batch = batch_of(step * numbers.batch + g * micro + np.arange(micro))
            tokens = batch.images[:, 0].long()
            masked, keep, _ = pretrain.draw_masks(numbers, batch.index, batch.epoch, tokens.device)
            torch.manual_seed(keyed.seed_of(numbers.seed, "dropout", step, g))
            loss, _ = token_loss(logits_of(model, batch, tokens, masked, keep), tokens, masked, numbers.label_smoothing)
            model.zero_grad()
            loss.sum().div(numbers.batch).backward()
            total += float(loss.detach().sum()) / numbers.batch
            for name, parameter in model.named_parameters():
                gradients[name] += parameter.grad.float()
        losses.append(total)
        if step in skip:
            continue
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        scale = min(1.0, settings.clip / norm) if settings.clip else 1.0
        if step < warmup:
            lr = peak * step / warmup
        else:
            turn = math.pi * (step - warmup) / (last - warmup)
            lr = settings.min_lr + (peak - settings.min_lr) * (1 + math.cos(turn)) / 2
        for group in adam.param_groups:
            group["lr"] = lr
        for name, value in masters.items():
            value.grad = gradients[name] * scale
        adam.step()
    return losses


def worst(one, two) -> float:
    """Largest relative difference of two lists of numbers."""
    assert len(one) == len(two)
    return max(abs(a - b) / abs(b) for a, b in zip(one, two, strict=True))
