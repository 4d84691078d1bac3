"""MAGE: a masked generative encoder over image tokens (paper sections 2 and 3).

Shapes: B samples, N tokens of a picture in raster order, K of them kept in the encoder. Sequences have the
fake class token in front: token i stands at place i + 1. Parameters are named as in the authors' files.
A parameter is read by the module that owns it, in its forward, and by others only through a call of that
module: so an engine may shard each module's parameters and gather them around its forward.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transformer import layer_norm, stack

# Published weights have 1000 class words between codes and mask token and use one of them, this one.
_PUBLISHED_VOCABULARY, _PUBLISHED_CLASS = 2025, 1100


def class_id(vocabulary: int) -> int:
    """The word in front of the tokens: the one before the mask token, in the published vocabulary another."""
    return _PUBLISHED_CLASS if vocabulary == _PUBLISHED_VOCABULARY else vocabulary - 2


class TokenEmbedding(nn.Module):
    """Word plus learned position embedding, LayerNorm, dropout."""

    def __init__(self, *, vocabulary: int, positions: int, width: int, dropout: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.LayerNorm = layer_norm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids int64 (B, L), positions int64 (B or 1, L) -> (B, L, width)."""
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings(positions)))


class MlmLayer(nn.Module):
    """Prediction head: linear, GELU, LayerNorm, dot product with word vectors, a bias per word."""

    def __init__(self, *, width_in: int, width: int, vocabulary: int):
        super().__init__()
        self.fc = nn.Linear(width_in, width)
        self.ln = nn.LayerNorm(width, eps=1e-5)  # the one LayerNorm of the model with this eps
        self.bias = nn.Parameter(torch.zeros(1, 1, vocabulary))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """x (B, N, width_in), words (C, width), the first C of the vocabulary -> logits (B, N, C)."""
        x = self.ln(F.gelu(self.fc(x)))
        return F.linear(x, words, self.bias[0, 0, : words.shape[0]])


class _Part(nn.Module):
    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Initial value of the parameter `name`, float32 on the CPU (paper section 2).

        Takes the full `shape` as an argument, because the parameter itself may be sharded.
        """
        value = torch.zeros(shape, dtype=torch.float32, device="cpu")
        if name.endswith("bias"):
            return value
        if len(shape) == 1:  # LayerNorm
            return value.fill_(1.0)
        if "embeddings" in name or name in ("decoder_pos_embed_learned", "mask_token"):
            return value.normal_(0.0, 0.02, generator=generator)
        return nn.init.xavier_uniform_(value, generator=generator)


class Encoder(_Part):
    """Tokens -> vectors: one half of a `Mage`, alone where it is frozen.

    Args: encoder: depth, width and heads; tokens: N; codes: size of the codebook, ids 0..codes-1; vocabulary:
    >= codes + 2, with the fake class (`class_id`) and the mask token (`mask_id`, the last).
    Raises: ValueError for a vocabulary that is too small.
    """

    def __init__(self, *, encoder: Mapping[str, int], tokens: int, codes: int, vocabulary: int, dropout: float):
        super().__init__()
        self._add_encoder(encoder, tokens, codes, vocabulary, dropout)

    def _add_encoder(self, encoder, tokens: int, codes: int, vocabulary: int, dropout: float) -> None:
        if vocabulary < codes + 2:
            raise ValueError(f"vocabulary {vocabulary}: at least codes + 2 = {codes + 2}")
        self.tokens, self.codes, self.vocabulary, self.width = tokens, codes, vocabulary, encoder["width"]
        self.mask_id = vocabulary - 1
        self.class_id = class_id(vocabulary)
        self.token_emb = TokenEmbedding(vocabulary=vocabulary, positions=1 + tokens, width=self.width, dropout=dropout)
        self.blocks = stack(**encoder, dropout=dropout)
        self.norm = layer_norm(self.width)

    def forward(self, tokens: Tensor, masked: Tensor, keep: Tensor | None = None) -> Tensor:
        """Vectors of the class token and of the tokens that enter, after the final norm: (B, 1 + K, width).

        Args: tokens int64 (B, N), read where not masked; masked bool (B, N); keep int64 (B, K), tokens that enter,
        each at most once, the same K for all samples (None: all of them, as in sampling).
        """
        ids = F.pad(torch.where(masked, self.mask_id, tokens), (1, 0), value=self.class_id)
        return self.norm(self._blocks(ids, None if keep is None else F.pad(keep + 1, (1, 0))))

    def features(self, tokens: Tensor) -> Tensor:
        """Representation of whole pictures (paper section 4): tokens int64 (B, N) -> (B, width).

        The mean of the last block's output over the tokens, without the class token and before the final
        norm, then a LayerNorm without affine.
        """
        x = self._blocks(F.pad(tokens, (1, 0), value=self.class_id), None)
        return F.layer_norm(x[:, 1:].mean(dim=1), x.shape[-1:], eps=1e-6)

    @torch.no_grad()
    def code_vectors(self) -> Tensor:
        """Word embeddings of the codes (codes, width), without gradient (as the authors' head)."""
        words = self.token_emb.word_embeddings
        return words(torch.arange(self.codes, device=self.norm.weight.device))

    def _blocks(self, ids: Tensor, places: Tensor | None) -> Tensor:
        """ids (B, 1 + N), places to keep (B, 1 + K) -> the last block's output (B, 1 + K, width)."""
        if places is None:
            places = torch.arange(ids.shape[1], device=ids.device)[None]
        else:  # before the embedding: less work, and its gradient needs no atomic additions
            ids = ids.gather(1, places)
        x = self.token_emb(ids, places)
        for block in self.blocks:
            x = block(x)
        return x


class Decoder(_Part):
    """Vectors -> logits over the codes: the other half, alone where it is trained on a frozen encoder (section 5).

    Args: width: of the encoder's vectors; decoder: depth, width and heads; tokens: N; vocabulary: as the encoder's;
    padding: "cls" or "mask", what fills masked and dropped positions of its input (Table 3); classes: of a
    class-conditional one, whose label is one more token behind the padded ones; None: it takes no label.
    Raises: ValueError for an unknown padding.
    """

    def __init__(
        self,
        *,
        width: int,
        decoder: Mapping[str, int],
        tokens: int,
        vocabulary: int,
        dropout: float,
        padding: str,
        classes: int | None = None,
    ):
        super().__init__()
        self._add_decoder(width, decoder, tokens, vocabulary, dropout, padding, classes)

    def _add_decoder(self, width: int, decoder, tokens: int, vocabulary: int, dropout: float, padding: str, classes):
        if padding not in ("cls", "mask"):
            raise ValueError(f"padding {padding!r}: cls or mask")
        self.padding, self.classes, inside = padding, classes, decoder["width"]
        self.decoder_embed = nn.Linear(width, inside)
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, 1 + tokens, inside))
        if padding == "mask":
            self.mask_token = nn.Parameter(torch.zeros(1, 1, inside))
        if classes is not None:
            self.label_embeddings = nn.Embedding(classes + 1, inside)  # the last: no label is given
        self.decoder_blocks = stack(**decoder, dropout=dropout)
        self.decoder_norm = layer_norm(inside)
        self.mlm_layer = MlmLayer(width_in=inside, width=width, vocabulary=vocabulary)

    def forward(
        self,
        x: Tensor,
        masked: Tensor,
        keep: Tensor | None,
        words: Tensor,
        labels: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Logits over the codes at every position: (B, N, codes).

        Args: x (B, 1 + K, width), masked, keep: of the encoder; words (codes, width): its code vectors; labels
        int64 (B,), negative or None: no label; guidance: a number as a tensor of no dimension: moves the logits
        away from those without a label, l + guidance (l - l without label), in float32. The decoder then sees each
        sample twice.
        """
        if guidance is not None:
            twice = (x, masked, keep, labels)
            x, masked, keep, labels = (None if each is None else torch.cat([each, each]) for each in twice)
            labels = labels.masked_fill(torch.arange(len(labels), device=labels.device) >= len(labels) // 2, -1)
        x = self._padded(self.decoder_embed(x), F.pad(masked, (1, 0)), keep)
        if self.classes is not None:
            if labels is None:
                labels = torch.full_like(masked[:, 0], -1, dtype=torch.int64)
            label = self.label_embeddings(torch.where(labels < 0, self.classes, labels))
            x = torch.cat([x, label[:, None]], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        logits = self.mlm_layer(self.decoder_norm(x)[:, 1 : 1 + masked.shape[1]], words)
        if guidance is None:
            return logits
        given, free = logits.float().chunk(2)
        return given + guidance * (given - free)

    def _padded(self, x: Tensor, masked: Tensor, keep: Tensor | None) -> Tensor:
        """Projected encoder output (B, 1 + K, width) -> padded, with positions (B, 1 + N, width)."""
        pad = x[:, :1] if self.padding == "cls" else self.mask_token.to(x.dtype)
        if keep is not None:
            index = F.pad(keep + 1, (1, 0))[..., None].expand(-1, -1, x.shape[2])
            x = pad.expand(x.shape[0], masked.shape[1], -1).scatter(1, index, x)
        # Masked positions that went through the encoder are padded like the dropped ones.
        return torch.where(masked[..., None], pad, x) + self.decoder_pos_embed_learned


class Mage(Encoder, Decoder):
    """Encoder and decoder of MAGE. A new one must be given its initial values by `models.initialize`.

    Args, errors: those of `Encoder` and `Decoder`.
    """

    def __init__(
        self,
        *,
        encoder: Mapping[str, int],
        decoder: Mapping[str, int],
        tokens: int,
        codes: int,
        vocabulary: int,
        dropout: float,
        padding: str,
        classes: int | None = None,
    ):
        nn.Module.__init__(self)
        self._add_encoder(encoder, tokens, codes, vocabulary, dropout)
        self._add_decoder(encoder["width"], decoder, tokens, vocabulary, dropout, padding, classes)

    def forward(
        self,
        tokens: Tensor,
        masked: Tensor,
        keep: Tensor | None = None,
        labels: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Logits over the codes at every position: (B, N, codes) in the dtype of the module. The encoder runs once,
        also where the decoder is guided. Args: of `Encoder.forward` and `Decoder.forward`."""
        return self.decode(Encoder.forward(self, tokens, masked, keep), masked, keep, labels, guidance)

    def decode(self, x: Tensor, masked: Tensor, keep: Tensor | None = None, labels=None, guidance=None) -> Tensor:
        """Logits of the encoder's output x (B, 1 + K, width)."""
        return Decoder.forward(self, x, masked, keep, self.code_vectors(), labels, guidance)


def token_loss(logits: Tensor, tokens: Tensor, masked: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy with label smoothing over the masked positions of each sample (paper section 3).

    Args: logits (B, N, codes), tokens int64 (B, N), masked bool (B, N).
    Returns: loss (B,), the mean over the sample's masked positions, and top1 (B,), the fraction of them whose
    likeliest code is right; 0 where nothing is masked. float32 also for bf16 logits.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(exact.flatten(0, 1), tokens.flatten(), reduction="none", label_smoothing=smoothing)
    right = (exact.argmax(dim=-1) == tokens) & masked
    count = masked.sum(dim=1).clamp(min=1)
    return (losses.view_as(tokens) * masked).sum(dim=1) / count, right.sum(dim=1) / count
