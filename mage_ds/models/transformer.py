"""The encoder and decoder stacks: plain pre-norm ViT blocks (paper section 2), as timm has them."""

from functools import partial

from timm.models.vision_transformer import Block
from torch import nn

layer_norm = partial(nn.LayerNorm, eps=1e-6)


def stack(*, depth: int, width: int, heads: int, dropout: float, drop_path: float = 0.0) -> nn.ModuleList:
    """`depth` blocks that map (B, L, width) to (B, L, width); width must divide by heads.

    qkv bias, MLP ratio 4, exact GELU, LayerNorm eps 1e-6. `dropout` acts on the attention weights, on the attention's
    projection, after GELU and after the MLP's second layer; `drop_path` is the share of samples that pass by the last
    block, and rises to it in a line from 0 in the first. Attention is torch's fused one, whose logits are float32
    whatever the dtype of the stack.
    """
    blocks = (
        Block(
            width,
            heads,
            mlp_ratio=4.0,
            qkv_bias=True,
            proj_drop=dropout,
            attn_drop=dropout,
            drop_path=drop_path * block / max(1, depth - 1),
            norm_layer=layer_norm,
        )
        for block in range(depth)
    )
    return nn.ModuleList(blocks)
