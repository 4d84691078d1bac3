"""Classifiers (paper section 4): an encoder with a linear layer, and a linear layer alone on frozen features."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mage import TokenEmbedding
from .transformer import layer_norm, stack

_STD = 0.02  # of a linear layer that is not pre-trained, and of embeddings


class Classifier(nn.Module):
    """MAGE's encoder without its final norm, a LayerNorm of the mean over the tokens, a linear layer; named as in the
    authors' files of fine-tuned models.

    Args: encoder: depth, width and heads; tokens: N; vocabulary: rows of the word embedding; class_id: the word in
    front of the tokens; classes; dropout: after the token embedding, the only one of the published recipes; drop_path:
    see `stack`; head_std: standard deviation of the linear layer's initial weights.
    """

    def __init__(
        self,
        *,
        encoder: Mapping[str, int],
        tokens: int,
        vocabulary: int,
        class_id: int,
        classes: int,
        dropout: float,
        drop_path: float = 0.0,
        head_std: float = _STD,
    ):
        super().__init__()
        self.tokens, self.class_id, self.head_std, width = tokens, class_id, head_std, encoder["width"]
        self.token_emb = TokenEmbedding(vocabulary=vocabulary, positions=1 + tokens, width=width, dropout=dropout)
        self.blocks = stack(**encoder, dropout=0.0, drop_path=drop_path)
        self.fc_norm = layer_norm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 (B, N) -> class scores before softmax (B, classes)."""
        return self.head(self.features(tokens))

    def features(self, tokens: Tensor) -> Tensor:
        """Representation of whole pictures: tokens int64 (B, N) -> (B, width), after `fc_norm`."""
        places = torch.arange(1 + tokens.shape[1], device=tokens.device)[None]
        x = self.token_emb(F.pad(tokens, (1, 0), value=self.class_id), places)
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x[:, 1:].mean(dim=1))

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """As `Mage.initial_value`, with the values of a classifier from scratch (paper section 4)."""
        return scratch_value(name, shape, generator, self.head_std)


def scratch_value(name: str, shape: torch.Size, generator: torch.Generator, head_std: float) -> Tensor:
    """Of a classifier's parameter: embeddings normal, linear layers truncated normal, LayerNorm 1 and 0."""
    value = torch.zeros(shape, dtype=torch.float32, device="cpu")
    if name.endswith("bias"):
        return value
    if len(shape) == 1:  # LayerNorm
        return value.fill_(1.0)
    if "emb" in name or name == "cls_token":
        return value.normal_(0.0, _STD, generator=generator)
    return nn.init.trunc_normal_(value, std=head_std if name == "head.weight" else _STD, generator=generator)


class ProbeHead(nn.Module):
    """BatchNorm without affine, then a linear layer: what a linear probe trains (paper section 4, Table 11).

    In training each rank normalizes by its own micro-batch's statistics; at evaluation by the running ones.
    """

    def __init__(self, *, width: int, classes: int, head_std: float):
        super().__init__()
        self.head_std = head_std
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, width) -> class scores before softmax (B, classes)."""
        return self.linear(self.norm(features))

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """As `Mage.initial_value`."""
        value = torch.zeros(shape, dtype=torch.float32, device="cpu")
        if name.endswith("bias"):
            return value
        return nn.init.trunc_normal_(value, std=self.head_std, generator=generator)


def folded(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `ProbeHead` as one linear layer of the same scores at evaluation: `weight` and `bias`."""
    scale = (head["norm.running_var"].double() + 1e-6).rsqrt()
    weight = head["linear.weight"].double() * scale
    bias = head["linear.bias"].double() - weight @ head["norm.running_mean"].double()
    return {"weight": weight.float(), "bias": bias.float()}
