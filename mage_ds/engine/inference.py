"""Serving a trained model: DeepSpeed's inference engine, and frozen modules beside it."""

import numpy as np

from mage_ds.engine import process
from mage_ds.sampling import decode

_SOME = (
    16  # pictures that a tokenizer takes, or makes, at once: at 256 px each of its activations takes 34 MB a picture
)


def engine(model, dtype):
    """DeepSpeed's InferenceEngine around `model`, on this process's device, in `dtype`, dropout off.

    One process serves a whole model on one device; more processes serve other pictures. Call the engine itself, with
    what the model's forward takes. The model is converted and moved in place.
    """
    process.start()  # init_inference takes the device, and the group, from there
    import deepspeed

    return deepspeed.init_inference(model.requires_grad_(False), config={"dtype": dtype}).eval()


def frozen(module):
    """The module on this process's device, without gradients, laid out for convolutions: the tokenizer.

    It stays outside of every engine: an engine in bf16 would convert its codebook too.
    """
    device = process.start().device
    return module.eval().requires_grad_(False).to(device=device, memory_format=layout(device))


def layout(device):
    """The memory format in which a tokenizer's convolutions are fast: channels last on a CPU.

    On an H200 channels last takes 1.65 times as long in bf16: torch's GroupNorm there works on, and returns, the usual
    layout, and half of the time went into copies.
    """
    import torch

    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def tokens_of(tokenizer, images):
    """The tokens int64 (B, N) of pictures in [0, 1] (B, 3, H, W), by a tokenizer that is `frozen`, on its device."""
    import torch

    images = images.contiguous(memory_format=layout(images.device))
    with torch.no_grad():
        return torch.cat([tokenizer.tokenize(some) for some in images.split(_SOME)])


def draw(tokenizer, tokens, rounded: bool = False) -> np.ndarray:
    """The pictures of tokens int64 (B, N), by a tokenizer that is `frozen`: uint8 (B, H, W, 3), as `decode.pixels`."""
    import torch

    with torch.no_grad():
        return np.concatenate([decode.pixels(tokenizer.detokenize(some), rounded) for some in tokens.split(_SOME)])
