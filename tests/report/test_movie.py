"""Films: the frames that ffmpeg and PIL read out of them are the frames that went in."""

import subprocess

import ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageSequence

from mage_ds.errors import UserError
from mage_ds.report import grids, movie


def drawn(count, high=47, wide=61):
    """Smooth colours, and a white bar that moves: all frames differ. Sides are odd."""
    frames = np.zeros((count, high, wide, 3), np.uint8)
    frames[..., 0] = np.linspace(0, 255, wide)
    for i, frame in enumerate(frames):
        frame[..., 1] = 30 * i % 240
        frame[10:30, 8 * i : 8 * i + 12] = 255
    return frames


def decoded(path, high, wide):
    out, _ = ffmpeg.input(str(path)).output("pipe:", format="rawvideo", pix_fmt="rgb24").run(quiet=True)
    return np.frombuffer(out, np.uint8).reshape(-1, high, wide, 3)


def far(one, other):
    return np.abs(one.astype(int) - other.astype(int)).mean()


def test_all_three_films_show_the_frames(tmp_path):
    frames = drawn(5)
    movie.write(iter(frames), tmp_path / "film", fps=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.gif", "film.mp4", "film.webp"]
    shown = decoded(tmp_path / "film.mp4", 48, 62)  # made even
    assert len(shown) == 5 + 4  # the last one is held for a second
    for i in range(9):
        assert far(shown[i, :47, :61], frames[min(i, 4)]) < 6
    assert far(shown[0, :47, :61], frames[1]) > 10  # the tolerance tells frames apart
    assert shown[:, 47].mean() > 220 and shown[:, :, 61].mean() > 220
    facts = ffmpeg.probe(str(tmp_path / "film.mp4"))["streams"][0]
    assert (facts["codec_name"], facts["pix_fmt"]) == ("h264", "yuv420p")
    for kind, count, most in (("gif", 9, 6), ("webp", 5, 6)):  # WebP joins equal frames
        with Image.open(tmp_path / f"film.{kind}") as film:
            parts = [(np.asarray(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(film)]
            assert film.info["loop"] == 0
        assert len(parts) == count and sum(duration for _, duration in parts) == 9 * 250
        for i, (frame, _) in enumerate(parts):
            assert far(frame, frames[min(i, 4)]) < most, (kind, i)


def test_a_film_of_a_decoding_covers_what_is_masked(tmp_path):
    masked = [np.arange(16) >= 16 - left for left in (12, 4, 0)]
    states = [(np.full((2, 16), i), np.stack([row, row[::-1]])) for i, row in enumerate(masked)]
    movie.film(tmp_path, states, lambda tokens: np.full((2, 64, 64, 3), 80 * tokens[0, 0], np.uint8), columns=2)
    high, wide = grids.grid(np.zeros((2, 64, 64, 3), np.uint8), 2).shape[:2]
    shown = decoded(tmp_path / "movie.mp4", high + high % 2, wide + wide % 2)
    assert len(shown) == 3 + 4
    for i, row in enumerate(masked):
        for j, cells in enumerate((row, row[::-1])):
            for k, hidden in enumerate(cells):
                y, x = 2 + 16 * (k // 4), 2 + 66 * j + 16 * (k % 4)
                middle = shown[i, y + 4 : y + 12, x + 4 : x + 12].astype(int).mean()
                assert abs(middle - (130 if hidden else 80 * i)) < 12, (i, j, k)


def test_one_frame_is_a_film(tmp_path):
    movie.write(drawn(1), tmp_path / "one", fps=2)
    assert len(decoded(tmp_path / "one.mp4", 48, 62)) == 3


def test_no_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"ffmpeg is not installed; install it \(apt install ffmpeg") as error:
        movie.write(drawn(2), tmp_path / "film")
    assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]


def test_an_ffmpeg_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match="No such file or directory") as error:
        movie.write(drawn(40, 400, 400), tmp_path / "nowhere" / "film")  # more than a pipe holds
    assert "\n" not in str(error.value)


def test_frames_that_fail_leave_nothing(tmp_path, monkeypatch):
    started, start = [], subprocess.Popen

    def remember(*args, **more):
        started.append(start(*args, **more))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", remember)

    def frames():
        yield from drawn(2)
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        movie.write(frames(), tmp_path / "film")
    assert started[0].returncode is not None and not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match="in one film"):
        movie.write([*drawn(1), *drawn(1, 20, 20)], tmp_path / "film")
    assert not [*tmp_path.iterdir()]
