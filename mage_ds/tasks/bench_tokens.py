"""What a token cache gains: images/s of a training step's input from a cache, and with live tokenization."""

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mage_ds import recipes
from mage_ds.engine import ds_config, process, training, wrap
from mage_ds.errors import UserError
from mage_ds.inputs import dali, token_cache
from mage_ds.inputs.catalog import open_catalog
from mage_ds.inputs.quarantine import Quarantine
from mage_ds.inputs.token_cache import TokenCache
from mage_ds.models import Vqgan
from mage_ds.recipes.schema import PretrainRecipe

_MICRO = 8  # pictures of a micro-batch where the recipe leaves the number open
_SECONDS = 2.0  # that the cache is read for
_SPARE = 1 << 24  # bytes that stay free on the disk
_BLOCK = 1 << 22  # tokens that are drawn at once


def tokens(name: str, overrides: list[str], *, data: str, images: int = 16, samples: int, where: str = ".") -> None:
    """Prints images/s of both ways to the same micro-batches of tokens, on the device or in memory, and their ratio.

    Live: `images` pictures of `data`, or as many more as fill a micro-batch, through decoding, crop and a tokenizer of
    the recipe's size. Cache: random tokens of `samples` pictures in a file below `where`, removed afterwards; freshly
    written, so the disk is not measured.
    Alone or under `deepspeed`: the sum over the ranks. Raises UserError for what cannot be.
    """
    recipe = recipes.load_recipe(name, overrides)
    if not isinstance(recipe, PretrainRecipe):
        raise UserError(f"{name}: trains a tokenizer, which reads pictures; name a recipe that trains a MAGE")
    me = process.start()
    _refuse_many(samples, recipe.model.tokens, where, me.local_world)
    micro = _MICRO if recipe.machine.micro_batch == "auto" else recipe.machine.micro_batch
    precision = ds_config.choose_precision(recipe.machine.precision, me.device)
    order = {"seed": recipe.seed, "position": 0, "batch": micro * me.world, "micro_batch": micro}
    order |= {"rank": me.rank, "world": me.world, "device": me.device}
    live = _all(_live(recipe, data, precision, images, order))
    cached = _all(_cached(recipe, samples, where, order))
    process.say(
        f"{name}: {recipe.model.tokens} tokens of {recipe.inputs.image_size} px, {precision}, micro batch {micro}, "
        f"{me.world} ranks\nlive tokenization  {live:,.3g} images/s\ntoken cache        {cached:,.0f} images/s of "
        f"{samples:,} samples\nratio              {cached / live:,.0f}"
    )


def _refuse_many(samples: int, width: int, where: str, ranks: int) -> None:
    """UserError where the disk has no room for the files of the ranks of this host, or does not say."""
    try:
        free = shutil.disk_usage(where).free
    except OSError as error:
        raise _unwritable(where, error) from None
    if (need := 2 * width * samples * ranks) + _SPARE > free:
        raise UserError(
            f"--samples {samples}: their tokens need {need / 1e6:,.0f} MB, the disk of --dir {where} has "
            f"{free / 1e6:,.0f} MB left; take fewer, or name a folder on another disk"
        )


def _unwritable(where: str, error: OSError) -> UserError:
    return UserError(f"--dir {where}: cannot be written ({error.strerror or error}); name another folder")


def _all(rate: float) -> float:
    """Summed over the ranks; each has measured by itself, side by side."""
    return sum(process.gather_objects(rate))


def _live(recipe: PretrainRecipe, data: str, precision: str, images: int, order: dict) -> float:
    catalog = open_catalog(data, "train")
    vqgan = Vqgan(**recipe.tokenizer.model_dump())
    wrap.initialize_weights(vqgan, recipe.seed)
    vqgan = training.frozen(vqgan, ds_config.dtype_of(precision))
    broken = Quarantine(None, 1.0, catalog.n)
    source = dali.stream(catalog, inputs=recipe.inputs, quarantine=broken, **order)
    rounds = -(-images // order["micro_batch"])
    return _rate(source, lambda batch: training.tokenize(vqgan, batch.images[:, 0]), order, lambda n, s: n >= rounds)


def _cached(recipe: PretrainRecipe, samples: int, where: str, order: dict) -> float:
    try:
        with tempfile.TemporaryDirectory(prefix=".bench_tokens.", dir=where) as folder:
            path = Path(folder) / "tokens.npy"
            _write(path, samples, recipe)
            cache = TokenCache(
                root=Path(folder),
                split="train",
                settings={"codes": recipe.model.codes},
                classes=[],
                fingerprint="",
                tokens=np.load(path, mmap_mode="r"),
                valid=np.broadcast_to(np.True_, (samples, 1)),  # one value in memory, however many samples
                labels=np.broadcast_to(np.int32(-1), samples),
            )
            source = token_cache.stream(cache, **order)
            return _rate(source, lambda batch: batch.tokens[:, 0], order, lambda n, s: s > _SECONDS)
    except OSError as error:
        raise _unwritable(where, error) from None
    except MemoryError:  # the order of an epoch is drawn in memory, as in a training
        raise UserError(f"--samples {samples}: their order does not fit into this machine's memory; fewer") from None


def _write(path: Path, samples: int, recipe: PretrainRecipe) -> None:
    """Random tokens, block by block: as large as the disk, not as the memory."""
    draw, width = np.random.default_rng(recipe.seed), recipe.model.tokens
    rows = max(1, _BLOCK // width)
    with open(path, "wb") as file:
        head = {"descr": "<u2", "fortran_order": False, "shape": (samples, 1, width)}
        np.lib.format.write_array_header_1_0(file, head)
        for first in range(0, samples, rows):
            shape = min(rows, samples - first), width
            file.write(draw.integers(recipe.model.codes, size=shape, dtype=np.uint16).astype("<u2").tobytes())


def _rate(source, tokens_of, order: dict, enough) -> float:
    """Images a second of this rank, once the first batch is there. enough(batches, seconds): ends it."""
    device, done = order["device"], 0
    try:
        _finish(tokens_of(next(source)), device)
        process.barrier()
        began = time.perf_counter()
        while not enough(done, time.perf_counter() - began):
            _finish(tokens_of(next(source)), device)
            done += 1
        return done * order["micro_batch"] / (time.perf_counter() - began)
    finally:
        source.close()


def _finish(tokens: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
