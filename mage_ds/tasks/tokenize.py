"""mage-ds tokenize: a data set of pictures into a token cache, which a training reads instead of them."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mage_ds import files, recipes
from mage_ds.engine import below, ds_config, process, stored, training
from mage_ds.errors import UserError
from mage_ds.inputs import dali, token_cache
from mage_ds.inputs.catalog import Catalog, open_catalog
from mage_ds.inputs.quarantine import Quarantine
from mage_ds.inputs.token_cache import Parts
from mage_ds.recipes.sections import Augmentation, Inputs
from mage_ds.report.progress import counter

_PART = 512  # pictures, or a few more: what a killed process has to do again
_SPARE = 1 << 24  # bytes that stay free on the disk
_BROKEN = 0.01  # largest share of unreadable pictures where no recipe says one


def tokenize(
    data: str,
    tokenizer: str,
    out: str,
    *,
    recipe: str | None = None,
    views: int = 1,
    augmentation: str | None = None,
    batch: int = 16,
    precision: str = "auto",
) -> None:
    """Write the tokens of every picture of `data` to the folder `out`; any number of processes, at any time, go on.

    View v of a picture is what a training sees of it in epoch v, crop and flip included; val/ has one view, the
    evaluation crop. Tokens equal those of live training bit for bit in float32 where `batch` is its micro batch.

    Args: tokenizer: a path as for `train`; recipe: whose `seed` and `inputs` are meant (by default: no augmentation,
    the tokenizer's picture size, linear interpolation, seed 0); augmentation: a name, instead of the recipe's;
    precision: "auto" is the recipe's machine.precision.
    Raises UserError for what cannot be, and for an `out` of other settings.
    """
    me, out = process.start(), Path(out)
    catalogs = {split: open_catalog(data, split) for split in token_cache.SPLITS}
    catalogs = {split: catalog for split, catalog in catalogs.items() if catalog is not None}
    vqgan, info = _tokenizer(tokenizer)
    inputs, seed, preferred = _inputs(recipe, augmentation, info["image_size"])
    width = _width(vqgan, inputs.image_size, tokenizer)
    if views > 1 and inputs.augmentation.scale is None and not inputs.augmentation.flip:
        raise UserError(f"--views {views}: without augmentation they are all the same; leave it out")
    precision = ds_config.choose_precision(preferred if precision == "auto" else precision, me.device)
    settings = {
        "data": {split: catalog.fingerprint for split, catalog in catalogs.items()},
        "tokenizer": info["hash"],
        "codes": info["model"]["codes"],
        "tokens": width,
        "dtype": precision,
        "batch": batch,
        "views": views,
        "seed": seed,
        **inputs.model_dump(include={"image_size", "augmentation", "interpolation", "evaluation_resize"}),
    }
    with ExitStack() as held:  # rank 0 holds the folder's lock
        facts = process.on_first(partial(_begin, out, settings, catalogs["train"].classes, held))
        if facts["complete"]:
            process.say(f"{out}: {_sizes(facts)} of these settings are complete; nothing to do")
            return
        parts = {
            split: Parts(out / split, catalog.n, views if split == "train" else 1, width, -(-_PART // batch) * batch)
            for split, catalog in catalogs.items()
        }
        process.on_first(partial(_prepare, out, list(parts.values()), vqgan, info))
        vqgan = training.frozen(vqgan, ds_config.dtype_of(precision))
        broken = Quarantine(out / "quarantine.jsonl", inputs.broken_limit, sum(c.n for c in catalogs.values()))
        for split, catalog in catalogs.items():
            _split(split, catalog, parts[split], _Reading(inputs, seed, batch, broken), vqgan)
            labels = np.asarray(catalog.labels)
            facts["splits"][split] = process.on_first(partial(parts[split].join, labels))
        process.on_first(partial(token_cache.finish, out, facts))
        process.say(f"{out}: {_sizes(facts)}; train with --data {out}")


def _tokenizer(path: str):
    if path == "random":
        raise UserError("--tokenizer random: tokens of random values are of no use to anyone; name a trained tokenizer")
    vqgan, info = stored.load_tokenizer(Path(path))
    if info["model"]["codes"] > token_cache.MOST_CODES:
        raise UserError(f"--tokenizer {path}: has {info['model']['codes']:,} codes, a cache holds 16 bits a token")
    return vqgan, info


def _width(vqgan, image_size: int, path: str) -> int:
    if image_size % vqgan.factor:
        raise UserError(
            f"--tokenizer {path}: makes a token of {vqgan.factor} x {vqgan.factor} pixels, which does not divide "
            f"inputs.image_size = {image_size}; choose another recipe or tokenizer"
        )
    return (image_size // vqgan.factor) ** 2


def _inputs(recipe: str | None, augmentation: str | None, image_size: int) -> tuple[Inputs, int, str]:
    """Size, crops and interpolation of the pictures, the seed of the crops, and the precision of a training."""
    named = recipes.augmentations()
    if recipe is not None:
        overrides = [f"inputs.augmentation={augmentation}"] if augmentation else []
        found = recipes.load_recipe(recipe, overrides)
        below.refuse_changed(found.inputs, f"--recipe {recipe}")
        return found.inputs, found.seed, found.machine.precision
    inputs = Inputs(
        image_size=image_size,
        augmentation=Augmentation(**named[augmentation or "none"]),
        interpolation="linear",
        evaluation_resize=image_size,
        broken_limit=_BROKEN,
    )
    return inputs, 0, "auto"


def _begin(out: Path, settings: dict, classes: list[str], held: ExitStack) -> dict:
    facts = token_cache.begin(out, settings, classes, held)
    if facts["complete"]:
        token_cache.check(out, facts)
    return facts


def _prepare(out: Path, parts: list[Parts], vqgan, info: dict) -> None:
    need, free = sum(part.bytes_missing() for part in parts), shutil.disk_usage(out).free
    if need + _SPARE > free:
        raise UserError(
            f"--out {out}: the tokens need {need / 1e6:,.0f} MB, its disk has {free / 1e6:,.0f} MB left; make room, or "
            "choose a folder on another disk"
        )
    if not (out / "tokenizer").exists():
        aside = out / ".tokenizer.part"
        with files.writing(out):
            shutil.rmtree(aside, ignore_errors=True)
            stored.save_tokenizer(aside, vqgan, info["model"], info["image_size"])
            aside.rename(out / "tokenizer")


def _sizes(facts: dict) -> str:
    views = facts["settings"]["views"]
    found = [f"{split} {one['n']:,}" for split, one in facts["splits"].items()]
    bad = sum(one["unreadable"] for one in facts["splits"].values())
    several = f" in {views} views" if views > 1 else ""
    return f"tokens of {' and '.join(found)} pictures{several}" + (f", {bad:,} unreadable" if bad else "")


# --- one split


@dataclass(frozen=True)
class _Reading:
    """How pictures are read."""

    inputs: Inputs
    seed: int
    batch: int
    broken: Quarantine


def _split(split: str, catalog: Catalog, parts: Parts, reading: _Reading, vqgan) -> None:
    """Every part that is missing, by whichever rank comes for it first. All ranks call it."""
    me = process.start()
    todo, name = process.on_first(lambda: (parts.missing(), uuid.uuid4().hex))
    plans = _plans(_claimed(todo, name), parts, reading.batch)
    common = {"batch": reading.batch, "inputs": reading.inputs, "device": me.device, "quarantine": reading.broken}
    if split == "train":
        source = dali.planned(catalog, plans, seed=reading.seed, **common)
    else:
        source = dali.held_out(catalog, plans, **common)
    total = sum(parts.length(first) for _, first in todo)
    said = 0
    try:
        with counter(total, "picture", f"{split}: tokenized", first=me.first, say=process.say) as advance:
            rows, good = [], []
            for batch in source:
                rows.append(training.tokenize(vqgan, batch.images[:, 0]).cpu().numpy())
                good.append(batch.valid.cpu().numpy() > 0)
                last = int(batch.index.max()) + 1
                view, first = int(batch.epoch[0]), last - 1 - (last - 1) % parts.size
                if last == first + parts.length(first):
                    size = parts.length(first)
                    parts.write(view, first, np.concatenate(rows)[:size], np.concatenate(good)[:size])
                    rows, good = [], []
                everywhere = me.store.add(f"tokenized/{name}", int((batch.index >= 0).sum()))
                advance(everywhere - said)
                said = everywhere
            process.barrier()
            if said < total:  # other ranks had more to do
                advance(total - said)
    finally:
        source.close()


def _claimed(todo: list, name: str) -> Iterator[tuple[int, int]]:
    """Parts, one after the other: all ranks draw from one list, so a slow one does fewer."""
    store = process.start().store
    while (k := store.add(f"claimed/{name}", 1) - 1) < len(todo):
        yield todo[k]


def _plans(claimed, parts: Parts, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(epoch, index) of the batches of parts; the last batch of a split is filled up, for its shape decides about the
    last bits of float32 (a part is a whole number of batches)."""
    for view, first in claimed:
        for epoch, index in dali.once(np.arange(first, first + parts.length(first)), batch):
            yield epoch + view, index
