"""The health of a tokenizer's codebook while it is trained: which codes are used, and new values for dead ones.

usage = Usage(codes, device)
usage.attach(vqgan)                                    # before its engine is made and the run resumed
usage.add(tokens, valid)                               # each micro-batch: no other rank, no host is asked
usage.end_of_step()                                    # after the update: one all-reduce of `codes` integers
usage.figures()                                        # scalar tensors, the same on all ranks
reseed(engine, usage, points, seed, step, after)       # where the recipe's reseed_after is not 0
"""

from collections.abc import Callable

import torch

from mage_ds import keyed
from mage_ds.engine import process, state

_CODEBOOK = "quantize.embedding.weight"


class Usage:
    """Counts how often each code is used. `unused` int64 (codes,): steps since each was used last."""

    def __init__(self, codes: int, device: torch.device | str):
        self._counts = torch.zeros(codes, dtype=torch.int64, device=device)  # of this rank, in the step under way
        self._totals = torch.zeros_like(self._counts)  # of all ranks, in the last step
        self.unused = torch.zeros_like(self._counts)
        self.looked = self.due = 0  # the host read `unused` after step `looked`; no code can be dead before `due`

    def attach(self, vqgan: torch.nn.Module) -> None:
        """Make `unused` a buffer of the tokenizer, so that checkpoints hold it and a resumed run goes on exactly. It
        is no part of the state_dict, whose layout is the published one."""
        vqgan.quantize.register_buffer("unused", self.unused, persistent=False)

    def add(self, tokens: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Count a micro-batch. tokens int64 (B, N); valid (B,): 0 for placeholders, which do not count."""
        weights = torch.ones_like(tokens) if valid is None else (valid > 0).long()[:, None].expand_as(tokens)
        self._counts.scatter_add_(0, tokens.flatten(), weights.flatten())

    def end_of_step(self) -> None:
        """Sum the step over the ranks, and begin the next one. All ranks call it."""
        self._totals.copy_(process.sum_over_ranks(self._counts))
        self._counts.zero_()
        self.unused.add_(1).masked_fill_(self._totals > 0, 0)

    def figures(self) -> dict[str, torch.Tensor]:
        """Of the last step, float32 scalars: `usage`, the share of the codes that were used; `perplexity`, exp of the
        entropy of their frequencies (how many are used evenly, 1 to codes); `dead_codes`, how many were not used."""
        used = (self._totals > 0).sum()
        p = self._totals / self._totals.sum().clamp(min=1)
        return {
            "usage": used / len(p),
            "perplexity": torch.exp(torch.special.entr(p).sum()),
            "dead_codes": (len(p) - used).float(),
        }


@torch.no_grad()
def reseed(engine, usage: Usage, points: Callable[[], tuple], seed: int, step: int, after: int) -> int:
    """Give codes that no step used for `after` steps encoder outputs of the batch; returns how many got one.

    Call it after each update and `usage.end_of_step()`, on all ranks. step: the one just made. points() -> encoder
    outputs (n, D) of this rank's last micro-batch, and the squared distance (n,) of each to its code; only asked for
    where a code is dead. A keyed draw of (seed, step) takes as many of each rank, each output with a chance in
    proportion to its squared distance (as k-means++ does): drawn evenly, most codes would come to lie in what pictures
    are full of, a white ground for instance, and tell apart what looks the same. Where the outputs do not suffice the
    rest of the codes gets its turn in the next step.
    Written to the float32 master with its moments set to 0 (an in-place write to the parameter alone is undone at the
    next step), in ZeRO 0 to 2; other rows keep every bit. The host reads the counters only in steps in which a code
    can have become dead.
    """
    if usage.looked <= step < usage.due:
        return 0
    dead = (usage.unused >= after).nonzero()[:, 0]
    if len(dead):
        rows = _drawn(*points(), len(dead), seed, step)
        dead = dead[: len(rows)]
        _write(engine, dead, rows)
        usage.unused[dead] = 0
    usage.looked, usage.due = step, step + after - int(usage.unused.max())
    return len(dead)


def _drawn(points: torch.Tensor, far: torch.Tensor, wanted: int, seed: int, step: int) -> torch.Tensor:
    """At most `wanted` different ones of all ranks' points, float32 on the CPU, the same on all ranks."""
    me = process.start()
    points, far = points.float().cpu(), far.double().cpu()
    there = points.isfinite().all(dim=1) & far.isfinite() & (far > 0)
    points, far = points[there], far[there]
    u = keyed.uniform(seed, "reseed", step * me.world + me.rank, 0, len(points))[0]
    # The first of exponential waiting times whose rates are the weights: a draw by weight, nothing twice.
    order = (-torch.from_numpy(u).log() / far).argsort(stable=True)[: -(-wanted // me.world)]
    return torch.cat(process.gather_objects(points[order]))[:wanted]


def _write(engine, codes: torch.Tensor, rows: torch.Tensor) -> None:
    parameter = state.parameters(engine)[_CODEBOOK]
    state.ensure_moments(engine)
    for key in (None, *state.kinds(engine)):
        value = state.get_full(engine, parameter, key).clone()
        value[codes.to(value.device)] = rows.to(value) if key in (None, state.EMA) else 0.0
        state.set_full(engine, parameter, value, key)
