"""Ends a training in which a rank makes no progress, after every rank has written down where it stands.

A thread of each rank looks at the time of its last beat, and at the store: who notices tells the others, each
writes the stacks of all its threads, rank 0 says in one line where the ranks are, and all end. A timer in C stands
behind that thread: it writes the stacks and ends the process where Python itself is held up. The same happens where
another rank of the host has ended: a collective may wait for it for ever, and the launcher kills one after the other.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from mage_ds.engine import launcher, process
from mage_ds.errors import EXIT_BUG, Stopped, UserError

_TICK_S = 1.0
_STARTING = 3  # times as long until the first step is done: listing, loading, compiling, the first kernels
_LEFT_S = 20.0  # after the end of another rank of the host; the launcher kills after 30 s
_ANSWER_S = 5.0  # that a rank has to say where it is, once one has noticed
_PACKAGE = f"{Path(__file__).parent.parent}{os.sep}"
_END_S = 20.0  # from noticing to the end, whatever blocks: a disk, a pipe, the store

_watch: "_Watch | None" = None


@contextmanager
def armed(seconds: int):
    """Within, this process must beat at least every `seconds`, three times that until its first step is done.

    Otherwise it ends with exit code 1, at most 20 s after that time. Stacks go to the screen until `write_to`.
    """
    global _watch
    _watch, kept = _Watch(seconds), False
    _watch.start()
    try:
        yield
    except BaseException as error:
        # The interpreter's way out of a bug leads through the process group, and may hang as well.
        kept = process.start().world > 1 and not isinstance(error, Stopped | UserError | KeyboardInterrupt)
        raise
    finally:
        if not kept:
            _watch.stop()
            _watch = None


def write_to(folder: Path, failed: Callable[[str], None]) -> None:
    """From here on the stacks go to `folder`/stack_rank_N.txt; failed(reason) writes down how the run ended."""
    if _watch:
        _watch.write_to(folder, failed)


def beat(steady: bool = False) -> None:
    """Progress: a micro-batch, a held-out batch, a file. steady: the first step of this start is done."""
    if _watch is None:
        return
    _watch.last = time.monotonic()
    if steady and not _watch.steady:
        _watch.steady = True
        _watch.set_timer()
        _outwait(2 * _watch.seconds + 600)


def _outwait(seconds: float) -> None:
    """Collectives must not give up before the watch does: NCCL's would end the process after 10 minutes."""
    import torch

    for group in list(torch.distributed.distributed_c10d._world.pg_map):  # DeepSpeed's own too: no public list
        torch.distributed.set_timeout(timedelta(seconds=seconds), group)


class _Watch:
    def __init__(self, seconds: int):
        self.seconds, self.last, self.steady = seconds, time.monotonic(), False
        self._me, self._called, self._left = process.start(), None, None
        self._lock, self._stopped = threading.Lock(), False  # no timer may be set after the end
        self._path, self._file, self._failed = None, sys.__stderr__, None
        if self._me.world > 1:
            self._store = self._me.store.clone()  # a connection of its own: the other one may be waiting

    def start(self) -> None:
        self.set_timer()
        threading.Thread(target=self._wait, name="hang watch", daemon=True).start()
        if self._me.world > 1:
            threading.Thread(target=self._listen, name="hang listener", daemon=True).start()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            faulthandler.cancel_dump_traceback_later()
        if self._path:
            self._file.close()
            with suppress(OSError):
                if self._path.stat().st_size == 0:
                    self._path.unlink()

    def write_to(self, folder: Path, failed: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.last = time.monotonic()
        self._failed, self._path = failed, folder / f"stack_rank_{self._me.rank}.txt"
        # Open from now on: the timer in C cannot do it.
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115
        self.set_timer()

    # --- waiting ---------------------------------------------------------------------------------------------

    @property
    def _limit(self) -> float:
        return self.seconds * (1 if self.steady else _STARTING)

    def set_timer(self, seconds: float | None = None) -> None:
        # Later than the others' threads notice: a rank that is gone would give them another error to die of.
        with self._lock:
            if not self._stopped:
                faulthandler.dump_traceback_later(seconds or self._limit + _END_S, exit=True, file=self._file)

    def _wait(self) -> None:
        while not self._stopped:
            self.set_timer()
            time.sleep(_TICK_S)  # not returned from where another thread keeps the interpreter to itself
            why = self._why()
            if why and not self._stopped:
                self._end(why)

    def _why(self) -> str | None:
        """Why this process must end, None where it must not."""
        now = time.monotonic()
        if self._called:
            return self._called
        if now - self.last > self._limit:
            return f"no progress for {self._limit} s (machine.hang_timeout)"
        fellows = launcher.fellows()
        self._left = None if fellows is None or fellows >= self._me.local_world else self._left or now
        return "another rank has ended" if self._left and now - self._left > _LEFT_S else None

    def _listen(self) -> None:
        with suppress(Exception):  # rank 0 is gone: of that the launcher and the collectives tell
            while not (self._stopped or self._called):
                if self._store.check(["hang"]):
                    self._called = self._store.get("hang").decode()
                time.sleep(_TICK_S)

    # --- ending ----------------------------------------------------------------------------------------------

    def _end(self, why: str) -> None:
        self.set_timer(_END_S)
        silent, where = time.monotonic() - self.last, _where()
        self._file.write(f"\n{time.strftime('%F %T')} {why}; {silent:.0f} s in {where}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        if not _within(2 * _ANSWER_S, lambda: self._confer(why, where)):
            alone = "" if self._me.first else "; rank 0 does not answer"
            self._say(why, f"rank {self._me.rank} in {where}{alone}")
        os._exit(EXIT_BUG)

    def _confer(self, why: str, where: str) -> bool:
        """Tell the others; rank 0 speaks for all. False where this rank has to speak for itself."""
        if self._me.world == 1:
            return False
        self._store.set(f"hang/{self._me.rank}", where)
        self._store.set("hang", why)
        if not self._me.first:
            self._store.wait(["hang/said"], timedelta(seconds=2 * _ANSWER_S))
            return True
        time.sleep(_ANSWER_S)
        keys = [f"hang/{rank}" for rank in range(self._me.world)]
        answers = [self._store.get(key).decode() if self._store.check([key]) else None for key in keys]
        self._say(why, _summary(answers))
        self._store.set("hang/said", "1")
        time.sleep(_TICK_S)  # the store is rank 0's: let the others read before it goes
        return True

    def _say(self, why: str, where: str) -> None:
        stacks = self._path.with_name("stack_rank_*.txt") if self._path else "above"
        reason = f"{why}: {where}; stacks: {stacks}"
        with suppress(OSError):
            os.write(2, f"mage-ds: error: {reason}\n".encode())
        if self._failed:
            self._failed(reason)


def _summary(answers: list[str | None]) -> str:
    """One line of where the ranks are (None: no answer), the fewest first: they are the ones to look at."""
    places: dict[str | None, list[int]] = {}
    for rank, place in enumerate(answers):
        places.setdefault(place, []).append(rank)
    parts = []
    for place, ranks in sorted(places.items(), key=lambda item: (item[0] is not None, len(item[1]))):
        some = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
        parts.append(f"rank {some} {'does not answer' if place is None else f'in {place}'}")
    return "; ".join(parts[:4])


def _where() -> str:
    """The innermost call of the main thread, and the innermost of ours."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    named = []
    while frame:
        code = frame.f_code
        ours = code.co_filename.startswith(_PACKAGE)
        if not named or ours:
            named.append(f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})")
        if ours:
            break
        frame = frame.f_back
    return " of ".join(named) or "no Python code"


def _within(seconds: float, action: Callable[[], bool]) -> bool:
    """action() in a thread that may block for ever; False where it raises or takes longer."""
    done = []

    def call() -> None:
        with suppress(Exception):
            done.append(action())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(done and done[0])
