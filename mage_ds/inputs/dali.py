"""DALI pipelines: encoded bytes, boxes and flips become uint8 pictures on the device, ahead of the step.

Whatever is random arrives as a number per picture (DALI's own random numbers follow the place in the batch), and
pictures are checked before they enter (a decode error costs DALI the batch and the pipeline).
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mage_ds.errors import UserError
from mage_ds.inputs import augment, order
from mage_ds.inputs.batch import Batch
from mage_ds.inputs.quarantine import Unreadable, picture_size

AHEAD = 3  # finished batches that wait for the step
READERS = 8  # threads that read files: they wait for the disk or the network most of the time
DECODERS = {"cpu": 2, "cuda": 4}  # DALI's threads on the host
PADDING = -1
_PLACEHOLDER = np.frombuffer(b"P6\n1 1\n255\n\x80\x80\x80", dtype=np.uint8)


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
        anchor, shape, flip = augment.boxes(
            sizes, epoch=epoch, index=index, view=view, seed=seed, augmentation=augmentation
        )
        if augmentation.scale is None:
            return _Frame(anchor, shape, *augment.centre(shape, size, size), flip)
        return _Frame(anchor, shape, np.full_like(shape, size), np.zeros_like(anchor), flip)

    decoder = _Decoder(size, inputs.interpolation, device, batch * views)
    return Ahead(_batches(catalog, plans, frame, views, decoder, quarantine))


def held_out(catalog, plans, *, batch, inputs, device, quarantine) -> Ahead:
    """As `planned`, but every epoch shows the same: short side to evaluation_resize, centre crop of image_size."""
    size, resize = inputs.image_size, inputs.evaluation_resize

    def frame(sizes, epoch, index, view):
        anchor, shape = augment.whole(sizes)
        return _Frame(anchor, shape, *augment.centre(shape, resize, size), np.zeros(len(sizes), dtype=bool))

    decoder = _Decoder(size, inputs.interpolation, device, batch)
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
class _Frame:
    """What is done to each of B upright pictures: cut a box, resize it, cut a square, mirror. Pairs are x, y."""

    anchor: np.ndarray
    shape: np.ndarray
    resized: np.ndarray
    start: np.ndarray
    flip: np.ndarray

    def rows(self, rows) -> _Frame:
        """A copy of some rows."""
        return _Frame(*(column[rows].copy() for column in vars(self).values()))

    def blank(self, rows, size: int) -> None:
        """The placeholder's frame in some rows."""
        self.anchor[rows], self.shape[rows], self.resized[rows] = 0, 1, size
        self.start[rows], self.flip[rows] = 0, False


@dataclass
class _File:
    data: np.ndarray
    size: tuple[int, int]
    problem: str | None = None


_NOTHING = _File(_PLACEHOLDER, (1, 1))


def _load(catalog, i: int) -> _File:
    if i == PADDING:
        return _NOTHING
    try:
        data = catalog.read(i)
        return _File(np.frombuffer(data, dtype=np.uint8), picture_size(data))
    except Unreadable as error:
        return _File(_PLACEHOLDER, (1, 1), str(error))
    except OSError as error:
        return _File(_PLACEHOLDER, (1, 1), f"cannot be read: {error.strerror or error}")


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
    frames = _interleave([frame(sizes, epoch, index, view) for view in range(views)])
    valid = np.array([file.data is not _PLACEHOLDER for file in files])
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


def _interleave(frames: list[_Frame]) -> _Frame:
    """Frames of B pictures in V views as one of B * V rows, a picture's views side by side."""
    columns = zip(*(vars(frame).values() for frame in frames), strict=True)
    return _Frame(*(np.stack(column, axis=1).reshape(-1, *column[0].shape[1:]) for column in columns))


# --- DALI


def _dali():
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise UserError(
            f"nvidia.dali cannot be imported ({error}); install it with `pip install nvidia-dali-cuda130` "
            "(or -cuda120; both run without a GPU too)"
        ) from error
    return fn, pipeline_def, types


class _Decoder:
    """Encoded pictures -> uint8 (B, 3, size, size) on the device, with a pipeline that is rebuilt after failures."""

    def __init__(self, size: int, interpolation: str, device, most: int):
        import torch

        self.size, self.interpolation, self.most = size, interpolation, most
        self.device = torch.device(device)
        self._cuda = self.device.type == "cuda"
        if self._cuda and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        # Copies leave DALI's buffers on a stream of their own, so as not to queue behind the training step.
        self._stream = torch.cuda.Stream(self.device) if self._cuda else None
        self._pipeline = self._build()

    def _build(self):
        fn, pipeline_def, types = _dali()
        size = self.size
        kind = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}[self.interpolation]

        @pipeline_def
        def pipeline():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            resized = fn.external_source(name="resized", dtype=types.FLOAT, ndim=1)
            start = fn.external_source(name="start", dtype=types.FLOAT, ndim=1)
            mirror = fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
            where = {"axis_names": "WH"}
            if self._cuda:  # the one place where GPU and CPU differ for DALI
                # Fancy, as the CPU does it: chroma upsampled otherwise makes pictures 3 of 255 apart on average. Older
                # nvJPEG cannot do so within a box only, so the whole picture is decoded, then cut.
                images = fn.decoders.image(encoded, device="mixed", output_type=types.RGB, jpeg_fancy_upsampling=True)
                images = fn.slice(images, anchor, shape, **where)
            else:
                images = fn.decoders.image_slice(encoded, anchor, shape, output_type=types.RGB, **where)
            images = fn.resize(images, size=resized, interp_type=kind, antialias=True)
            return fn.crop_mirror_normalize(
                images,
                crop=(size, size),
                crop_pos_x=start[0],
                crop_pos_y=start[1],
                mirror=mirror,
                dtype=types.UINT8,
                output_layout="CHW",
            )

        return pipeline(
            batch_size=self.most,
            num_threads=DECODERS[self.device.type],
            device_id=self.device.index if self._cuda else None,
            prefetch_queue_depth=1,  # one run, one batch: a batch can be run again after a failure
        )

    def __call__(self, data: list[np.ndarray], frame: _Frame):
        """Returns: the pictures as a fresh tensor; {row: reason} of those that do not decode (placeholders)."""
        failures = {}
        try:
            output = self._run(data, frame)
        except RuntimeError as error:  # says neither which picture nor always why, and the batch is lost
            failures = self._culprits(data, frame, error)
            data = [_PLACEHOLDER if k in failures else one for k, one in enumerate(data)]
            frame.blank(list(failures), self.size)
            output = self._run(data, frame)
        return self._copy(output), failures

    def _run(self, data, frame: _Frame):
        room = np.maximum(frame.resized - self.size, 1)  # DALI takes the crop's place as a share of the room left
        (output,) = self._pipeline.run(
            encoded=data,
            anchor=frame.anchor.astype(np.int32),
            shape=frame.shape.astype(np.int32),
            resized=frame.resized[:, ::-1].astype(np.float32),  # height, width
            start=(frame.start / room).astype(np.float32),
            mirror=frame.flip.astype(np.int32),
        )
        return output

    def _culprits(self, data, frame: _Frame, error: RuntimeError) -> dict[int, str]:
        """Decodes one by one. Raises the error where no picture is to blame: not even the placeholder passes."""
        blank = frame.rows([0])
        blank.blank([0], self.size)
        self._pipeline = self._build()
        try:
            self._run([_PLACEHOLDER], blank)
        except RuntimeError:
            raise error from None
        failures = {}
        for k, one in enumerate(data):
            try:
                self._run([one], frame.rows([k]))
            except RuntimeError as reason:
                failures[k] = f"cannot be decoded: {_short(reason)}"
                self._pipeline = self._build()
        if not failures:
            raise error
        return failures

    def _copy(self, output):
        """Out of DALI's buffers, which the next run overwrites."""
        import torch

        with torch.cuda.stream(self._stream) if self._cuda else contextlib.nullcontext():
            images = torch.from_dlpack(output.as_tensor()).clone()
        if self._cuda:
            self._stream.synchronize()
        return images

    def to_device(self, array: np.ndarray):
        import torch

        with torch.cuda.stream(self._stream) if self._cuda else contextlib.nullcontext():
            return torch.from_numpy(array).to(self.device)


def _short(error: RuntimeError) -> str:
    """The telling line of DALI's page-long message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [k for k, line in enumerate(lines) if line.startswith("encountered:")]
    return lines[after[0] + 1] if after and after[0] + 1 < len(lines) else lines[0]


# --- ahead of the step


class Ahead:
    """Iterator over what a background thread makes ahead; its exceptions surface here, in order.

    waited: seconds that the consumer has waited so far. The thread ends with close(), with garbage collection of
    this object and at interpreter exit.
    """

    def __init__(self, source: Iterator[Batch]):
        self.waited = 0.0
        self._ready, self._room, stop = queue.SimpleQueue(), threading.Semaphore(AHEAD), threading.Event()
        work = (source, self._ready, self._room, stop)
        thread = threading.Thread(target=_work, args=work, name="inputs", daemon=True)
        # The thread knows nothing of this object, or it would never be collected.
        self._finish = weakref.finalize(self, _finish, thread, self._room, stop)
        atexit.register(self._finish)  # finalize's own hook runs after DALI's, which takes the pipeline away
        thread.start()

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Batch:
        if not self._finish.alive:
            raise StopIteration
        begin = time.perf_counter()
        batch = self._ready.get()
        self.waited += time.perf_counter() - begin
        self._room.release()
        if isinstance(batch, BaseException):
            self.close()
            raise batch
        _hand_over(batch)
        return batch

    def close(self) -> None:
        """Ends the thread; further next() raise StopIteration."""
        self._finish()


def _hand_over(batch: Batch) -> None:
    """Tells the allocator that the consumer's stream now uses what the copying stream allocated."""
    for value in vars(batch).values():
        if getattr(value, "is_cuda", False):
            import torch

            value.record_stream(torch.cuda.current_stream(value.device))


def _work(source, ready, room, stop) -> None:
    try:
        while room.acquire() and not stop.is_set():
            ready.put(next(source))  # its end, StopIteration, is passed on like any error
    except BaseException as error:
        ready.put(error)
    finally:
        source.close()


def _finish(thread, room, stop) -> None:
    stop.set()
    room.release()
    if thread is not threading.current_thread():  # the collector may run in any thread
        thread.join(timeout=10)
