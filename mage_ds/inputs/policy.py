"""timm's random augmentation of cropped pictures, in processes of their own beside the training step.

Every picture's policy is drawn anew from a seed of (seed, view, epoch, sample), so that neither the process which
changes it nor the order matters. A worker is this file as a program that reads from its parent's pipe: it ends where
the pipe does, however the parent died, and nobody's threads, GPU or open files are copied into it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import random
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from mage_ds import keyed
from mage_ds.errors import UserError

if TYPE_CHECKING:
    from mage_ds.inputs.batch import Batch
    from mage_ds.inputs.dali_decoder import Decoder

MOST = 12  # workers of a rank: more do not change pictures faster than they are decoded
_AHEAD = 2  # batches that workers have in hand


def workers() -> int:
    """Processes for one rank: this host's cores by its ranks, but one for the step."""
    ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(MOST, max(1, len(os.sched_getaffinity(0)) // ranks - 1))


def changed(batches: Iterator[Batch], inputs, seed: int, decoder: Decoder) -> Iterator[Batch]:
    """Batches of pictures, each picture changed as `inputs.policy` says; two more batches are being changed meanwhile.

    Raises UserError where a worker was killed, and RuntimeError, with what it says, for any other failure in one.
    """
    with contextlib.closing(batches), _Pool(inputs, workers()) as pool:
        waiting: deque[tuple[Batch, list[Future]]] = deque()
        for batch in batches:
            images = decoder.to_host(batch.images.flatten(0, 1))
            seeds = seeds_of(seed, batch.epoch, batch.index, batch.images.shape[1])
            waiting.append((batch, pool.submit(images, seeds)))
            if len(waiting) > _AHEAD:
                yield _finished(*waiting.popleft(), decoder)
        while waiting:
            yield _finished(*waiting.popleft(), decoder)


def _finished(batch: Batch, parts: list[Future], decoder: Decoder) -> Batch:
    images = np.concatenate([part.result() for part in parts])
    batch.images = decoder.to_device(images.reshape(batch.images.shape))
    return batch


def seeds_of(seed: int, epoch: np.ndarray, index: np.ndarray, views: int) -> list[int]:
    """A seed for each picture of a batch in its views, a picture's views side by side."""
    pairs = zip(epoch.tolist(), index.tolist(), strict=True)
    return [keyed.seed_of(seed, f"policy/{view}", *pair) for pair, view in product(pairs, range(views))]


# --- the parent's side


class _Pool:
    """Workers, and a thread for each that writes to it and waits for its answer."""

    def __init__(self, inputs, count: int):
        told = (inputs.policy, inputs.image_size, inputs.interpolation)
        self._workers = [_start(told) for _ in range(count)]
        self._idle: queue.SimpleQueue = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="policy")

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error) -> None:
        for worker in self._workers:
            worker.kill()  # it holds nothing that must be put down
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                with contextlib.suppress(OSError):  # what was not sent yet goes nowhere
                    pipe.close()

    def submit(self, images: np.ndarray, seeds: list[int]) -> list[Future]:
        """uint8 (B, 3, H, W), changed by as many workers as there are: a part from each, in order."""
        parts = np.array_split(np.arange(len(seeds)), min(len(seeds), len(self._workers)))
        return [self._threads.submit(self._ask, images[part], [seeds[k] for k in part]) for part in parts]

    def _ask(self, images: np.ndarray, seeds: list[int]) -> np.ndarray:
        worker = self._idle.get()
        try:
            _send(worker.stdin, (images, seeds))
            answer = pickle.load(worker.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise _dead(worker) from None
        finally:
            self._idle.put(worker)
        if isinstance(answer, str):
            raise RuntimeError(f"inputs.policy failed in its worker:\n{answer}")
        return answer


def _start(told: tuple) -> subprocess.Popen:
    pipe = subprocess.PIPE
    places = os.pathsep.join(place or os.getcwd() for place in sys.path)
    environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen([sys.executable, "-m", __name__], stdin=pipe, stdout=pipe, env=environment)
    with contextlib.suppress(OSError):  # one that died at once is told of where it is asked
        _send(worker.stdin, told)
    return worker


def _send(pipe, what) -> None:
    pickle.dump(what, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _dead(worker: subprocess.Popen) -> Exception:
    code = worker.wait()
    if code < 0:
        name = signal.Signals(-code).name
        return UserError(
            f"a worker of inputs.policy was ended by {name}, as a system out of memory does; make room, or leave the "
            "policy out (inputs.policy=null)"
        )
    return RuntimeError(f"a worker of inputs.policy ended with exit code {code}; what it said stands above")


# --- the worker's side


def transform(policy: str, image_size: int, interpolation: str):
    """timm's policy for PIL pictures, with the settings that timm's own input pipeline gives it."""
    from timm.data.auto_augment import posterize, rand_augment_transform
    from timm.data.constants import IMAGENET_DEFAULT_MEAN
    from timm.data.transforms import str_to_pil_interp

    settings = {
        "translate_const": int(image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in IMAGENET_DEFAULT_MEAN),
        "interpolation": str_to_pil_interp({"linear": "bilinear", "cubic": "bicubic"}[interpolation]),
    }
    made = rand_augment_transform(policy, settings)
    for operation in made.ops:
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return made


def _posterize(image, bits: int, **settings):
    """timm's, which at full magnitude asks for 0 bits: black, which Pillow 13 refuses to make."""
    from PIL import Image
    from timm.data.auto_augment import posterize

    return posterize(image, bits, **settings) if bits else Image.new(image.mode, image.size)


def _work(pictures, images: np.ndarray, seeds: list[int]) -> np.ndarray:
    from PIL import Image

    done = np.empty_like(images)
    for k, seed in enumerate(seeds):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # timm draws from both
        done[k] = np.asarray(pictures(Image.fromarray(images[k].transpose(1, 2, 0).copy()))).transpose(2, 0, 1)
    return done


def _serve(requests, answers) -> None:
    pictures = transform(*pickle.load(requests))
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = _work(pictures, *request)
        except Exception:
            answer = traceback.format_exc()
        _send(answers, answer)


def _main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they are meant for the training, which may have steps to finish
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    with contextlib.suppress(BrokenPipeError, EOFError):
        _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main()
