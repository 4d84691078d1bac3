"""The progress line, the record behind it, and the peak that MFU is measured against."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SAY_EVERY_S = 10  # seconds between the lines of a counter
_SECONDS_TO_MEASURE = 0.1  # each of at most four products
# Dense 16-bit tensor-core peaks (operations/s) from the makers' data sheets. The first name that the device's
# name contains counts, so longer names stand before the shorter ones that they contain.
_PEAKS = (
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H200", 989e12), ("GH200", 989e12),
    ("H800", 989e12), ("H20", 148e12), ("B200", 2250e12), ("A100", 312e12), ("A800", 312e12),
    ("A10G", 70e12), ("A10", 125e12), ("A40", 149.7e12), ("A30", 165e12), ("A6000", 154.8e12),
    ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12), ("V100", 125e12), ("T4", 65e12),
    ("RTX 5090", 209.5e12), ("RTX 4090", 165.2e12), ("RTX 3090", 71e12),
)  # fmt: skip
_SHOWN = {  # the line's columns: record key -> (label, format); everything else stands after the loss
    "loss": ("loss", lambda v: f"{v:.4f}"),
    "lr": ("lr", lambda v: f"{v:.2e}"),
    "images_per_s": ("", lambda v: _rate(v)),
    "grad_norm": ("grad", lambda v: f"{v:.3g}"),
    "top1": ("top1", lambda v: f"{v:.1%}"),
    "mfu": ("mfu", lambda v: f"{v:.1%}"),
    "memory_gib": ("mem", lambda v: f"{v:.2f} GiB"),
    "input_wait": ("wait", lambda v: f"{v:.1%}"),
    "skipped": ("skipped", lambda v: f"{v:d}"),
    "eta": ("eta", lambda v: duration(v)),
}
_HIDDEN = {"step", "seconds"}


def _rate(images_per_s: float) -> str:
    if 0 < images_per_s < 1:
        return f"{1 / images_per_s:.3g} s/image"
    return f"{images_per_s:,.0f} images/s" if images_per_s >= 100 else f"{images_per_s:.3g} images/s"


def duration(seconds: float) -> str:
    """`75` -> `1m15s`; the two largest units that matter."""
    seconds = max(0, round(seconds))
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


def line(record: dict, total_steps: int) -> str:
    """One line for the screen from one record (see `Progress.record`)."""
    width = len(str(total_steps))
    extras = [key for key in record if key not in _SHOWN and key not in _HIDDEN]
    parts = [f"step {record['step']:{width}d}/{total_steps}"]
    for key in ["loss", *extras, *[key for key in _SHOWN if key != "loss"]]:
        if key in record:
            label, form = _SHOWN.get(key, (key, lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)))
            value = "nan" if record[key] is None else form(record[key])
            parts.append(f"{label} {value}".strip())
    return "  ".join(parts)


class Progress:
    """Turns the figures of a step into a record (a line of metrics.jsonl) and a line on the screen.

    In a terminal a bar stays at the bottom and the lines scroll above it; elsewhere there are only the lines.

    Args: total_steps, start_step: steps of the whole run and those done before this start; images_per_step:
    the global batch; flops_per_image: useful operations of one training step, per image (None: no MFU);
    peak_flops: operations/s of all devices together; console: False prints nothing (ranks other than 0).
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        *,
        images_per_step: int,
        flops_per_image: float | None = None,
        peak_flops: float | None = None,
        stream=None,
        console: bool = True,
    ):
        self.total, self.start, self.images = total_steps, start_step, images_per_step
        self.flops, self.peak = flops_per_image, peak_flops
        self.stream, self.console = stream or sys.stdout, console
        self.began = self.then = time.perf_counter()
        self.last_step, self.last_waited = start_step, 0.0
        self.settled = None  # (step, time) of the first record: what came before holds compilation
        self.first_loss = self.last = None
        self.bar = self._open_bar() if console and self.stream.isatty() else None

    def _open_bar(self):
        from tqdm import tqdm

        return tqdm(
            total=self.total,
            initial=self.start,
            file=self.stream,
            dynamic_ncols=True,
            leave=False,
            unit="step",
        )

    def advance(self, step: int) -> None:
        """Moves the bar to `step` completed steps, where there is a terminal. Cheap: for every step."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def record(self, step: int, figures: dict) -> dict:
        """One JSON-ready record after `step` completed steps; the interval is the time since the last record.

        figures: host numbers. `loss`, `lr`, `grad_norm`, `top1` (a fraction), `skipped` (so far) and any
        others are kept unrounded; `waited`, the seconds that the loop has waited for input since the start,
        becomes `input_wait`, a fraction of the interval. Added: images_per_s, mfu (a fraction), memory_gib
        (peak), seconds (since the start), eta (seconds). A number that is not finite becomes None.
        """
        now = time.perf_counter()
        seconds, steps = max(now - self.then, 1e-9), step - self.last_step
        figures = dict(figures)
        waited = figures.pop("waited", None)
        record = {"step": step, **{key: _plain(value) for key, value in figures.items()}}
        if steps > 0:
            record["images_per_s"] = _digits(steps * self.images / seconds)
            if self.flops and self.peak:
                record["mfu"] = _digits(steps * self.images * self.flops / seconds / self.peak)
        record.setdefault("memory_gib", _digits(peak_memory_gib()))
        if waited is not None:
            record["input_wait"] = _digits(min(1.0, max(0.0, waited - self.last_waited) / seconds))
            self.last_waited = waited
        record["seconds"] = _digits(now - self.began)
        record["eta"] = _digits(self._seconds_per_step(step, now) * max(0, self.total - step))
        self.then, self.last_step, self.last = now, step, record
        if self.settled is None:
            self.settled = (step, now)
        if self.first_loss is None:
            self.first_loss = record.get("loss")
        return record

    def _seconds_per_step(self, step: int, now: float) -> float:
        since, began = self.settled or (self.start, self.began)
        return (now - began) / max(1, step - since)

    def show(self, record: dict) -> None:
        """Prints the record's line."""
        self.say(line(record, self.total))

    def say(self, text: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        if not self.console:
            return
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def summary(self) -> str:
        """One line about what this start did; closes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        seconds = time.perf_counter() - self.began
        steps = self.last_step - self.start
        text = f"{steps} steps ({steps * self.images:,} images) in {duration(seconds)}"
        if not self.last or steps <= 0:
            return text
        parts = [text, _rate(steps * self.images / seconds)]
        if self.last.get("loss") is not None and self.first_loss is not None:
            parts.append(f"loss {self.first_loss:.4f} -> {self.last['loss']:.4f}")
        if "input_wait" in self.last:
            parts.append(f"{self.last_waited / seconds:.1%} of the time waiting for input")
        parts.append(f"peak memory {self.last['memory_gib']:.2f} GiB")
        if "skipped" in self.last:
            parts.append(f"{self.last['skipped']} skipped")
        return ", ".join(parts)


@contextmanager
def counter(total: int, unit: str, done: str, *, first: bool, say: Callable[[str], None]) -> Iterator[Callable]:
    """Gives advance(number of units): a bar in the terminal of the `first` rank, else lines with an ETA.

    done: the verb of a line ("sampled 64/256 ..."); say: prints a line, on the first rank only, which speaks for all.
    """
    if first and sys.stdout.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit=unit, file=sys.stdout, dynamic_ncols=True, disable=not total) as bar:
            yield lambda number: bar.update(min(number, total - bar.n))
        return
    began = said = time.perf_counter()
    so_far = 0

    def advance(number: int) -> None:
        nonlocal said, so_far
        so_far, now = min(total, so_far + number), time.perf_counter()
        if so_far and (now - said > _SAY_EVERY_S or so_far == total):
            said, rate = now, so_far / (now - began)
            left = f"eta {duration((total - so_far) / rate)}" if so_far < total else f"in {duration(now - began)}"
            say(f"{done} {so_far:,}/{total:,}  {rate:.3g} {unit}s/s  {left}")

    yield advance


def _plain(value):
    if hasattr(value, "item"):  # a numpy or torch scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def peak_memory_gib() -> float:
    """Most memory held so far, GiB: the GPU's as torch counts it, else this process's resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def peak_flops(device, dtype) -> float:
    """Peak operations/s of one device: the data sheet's for a known GPU in 16 bits, measured otherwise.

    On a CPU the better of float32 and bf16 with the current number of threads, whatever `dtype` is: that is
    what the machine could do. Takes less than half a second.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).replace("-", " ")
        known = next((peak for part, peak in _PEAKS if part in name), None)
        if known and dtype in (torch.bfloat16, torch.float16):
            return known
        return _matmul_rate(torch, device, dtype, size=4096)
    best = _matmul_rate(torch, device, torch.float32, size=1024)
    # Emulated bf16 can be a hundred times slower than float32; a tiny product shows it at no cost.
    single, half = (_matmul_rate(torch, device, kind, size=128) for kind in (torch.float32, torch.bfloat16))
    if half > 0.3 * single:
        best = max(best, _matmul_rate(torch, device, torch.bfloat16, size=1024))
    return best


def _matmul_rate(torch, device, dtype, *, size: int) -> float:
    """Best operations/s of a square product in a short while (three tries at least, the first to warm up).

    On a CPU by this thread's own time: what other processes take is no part of the peak.
    """
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    out = torch.empty_like(left)
    best, tries, end = math.inf, 0, time.perf_counter() + _SECONDS_TO_MEASURE
    with torch.no_grad():
        while tries < 3 or time.perf_counter() < end:
            began = clock()
            torch.matmul(left, left, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if tries:
                best = min(best, clock() - began)
            tries += 1
    return 2 * size**3 / best
