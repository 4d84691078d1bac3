"""Pictures beside the training stream: the held-out split in equal shares, and a few to look at."""

from collections.abc import Iterator

import numpy as np
import torch

from mage_ds import keyed
from mage_ds.engine import process, watch
from mage_ds.engine.training import Plan
from mage_ds.inputs import dali, token_cache
from mage_ds.inputs.batch import Batch
from mage_ds.inputs.catalog import Catalog
from mage_ds.inputs.quarantine import Quarantine
from mage_ds.inputs.token_cache import TokenCache


def batches(plan: Plan, catalog: Catalog | TokenCache) -> Iterator[tuple[Batch, torch.Tensor]]:
    """This rank's share of the held-out pictures that the recipe measures, always the same ones.

    Yields (batch, counts): counts bool (B,) on the host is False for padding. Every rank yields as many batches,
    because a forward may be collective (ZeRO 3); together they count each picture once. Raises process.StopAsked
    between batches, on all ranks before the same one.
    """
    me, most = process.start(), plan.recipe.report.evaluate_samples
    order = keyed.permutation(plan.recipe.seed, "held out", 0, catalog.n)[:most]
    each = -(-len(order) // me.world)
    share = np.full(each, dali.PADDING)
    mine = order[me.rank :: me.world]
    share[: len(mine)] = mine
    source = _open(plan, catalog, share, min(plan.share.micro_batch, each))
    try:
        for batch in source:
            process.stop_point()
            watch.beat()
            yield batch, batch.valid.cpu() > 0
    finally:
        source.close()


def shown(plan: Plan, catalog: Catalog | TokenCache, count: int) -> Batch:
    """This rank's share of `count` pictures to look at, always the same ones: as many on every rank, so that the
    forwards on them may be collective; `join` puts what is drawn of them together."""
    me = process.start()
    process.stop_point()
    chosen = keyed.permutation(plan.recipe.seed, "shown", 0, catalog.n)[:count]
    each = -(-len(chosen) // me.world)
    source = _open(plan, catalog, np.resize(chosen, each * me.world)[me.rank * each :][:each], each)
    batch = next(source)
    source.close()
    return batch


def stoppable(engine):
    """The engine's forward, before each of which a stop may cut off what is being drawn."""

    def forward(*inputs):
        process.stop_point()
        watch.beat()
        return engine(*inputs)

    return forward


def join(drawn: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """name -> uint8 (n, H, W, 3) of every rank's share, in order; the first `count` of each."""
    shares = process.gather_objects(drawn)
    return {name: np.concatenate([share[name] for share in shares])[:count] for name in drawn}


def _open(plan: Plan, catalog: Catalog | TokenCache, indices: np.ndarray, batch: int) -> dali.Ahead:
    device = process.start().device
    if isinstance(catalog, TokenCache):
        return token_cache.evaluation(catalog, indices, batch=batch, device=device)
    return dali.evaluation(
        catalog,
        indices,
        batch=batch,
        inputs=plan.recipe.inputs,
        device=device,
        quarantine=Quarantine(None, 1.0, catalog.n),  # unreadable ones are not counted; `prepare` lists them
    )
