"""A decoder on a frozen encoder, on two ranks: each rank writes what it saw to FOLDER/rank_N.json.

Started by test_decoder_ranks.py with the environment that a launcher gives: python decoder_ranks.py FOLDER
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import tiny
import torch

from mage_ds.engine import checkpoint, loop, made, process, state, stored, training, wrap
from mage_ds.inputs.batch import Batch
from mage_ds.tasks import pretrain

STEPS, CLASSES, STAGES = 5, 5, (1, 3)
# The encoder is the larger half: if it travelled too, it would show.
NUMBERS = [
    f"model.classes={CLASSES}",
    "label_dropout=0.3",
    "batch=16",
    "model.encoder={depth: 4, width: 20, heads: 2}",
]


def numbers_of():
    return tiny.recipe(*NUMBERS)


def encoder_of(numbers):
    """The frozen encoder, of values as if it had been trained."""
    encoder = made.encoder_of(numbers)
    wrap.initialize_weights(encoder, 77)
    return training.frozen(encoder, torch.float32)


def batch_at(positions: np.ndarray) -> Batch:
    """tiny's pictures; the label is the pattern, of every seventh there is none."""
    batch = tiny.batch_at(positions)
    label = np.where(positions % 7 == 6, -1, positions % tiny.DATASET % CLASSES)
    return Batch(torch.from_numpy(label), batch.index, batch.epoch, batch.valid, images=batch.images)


class Stream(tiny.Stream):
    batch_of = staticmethod(batch_at)


def train(engine, encoder, numbers) -> list[float]:
    me, run = process.start(), tiny.Recorder(numbers)
    loop.train(
        {"decoder": engine},
        lambda position: Stream(numbers, me.rank, me.world, position),
        partial(pretrain.step_fn, recipe=numbers, tokenize=tiny.tokenize, encoder=encoder),
        {"decoder": tiny.schedule_of(numbers)},
        run,
        loop.Limits(STEPS, numbers.batch // numbers.machine.micro_batch // me.world, numbers.report.max_skipped),
    )
    return run.losses


class Counted:
    """While on, counts the values that go into collectives of more than a few numbers, by torch's profiler."""

    def __enter__(self):
        self._profile = torch.profiler.profile(record_shapes=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error):
        self._profile.__exit__(*error)
        self.largest, self.values = 0, 0
        for event in self._profile.events():
            if event.name.startswith("c10d::"):
                sizes = [int(np.prod(shape)) for shape in event.input_shapes if shape]
                self.largest, self.values = max([self.largest, *sizes]), self.values + sum(sizes)


def scenario(stage: int, folder: Path) -> dict:
    numbers, config = numbers_of(), tiny.config_of(numbers_of(), stage)
    encoder = encoder_of(numbers)
    before = stored.weights_hash(encoder.state_dict())
    model = wrap.build(lambda: made.model_of(numbers), numbers.seed, config)
    engine = wrap.wrap(model, numbers, config, process.start().device)
    with Counted() as sent:
        losses = train(engine, encoder, numbers)
    checkpoint.save(folder / f"run_{stage}", STEPS, {"decoder": engine}, {"position": 0, "skipped": 0}, keep=1)
    base = state.base_of(engine)
    moments = [base.state[flat]["exp_avg"].numel() for flat in state.flats(engine)]
    return {
        "losses": losses,
        "encoder changed": stored.weights_hash(encoder.state_dict()) != before,
        "encoder gradients": sum(p.grad is not None or p.requires_grad for p in encoder.parameters()),
        "in the engine": sum(state.shape_of(p).numel() for p in engine.module.parameters()),
        "moments": sum(moments),
        "largest sent": sent.largest,
        "sent": sent.values,
    }


def main() -> None:
    me, folder = process.start(threads=1), Path(sys.argv[1])
    found = {str(stage): scenario(stage, folder) for stage in STAGES}
    (folder / f"rank_{me.rank}.json").write_text(json.dumps(found, indent=1))
    process.leave(0)


if __name__ == "__main__":
    main()
