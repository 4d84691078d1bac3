"""Pictures beside the training stream: the held-out split in equal shares, and a few to look at."""

from collections.abc import Iterator

import numpy as np
import torch

from mage_ds import keyed
from mage_ds.engine import process
from mage_ds.engine.training import Plan
from mage_ds.inputs import dali
from mage_ds.inputs.batch import Batch
from mage_ds.inputs.catalog import Catalog
from mage_ds.inputs.quarantine import Quarantine


def batches(plan: Plan, catalog: Catalog) -> Iterator[tuple[Batch, torch.Tensor]]:
    """This rank's share of the held-out pictures that the recipe measures, always the same ones.

    Yields (batch, counts): counts bool (B,) on the host is False for padding. Every rank yields as many batches,
    because a forward may be collective (ZeRO 3); together they count each picture once.
    """
    me, most = process.start(), plan.recipe.report.evaluate_samples
    order = keyed.permutation(plan.recipe.seed, "held out", 0, catalog.n)[:most]
    each = -(-len(order) // me.world)
    share = np.full(each, dali.PADDING)
    mine = order[me.rank :: me.world]
    share[: len(mine)] = mine
    source = _open(plan, catalog, share, min(plan.share.micro_batch, each))
    for batch in source:
        yield batch, batch.valid.cpu() > 0


def shown(plan: Plan, catalog: Catalog, count: int) -> Batch:
    """`count` pictures to look at (fewer where there are fewer), always the same, alike on all ranks."""
    chosen = keyed.permutation(plan.recipe.seed, "shown", 0, catalog.n)[:count]
    source = _open(plan, catalog, chosen, len(chosen))
    batch = next(source)
    source.close()
    return batch


def _open(plan: Plan, catalog: Catalog, indices: np.ndarray, batch: int) -> dali.Ahead:
    return dali.evaluation(
        catalog,
        indices,
        batch=batch,
        inputs=plan.recipe.inputs,
        device=process.start().device,
        quarantine=Quarantine(None, 1.0, catalog.n),  # unreadable ones are not counted; `prepare` lists them
    )
