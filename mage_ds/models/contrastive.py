"""Contrast between two views of a picture: MAGE-C, and SimCLR on the same encoder (paper section 3, Tables 7 to 9).

What goes over the ranks comes in as two functions, `total` and `gathered` of engine.gather: in a single process both
are the identity. Shapes: B pictures in two views, as 2B samples: first view 0 of all, then view 1 of all.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mage import Encoder, Mage

Over = Callable[[Tensor], Tensor]  # over the ranks
_EPS = 1e-5


def _exact(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class BatchNorm(nn.Module):
    """Batch norm by the statistics of all ranks, in training only: there are no running ones. float32 inside."""

    def __init__(self, width: int, *, shift: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if shift else None

    def forward(self, x: Tensor, counted: Tensor, total: Over) -> Tensor:
        """x (B, width); counted float32 (B,): 0 for a sample that the statistics leave out, else 1."""
        exact, share = _exact(x), counted[:, None]
        count = total(counted.sum()[None]).clamp(min=1)
        mean = total((exact * share).sum(0)) / count
        exact = exact - mean  # before the square: no small difference of large sums
        variance = total((exact.square() * share).sum(0)) / count
        exact = exact * (variance + _EPS).rsqrt() * self.weight
        return (exact if self.bias is None else exact + self.bias).to(x.dtype)


class Projection(nn.Module):
    """An MLP whose layers have batch norm and no bias of their own, and ReLU between them (as SimCLR's).

    Args: width: of what is projected; hidden, hidden_layers: width and number of the layers before the last; out.
    """

    def __init__(self, *, width: int, hidden: int, hidden_layers: int, out: int):
        super().__init__()
        widths = [width, *[hidden] * hidden_layers, out]
        self.layers = nn.ModuleList(nn.Linear(*pair, bias=False) for pair in pairwise(widths))
        self.norms = nn.ModuleList(BatchNorm(each, shift=at < hidden_layers) for at, each in enumerate(widths[1:]))

    def forward(self, x: Tensor, counted: Tensor, total: Over) -> Tensor:
        """x (B, width) -> (B, out) of length 1, float32 also for bf16. counted, total: of `BatchNorm`."""
        for at, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = norm(layer(F.relu(x) if at else x), counted, total)
        return F.normalize(_exact(x), dim=1)


class MageC(Mage):
    """MAGE with a projection head beside its decoder. Args: those of `Mage`; projection: those of `Projection` but the
    width."""

    def __init__(self, *, projection: Mapping[str, int], **numbers):
        super().__init__(**numbers)
        self.projection = Projection(width=self.width, **projection)

    def forward(self, tokens, masked, keep=None, counted: Tensor | None = None, total: Over | None = None):
        """Logits as of `Mage.forward`; where samples are `counted`, also their projections, as `Projection.forward`."""
        x = Encoder.forward(self, tokens, masked, keep)
        logits = self.decode(x, masked, keep)
        return logits if counted is None else (logits, _projected(self.projection, x, counted, total))


class ContrastiveEncoder(Encoder):
    """MAGE's encoder with a projection head and no decoder. Args: as `MageC`, those of `Encoder`."""

    def __init__(self, *, projection: Mapping[str, int], **numbers):
        super().__init__(**numbers)
        self.projection = Projection(width=self.width, **projection)

    def forward(self, tokens, masked, keep=None, counted: Tensor | None = None, total: Over | None = None) -> Tensor:
        """Projections of the samples, as `Projection.forward`. Args: of `Encoder.forward` and `BatchNorm.forward`."""
        return _projected(self.projection, Encoder.forward(self, tokens, masked, keep), counted, total)


def _projected(projection: Projection, x: Tensor, counted: Tensor, total: Over) -> Tensor:
    """x (B, 1 + K, width), the encoder's output: its mean over the tokens, without the class token, projected."""
    return projection(x[:, 1:].mean(dim=1), counted, total)


def info_nce(
    views: Tensor, counted: Tensor, *, temperature: float, gathered: Over, first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """InfoNCE of pairs of views, each to be told from all other views of all ranks (the same view of the same picture
    aside), of which those that are not counted take no part.

    Args: views float32 (2B, D) of length 1; counted float32 (B,), 1 or 0; first: place of this rank's first picture
    among those of all ranks.
    Returns: loss, of which the mean over the ranks is the mean over all counted views of all ranks (0 with gradients
    where there are none); top1, the share of them whose other view is the nearest, likewise; pairs, how many pictures
    of all ranks are counted.
    """
    count = len(counted)
    ours = views.unflatten(0, (2, count)).transpose(0, 1)  # (B, 2, D): gathered in order of the pictures
    everyone, taken = gathered(ours).flatten(0, 1), gathered(counted).repeat_interleave(2) > 0
    rows = 2 * first + torch.arange(2 * count, device=views.device)
    places = torch.arange(len(everyone), device=views.device)
    ours, weight = ours.flatten(0, 1), counted.repeat_interleave(2)
    logits = ours @ everyone.T / temperature
    logits = logits.masked_fill((places == rows[:, None]) | ~taken, -torch.inf)
    logits = logits.masked_fill(weight[:, None] == 0, 0.0)  # finite, and without gradient
    partner = rows ^ 1
    losses = F.cross_entropy(logits, partner, reduction="none")
    right = (logits.argmax(dim=1) == partner).float()
    pairs = taken.sum() / 2
    share = weight / (2 * pairs).clamp(min=1) * (len(everyone) / len(ours))  # of the mean over the ranks, not their sum
    return (losses * share).sum(), (right * share).sum(), pairs
