"""The one training loop, for every training and any number of engines."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from mage_ds import keyed
from mage_ds.engine import optim, process, state, watch
from mage_ds.errors import Stopped, UserError


@dataclass(frozen=True)
class Limits:
    """steps: optimizer steps of the whole run; accumulation: micro-batches of a step on each rank;
    max_skipped: steps in a row whose gradient is not finite; one more ends the run."""

    steps: int
    accumulation: int
    max_skipped: int


def train(engines, batches, step_fn, lr, run, limits, after_step=None, evaluate=None, pictures=None) -> None:
    """Train `engines` from run.step to limits.steps.

    Args: engines: name -> DeepSpeed engine; batches(position) -> endless iterator of this rank's micro-batches
    with `.waited`, seconds; step_fn(engines, batch, step) yields (engine name, loss, logs), once for each
    optimizer that takes part in this step: loss is the micro-batch's sum over samples / micro batch size, logs are
    scalar tensors, means over the micro-batch, of which the mean over the global batch is shown; lr: name -> function
    of the step; after_step(engines, step): returns more scalar tensors to show, alike on all ranks, or None;
    evaluate(engines, step) -> figures; pictures(engines, step) -> a uint8 picture.
    Raises Stopped after a signal, once the last completed step is saved; UserError after too many steps without a
    finite gradient, and where the rule for spikes ends the run. It judges by the log named `loss`.
    """
    process.begin_stops()
    stream, begun, in_a_row = batches(run.position), 0, 0
    try:
        run.catch_up(engines, evaluate, pictures)
        while run.step < limits.steps:
            step, logs = run.step, _Logs(limits.accumulation)
            for name, engine in engines.items():
                optim.set_lr(engine, lr[name](step))
            outcomes = _train_step(engines, stream, step_fn, run, logs, steady=begun > 0)
            begun += 1
            for name, norm in outcomes.items():
                if norm is not None:
                    state.follow(engines[name])
            if after_step:
                logs.add_whole(after_step(engines, step) or {})
            in_a_row = in_a_row + 1 if None in outcomes.values() else 0
            _count_skipped(run, in_a_row, limits)
            if run.spikes and (median := run.spikes.median(logs.means["loss"])) is not None:
                run.spiked(step + 1, logs.means["loss"], median, engines)
                stream.close()
                stream, in_a_row = batches(run.position), 0
                continue
            figures = {}
            if run.log_due(step + 1):
                norms = {name: norm for name, norm in outcomes.items() if norm is not None}
                rates = {name: lr[name](step) for name in outcomes}
                figures = logs.means | _named("lr", rates, engines) | _named("grad_norm", norms, engines)
                figures |= {"skipped": run.skipped, "waited": stream.waited}
            run.end_of_step(step + 1, engines, figures, evaluate, pictures)
    except process.StopAsked as asked:
        run.stop(str(asked), engines)
        saved = f"saved after step {run.step}" if run.step else "before step 1"
        raise Stopped(f"{asked}: {saved}") from None
    finally:
        stream.close()


def _train_step(engines, stream, step_fn, run, logs, steady: bool) -> dict[str, float | None]:
    """All micro-batches of a step and the update. Returns the gradient's norm, None where the update was skipped, of
    each engine that takes part in this step: a discriminator that has not begun yet makes no update and skips none.

    Raises process.StopAsked between micro-batches.
    """
    me, step, outcomes = process.start(), run.step, {}
    for micro in range(logs.micro_batches):
        process.stop_point()
        watch.beat(steady)
        seed_dropout(run.seed, step, micro * me.world + me.rank)
        for name, loss, values in step_fn(engines, next(stream), step):
            logs.add(values)
            engines[name].backward(_poisoned(loss))
            outcomes[name] = _step(engines[name])
    return outcomes


def _count_skipped(run, in_a_row: int, limits: Limits) -> None:
    run.skipped += in_a_row > 0
    if in_a_row:
        process.say(f"step {run.step + 1}: the gradient is not finite, step skipped ({in_a_row} in a row)")
    if in_a_row > limits.max_skipped:
        raise UserError(
            f"{run.path}: {in_a_row} steps in a row without a finite gradient; the checkpoint of step "
            f"{run.saved} is kept (0: none yet); lower optimizer.base_lr or choose --precision float32"
        )


class _Logs:
    """The logs of a step's micro-batches on this rank; `means` over the global batch are read once, where needed."""

    def __init__(self, micro_batches: int):
        self.micro_batches, self._totals, self._whole = micro_batches, {}, {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for key, value in values.items():
            self._totals[key] = self._totals.get(key, 0) + value.detach().float()

    def add_whole(self, values: dict[str, torch.Tensor]) -> None:
        """Scalars of the whole step, which all ranks have."""
        self._whole |= values

    @cached_property
    def means(self) -> dict[str, float]:
        """One small all-reduce, one read by the host; every rank asks for it in the same steps."""
        if not self._totals:
            return {}
        totals = process.sum_over_ranks(torch.stack(list(self._totals.values())))
        means = totals / (self.micro_batches * process.start().world)
        whole = [value.detach().to(means) for value in self._whole.values()]
        read = torch.stack([*means, *whole]).tolist()
        return dict(zip([*self._totals, *self._whole], read, strict=True))


def seed_dropout(seed: int, step: int, micro: int) -> None:
    """Seed the dropout generator for one micro-batch, by its place in the global batch: no RNG state is saved,
    and the same micro batch on another world size drops the same units."""
    torch.manual_seed(keyed.seed_of(seed, "dropout", step, micro))


def _poisoned(loss: torch.Tensor) -> torch.Tensor:
    """`loss`, with a NaN gradient where it is not finite: so the gradient's check covers the loss on any rank."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


def _step(engine) -> float | None:
    """engine.step(): at the accumulation's end, update if the gradient is finite.

    Returns the gradient's norm before clipping, None where the update was skipped or is not due yet.
    DeepSpeed skips a gradient that is not finite in every stage but float32 stage 0. There the gradients are
    whole and already reduced, alike on all ranks: with them removed, the update does nothing.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    norm = None
    if engine.zero_optimization_stage() == 0:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            for parameter in engine.module.parameters():
                parameter.grad = None
            engine.clip_fp32_gradients = lambda: None  # DeepSpeed's raises where no parameter has a gradient
    engine.step()
    vars(engine).pop("clip_fp32_gradients", None)
    if norm is None:
        norm = float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.nan
    return norm if math.isfinite(norm) else None


def _named(key: str, values: dict[str, float], engines) -> dict[str, float]:
    """{"lr": x} for a training with one engine, {"tokenizer_lr": x, ...} for one with several."""
    return {key if len(engines) == 1 else f"{name}_{key}": value for name, value in values.items()}
