"""A fine-tuned encoder with its classifier (paper section 4), named as in the authors' files."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mage import TokenEmbedding
from .transformer import layer_norm, stack


class Classifier(nn.Module):
    """MAGE's encoder without its final norm, a LayerNorm of the mean over the tokens, a linear layer.

    Args: encoder: depth, width and heads; tokens: N; vocabulary: rows of the word embedding; class_id: the word in
    front of the tokens; classes; dropout: after the token embedding, the only one of the published recipes.
    """

    def __init__(
        self, *, encoder: Mapping[str, int], tokens: int, vocabulary: int, class_id: int, classes: int, dropout: float
    ):
        super().__init__()
        self.tokens, self.class_id, width = tokens, class_id, encoder["width"]
        self.token_emb = TokenEmbedding(vocabulary=vocabulary, positions=1 + tokens, width=width, dropout=dropout)
        self.blocks = stack(**encoder, dropout=0.0)
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
