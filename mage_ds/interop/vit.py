"""Plain ViTs over pixels of other people: MAE's checkpoints in each of their published layouts, and timm's models.

A file holds the encoder (`mae_pretrain_vit_*.pth`), the decoder beside it (`mae_visualize_vit_large*.pth`), or a head
(fine-tuned). `norm`, the LayerNorm behind the last block, is not used: features are the mean of the last block's
patches, then `fc_norm`, as fine-tuned files have it, and in the others a LayerNorm that only normalizes. A head that
comes without `fc_norm` reads the class token; it is not used either.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mage_ds.errors import UserError
from mage_ds.interop import foreign, safe, timm_files
from mage_ds.interop.parts import Parts, brief, plain_norm

_HEAD_WIDTH, _HEADS = 64, {1280: 16}  # the published ViT-H has 16 heads, 80 wide
_PATCHES, _BIAS, _PLACES = "patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"
_HEAD, _NORM = "head.weight", "fc_norm.weight"
_OTHERS = ("reg_token", "dist_token", "norm_pre", "attn_pool")  # what other ViTs compute with beside the encoder


def is_one(table: Mapping) -> bool:
    return {"cls_token", _PLACES, _PATCHES} <= table.keys() and not foreign.has(table, "token_emb.")


def read(path: Path) -> Parts:
    """The model in a file of one of MAE's layouts. UserError, one line, where it is something else."""
    path = Path(path)
    file = safe.read(path)
    table = foreign.table(file, path)
    if not is_one(table):
        raise UserError(
            f"{path}: is in none of MAE's layouts, which have cls_token, pos_embed and patch_embed.proj.*; it holds "
            f"{len(table)} tensors: {brief(table)}"
        )
    return of_table(table, foreign.settings_of(file), path)


def of_timm(name: str, file: Path | None = None) -> Parts:
    """A plain ViT of timm, from a file or from timm's cache; its input is normalized as it is used to.

    Raises: UserError for another architecture, and where its weights are not there.
    """
    model = timm_files.built(name, file)
    table = dict(model.state_dict())
    block = model.blocks[0] if isinstance(model, VisionTransformer) and is_one(table) else None
    if block is None or block.norm1.eps != 1e-6 or type(block.mlp.act) is not nn.GELU:
        raise UserError(f"timm:{name}: is no plain ViT with a class token, such as vit_base_patch16_224; choose one")
    how = resolve_model_data_config(model)
    _normalize(table, how["mean"], how["std"])
    return of_table(table, {"encoder_heads": block.attn.num_heads}, Path(f"timm:{name}"))


def _normalize(table: dict[str, Tensor], mean, std) -> None:
    """Gives a model that was trained on pictures of another mean and deviation ImageNet's ones to see: the patches'
    projection is linear, so the difference is one of its weights."""
    ours = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    if (tuple(mean), tuple(std)) == ours:
        return
    mean, std, our_mean, our_std = (torch.tensor(each).double()[:, None, None] for each in (mean, std, *ours))
    weight, bias = table[_PATCHES].double(), table[_BIAS].double()
    table[_BIAS] = (bias + (weight * (our_mean - mean) / std).sum(dim=(1, 2, 3))).float()
    table[_PATCHES] = (weight * our_std / std).float()


def of_table(table: Mapping[str, Tensor], settings: Mapping, path: Path) -> Parts:
    """The model whose tensors these are. Raises UserError for those of another one, and names them."""
    width, _, patch, _ = foreign.shape(table, _PATCHES, 4, path)
    if found := [name for name in table if name.startswith(_OTHERS)]:
        raise UserError(f"{path}: is no plain ViT, it has {brief(found)}; choose another")
    if width % _HEAD_WIDTH and "encoder_heads" not in settings:
        raise UserError(f"{path}: its width of {width} is no whole number of {_HEAD_WIDTH}-wide heads")
    heads = foreign.setting(settings, "encoder_heads", _HEADS.get(width, width // _HEAD_WIDTH), path)
    places = foreign.shape(table, _PLACES, 3, path)[1]
    side = math.isqrt(max(0, places - 1))
    if not side or side * side + 1 != places:
        raise UserError(f"{path}: {_PLACES} has {places} places, not those of a class token and a square of patches")
    foreign.shape(table, "blocks.0.norm1.weight", 1, path)
    encoder = {"depth": foreign.count(table, "blocks"), "width": width, "heads": heads}
    classes = foreign.shape(table, _HEAD, 2, path)[0] if _HEAD in table and _NORM in table else None
    model = {"encoder": encoder, "image_size": side * patch, "patch": patch, "classes": classes}
    weights, unused = foreign.fit("pixel_vit", model, plain_norm("fc_norm", width) | dict(table), path)
    what = "features alone" if classes is None else f"{classes} classes"
    words = f"ViT over pixels, encoder {foreign.say(encoder)}, patches of {patch} px, {what}"
    origin = f"{path.name}: {words}; {foreign.say_unused(unused)}"
    return Parts("pixel_vit", model, weights, side * patch, origin, unused=unused, foreign=True)


def resized(parts: Parts, image_size: int) -> Parts:
    """A ViT over pixels for pictures of another size: its position embeddings are interpolated, as timm does it.

    Raises: UserError where patches do not divide the pictures.
    """
    if image_size == parts.image_size:
        return parts
    side, rest = divmod(image_size, parts.model["patch"])
    if rest or not side:
        raise UserError(
            f"inputs.image_size = {image_size}: the patches of {parts.origin.partition(': ')[0]} are "
            f"{parts.model['patch']} px, which must divide it"
        )
    places = resample_abs_pos_embed(parts.weights[_PLACES].float(), [side, side], num_prefix_tokens=1)
    model, weights = parts.model | {"image_size": image_size}, parts.weights | {_PLACES: places}
    return replace(parts, model=model, weights=weights, image_size=image_size)
