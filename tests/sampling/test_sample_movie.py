"""`sample --movie`: the film of the first pictures ends with those pictures."""

import ffmpeg
import numpy as np
import pytest
from launched import several
from made_export import make_export
from PIL import Image

from mage_ds import cli
from mage_ds.report import grids


@pytest.mark.processes
def test_a_film_ends_with_the_pictures(tmp_path):
    run, out = make_export(tmp_path / "run", classes=3), tmp_path / "out"
    line = ["sample", run, "-n", 6, "--batch", 4, "--out", out, "--steps", 5, "--movie"]
    first, again = several(line, line, cwd=tmp_path)  # the second finds a complete set
    assert first[0] == again[0] == 0 and "movie.mp4" in first[1] and "nothing to do" in again[1]
    assert {"movie.mp4", "movie.gif", "movie.webp"} <= {path.name for path in out.iterdir()}
    pictures = np.stack([np.asarray(Image.open(out / f"{i:06d}.png").convert("RGB")) for i in range(4)])
    last = grids.grid(pictures)
    high, wide = last.shape[:2]
    film, _ = ffmpeg.input(str(out / "movie.mp4")).output("pipe:", format="rawvideo", pix_fmt="rgb24").run(quiet=True)
    frames = np.frombuffer(film, np.uint8).reshape(-1, high + high % 2, wide + wide % 2, 3)[:, :high, :wide]
    assert len(frames) == 1 + 5 + 4  # nothing known yet, each step, the last one held
    far = [np.abs(frame.astype(int) - last).mean() for frame in frames]
    assert max(far[5:]) < 10 and far[0] > 2 * far[5]
    hidden = grids.grid(grids.mask_overlay(pictures, np.ones((4, 64), bool)))
    assert np.abs(frames[0].astype(int) - hidden).mean() < 10


def test_without_ffmpeg_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["sample", "run", "-n", "6", "--out", str(tmp_path / "out"), "--movie"]) == 2
    said = capsys.readouterr().err
    assert "ffmpeg is not installed" in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
