"""mage-ds bench metrics: its tables, of small features, and Inception with random weights on a few pictures."""

import re

import numpy as np
import pytest
from PIL import Image

from mage_ds import cli
from mage_ds.evaluation import features
from mage_ds.tasks import bench_metrics


@pytest.fixture
def pictures(tmp_path):
    for i in range(3):
        values = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    return tmp_path


def test_the_tables(pictures, monkeypatch, capsys):
    monkeypatch.setattr(bench_metrics, "_ROUNDS", 1)
    bench_metrics.metrics(pictures=str(pictures), images=3, sizes=(51, 131), reference=101, width=64)
    said = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if re.match(r"\| \d", line)]
    figures = [row for row in rows if len(row) == 5]
    assert [row[1] for row in figures] == ["FID", "IS", "KID", "precision", "recall"] * 2
    for n, name, ours, theirs, difference in figures:
        assert n in ("51", "131") and float(ours) == pytest.approx(float(theirs), rel=1e-6, abs=1e-6)
        if name in ("precision", "recall"):
            assert difference.startswith("0 of")
        else:
            assert abs(float(difference.split()[0])) < 1e-6
    assert [row[0] for row in rows if len(row) == 4] == ["51", "131"]
    assert "random weights in its layout" in said
    found = re.search(r"Inception on 3 pictures of \S+, cpu, .*, ratio [\d.]+; features differ by (\S+) of", said)
    assert float(found[1]) < 1e-4


def test_a_file_that_is_no_inception(pictures, capsys, monkeypatch):
    monkeypatch.setattr(bench_metrics, "_SIZES", ())
    monkeypatch.setattr(bench_metrics.metrics, "__kwdefaults__", bench_metrics.metrics.__kwdefaults__ | {"sizes": ()})
    line = ["bench", "metrics", "--pictures", str(pictures), "--inception", str(pictures / "0.png")]
    assert cli.main(line) == 2
    assert features.FILE in capsys.readouterr().err
