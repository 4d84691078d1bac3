"""A background thread that makes batches ahead of the step that takes them."""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Iterator

from mage_ds.inputs.batch import Batch

AHEAD = 3  # finished batches that wait for the step


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
