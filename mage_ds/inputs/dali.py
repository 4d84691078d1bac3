"""From plans to batches: files become uint8 pictures on the device, by DALI, ahead of the step.

Whatever is random arrives as a number per picture (DALI's own random numbers follow the place in the batch), and
pictures are checked before they enter (a decode error costs DALI the batch and the pipeline).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mage_ds.inputs import augment, order, policy
from mage_ds.inputs.ahead import AHEAD, Ahead
from mage_ds.inputs.batch import Batch
from mage_ds.inputs.dali_decoder import PLACEHOLDER, Decoder, Frame, interleave
from mage_ds.inputs.quarantine import Unreadable, picture_size

__all__ = ["AHEAD", "PADDING", "Ahead", "evaluation", "held_out", "once", "planned", "stream"]
READERS = 8  # threads that read files: they wait for the disk or the network most of the time
PADDING = -1


def stream(catalog, *, seed, position, batch, micro_batch, rank, world, inputs, device, quarantine, views=1) -> Ahead:
    """Endless training stream of this rank, in the order of `order.plans`. `inputs` is the recipe's section.

    Returns an iterator of Batch with images (micro_batch, views, 3, image_size, image_size).
    Raises while iterating: UserError when the quarantine's limit is exceeded.
    """
    share = {"batch": batch, "micro_batch": micro_batch, "rank": rank, "world": world}
    return planned(
        catalog,
        order.plans(catalog.n, seed=seed, position=position, **share),
        seed=seed,
        batch=micro_batch,
        inputs=inputs,
        device=device,
        quarantine=quarantine,
        views=views,
    )


def planned(catalog, plans, *, seed, batch, inputs, device, quarantine, views=1) -> Ahead:
    """Pictures of given (epoch, index), int64 (batch,) each, cut as the training stream cuts them in that epoch.

    index -1: padding. Returns an iterator of Batch, one for each of `plans`.
    """
    size, augmentation = inputs.image_size, inputs.augmentation

    def frame(sizes, epoch, index, view):
        key = {"epoch": epoch, "index": index, "view": view, "seed": seed}
        anchor, shape, flip = augment.boxes(sizes, augmentation=augmentation, crop=inputs.crop, **key)
        if augmentation.scale is None:
            resized, start = augment.centre(shape, size, size)
        else:
            resized, start = np.full_like(shape, size), np.zeros_like(anchor)
        return Frame(anchor, shape, resized, start, flip, augment.colours(inputs.colour, size, **key))

    decoder = Decoder(size, inputs.interpolation, device, batch * views, inputs.colour)
    batches = _batches(catalog, plans, frame, views, decoder, quarantine)
    return Ahead(policy.changed(batches, inputs, seed, decoder) if inputs.policy else batches)


def held_out(catalog, plans, *, batch, inputs, device, quarantine) -> Ahead:
    """As `planned`, but every epoch shows the same: short side to evaluation_resize, centre crop of image_size."""
    size, resize = inputs.image_size, inputs.evaluation_resize

    def frame(sizes, epoch, index, view):
        anchor, shape = augment.whole(sizes)
        resized, start = augment.centre(shape, resize, size)
        flip, colours = np.zeros(len(sizes), dtype=bool), augment.colours(None, size, epoch=epoch, index=index)
        return Frame(anchor, shape, resized, start, flip, colours)

    decoder = Decoder(size, inputs.interpolation, device, batch)
    return Ahead(_batches(catalog, plans, frame, 1, decoder, quarantine))


def evaluation(catalog, indices, *, batch, inputs, device, quarantine) -> Ahead:
    """Every picture of `indices` once, in order, as `held_out` shows it.

    Returns a finite iterator of Batch with `batch` pictures in one view; the last one is filled up with padding
    (valid = 0, index = -1).
    """
    plans = once(indices, batch)
    return held_out(catalog, plans, batch=batch, inputs=inputs, device=device, quarantine=quarantine)


def once(indices, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(epoch 0, index) of the indices in order, `batch` at a time, the last ones filled up with PADDING."""
    indices = np.asarray(indices, dtype=np.int64)
    for index in np.concatenate([indices, np.full(-len(indices) % batch, PADDING)]).reshape(-1, batch):
        yield np.zeros(batch, dtype=np.int64), index


# --- from plans to batches


@dataclass
class _File:
    data: np.ndarray
    size: tuple[int, int]
    problem: str | None = None


_NOTHING = _File(PLACEHOLDER, (1, 1))


def _load(catalog, i: int) -> _File:
    if i == PADDING:
        return _NOTHING
    try:
        data = catalog.read(i)
        return _File(np.frombuffer(data, dtype=np.uint8), picture_size(data))
    except Unreadable as error:
        return _File(PLACEHOLDER, (1, 1), str(error))
    except OSError as error:
        return _File(PLACEHOLDER, (1, 1), f"cannot be read: {error.strerror or error}")


def _batches(catalog, plans, frame, views, decoder, quarantine) -> Iterator[Batch]:
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        for epoch, index, files in _read_ahead(pool, catalog, plans):
            yield _batch(catalog, epoch, index, files, frame, views, decoder, quarantine)


def _read_ahead(pool, catalog, plans):
    """Files of a batch; those of the next one are being read meanwhile."""
    waiting = deque()
    for epoch, index in plans:
        waiting.append((epoch, index, [pool.submit(_load, catalog, int(i)) for i in index]))
        if len(waiting) > 1:
            epoch, index, files = waiting.popleft()
            yield epoch, index, [file.result() for file in files]
    for epoch, index, files in waiting:
        yield epoch, index, [file.result() for file in files]


def _batch(catalog, epoch, index, files, frame, views, decoder, quarantine) -> Batch:
    data = [file.data for file in files for _ in range(views)]
    sizes = np.array([file.size for file in files])
    frames = interleave([frame(sizes, epoch, index, view) for view in range(views)])
    valid = np.array([file.data is not PLACEHOLDER for file in files])
    frames.blank(np.repeat(~valid, views), decoder.size)

    images, failures = decoder(data, frames)
    problems = [file.problem for file in files]
    for row, reason in failures.items():
        problems[row // views], valid[row // views] = reason, False
    for i, reason in zip(index, problems, strict=True):
        if reason:
            quarantine.add(catalog.name(int(i)), reason)

    labels = [catalog.label(int(i)) if i != PADDING else -1 for i in index]
    return Batch(
        images=images.unflatten(0, (len(files), views)),
        labels=decoder.to_device(np.array(labels, dtype=np.int64)),
        index=index,
        epoch=epoch,
        valid=decoder.to_device(valid.astype(np.float32)),
    )
