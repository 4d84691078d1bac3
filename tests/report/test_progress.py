"""The progress line, its record and the measured peak."""

import io
import json
import time

import pytest
import torch

from mage_ds.report import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def make(total, start, **kwargs):
    return progress.Progress(total, start, images_per_step=32, stream=io.StringIO(), **kwargs)


def test_record_holds_rates_of_its_interval(clock):
    track = make(1000, 100, flops_per_image=2e9, peak_flops=1e12)
    clock[0] += 5
    track.record(110, {"loss": 6.0, "waited": 1.0})
    clock[0] += 2
    record = track.record(120, {"loss": 5.123456789012345, "lr": 1e-4, "waited": 1.5, "skipped": 3, "codes": 0.5})
    assert record["step"] == 120 and record["skipped"] == 3 and record["codes"] == 0.5
    assert record["loss"] == 5.123456789012345  # not rounded: resumed runs are compared by it
    assert record["images_per_s"] == pytest.approx(10 * 32 / 2)
    assert record["mfu"] == pytest.approx(10 * 32 / 2 * 2e9 / 1e12)
    assert record["input_wait"] == pytest.approx(0.25)  # 0.5 of 2 seconds
    assert record["seconds"] == pytest.approx(7)
    assert record["eta"] == pytest.approx(880 * 0.2)  # the slow first interval does not count
    assert record["memory_gib"] > 0
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_numbers_that_are_not_finite_and_tensors(clock):
    track = make(10, 0)
    clock[0] += 1
    figures = {"loss": torch.tensor(float("nan")), "grad_norm": float("inf"), "top1": torch.tensor(0.5)}
    record = track.record(1, figures)
    assert record["loss"] is None and record["grad_norm"] is None and record["top1"] == 0.5
    assert "mfu" not in record and "input_wait" not in record
    assert "loss nan" in progress.line(record, 10)


def test_line_names_everything_once(clock):
    track = make(4000, 0, flops_per_image=1e9, peak_flops=1e12)
    clock[0] += 2
    figures = {"lr": 1.5e-4, "loss": 3.25, "l1": 0.125, "grad_norm": 0.5, "top1": 0.214}
    figures |= {"skipped": 0, "waited": 0.1}
    text = progress.line(track.record(10, figures), 4000)
    parts = text.split("  ")
    assert "step" in parts[0] and text.startswith("step   10/4000")
    for part in [
        "loss 3.2500",
        "l1 0.125",
        "lr 1.50e-04",
        "160 images/s",
        "grad 0.5",
        "top1 21.4%",
        "mfu 16.0%",
    ]:
        assert parts.count(part) == 1, part
    for part in ["wait 5.0%", "skipped 0", "eta 13m18s"]:
        assert parts.count(part) == 1, part
    assert text.index("l1") < text.index("lr ")
    assert "\n" not in text


def test_console_only_where_asked(clock):
    shown, silent = make(10, 0), make(10, 0, console=False)
    for track in (shown, silent):
        clock[0] += 1
        track.show(track.record(5, {"loss": 1.0}))
        track.advance(6)
    assert shown.stream.getvalue().count("\n") == 1 and silent.stream.getvalue() == ""


def test_bar_in_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    track = progress.Progress(20, 4, images_per_step=2, stream=Terminal())
    for step in range(5, 21):
        track.advance(step)
    track.show(track.record(20, {"loss": 1.0}))
    assert track.bar.n == 20 and "16 steps" in track.summary() and track.bar is None
    assert "step 20/20" in track.stream.getvalue()


def test_summary(clock):
    track = make(40, 20)
    assert track.summary() == "0 steps (0 images) in 0s"
    clock[0] += 50
    track.record(30, {"loss": 6.0, "waited": 10.0, "skipped": 0})
    clock[0] += 50
    track.record(40, {"loss": 2.0, "waited": 10.0, "skipped": 1})
    text = track.summary()
    for part in [
        "20 steps (640 images)",
        "1m40s",
        "6.4 images/s",
        "6.0000 -> 2.0000",
        "10.0% of",
        "1 skipped",
    ]:
        assert part in text, part


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (75, "1m15s"), (3600, "1h00m"), (90000, "1d01h"), (-3, "0s")],
)
def test_duration(seconds, text):
    assert progress.duration(seconds) == text


def test_peak_is_plausible():
    peak = progress.peak_flops("cpu", torch.float32)
    size = 512
    left = torch.ones(size, size)
    left @ left
    began = time.thread_time()
    left @ left
    mine = 2 * size**3 / (time.thread_time() - began)
    assert peak > 0.3 * mine and 1e8 < peak < 1e14


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("Tesla V100-SXM2-16GB", 125e12), ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12), ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12), ("Tesla T4", 65e12), ("NVIDIA H20", 148e12),
    ],
)  # fmt: skip
def test_known_gpus(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert progress.peak_flops("cuda", torch.bfloat16) == peak
