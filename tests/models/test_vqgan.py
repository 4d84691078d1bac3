"""The tokenizer against a plain functional implementation, and its quantizer against loops."""

import math
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from mage_ds.engine.memory import Live
from mage_ds.models import Vqgan, initialize
from mage_ds.models.vqgan import Quantizer

FULL = {"channels": 128, "multipliers": [1, 1, 2, 2, 4], "blocks": 2, "code_dim": 256, "codes": 1024}
TINY = {"channels": 32, "multipliers": [1, 2, 2], "blocks": 2, "code_dim": 6, "codes": 20}


def named_generator(name):
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def build(**sizes):
    """A small tokenizer whose codes are as far apart as its encoder's outputs, in float64."""
    model = Vqgan(**(TINY | sizes))
    initialize(model, named_generator)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:  # away from 1 and 0, which would hide mistakes
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
            if name.startswith("quantize"):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model.double()


def pictures(batch=3, side=16, dtype=torch.float64):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(4), dtype=dtype)


class Plain:
    """The specification with torch's functions; `w` are the weights by their published names."""

    def __init__(self, model, sizes):
        self.w = {name: p.detach() for name, p in model.named_parameters()}
        self.sizes = sizes

    def norm(self, x, name):
        return F.silu(F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6))

    def conv(self, x, name):
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def block(self, x, name):
        h = self.conv(self.norm(x, f"{name}.norm1"), f"{name}.conv1")
        h = self.conv(self.norm(h, f"{name}.norm2"), f"{name}.conv2")
        if x.shape[1] != h.shape[1]:  # the branch goes through the shortcut, the input is lost
            return h + self.conv(h, f"{name}.nin_shortcut")
        return x + h

    def encode(self, x):
        levels = len(self.sizes["multipliers"])
        h = self.conv(x, "encoder.conv_in")
        for level in range(levels):
            for block in range(self.sizes["blocks"]):
                h = self.block(h, f"encoder.down.{level}.block.{block}")
            if level < levels - 1:
                h = (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
        h = self.block(self.block(h, "encoder.mid.block_1"), "encoder.mid.block_2")
        return self.conv(self.norm(h, "encoder.norm_out"), "encoder.conv_out")

    def decode(self, z):
        h = self.conv(z, "decoder.conv_in")
        h = self.block(self.block(h, "decoder.mid.block_1"), "decoder.mid.block_2")
        for level in range(len(self.sizes["multipliers"]) - 1, -1, -1):
            for block in range(self.sizes["blocks"]):
                h = self.block(h, f"decoder.up.{level}.block.{block}")
            if level > 0:
                h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                h = self.conv(h, f"decoder.up.{level}.upsample.conv")
        return self.conv(self.norm(h, "decoder.norm_out"), "decoder.conv_out")


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        model = Vqgan(**FULL)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts == {"encoder": 23_775_104, "decoder": 30_478_339, "quantize": 262_144}
    assert model.factor == 16


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        model = Vqgan(**FULL)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.conv_out.weight": (256, 512, 1, 1),
        "encoder.conv_out.bias": (256,),
        "quantize.embedding.weight": (1024, 256),
        "decoder.conv_in.weight": (512, 256, 3, 3),
        "decoder.conv_in.bias": (512,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
        "decoder.conv_out.bias": (3,),
    }
    for norm, width in (("encoder.norm_out", 512), ("decoder.norm_out", 128)):
        expected |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    blocks = {f"{half}.mid.block_{i}": (512, 512) for half in ("encoder", "decoder") for i in (1, 2)}
    down = ((128, 128), (128, 128), (128, 256), (256, 256), (256, 512))  # finest first
    up = ((128, 128), (256, 128), (256, 256), (512, 256), (512, 512))
    for i in range(5):
        blocks |= {f"encoder.down.{i}.block.0": down[i], f"encoder.down.{i}.block.1": (down[i][1],) * 2}
        blocks |= {f"decoder.up.{i}.block.0": up[i], f"decoder.up.{i}.block.1": (up[i][1],) * 2}
        if i > 0:
            name, width = f"decoder.up.{i}.upsample.conv", up[i][1]
            expected |= {f"{name}.weight": (width, width, 3, 3), f"{name}.bias": (width,)}
    for name, (before, width) in blocks.items():
        expected |= {f"{name}.norm1.weight": (before,), f"{name}.norm1.bias": (before,)}
        expected |= {f"{name}.norm2.weight": (width,), f"{name}.norm2.bias": (width,)}
        expected |= {f"{name}.conv1.weight": (width, before, 3, 3), f"{name}.conv2.weight": (width, width, 3, 3)}
        if before != width:
            expected[f"{name}.nin_shortcut.weight"] = (width, width, 1, 1)
    assert shapes == expected


@pytest.mark.parametrize("multipliers", [[1, 2, 2], [2, 1]])
def test_equals_the_plain_implementation(multipliers):
    model = build(multipliers=multipliers)
    plain = Plain(model, TINY | {"multipliers": multipliers})
    images = pictures()
    z = model.encode(images)
    side = 16 // 2 ** (len(multipliers) - 1)
    assert z.shape == (3, 6, side, side)
    torch.testing.assert_close(z, plain.encode(images), rtol=1e-10, atol=1e-10)

    codebook = model.quantize.embedding.weight.detach()
    tokens = torch.empty(3, side * side, dtype=torch.int64)
    for b in range(3):
        for place in range(side * side):
            point = z[b, :, place // side, place % side].detach()
            tokens[b, place] = int(np.argmin([float(((point - e) ** 2).sum()) for e in codebook]))
    assert len(tokens.unique()) > 4  # or the test would see little
    assert torch.equal(model.tokenize(images), tokens)

    codes = codebook[tokens].view(3, side, side, 6).permute(0, 3, 1, 2)
    expected = plain.decode(codes)
    torch.testing.assert_close(model.detokenize(tokens), expected, rtol=1e-10, atol=1e-10)
    reconstruction, found, codebook_loss, commitment_loss = model(images)
    torch.testing.assert_close(reconstruction, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(found, tokens)
    distance = ((z - codes) ** 2).flatten(1).mean(dim=1)
    torch.testing.assert_close(codebook_loss, distance)
    torch.testing.assert_close(commitment_loss, distance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_nearest_code_against_float64(dtype, autocast):
    quantize = Vqgan(**(TINY | {"code_dim": 32, "codes": 512})).quantize.to(dtype)
    z = torch.randn(4, 32, 16, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        tokens = quantize.nearest(z)
    assert tokens.shape == (4, 256) and tokens.dtype == torch.int64
    points = z.double().permute(0, 2, 3, 1).reshape(-1, 32)
    distance = torch.cdist(points, quantize.embedding.weight.detach().double())
    best = distance.min(dim=1).values
    chosen = distance.gather(1, tokens.view(-1, 1))[:, 0]
    assert (chosen - best).max() < 1e-5  # bf16 arithmetic would be off by 1e-2
    assert (tokens.view(-1) == distance.argmin(dim=1)).double().mean() > 0.999


def full_size_quantizer(batch):
    """1024 codes of 256 numbers, far from the origin: a third of them a few float32 steps beside another."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(1024, 256, generator=generator) + 3
    codes[700:] = codes[:324] * (1 + 3e-7 * torch.randn(324, 256, generator=generator))
    quantize = Quantizer(codes=1024, code_dim=256)
    with torch.no_grad():
        quantize.embedding.weight.copy_(codes[torch.randperm(1024, generator=generator)])
    z = quantize.embedding.weight.detach()[torch.randint(0, 1024, (batch, 256), generator=generator)]
    z = z + 0.3 * torch.randn(z.shape, generator=generator)
    return quantize, z.transpose(1, 2).unflatten(2, (16, 16))


def direct_distances(quantize, z):
    """Squared distances in float64 by subtraction, (B h w, codes)."""
    points = z.double().permute(0, 2, 3, 1).flatten(0, 2)
    codes = quantize.embedding.weight.detach().double()
    return torch.stack([(points - code).square().sum(1) for code in codes], dim=1)


def test_the_choice_is_float64s_where_float32_cannot_tell():
    quantize, z = full_size_quantizer(3)
    tokens, distance = quantize.nearest(z).flatten(), direct_distances(quantize, z)
    assert torch.equal(tokens, distance.argmin(dim=1))
    codes = quantize.embedding.weight.detach()
    points = z.permute(0, 2, 3, 1).flatten(0, 2)
    rounded = torch.addmm(codes.square().sum(1), points, codes.T, alpha=-2).argmin(1)
    assert (rounded != tokens).sum() > 50  # what this test would see otherwise


def test_of_equal_codes_the_first_is_taken():
    """Also where the product of matrices rounds two equal columns differently."""
    quantize, z = full_size_quantizer(3)
    first = torch.arange(1024)
    first[400:] = first[:400].repeat(2)[:624]
    with torch.no_grad():
        quantize.embedding.weight.copy_(quantize.embedding.weight[first].clone())
    tokens = quantize.nearest(z).flatten()
    assert tokens.max() < 400
    assert torch.equal(tokens, direct_distances(quantize, z).argmin(dim=1))


def test_nearest_code_picture_by_picture(monkeypatch):
    quantize, z = full_size_quantizer(9)  # eight of them at once
    whole = quantize.nearest(z)
    assert torch.equal(whole, torch.cat([quantize.nearest(one[None]) for one in z]))
    monkeypatch.setattr("mage_ds.models.vqgan._SEARCH_BYTES", 1)  # not even one picture's
    assert torch.equal(whole, quantize.nearest(z))
    assert quantize.nearest(z[:0]).shape == (0, 256)


@pytest.mark.parametrize("batch", [64, 512])
def test_memory_of_the_search_does_not_grow_with_the_batch(batch):
    """All distances of 512 pictures would take 1 GiB."""
    with FakeTensorMode():
        quantize, z = Quantizer(codes=1024, code_dim=256), torch.empty(batch, 256, 16, 16)
        with Live([z, *quantize.parameters()]) as live:
            before = live.now
            tokens = quantize.nearest(z)
        assert tokens.shape == (batch, 256)
    assert live.peak - before < 30 * 2**20 + 2 * tokens.nbytes


def test_straight_through():
    quantize = build().quantize
    z = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    straight, tokens, _, _ = quantize(z)
    expected = quantize.embedding.weight[tokens].view(2, 4, 4, 6).permute(0, 3, 1, 2)
    assert torch.equal(straight, expected)  # the value is the code, exactly
    weight = torch.randn_like(z)
    (straight * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    assert quantize.embedding.weight.grad is None


def test_losses_move_their_own_side():
    quantize = build().quantize
    z = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    _, tokens, codebook_loss, commitment_loss = quantize(z)
    assert codebook_loss.shape == commitment_loss.shape == (2,)
    weight = quantize.embedding.weight
    moved = torch.autograd.grad(codebook_loss.sum(), (z, weight), allow_unused=True, retain_graph=True)
    assert moved[0] is None
    expected = torch.zeros_like(weight)
    for b in range(2):
        for place in range(16):
            code = tokens[b, place]
            expected[code] += 2 * (weight[code] - z[b, :, place // 4, place % 4]).detach() / (6 * 16)
    torch.testing.assert_close(moved[1], expected)

    moved = torch.autograd.grad(commitment_loss.sum(), (z, weight), allow_unused=True)
    assert moved[1] is None
    codes = weight[tokens].view(2, 4, 4, 6).permute(0, 3, 1, 2).detach()
    torch.testing.assert_close(moved[0], 2 * (z.detach() - codes) / (6 * 16))


def test_every_parameter_gets_a_gradient():
    model = build()
    images = pictures()
    reconstruction, tokens, codebook_loss, commitment_loss = model(images)
    ((reconstruction - images).abs().mean() + codebook_loss.mean() + 0.25 * commitment_loss.mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name
    used = torch.zeros(20, dtype=torch.bool)
    used[tokens.flatten()] = True
    assert torch.equal((model.quantize.embedding.weight.grad != 0).any(dim=1), used)


@pytest.mark.parametrize("sizes", [{}, {"channels": 48, "multipliers": [1, 1, 2, 2]}, {"multipliers": [1]}])
def test_round_trip_shapes(sizes):
    model = Vqgan(**(TINY | sizes))
    images = torch.rand(2, 3, 32, 32)
    tokens = model.tokenize(images)
    assert tokens.shape == (2, (32 // model.factor) ** 2) and tokens.dtype == torch.int64
    assert model.detokenize(tokens).shape == images.shape
    again = model.detokenize(model.tokenize(model.detokenize(tokens)))
    assert again.shape == images.shape and again.isfinite().all()


def test_oblong_pictures_are_tokenized_in_raster_order():
    model = build(multipliers=[1, 2])
    images = pictures(1, 16)[:, :, :8]
    z = model.encode(images)
    tokens = model.tokenize(images)
    assert z.shape == (1, 6, 4, 8) and tokens.shape == (1, 32)
    weight = model.quantize.embedding.weight
    assert tokens[0, 8 + 3] == (z[0, :, 1, 3] - weight).square().sum(dim=1).argmin()


def test_bf16():
    model = Vqgan(**TINY).bfloat16()
    images = pictures(dtype=torch.bfloat16)
    reconstruction, _, codebook_loss, commitment_loss = model(images)
    assert reconstruction.dtype == torch.bfloat16
    assert codebook_loss.dtype == commitment_loss.dtype == torch.float32
    (reconstruction.sum() + codebook_loss.sum() + commitment_loss.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_static_shapes():
    model = build().float()
    images = pictures(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(images), model(images), strict=True):
        torch.testing.assert_close(got, expected)
    model.to("meta")
    shapes = [tuple(t.shape) for t in model(images.to("meta"))]
    assert shapes == [(3, 3, 16, 16), (3, 16), (3,), (3,)]


def test_channels_last_changes_nothing_but_rounding():
    model = build()
    images = pictures()
    expected = model.detokenize(model.tokenize(images))
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model.detokenize(model.tokenize(images)), expected)


def test_initial_values():
    model = Vqgan(**TINY)
    initialize(model, named_generator)
    codes = model.quantize.embedding.weight
    assert 0.9 / 20 < codes.abs().max() <= 1 / 20
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        if isinstance(module, torch.nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
            assert module.bias is None or 0.3 * bound < module.bias.abs().max() <= bound, name
    name = "decoder.conv_in.bias"
    value = model.initial_value(name, model.get_parameter(name).shape, named_generator(name))
    assert value.dtype == torch.float32 and torch.equal(value, model.get_parameter(name))


def test_refuses_sizes_that_cannot_be():
    model = Vqgan(**TINY)
    with pytest.raises(ValueError, match="divide"):
        model.encode(torch.rand(1, 3, 18, 16))
    with pytest.raises(ValueError, match="square"):
        model.detokenize(torch.zeros(1, 15, dtype=torch.int64))
