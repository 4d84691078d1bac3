"""Serving a trained model: DeepSpeed's inference engine, and frozen modules beside it."""

from mage_ds.engine import process


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
    import torch

    device = process.start().device
    return module.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)
