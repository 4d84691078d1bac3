"""DALI's pipeline: encoded bytes, boxes and flips become uint8 pictures on the device."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np

from mage_ds.errors import UserError
from mage_ds.inputs import augment, dali_colour

THREADS = {"cpu": 2, "cuda": 4}  # DALI's own on the host
PLACEHOLDER = np.frombuffer(b"P6\n1 1\n255\n\x80\x80\x80", dtype=np.uint8)


@dataclass
class Frame:
    """What is done to each of B upright pictures: cut a box, resize it, cut a square, mirror, change its colours.

    Pairs are x, y; colours: as augment.colours.
    """

    anchor: np.ndarray
    shape: np.ndarray
    resized: np.ndarray
    start: np.ndarray
    flip: np.ndarray
    colours: np.ndarray

    def rows(self, rows) -> Frame:
        """A copy of some rows."""
        return Frame(*(column[rows].copy() for column in vars(self).values()))

    def blank(self, rows, size: int) -> None:
        """The placeholder's frame in some rows."""
        self.anchor[rows], self.shape[rows], self.resized[rows] = 0, 1, size
        self.start[rows], self.flip[rows], self.colours[rows] = 0, False, augment.UNCHANGED


def interleave(frames: list[Frame]) -> Frame:
    """Frames of B pictures in V views as one of B * V rows, a picture's views side by side."""
    columns = zip(*(vars(frame).values() for frame in frames), strict=True)
    return Frame(*(np.stack(column, axis=1).reshape(-1, *column[0].shape[1:]) for column in columns))


def _dali():
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise UserError(
            f"nvidia.dali cannot be imported ({error}); install it with `pip install nvidia-dali-cuda130` "
            "(or -cuda120; both run without a GPU too)"
        ) from error
    return fn, pipeline_def, types


class Decoder:
    """Encoded pictures -> uint8 (B, 3, size, size) on the device, with a pipeline that is rebuilt after failures."""

    def __init__(self, size: int, interpolation: str, device, most: int, colour=None):
        """most: pictures of a batch; colour: the recipe's section, or None."""
        import torch

        self.size, self.interpolation, self.most, self.colour = size, interpolation, most, colour
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
            images = fn.crop_mirror_normalize(
                images,
                crop=(size, size),
                crop_pos_x=start[0],
                crop_pos_y=start[1],
                mirror=mirror,
                dtype=types.UINT8,
                output_layout="CHW",
            )
            return images if self.colour is None else dali_colour.changed(images, self.colour, self._cuda)

        return pipeline(
            batch_size=self.most,
            num_threads=THREADS[self.device.type],
            device_id=self.device.index if self._cuda else None,
            prefetch_queue_depth=1,  # one run, one batch: a batch can be run again after a failure
        )

    def __call__(self, data: list[np.ndarray], frame: Frame):
        """Returns: the pictures as a fresh tensor; {row: reason} of those that do not decode (placeholders)."""
        failures = {}
        try:
            output = self._run(data, frame)
        except RuntimeError as error:  # says neither which picture nor always why, and the batch is lost
            failures = self._culprits(data, frame, error)
            data = [PLACEHOLDER if k in failures else one for k, one in enumerate(data)]
            frame.blank(list(failures), self.size)
            output = self._run(data, frame)
        return self._copy(output), failures

    def _run(self, data, frame: Frame):
        room = np.maximum(frame.resized - self.size, 1)  # DALI takes the crop's place as a share of the room left
        colours = {} if self.colour is None else {"colours": frame.colours.astype(np.float32)}
        (output,) = self._pipeline.run(
            encoded=data,
            anchor=frame.anchor.astype(np.int32),
            shape=frame.shape.astype(np.int32),
            resized=frame.resized[:, ::-1].astype(np.float32),  # height, width
            start=(frame.start / room).astype(np.float32),
            mirror=frame.flip.astype(np.int32),
            **colours,
        )
        return output

    def _culprits(self, data, frame: Frame, error: RuntimeError) -> dict[int, str]:
        """Decodes one by one. Raises the error where no picture is to blame: not even the placeholder passes."""
        blank = frame.rows([0])
        blank.blank([0], self.size)
        self._pipeline = self._build()
        try:
            self._run([PLACEHOLDER], blank)
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

    def to_host(self, images) -> np.ndarray:
        """A tensor of the device's, which this has made."""
        import torch

        with torch.cuda.stream(self._stream) if self._cuda else contextlib.nullcontext():
            return images.cpu().numpy()

    def to_device(self, array: np.ndarray):
        import torch

        with torch.cuda.stream(self._stream) if self._cuda else contextlib.nullcontext():
            return torch.from_numpy(array).to(self.device)


def _short(error: RuntimeError) -> str:
    """The telling line of DALI's page-long message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [k for k, line in enumerate(lines) if line.startswith("encountered:")]
    return lines[after[0] + 1] if after and after[0] + 1 < len(lines) else lines[0]
