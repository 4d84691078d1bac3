"""What one image costs: operations and activation memory, counted without computing anything.

Operations are counted on the meta device. Memory is counted in a step on fake tensors, which take the same way
through torch as the real ones: on a CPU attention with dropout keeps its weights, a GPU's fused one does not.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mage_ds.engine import made, wrap
from mage_ds.engine.memory import Live
from mage_ds.models import Vqgan
from mage_ds.models.adversary import Lpips, PatchGAN
from mage_ds.recipes.schema import Recipe, TokenizerRecipe

CHECKPOINTING = ("none", "selective", "full")
_COUNTED = (2, 4)  # images; a single one has shapes of its own, which differ by a few per cent

_SHARE = 0.5  # of the memory of a rank: the rest holds weights, moments, gradients, buffers and the input queue
_ENOUGH = {"cpu": 32, "cuda": 1024}  # larger micro-batches no longer gain speed


def forward_flops(forward: Callable[[], object]) -> int:
    """Operations of one call (a multiply-add counts as two), attention products included."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


def activation_bytes(forward: Callable[[], object], model: torch.nn.Module) -> int:
    """Bytes that autograd keeps of one call for the backward pass, each tensor once, without the parameters.

    Of the plain model: recomputing blocks keeps far less.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}  # also of their views, as a transpose
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held.append(forward())  # alive until counted, or storages would be numbered twice
    return sum(kept.values())


def largest_micro_batch(bytes_per_image: float, device: torch.device, local_world: int) -> int:
    """Images whose activations fit a rank's memory. From the memory that is built in, not what is free just now:
    a start on the same machine gives the same number."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        import psutil

        memory = psutil.virtual_memory().total / local_world
    return max(1, min(_ENOUGH[device.type], int(memory * _SHARE / max(1.0, bytes_per_image))))


def parameters(recipe: Recipe) -> list[int]:
    """Sizes of the trained parameters, in the model's order; a discriminator's after the tokenizer's (its engine is
    another one: with small buckets, what they hold is a little more)."""
    with torch.device("meta"):
        trained = [made.model_of(recipe)]
        trained += [critic for critic, _ in made.judges_of(recipe) if isinstance(critic, PatchGAN)]
        return [p.numel() for model in trained for p in model.parameters()]


def tokenizer_step_bytes(recipe: Recipe) -> int:
    """Bytes that autograd keeps of one picture at most in a step of a tokenizer, computed in float32: its own while
    the hungriest of its judges looks at the reconstruction."""
    with _fake(torch.float32):
        model, judges = made.model_of(recipe), made.judges_of(recipe)
        real, fake = (made.pictures_of(recipe, 1, "cpu", torch.float32) for _ in range(2))
        fake.requires_grad_()
        most = max((activation_bytes(partial(look, real, fake), judge) for judge, look in judges), default=0)
        return most + activation_bytes(partial(model, real), model)


def flops_per_image(recipe: Recipe, *, cached: bool = False) -> int:
    """Useful operations of a training step: forward, twice that backward, the forward of a frozen encoder, and the
    tokenizer's encoder unless the tokens are `cached`.

    LPIPS goes back to the reconstruction only, half of its operations. A discriminator is left out: it is a few per
    cent at the paper's size, and from its start on only.
    """
    with torch.device("meta"):
        model, tokenizer, encoder = made.model_of(recipe).eval(), made.tokenizer_of(recipe), made.encoder_of(recipe)
        count = 3 * forward_flops(lambda: made.loss_on_made_inputs(recipe, model, 1, torch.float32, "meta"))
        if encoder is not None:
            count += forward_flops(lambda: made.encode(recipe, encoder, 1, "meta"))
        if tokenizer is not None and not cached:
            vqgan = Vqgan(**tokenizer.model_dump())
            views = made.pictures_of(recipe, recipe.views, "meta", torch.float32)
            count += forward_flops(lambda: vqgan.encode(views))
    with _fake(torch.float32):
        real, fake = (made.pictures_of(recipe, 1, "cpu", torch.float32) for _ in range(2))
        looks = [look for judge, look in made.judges_of(recipe) if isinstance(judge, Lpips)]
        count += sum(3 * forward_flops(partial(look, real, fake)) // 2 for look in looks)
    return count


# --- memory


class Line(NamedTuple):
    """Bytes as a function of the number of images: `constant` + images x `slope`."""

    constant: float
    slope: float

    def __call__(self, images: int) -> float:
        return self.constant + images * self.slope


class Activations(NamedTuple):
    """kept: alive when the forward pass ends; working: what the backward pass takes beside them at most (blocks
    that are computed again, gradients of activations), parameters' gradients aside."""

    kept: Line
    working: Line


def activations(recipe: Recipe, dtype: torch.dtype, *, gpu: bool) -> dict[str, Activations]:
    """Memory of the activations of a micro-batch, for each choice of machine.activation_checkpointing."""
    kept = [_kept(recipe, images, dtype, gpu) for images in _COUNTED]
    judging = [_judging(recipe, images, dtype) for images in _COUNTED]
    found = {}
    for which in CHECKPOINTING:
        working = [_working(_shallow(recipe), which, images, dtype, gpu) for images in _COUNTED]
        working = max(working, judging, key=lambda both: both[-1])  # one after the other
        found[which] = Activations(_line(*(each[which] for each in kept)), _line(*working))
    return found


def frozen_calls(recipe: Recipe, dtype: torch.dtype) -> dict[str, tuple[torch.nn.Module, Callable]]:
    """The frozen models beside the trained one by name, in torch's default dtype, which must be `dtype` when they are
    called, without initial values: the module, and what a step asks of it for a number of images."""
    found, tokenizer, encoder = {}, made.tokenizer_of(recipe), made.encoder_of(recipe)
    if encoder is not None:
        found["encoder"] = encoder.eval(), lambda n: made.encode(recipe, encoder, n, "cpu")
    if tokenizer is not None:
        vqgan, views = Vqgan(**tokenizer.model_dump()), recipe.views
        found["tokenizer"] = (
            vqgan,
            lambda n: vqgan.tokenize(made.pictures_of(recipe, views * n, "cpu", torch.float32).to(dtype)),
        )
    return found


def frozen_bytes(recipe: Recipe, dtype: torch.dtype) -> dict[str, tuple[int, Line]]:
    """Of each frozen model its weights, and the peak of its forward pass."""
    found = {}
    with _fake(dtype):
        for name, (module, call) in frozen_calls(recipe, dtype).items():
            peaks = []
            for images in _COUNTED:
                with Live(module.parameters()) as live, torch.no_grad():
                    weights = live.now
                    call(images)
                peaks.append(live.peak - weights)
            found[name] = weights, _line(*peaks)
    return found


def _line(few: float, more: float) -> Line:
    slope = (more - few) / (_COUNTED[1] - _COUNTED[0])
    return Line(few - _COUNTED[0] * slope, slope)


def _shallow(recipe: Recipe) -> Recipe:
    """With two blocks in each stack at most: what a block's backward pass takes does not depend on their number."""
    if isinstance(recipe, TokenizerRecipe):
        return recipe
    stacks = {name: getattr(recipe.model, name) for name in ("encoder", "decoder") if hasattr(recipe.model, name)}
    less = {name: stack.model_copy(update={"depth": min(2, stack.depth)}) for name, stack in stacks.items()}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=less)})


def _kept(recipe: Recipe, images: int, dtype: torch.dtype, gpu: bool) -> dict[str, int]:
    """Bytes alive at the end of a forward pass, by choice. A block that is computed again leaves its output only."""
    with _fake(dtype):
        model, blocks = made.model_of(recipe), {}
        with Live(model.parameters()) as live, _kernels(gpu):
            own = live.now

            def before(block, args) -> None:
                blocks[block] = live.now

            def after(block, args, output) -> None:
                blocks[block] = live.now - blocks[block] - output.untyped_storage().nbytes()

            for block in wrap.blocks(model):
                block.register_forward_pre_hook(before)
                block.register_forward_hook(after)
            loss = made.loss_on_made_inputs(recipe, model, images, dtype)
            last = live.now - own
        del loss
        return {
            which: last - sum(blocks[block] for block in wrap.recomputed(wrap.blocks(model), which))
            for which in CHECKPOINTING
        }


def _working(recipe: Recipe, which: str, images: int, dtype: torch.dtype, gpu: bool) -> int:
    """Most bytes of a backward pass, beyond those at its start; a parameter's gradient is dropped once it is there."""
    with _fake(dtype):
        model = made.model_of(recipe)
        for block in wrap.recomputed(wrap.blocks(model), which):
            wrap.recompute(block)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with Live(model.parameters()) as live, _kernels(gpu):
            loss = made.loss_on_made_inputs(recipe, model, images, dtype)
            live.peak = start = live.now
            loss.backward()
    return live.peak - start


def _judging(recipe: Recipe, images: int, dtype: torch.dtype) -> int:
    """Most bytes that a tokenizer's judges take one by one, beside its own activations; LPIPS with its weights, which
    are float32. (Roughly: of the discriminator's two pictures only one comes before the tokenizer's backward pass.)"""
    most = 0
    for kind, form in ((Lpips, torch.float32), (PatchGAN, dtype)):
        with _fake(form):
            real, fake = (made.pictures_of(recipe, images, "cpu", form) for _ in range(2))
            fake.requires_grad_()
            for judge, look in made.judges_of(recipe):
                if not isinstance(judge, kind):
                    continue
                with Live([real, fake, *judge.parameters()]) as live:
                    own = 0 if kind is Lpips else live.now
                    torch.autograd.grad([each.sum() for each in look(real, fake)], fake)
                most = max(most, live.peak - own)
    return most


@contextlib.contextmanager
def _fake(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _kernels(gpu: bool):
    """Where a GPU's kernels keep other tensors than a CPU's: fused attention no weights, dropout a byte a value.

    (A torch function mode would do, were it not off while the backward pass computes blocks again.)
    """
    usual = F.scaled_dot_product_attention, F.dropout
    if gpu:
        F.scaled_dot_product_attention, F.dropout = _fused_attention, _fused_dropout
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = usual


def _fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    return _FusedAttention.apply(q, k, v)


def _fused_dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, True)[0] if training and p else x


class _FusedAttention(torch.autograd.Function):
    """Keeps what the flash and the memory-efficient kernels keep: q, k, v, output (B, H, L, D) and a number a row."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])
