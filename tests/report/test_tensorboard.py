"""The event files, read back by TensorBoard itself."""

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mage_ds.report.tensorboard import Board


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}, purge_orphaned_data=True)
    return events.Reload()


def test_scalars_and_pictures(tmp_path):
    board = Board(tmp_path)
    board.scalars(3, {"step": 3, "loss": 2.5, "grad_norm": None, "skipped": 0, "note": "text"})
    board.picture(3, "samples", np.full((8, 6, 3), 200, np.uint8))
    board.close()
    events = read(tmp_path)
    assert sorted(events.Tags()["scalars"]) == ["loss", "skipped"]
    (loss,) = events.Scalars("loss")
    assert (loss.step, loss.value) == (3, 2.5)
    (picture,) = events.Images("samples")
    assert (picture.step, picture.width, picture.height) == (3, 6, 8)


def test_a_resumed_run_hides_what_it_writes_again(tmp_path):
    first = Board(tmp_path)
    for step in range(1, 11):
        first.scalars(step, {"loss": float(step)})
    first.close()
    second = Board(tmp_path, purge_step=6)
    for step in range(6, 9):
        second.scalars(step, {"loss": step + 0.5})
    second.close()
    points = [(e.step, e.value) for e in read(tmp_path).Scalars("loss")]
    assert points == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6.5), (7, 7.5), (8, 8.5)]
