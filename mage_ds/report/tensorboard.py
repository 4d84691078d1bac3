"""A thin writer of TensorBoard's event files."""

import functools
import threading
from pathlib import Path


class Board:
    """Scalars and pictures of one run under `folder`.

    purge_step: on resuming, the first step that will be written again; TensorBoard then hides what an earlier
    start wrote from that step on. None for a new run.
    Each method raises OSError where a file could not be written, perhaps by the call before it.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter  # two seconds, so only where something is written

        _say_it_once()
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)

    def scalars(self, step: int, figures: dict) -> None:
        """Numbers by name; what is no number (None, text) is left out."""
        for name, value in figures.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture) -> None:
        """picture: uint8 array (height, width, 3)."""
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


@functools.cache
def _say_it_once() -> None:
    """The writer's thread keeps its error for our next call: it must not print a traceback of it as well."""
    before = threading.excepthook

    def hook(failed) -> None:
        if not (issubclass(failed.exc_type, OSError) and type(failed.thread).__name__ == "_AsyncWriterThread"):
            before(failed)

    threading.excepthook = hook
