"""mage-ds bench save: a real save of a small model, and what its seconds mean for a training."""

import re

from mage_ds import cli
from mage_ds.tasks.bench_save import _share

SMALL = [f"model.{part}={{depth: 1, width: 32, heads: 2}}" for part in ("encoder", "decoder")]


def test_a_save_is_timed_and_cleaned_up(tmp_path, capsys):
    line = ["bench", "save", "digits_mage", *SMALL, "--dir", str(tmp_path), "--images-per-s", "64", "--samples", "1000"]
    assert cli.main(line) == 0
    said = capsys.readouterr().out.splitlines()
    head = next(i for i, text in enumerate(said) if text.split() == ["gather", "write", "verify", "rest", "all"])
    rows = [[float(word) for word in text.split()] for text in said[head + 1 : head + 4]]
    assert all(abs(sum(row[:4]) - row[4]) < 0.05 for row in rows)
    assert re.search(
        r"saved every 600 steps: 38,400 images, 10m00s at 64 images/s, of which a save takes 0\.\d\d%", said[-1]
    )
    assert not list(tmp_path.iterdir())


def test_the_share():
    every = {"epochs": 5}
    text = _share(5.0, 6_405_835, every, 4000.0)
    assert text.startswith(
        "saved every 5 epochs: 6,405,835 images, 26m41s at 4000 images/s, of which a save takes 0.31%"
    )
    assert text.endswith("more than 2% from 25,623 images/s on")  # 6,405,835 x 0.02 / 5 s
    assert _share(5.0, 0, {"epochs": 0}, None) == "the recipe saves at the end only"


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert cli.main(["bench", "save", "digits_mage", *SMALL, "--dir", str(tmp_path / "nowhere")]) == 2
    assert "--dir" in capsys.readouterr().err
