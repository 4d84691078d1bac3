"""A thread that writes while the device computes, and what either has waited for the other."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from mage_ds.report.progress import duration

_AHEAD = 2  # of what is put: that wait for the writer at most
_PNG_THREADS = 4  # PNG takes about 20 ms a picture of 256 px


class Writer:
    """Calls write(*what is put, apply) in a thread, one after the other: the device goes on meanwhile.

    An error there is raised by the next `put` or `flush`. drawing: seconds in which pictures were drawn, of which the
    shares of waiting are told; whoever draws adds to it.
    """

    def __init__(self, write: Callable):
        self._write, self._pending = write, deque()
        self._thread = ThreadPoolExecutor(1, "writer")
        self._helpers = ThreadPoolExecutor(_PNG_THREADS, "png")  # PNG is compressed outside of Python's lock
        self._stood = self._busy = self.drawing = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for pool in (self._thread, self._helpers):
            pool.shutdown(cancel_futures=True)

    def put(self, *what) -> None:
        self._pending.append(self._thread.submit(self._timed, what))
        self._settle(_AHEAD)

    def flush(self) -> None:
        """Until everything is written."""
        self._settle(0)

    def summary(self, made: int, seconds: float) -> str:
        """The closing line of a worker that made so many pictures in so long a time, waiting and joining included."""
        line = f"{made} pictures in {duration(seconds)}"
        if not self.drawing:
            return line
        stood, busy = (min(1, share / self.drawing) for share in (self._stood, self._busy))
        return (
            f"{line}; drawing took {duration(self.drawing)}, {made / self.drawing:.3g} pictures/s, in which the device "
            f"waited {stood:.1%} for writing, writing {1 - busy:.1%} for the device"
        )

    def _settle(self, most: int) -> None:
        began = time.perf_counter()
        while len(self._pending) > most:
            self._pending.popleft().result()
        self._stood += time.perf_counter() - began

    def _timed(self, what: tuple) -> None:
        began = time.perf_counter()
        self._write(*what, self._helpers.map)
        self._busy += time.perf_counter() - began
