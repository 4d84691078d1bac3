"""Scenarios of a run on two ranks: each rank writes what it saw to FOLDER/rank_N.json. Started by the launcher."""

import json
import os
import signal
import sys
from pathlib import Path

import tiny
from made_runs import BATCH, OFTEN, SPIKE, LeftOut, evaluator, leaping, losses, opened

from mage_ds.engine import checkpoint, process
from mage_ds.errors import Stopped, UserError

FOLDER = Path(sys.argv[-1])


def bad_data(step, position):
    """In the share of the second rank only."""
    return position == 12 * BATCH + 4


def spiked(me, stage: int, precision: str) -> dict:
    """A spike that one rank alone has in its samples, and a run that was told to leave the samples out."""
    numbers, path = tiny.recipe(SPIKE, OFTEN), FOLDER / f"spiked_{stage}"
    engine = tiny.engine_of(numbers, stage, precision)
    tiny.train(engine, numbers, 20, opened(path, numbers, engine), leaping(numbers, bad_data))
    other = tiny.engine_of(numbers, stage, precision)
    told = LeftOut(numbers)
    tiny.train(other, numbers, 10, told)
    told.left_out = 3 * BATCH
    tiny.train(other, numbers, 20, told)
    return {
        "same": [loss for _, loss in losses(path)] == told.losses,
        "same end": tiny.equal(tiny.full_state(engine), tiny.full_state(other)),
        "notes": (path / "spikes.jsonl").read_text().splitlines(),
    }


def full_disk(me) -> dict:
    """Rank 0 cannot write its metrics: both ranks save, and say the same."""
    numbers, path = tiny.recipe(), FOLDER / "full_disk"
    engine, message = tiny.engine_of(numbers, 1), None
    run = opened(path, numbers, engine)
    if me.first:
        run._metrics.close()
        run._metrics = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    try:
        tiny.train(engine, numbers, 20, run)
    except UserError as error:
        message = str(error)
    process._stop_reason = None
    for key in ("stop_request", "stopping", "stop_at"):
        me.store.delete_key(key)
    process.barrier()
    return {"message": message, "steps": checkpoint.steps(path)}


def cut_off(me) -> dict:
    """SIGTERM reaches rank 1 in a held-out pass of 4000 batches, whose forwards are collective."""
    numbers, path = tiny.recipe("report.evaluate_every={steps: 3}"), FOLDER / "cut_off"
    engine, message, seen = tiny.engine_of(numbers, 3), None, []
    process.stop_on_signals()

    def at(step, batch):
        seen.append(batch)
        process.barrier()
        if batch == 5 and me.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        tiny.train(engine, numbers, 20, opened(path, numbers, engine), evaluate=evaluator(at, 4000))
    except Stopped as error:
        message = str(error)
    meta = checkpoint.read_meta(checkpoint.find(path))
    return {"message": message, "batches": len(seen), "step": meta["step"], "due": meta["due"]}


def main() -> None:
    me = process.start(threads=1)
    found = {"spiked 1": spiked(me, 1, "float32"), "spiked 3": spiked(me, 3, "bf16")}
    found |= {"full_disk": full_disk(me), "cut_off": cut_off(me)}
    (FOLDER / f"rank_{me.rank}.json").write_text(json.dumps(found))
    process.leave(0)


main()
