"""What a frozen encoder says of the training pictures, computed once: for probes that always see them alike.

RUN/features/train.float32 (or .bfloat16, the encoder's number format): n rows of float32, NaN for unreadable pictures.
"""

import os
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mage_ds.engine import process, watch
from mage_ds.engine.training import Plan
from mage_ds.errors import UserError
from mage_ds.inputs import dali, order, token_cache
from mage_ds.inputs.batch import Batch
from mage_ds.inputs.catalog import Catalog
from mage_ds.inputs.quarantine import Quarantine
from mage_ds.inputs.token_cache import TokenCache
from mage_ds.recipes.schema import ClassifyRecipe
from mage_ds.report.progress import counter


def serves(recipe: ClassifyRecipe, catalog: Catalog | TokenCache) -> bool:
    """Whether the features of a training picture are the same whenever it is seen."""
    inputs = recipe.inputs
    changed = inputs.augmentation.scale or inputs.augmentation.flip or inputs.colour or inputs.policy
    several = isinstance(catalog, TokenCache) and catalog.views > 1
    dropped = recipe.model.dropout and recipe.model.patch is None
    return recipe.protocol == "probe" and not (changed or several or dropped)


def made(plan: Plan, catalog: Catalog | TokenCache, see: Callable[[Batch], torch.Tensor], name: str) -> np.ndarray:
    """The table float32 (n, width), a map of the file in the run folder; where it is not there, every rank makes its
    share of it. see: a batch -> features (B, width); name: of the number format that they are computed in."""
    path = plan.options.out / "features" / f"train.{name}"
    shape = catalog.n, plan.recipe.model.encoder.width
    if not process.on_first(path.is_file):
        _make(plan, catalog, see, path, shape)
    return np.memmap(path, np.float32, "r", shape=shape)


def _make(plan: Plan, catalog, see, path: Path, shape: tuple[int, int]) -> None:
    me, (n, width) = process.start(), shape
    part = path.with_name(f".{path.name}.part")
    process.on_first(lambda: _written(part, partial(_begin, part, 4 * n * width)))
    each = -(-n // me.world)
    mine = np.arange(n)[each * me.rank :][:each]
    process.say(f"features of {n:,} training pictures, computed once: {path}, {4e-6 * n * width:,.0f} MB")
    problem = None
    try:
        with (
            counter(len(mine) * me.world, "picture", "seen", first=me.first, say=process.say) as advance,
            closing(_share(plan, catalog, mine)) as source,
        ):
            for batch in source:
                rows = see(batch).float().masked_fill(batch.valid[:, None] == 0, torch.nan).cpu().numpy()
                real = batch.index >= 0
                if real.any():
                    at = 4 * width * int(batch.index[0])
                    _written(part, partial(_put, part, at, rows[real].tobytes()))
                advance(int(real.sum()) * me.world)
                watch.beat()
    except UserError as error:  # told after the others' work, or they would wait for ever
        problem = str(error)
    if problems := [each for each in process.gather_objects(problem) if each]:
        raise UserError(problems[0])
    process.on_first(lambda: _written(part, partial(os.replace, part, path)))


def _share(plan: Plan, catalog, indices: np.ndarray):
    """The pictures `indices`, as the training shows them."""
    device, size = process.start().device, plan.share.micro_batch
    if isinstance(catalog, TokenCache):
        return token_cache.evaluation(catalog, indices, batch=size, device=device)
    listed = Quarantine(plan.options.out / "quarantine.jsonl", plan.recipe.inputs.broken_limit, catalog.n)
    common = {"seed": plan.recipe.seed, "inputs": plan.recipe.inputs, "device": device, "quarantine": listed}
    return dali.planned(catalog, dali.once(indices, size), batch=size, **common)


def _begin(part: Path, size: int) -> None:
    part.parent.mkdir(exist_ok=True)
    with open(part, "wb") as file:
        file.truncate(size)


def _put(part: Path, at: int, data: bytes) -> None:
    # Not through a map: where two hosts share a page of a network's file, one would overwrite the other's rows.
    with open(part, "r+b", buffering=0) as file:
        file.seek(at)
        file.write(data)


def _written(path: Path, action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room, then start again") from None


class Stream:
    """This rank's endless micro-batches, in the order of `order.plans`, with features in place of pictures."""

    waited = 0.0

    def __init__(self, plan: Plan, table: np.ndarray, labels: np.ndarray, position: int):
        me, recipe = process.start(), plan.recipe
        share = {"batch": recipe.batch, "micro_batch": plan.share.micro_batch, "rank": me.rank, "world": me.world}
        self._plans = order.plans(len(table), seed=recipe.seed, position=position, **share)
        self._table, self._labels, self._device = table, labels, me.device

    def __next__(self) -> Batch:
        epoch, index = next(self._plans)
        rows = torch.from_numpy(self._table[index])
        valid = rows.isfinite().all(dim=1)
        labels = torch.from_numpy(np.asarray(self._labels[index], dtype=np.int64))
        held = (each.to(self._device) for each in (labels, rows.nan_to_num(), valid.float()))
        labels, rows, valid = held
        return Batch(labels=labels, index=index, epoch=epoch, valid=valid, features=rows)

    def close(self) -> None:
        pass
