"""A plain ViT over pixels: what MAE's checkpoints hold, and a baseline beside the classifiers over tokens."""

from collections.abc import Mapping

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .classifier import scratch_value
from .transformer import layer_norm, stack


class PixelViT(VisionTransformer):
    """timm's ViT, whose features are the LayerNorm `fc_norm` of the mean over the last block's patches, as those of
    `Classifier` are of its tokens; parameters are named as in timm's and MAE's files.

    Args: encoder: depth, width and heads; image_size, patch: pixels of a side; classes: None for features alone;
    drop_path, head_std: as of `Classifier`.
    """

    def __init__(
        self,
        *,
        encoder: Mapping[str, int],
        image_size: int,
        patch: int,
        classes: int | None = None,
        drop_path: float = 0.0,
        head_std: float = 0.02,
    ):
        super().__init__(
            img_size=image_size,
            patch_size=patch,
            embed_dim=encoder["width"],
            depth=0,  # its rates of drop path go through tensors, which have no values where memory is planned
            num_heads=encoder["heads"],
            num_classes=classes or 0,
            global_pool="avg",
            norm_layer=layer_norm,
            weight_init="skip",
        )
        self.blocks = nn.Sequential(*stack(**encoder, dropout=0.0, drop_path=drop_path))
        self.image_size, self.head_std = image_size, head_std

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, image_size, image_size) in [0, 1] -> class scores before softmax (B, classes)."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Pictures as of `forward` -> (B, width), after `fc_norm`."""
        # Numbers, not buffers: those would be tensors of the files, and bf16 in a model that is converted to it.
        scales = zip(images.unbind(1), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, strict=True)
        normalized = torch.stack([(channel - mean) / std for channel, mean, std in scales], dim=1)
        x = self.forward_features(normalized.to(self.patch_embed.proj.weight.dtype))
        return self.forward_head(x, pre_logits=True)

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """As `Classifier.initial_value`; the projection of the patches is a linear layer."""
        return scratch_value(name.removeprefix("patch_embed."), shape, generator, self.head_std)
