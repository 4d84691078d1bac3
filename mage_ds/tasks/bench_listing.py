"""`mage-ds bench listing`: how long a large data set takes to open, and how much memory its listing needs."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from mage_ds.errors import UserError

LINKS = 60_000  # names of one file; ext4 allows 65,000
LATER = 1_000_000  # position of the stream that is compared with 0
BATCH = 64
STORE = ".pictures"  # hidden: not part of the data set
SETTLE = 2.5  # seconds: a listing made sooner after the folders' last change is not cached


def listing(files: int = 1_300_000, folders: int = 1000, dir: str = ".", tars: bool = False) -> None:
    """Makes a data set of tiny pictures, times and weighs its listing, each in a process of its own, and removes it.

    Args: files: pictures, hard links of a few; folders: class folders; dir: where; tars: one tar
    for each folder instead, with labels in `.cls`. Prints a table. The disk's own pages are warm.
    Raises: UserError where the tree cannot be made.
    """
    root = Path(dir)
    try:
        folder = Path(tempfile.mkdtemp(prefix="bench_listing_", dir=root))
    except OSError as error:
        raise UserError(f"--dir {root}: {error.strerror}; name a folder that can be written") from None
    try:
        begin = time.perf_counter()
        try:
            _make(folder, files, folders, tars)
        except OSError as error:
            raise UserError(f"--dir {root}: {error.strerror} after {time.perf_counter() - begin:.0f} s") from None
        what = "tars" if tars else "folders"
        print(f"{files:,} pictures in {folders:,} {what}, made in {time.perf_counter() - begin:.0f} s", flush=True)
        time.sleep(SETTLE)
        _table(folder, tars)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _table(folder: Path, tars: bool) -> None:
    base = _alone(_headers if tars else _plain, folder)
    print(f"{'':34}{'seconds':>9}{'x base':>9}{'MB':>7}{'peak MB':>9}")
    _row("base: " + ("tarfile over all tars" if tars else "os.walk, sorted paths"), base, base)
    _row("first listing", _alone(_open, folder), base)
    _row("listing with its cache", _alone(_open, folder), base)
    for position in (0, LATER):
        _row(f"first batch at position {position:,}", _alone(_first_batch, folder, position), base)
    print("  MB: what the process grew by and keeps; peak: at most meanwhile; both batches include the cached listing")


def _row(name: str, measured: tuple[float, float, float], base: tuple[float, float, float]) -> None:
    seconds, grown, peak = measured
    print(f"  {name:32}{seconds:9.2f}{seconds / base[0]:9.2f}{grown:7.0f}{peak:9.0f}", flush=True)


# --- what is measured


def _alone(call, *arguments) -> tuple[float, float, float]:
    """Seconds, MB kept and MB at most of a call in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, call, arguments).result()


def _measured(call, arguments) -> tuple[float, float, float]:
    from mage_ds.inputs import catalog, dali  # noqa: F401 - their memory and time are not the listing's

    if call is _first_batch:
        _first_batch(arguments[0] / STORE, 0)  # neither are torch's and DALI's
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, _ = _memory()
    begin = time.perf_counter()
    kept = call(*arguments)
    seconds = time.perf_counter() - begin
    after, peak = _memory()
    del kept
    return seconds, after - before, peak - before


def _memory() -> tuple[float, float]:
    """MB that the process holds, shared pages included, and at most held."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) / 1e3 for name in ("VmRSS", "VmHWM"))


def _plain(folder: Path) -> list[str]:
    return sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)


def _headers(folder: Path) -> list[str]:
    names = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path, "r:") as file:
            names += [member.name for member in file]
    return sorted(names)


def _open(folder: Path):
    from mage_ds.inputs.catalog import open_catalog

    return open_catalog(folder)


def _first_batch(folder: Path, position: int):
    from mage_ds.inputs import dali
    from mage_ds.inputs.quarantine import Quarantine
    from mage_ds.recipes import load_recipe

    catalog = _open(folder)
    stream = dali.stream(
        catalog,
        seed=0,
        position=position,
        batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        world=1,
        inputs=load_recipe("digits_mage", []).inputs,
        device="cpu",
        quarantine=Quarantine(None, 0.0, catalog.n),
    )
    next(stream)
    stream.close()
    return catalog


# --- the tree


def _make(folder: Path, files: int, folders: int, tars: bool) -> None:
    store = folder / STORE
    store.mkdir()
    sources = []
    for k in range(-(-files // LINKS)):
        sources.append(store / f"{k}.jpg")
        sources[-1].write_bytes(_picture(k))
    shares = np.array_split(np.arange(files), folders)
    for k, share in enumerate(shares):
        if tars:
            _pack(folder / f"{k:05d}.tar", share.tolist(), k, [source.read_bytes() for source in sources])
            continue
        (folder / f"n{k:08d}").mkdir()
        for i in share.tolist():
            os.link(sources[i // LINKS], folder / f"n{k:08d}" / f"n{k:08d}_{i:08d}.JPEG")


def _picture(seed: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", optimize=True)
    return stream.getvalue()


def _pack(path: Path, share: list[int], label: int, sources: list[bytes]) -> None:
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as file:
        for i in share:
            for ending, data in (("jpg", sources[i // LINKS]), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"n{label:08d}_{i:08d}.{ending}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
