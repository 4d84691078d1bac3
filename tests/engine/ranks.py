"""Every scenario that needs two ranks, in one start: each rank writes what it saw to FOLDER/rank_N.json.

Started twice by conftest.py, with the environment that a launcher gives: python ranks.py FOLDER
"""

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import tiny
import torch

from mage_ds.engine import checkpoint, process, state
from mage_ds.engine.run import Run
from mage_ds.errors import Stopped, UserError
from mage_ds.tasks import pretrain

MODES = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
OFFLOADED = [
    (1, "float32", ("optimizer",)),
    (3, "float32", ("optimizer", "param")),
    (2, "bf16", ("optimizer",)),
    (3, "bf16", ("optimizer", "param")),
]
FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()


def stages(me) -> dict:
    """20 steps in every stage and precision, two micro-batches a step on each rank."""
    numbers = tiny.recipe("batch=16")
    found = {}
    for stage, precision in MODES:
        run = tiny.train(tiny.engine_of(numbers, stage, precision), numbers, 20)
        found[f"{stage} {precision}"] = {
            "losses": run.losses,
            "norms": [figures["grad_norm"] for figures in run.figures],
        }
    return found


def one_micro_batch(me) -> dict:
    """Batch 8 as 2 ranks x 4: a test compares it with 1 rank x 2 accumulated."""
    numbers = tiny.recipe()
    return {stage: tiny.train(tiny.engine_of(numbers, stage), numbers, 20).losses for stage in (1, 3)}


def poisoned_step(numbers, kind: str, steps, rank: int = 1, micro: int = 0):
    """The real step_fn, but on one rank one micro-batch of some steps has a loss or a gradient that is not finite."""
    me, seen = process.start(), {}

    def step_fn(engines, batch, step):
        for name, loss, logs in pretrain.step_fn(engines, batch, step, recipe=numbers, tokenize=tiny.tokenize):
            seen[step] = seen.get(step, -1) + 1
            if me.rank == rank and step in steps and seen[step] == micro:
                # a loss of inf with a finite gradient; or a finite loss whose gradient is infinite times zero
                loss = loss + torch.inf if kind == "loss" else loss + torch.sqrt(loss * 0)
            yield name, loss, logs

    return step_fn


def not_finite(me) -> dict:
    """Steps 0 to 3, the second poisoned on rank 1; what each step left."""
    numbers = tiny.recipe("batch=16")
    found = {}
    for (stage, precision), kind in [*((mode, "gradient") for mode in MODES), (MODES[0], "loss"), (MODES[1], "loss")]:
        states, counts = [], []

        def hook(engine, states=states, counts=counts):
            states.append(tiny.full_state(engine))
            counts.append(state.updates(engine))

        run = tiny.Recorder(numbers, hook=hook)
        engine = tiny.engine_of(numbers, stage, precision)
        tiny.train(engine, numbers, 4, run, poisoned_step(numbers, kind, [1]))
        found[f"{stage} {precision} {kind}"] = {
            "kept": tiny.equal(states[0], states[1]),
            "moved": not tiny.equal(states[1], states[2]),
            "updates": counts,
            "skipped": run.skipped,
            "norms": [figures.get("grad_norm") for figures in run.figures],
            "losses": run.losses,
        }
    return found


def real_run(numbers, name: str) -> Run:
    """A run with a folder, as training.begin opens it."""
    run = Run(FOLDER / name, numbers, {"data": "made"}, steps=numbers.duration.steps, dataset=tiny.DATASET)
    process.on_first(lambda: run.path.mkdir())
    run.begin(flops_per_image=None, peak_flops=None)
    return run


def too_many(me) -> dict:
    """A checkpoint after step 3, then only poisoned steps."""
    numbers = tiny.recipe("report.max_skipped=2", "report.checkpoint_every={steps: 3}")
    run, message = real_run(numbers, "too_many"), None
    try:
        tiny.train(tiny.engine_of(numbers, 1), numbers, 20, run, poisoned_step(numbers, "gradient", range(3, 20)))
    except UserError as error:
        message = str(error)
    return {"message": message, "steps": checkpoint.steps(run.path), "step": run.step, "skipped": run.skipped}


def save(path: Path, run, engine) -> None:
    checkpoint.save(path, run.step, {"mage": engine}, {"position": run.position, "skipped": 0}, keep=5)


def continued(me) -> dict:
    """6 steps at once, and 3 + save + load + 3, in files of 12 kB so that both ranks write some."""
    numbers, found = tiny.recipe(), {}
    checkpoint._FILE_BYTES, usual = 12000, checkpoint._FILE_BYTES
    for stage, precision in ((1, "float32"), (3, "float32"), (1, "bf16"), (3, "bf16")):
        path = FOLDER / f"continued_{stage}_{precision}"
        engine = tiny.engine_of(numbers, stage, precision)
        whole = tiny.train(engine, numbers, 6)
        at_once = tiny.full_state(engine)
        engine = tiny.engine_of(numbers, stage, precision)
        half = tiny.train(engine, numbers, 3)
        save(path, half, engine)
        left = tiny.full_state(engine)
        engine = tiny.engine_of(numbers, stage, precision)
        meta = checkpoint.load(checkpoint.find(path), {"mage": engine})
        stored = tiny.stored_state(checkpoint.find(path))
        found[f"{stage} {precision}"] = {
            "loaded": tiny.equal(left, tiny.full_state(engine)) and tiny.equal(left, stored),
            "decays": [group["weight_decay"] for group in engine.optimizer.param_groups],
            "updates": state.updates(engine),
            "whole": whole.losses,
            "parts": half.losses + tiny.train(engine, numbers, 6, tiny.Recorder(numbers, meta["step"])).losses,
            "same end": tiny.equal(at_once, tiny.full_state(engine)),
            "files": len(meta["files"]),
        }
    checkpoint._FILE_BYTES = usual
    return found


def offloaded(me) -> dict:
    """6 steps with the optimizer, or the parameters too, on the host, saved; 6 more without, and so back again."""
    numbers, found = tiny.recipe("batch=16"), {}
    for stage, precision, what in OFFLOADED:
        path = FOLDER / f"offloaded_{stage}_{precision}"
        engine = tiny.engine_of(numbers, stage, precision, what)
        out = tiny.train(engine, numbers, 6)
        save(path, out, engine)
        loaded, losses = [], out.losses
        for offload, end in (((), 9), (what, 12)):
            engine = tiny.engine_of(numbers, stage, precision, offload)
            source = checkpoint.find(path)
            meta = checkpoint.load(source, {"mage": engine})
            loaded.append(tiny.equal(tiny.full_state(engine), tiny.stored_state(source)))
            run = tiny.train(engine, numbers, end, tiny.Recorder(numbers, meta["step"]))
            save(path, run, engine)
            losses = losses + run.losses
        found[f"{stage} {precision}"] = {
            "loaded": loaded,
            "losses": losses,
            "decays": [group["weight_decay"] for group in engine.optimizer.param_groups],
            "kept on": sorted({str(flat.device) for flat in state.flats(engine)}),
            "offloads": bool(
                getattr(engine.optimizer, "cpu_offload", getattr(engine.optimizer, "offload_optimizer", 0))
            ),
        }
    return found


def sharded_from_the_start(me) -> dict:
    """What ZeRO 3 leaves of a model on a rank before its initial values are written and after, and those values."""
    numbers = tiny.recipe(
        "model.encoder={depth: 2, width: 16, heads: 2}", "model.decoder={depth: 1, width: 16, heads: 2}"
    )
    seen = []

    def make():
        seen.append(tiny.Mage(**numbers.model.model_dump()))
        return seen[0]

    config = tiny.config_of(numbers, 3)
    made = tiny.wrap.build(make, numbers.seed, config)
    held = sum(p.numel() + p.ds_tensor.numel() for p in made.parameters())
    whole = sum(p.ds_numel for p in made.parameters())
    values = tiny.full_state(tiny.wrap.wrap(made, numbers, config, me.device))
    plain = tiny.Mage(**numbers.model.model_dump())
    tiny.wrap.initialize_weights(plain, numbers.seed)
    same = [torch.equal(values[f"weight {name}"], p.detach()) for name, p in plain.named_parameters()]
    return {"share": held / whole, "same": all(same), "parameters": len(same)}


def leg_1(me) -> dict:
    """ZeRO 1 on two ranks: 5 steps that are saved for others to go on."""
    numbers = tiny.recipe("batch=16")
    engine = tiny.engine_of(numbers, 1)
    run = tiny.train(engine, numbers, 5)
    save(FOLDER / "moved", run, engine)
    return {"losses": run.losses}


def leg_3(me) -> dict:
    """ZeRO 2 on two ranks, from what one rank left at step 10, to 14."""
    deadline = time.monotonic() + 120
    while 10 not in checkpoint.steps(FOLDER / "moved") and time.monotonic() < deadline:
        time.sleep(0.1)
    return moved_leg(2, 10, 14)


def leg_5(me) -> dict:
    """ZeRO 2 with the optimizer on the host, on four ranks, from what one rank left at step 18, to the end."""
    return moved_leg(2, 18, 20, offload=("optimizer",))


def moved_leg(stage: int, start: int, end: int, folder: Path = FOLDER, offload: tuple[str, ...] = ()) -> dict:
    """Load the moved run at `start` in another stage, train to `end`, save."""
    numbers = tiny.recipe("batch=16")
    engine = tiny.engine_of(numbers, stage, offload=offload)
    source = checkpoint.folder_of(folder / "moved", start)
    meta = checkpoint.load(source, {"mage": engine})
    loaded = tiny.equal(tiny.full_state(engine), tiny.stored_state(source))
    updates, decays = state.updates(engine), [group["weight_decay"] for group in engine.optimizer.param_groups]
    run = tiny.train(engine, numbers, end, tiny.Recorder(numbers, meta["step"]))
    save(folder / "moved", run, engine)
    return {"loaded": loaded, "updates": updates, "decays": decays, "losses": run.losses}


def failed_write(me) -> dict:
    """Rank 1's disk is full: both ranks say so, nothing half written stays, the next save works."""
    numbers, path = tiny.recipe(), FOLDER / "failed_write"
    checkpoint._FILE_BYTES, usual = 12000, checkpoint._FILE_BYTES
    engine, run = tiny.engine_of(numbers, 3), tiny.Recorder(numbers)
    write, message = checkpoint.save_file, None
    for step in (1, 2):
        tiny.train(engine, numbers, step, run)

        def full(tensors, file, step=step):
            if me.rank == 1 and step == 2:
                raise OSError(28, "No space left on device")
            write(tensors, file)

        checkpoint.save_file = full
        try:
            save(path, run, engine)
        except UserError as error:
            message = str(error)
        checkpoint.save_file = write
    checkpoint._FILE_BYTES = usual
    process.barrier()
    return {"message": message, "left": sorted(entry.name for entry in (path / "checkpoints").iterdir())}


def optimizer_bytes(me) -> dict:
    """Bytes of this rank's moments, by stage."""
    found = {}
    for stage in (0, 1, 2, 3):
        numbers = tiny.recipe()
        engine = tiny.engine_of(numbers, stage)
        tiny.train(engine, numbers, 2)
        tensors = [value for one in state.base_of(engine).state.values() for value in one.values()]
        found[stage] = sum(value.nbytes for value in tensors if value.numel() > 1)
    return found


def accumulated(me) -> dict:
    """Relative error of a gradient of 64 bf16 micro-batches against their exact sum, by stage and number format."""
    from deepspeed.utils import safe_get_full_grad

    numbers = tiny.recipe("batch=128", "machine.micro_batch=1", "model.dropout=0.0")
    step_fn = partial(pretrain.step_fn, recipe=numbers, tokenize=tiny.tokenize)
    model = tiny.Mage(**numbers.model.model_dump())
    tiny.wrap.initialize_weights(model, numbers.seed)
    model.bfloat16()
    exact = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    stream = tiny.Stream(numbers, me.rank, me.world, 0)
    for _ in range(64):
        ((_, loss, _),) = step_fn({"mage": model}, next(stream), 0)
        model.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            exact[name] += parameter.grad.double() / 128
    for value in exact.values():
        process.sum_over_ranks(value)
    scale = torch.cat([value.flatten() for value in exact.values()]).norm()
    found = {}
    for stage, form in ((1, "default"), (3, "default"), (1, "bf16")):
        blocks = {} if form == "default" else {"data_types": {"grad_accum_dtype": "bf16"}}
        engine = tiny.engine_of(numbers, stage, "bf16", **blocks)
        stream, error = tiny.Stream(numbers, me.rank, me.world, 0), 0.0
        for micro in range(64):
            ((_, loss, _),) = step_fn({"mage": engine}, next(stream), 0)
            engine.backward(loss)
            if micro < 63:
                engine.step()
        for name, parameter in engine.module.named_parameters():
            value = safe_get_full_grad(parameter)
            error += float((value.double().reshape(exact[name].shape) - exact[name]).square().sum())
        found[f"{stage} {form}"] = error**0.5 / float(scale)
        engine.step()
    return found


def errors_said(me) -> None:
    """One rank's own error, then one that both have; the test reads the screens."""
    if me.rank == 1:
        process.say_error("only here")
    process.barrier()
    process.say_error("everywhere")
    process.barrier()


def stopped(me) -> dict:
    """SIGTERM reaches rank 1 in the 3rd of 8 micro-batches of step 3, rank 0 (slower) later, in the same step."""
    numbers = tiny.recipe("batch=64", "report.checkpoint_every={steps: 100}")
    run, micros, message = real_run(numbers, "stopped"), [], None
    process.stop_on_signals()

    def step_fn(engines, batch, step):
        micros.append(step)
        if step == 3 and micros.count(3) == 3 and me.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 3 and me.rank == 0:
            time.sleep(0.02)
            if micros.count(3) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
        yield from pretrain.step_fn(engines, batch, step, recipe=numbers, tokenize=tiny.tokenize)

    try:
        tiny.train(tiny.engine_of(numbers, 1), numbers, 20, run, step_fn)
    except Stopped as error:
        message = str(error)
    meta = checkpoint.read_meta(checkpoint.find(run.path))
    return {"micros": len(micros), "message": message, "step": meta["step"], "position": meta["position"]}


SCENARIOS = [
    leg_1,
    stages,
    one_micro_batch,
    not_finite,
    too_many,
    continued,
    offloaded,
    sharded_from_the_start,
    failed_write,
    optimizer_bytes,
    accumulated,
    leg_3,
    errors_said,
    stopped,  # last: a stop is asked for once in the life of a process
]


def main() -> None:
    faulthandler.dump_traceback_later(400, exit=True)
    me = process.start(threads=1)
    found = {}
    try:
        chosen = [globals()[name] for name in sys.argv[2:]]
        for scenario in chosen or SCENARIOS:
            began = time.perf_counter()
            found[scenario.__name__] = scenario(me)
            found[scenario.__name__ + " seconds"] = round(time.perf_counter() - began, 2)
    except BaseException:
        found["traceback"] = traceback.format_exc()
        raise
    finally:
        (FOLDER / f"rank_{me.rank}.json").write_text(json.dumps(found, indent=1))
    process.leave(0)


if __name__ == "__main__":
    main()
