"""For tests: MAE's checkpoints of the published layouts, small and with random values, and timm's own ViT of them."""

from functools import partial
from pathlib import Path

import timm
import torch

WIDTH, DEPTH, PATCH, SIDE = 128, 2, 8, 4


def of_timm(classes: int = 0):
    """An independent model: the mean of the last block's patches, then fc_norm."""
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIDE * PATCH,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=2,
        num_classes=classes,
        global_pool="avg",
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def encoder_table(model) -> dict[str, torch.Tensor]:
    """Of a pre-training file: no fc_norm and no head, but a norm."""
    table = {name: value for name, value in model.state_dict().items() if not name.startswith(("fc_norm", "head"))}
    return table | {"norm.weight": torch.full((WIDTH,), 3.0), "norm.bias": torch.ones(WIDTH)}


def decoder_table() -> dict[str, torch.Tensor]:
    table = {"mask_token": torch.zeros(1, 1, 64), "decoder_pos_embed": torch.zeros(1, 1 + SIDE**2, 64)}
    table |= {"decoder_embed.weight": torch.zeros(64, WIDTH), "decoder_embed.bias": torch.zeros(64)}
    return table | {"decoder_pred.weight": torch.zeros(3 * PATCH**2, 64), "decoder_norm.weight": torch.ones(64)}


def normalized(images: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean[:, None, None]) / std[:, None, None]


def save(path: Path, gan: bool = False):
    """A pre-training file as `mae_pretrain_vit_*.pth`, or with the decoder, as those of `mae_visualize_vit_*`, which
    losses on normalized pixels and of a GAN left behind. Returns timm's model of its weights."""
    model = of_timm()
    torch.save({"model": encoder_table(model) | (decoder_table() if gan else {})}, path)
    return model


@torch.no_grad()
def features(model, images: torch.Tensor) -> torch.Tensor:
    """By timm's modules: the mean of the last block's patches, normalized without weights. images: in [0, 1]."""
    x = model._pos_embed(model.patch_embed(normalized(images)))
    for block in model.blocks:
        x = block(x)
    return torch.nn.functional.layer_norm(x[:, 1:].mean(dim=1), (WIDTH,), eps=1e-6)
