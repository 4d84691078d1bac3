"""The models of the paper: plain torch.nn. Tensors, masks and generators come in as arguments."""

from collections.abc import Callable

import torch

from .adversary import Lpips, PatchGAN
from .classifier import Classifier, ProbeHead
from .contrastive import ContrastiveEncoder, MageC
from .mage import Decoder, Encoder, Mage
from .pixel_vit import PixelViT
from .vqgan import Vqgan

__all__ = [
    "Classifier",
    "ContrastiveEncoder",
    "Decoder",
    "Encoder",
    "Lpips",
    "Mage",
    "MageC",
    "PatchGAN",
    "PixelViT",
    "ProbeHead",
    "Vqgan",
    "initialize",
]


@torch.no_grad()
def initialize(model: Mage | Decoder | Vqgan | PatchGAN, generator_of: Callable[[str], torch.Generator]) -> None:
    """Writes every parameter's initial value in place. The model must be whole, not sharded.

    generator_of(name) returns that parameter's own CPU generator. Parameters keep their dtype and device.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(model.initial_value(name, parameter.shape, generator_of(name)))
