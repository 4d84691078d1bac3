"""Films of a decoding, by ffmpeg: a frame an iteration, masked places covered."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from mage_ds.errors import UserError
from mage_ds.report import grids

_FPS = 4
_HELD_S = 1  # how long the last frame stays


def film(out: Path, states: Iterable[tuple], draw: Callable, columns: int | None = None) -> None:
    """Writes out/movie.mp4, .gif and .webp: the grid of some pictures, as it fills.

    Args: states: (tokens int (B, N), masked bool (B, N)) of each frame, arrays or tensors, such as `decode` gives to
    `on_step`; draw: tokens -> uint8 (B, H, W, 3); columns: of the grid.
    Raises: UserError, one line, where ffmpeg is missing or fails.
    """
    write((_frame(draw(tokens), masked, columns) for tokens, masked in states), out / "movie", _FPS)


def _frame(images: np.ndarray, masked, columns: int | None) -> np.ndarray:
    masked = masked.cpu().numpy() if hasattr(masked, "cpu") else masked
    return grids.grid(grids.mask_overlay(images, masked), columns)


def write(frames: Iterable[np.ndarray], path: Path, fps: float = _FPS) -> None:
    """Writes path.mp4 (H.264, yuv420p, sides made even by white), path.gif and path.webp (both without end).

    frames: uint8 (H, W, 3), one or more of one size, read once; the last one is held for a second.
    Raises: UserError, one line, where ffmpeg is missing or fails; no half-written film is left.
    """
    require()
    frames = iter(frames)
    first = next(frames)
    parts = {kind: path.with_name(f".{path.name}.{os.getpid()}.part.{kind}") for kind in ("mp4", "gif", "webp")}
    process = _start(first.shape, parts, fps)
    try:
        for frame in _held(first, frames, round(_HELD_S * fps)):
            process.stdin.write(np.ascontiguousarray(frame).data)
    except BrokenPipeError:  # it has ended, and said why
        pass
    except BaseException:
        process.kill()
        raise
    finally:
        said = process.communicate()[1].decode(errors="replace").strip()
        if process.returncode:
            for part in parts.values():
                part.unlink(missing_ok=True)
    if process.returncode:
        why = said.splitlines()[-1] if said else f"exit code {process.returncode}"
        raise UserError(f"{path}: ffmpeg fails ({why}); it needs libx264, libwebp and room; or leave --movie out")
    for kind, part in parts.items():
        os.replace(part, path.with_name(f"{path.name}.{kind}"))


def require() -> None:
    """UserError, one line, where there is no ffmpeg: before work that ends in a film."""
    if shutil.which("ffmpeg") is None:
        raise UserError(
            "--movie: ffmpeg is not installed; install it (apt install ffmpeg, conda install ffmpeg) or leave it out"
        )


def _held(first: np.ndarray, others: Iterable[np.ndarray], times: int):
    last = first
    yield first
    for last in others:
        if last.shape != first.shape:
            raise ValueError(f"frames of {first.shape} and {last.shape} in one film")
        yield last
    yield from [last] * times


def _start(shape: tuple, parts: dict[str, Path], fps: float):
    """A process that reads frames from its stdin and writes all films in one pass."""
    import ffmpeg

    high, wide = shape[:2]
    raw = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{wide}x{high}", framerate=fps)
    copies = raw.filter_multi_output("split", 4)
    even = copies[0].filter("pad", "ceil(iw/2)*2", "ceil(ih/2)*2", color="white")
    colours = copies[2].filter("palettegen")
    few = ffmpeg.filter([copies[1], colours], "paletteuse")
    files = {"movflags": "+faststart", "vcodec": "libx264", "pix_fmt": "yuv420p", "crf": 18}
    films = [
        ffmpeg.output(even, str(parts["mp4"]), format="mp4", **files),
        ffmpeg.output(few, str(parts["gif"]), format="gif", loop=0),
        ffmpeg.output(copies[3], str(parts["webp"]), format="webp", vcodec="libwebp_anim", quality=90, loop=0),
    ]
    whole = ffmpeg.merge_outputs(*films).global_args("-loglevel", "error").overwrite_output()
    return ffmpeg.run_async(whole, pipe_stdin=True, pipe_stderr=True)
