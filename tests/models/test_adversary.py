"""The PatchGAN against a plain stack of layers, the losses against formulas in float64, LPIPS against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mage_ds.models import Lpips, PatchGAN, initialize
from mage_ds.models.adversary import adaptive_weight, generator_loss, hinge


def generator_of(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(len(name))


def pictures(batch: int = 2, side: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


# --- PatchGAN


def plain(channels: int, norm: str) -> nn.Sequential:
    """Three strided convolutions, one with stride 1, one to a logit."""
    bias = norm != "batch"

    def inner(before, width, stride):
        layers = [nn.Conv2d(before, width, 4, stride, 1, bias=bias)]
        return [*layers, *([nn.BatchNorm2d(width)] if norm == "batch" else []), nn.LeakyReLU(0.2)]

    return nn.Sequential(
        nn.Conv2d(3, channels, 4, 2, 1),
        nn.LeakyReLU(0.2),
        *inner(channels, 2 * channels, 2),
        *inner(2 * channels, 4 * channels, 2),
        *inner(4 * channels, 8 * channels, 1),
        nn.Conv2d(8 * channels, 1, 4, 1, 1),
    )


def test_size_of_vqgans_discriminator():
    with torch.device("meta"):
        model = PatchGAN()
        logits = model(torch.empty(1, 3, 256, 256))
    assert sum(p.numel() for p in model.parameters()) == 2_765_633
    assert logits.shape == (1, 1, 30, 30) and model.side(256) == 30
    assert not list(model.buffers())  # nothing to keep in step over ranks
    names = ["0.weight", "0.bias", "2.weight", "3.weight", "3.bias", "5.weight", "6.weight", "6.bias", "8.weight"]
    names = [f"main.{name}" for name in [*names, "9.weight", "9.bias", "11.weight", "11.bias"]]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_equals_the_plain_stack(training):
    model, reference = PatchGAN(8).double().train(training), plain(8, "batch").double().train()
    initialize(model, generator_of)
    reference.load_state_dict({name.removeprefix("main."): value for name, value in model.state_dict().items()}, False)
    images = pictures().double()
    logits = model(images)
    torch.testing.assert_close(logits, reference((images - 0.5) / 0.5))
    assert logits.shape == (2, 1, 6, 6)


def test_spectral_norm_equals_the_plain_stack_of_divided_weights():
    model, reference = PatchGAN(8, norm="spectral").double(), plain(8, "spectral").double()
    initialize(model, generator_of)
    images = pictures().double()
    for _ in range(200):  # the power iteration arrives
        model(images)
    model.eval()
    with torch.no_grad():
        convolutions = [layer for layer in reference if isinstance(layer, nn.Conv2d)]
        ours = [layer for layer in model.main if isinstance(layer, nn.Conv2d)]
        for theirs, layer in zip(convolutions, ours, strict=True):
            weight = layer.parametrizations.weight.original
            theirs.weight.copy_(weight / torch.linalg.matrix_norm(weight.flatten(1), 2))
            theirs.bias.copy_(layer.bias)
    before = {name: value.clone() for name, value in model.named_buffers()}
    torch.testing.assert_close(model(images), reference(2 * images - 1), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())  # in eval mode they rest


@pytest.mark.parametrize(("layers", "widths"), [(1, [8, 16]), (2, [8, 16, 32]), (5, [8, 16, 32, 64, 64, 64])])
def test_widths_double_up_to_eight_times(layers, widths):
    model = PatchGAN(8, layers)
    convolutions = [layer for layer in model.main if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [*widths, 1]
    assert [layer.stride[0] for layer in convolutions] == [2] * layers + [1, 1]
    least = 3 << layers
    assert model(pictures(side=least)).shape[2:] == (1, 1) and model.side(least) == 1
    assert model(pictures(side=least + 9)).shape[2] == model.side(least + 9)


def test_a_patch_is_seventy_pixels_wide():
    model = PatchGAN(8, norm="spectral").eval()
    images = pictures(1, 128).requires_grad_()
    model(images)[0, 0, 7, 7].backward()
    seen = images.grad[0].abs().sum(0) > 0
    assert int(seen.any(0).sum()) == int(seen.any(1).sum()) == 70


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_initial_values(norm):
    model = PatchGAN(32, norm=norm)
    initialize(model, generator_of)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name.endswith("bias"):
            assert (value == 0).all()
        elif value.ndim == 1:
            assert abs(float(value.mean()) - 1) < 0.01 and abs(float(value.std()) - 0.02) < 0.01
        else:
            assert abs(float(value.mean())) < 0.002 and float(value.std()) == pytest.approx(0.02, rel=0.1)
        assert torch.equal(model.initial_value(name, parameter.shape, generator_of(name)), value)


def test_spectral_norm_is_the_same_in_every_process():
    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = PatchGAN(8, norm="spectral")
        initialize(model, generator_of)
        logits.append(model(pictures()))
    assert torch.equal(*logits)


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_every_parameter_learns_in_bf16_from_two_forwards(norm):
    """Real and fake pictures go forward before one backward: the power iteration's buffers move in between."""
    model = PatchGAN(8, norm=norm)
    initialize(model, generator_of)
    exact, model = PatchGAN(8, norm=norm), model.bfloat16()
    initialize(exact, generator_of)
    for each, dtype in ((model, torch.bfloat16), (exact, torch.float32)):
        for _ in range(30 if norm == "spectral" else 0):
            each(pictures().to(dtype))
        real, fake = each(pictures(seed=1).to(dtype)), each(pictures(seed=2).to(dtype))
        loss = hinge(2 * real, fake)  # alike, they leave the last bias without a gradient
        assert loss.dtype == torch.float32 and loss.shape == (2,)
        loss.mean().backward()
    for parameter, reference in zip(model.parameters(), exact.parameters(), strict=True):
        assert parameter.grad.dtype == torch.bfloat16
        one, other = parameter.grad.float().flatten(), reference.grad.flatten()
        assert float(F.cosine_similarity(one, other, dim=0)) > 0.95
        assert float(one.norm() / other.norm()) == pytest.approx(1, abs=0.1)


# --- losses


def test_hinge_and_generator_loss():
    generator = torch.Generator().manual_seed(0)
    real, fake = (2 * torch.randn(3, 1, 4, 5, generator=generator) for _ in range(2))
    expected, expected_generator = [], []
    for b in range(3):
        above = [max(0.0, 1 - value) for value in real[b].double().flatten().tolist()]
        below = [max(0.0, 1 + value) for value in fake[b].double().flatten().tolist()]
        expected.append((sum(above) / 20 + sum(below) / 20) / 2)
        expected_generator.append(-sum(fake[b].double().flatten().tolist()) / 20)
    torch.testing.assert_close(hinge(real, fake), torch.tensor(expected))
    torch.testing.assert_close(generator_loss(fake), torch.tensor(expected_generator))
    for loss in (hinge(real.bfloat16(), fake.bfloat16()), generator_loss(fake.bfloat16())):
        assert loss.dtype == torch.float32


def test_adaptive_weight():
    nll, adversarial = torch.randn(3, 4, 3, 3), 7 * torch.randn(3, 4, 3, 3)

    def norm(x):
        return math.sqrt(sum(value**2 for value in x.double().flatten().tolist()))

    expected = norm(nll) / (norm(adversarial) + 1e-4)
    weight = adaptive_weight(nll.requires_grad_(), adversarial.requires_grad_(), 1e4)
    assert weight.dtype == torch.float32 and weight.shape == () and not weight.requires_grad
    assert float(weight) == pytest.approx(expected, rel=1e-5)
    assert float(adaptive_weight(nll, adversarial, 0.01)) == pytest.approx(0.01)
    nothing = torch.zeros_like(nll)
    assert float(adaptive_weight(nll, nothing, 1e4)) == 1e4  # clamped, where VQGAN's would be 1e4 |nll|
    assert float(adaptive_weight(nothing, adversarial, 1e4)) == 0
    assert adaptive_weight(nll.bfloat16(), adversarial.bfloat16(), 1e4).dtype == torch.float32


# --- LPIPS


@pytest.fixture(scope="module")
def lpips() -> Lpips:
    model = Lpips()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.startswith("lin"):
            parameter.uniform_(0, 1, generator=generator)
        elif parameter.ndim == 4:
            parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
        else:
            parameter.normal_(0, 0.1, generator=generator)
    return model


def test_lpips_equals_loops(lpips):
    """From the description: VGG-16 to relu5_3, channels of unit length, weighted squares, means over places."""
    weights = {name: value.double() for name, value in lpips.state_dict().items()}
    x, y = pictures(2, 32, 1), pictures(2, 32, 2)
    shift, scale = [-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]

    def features(images):
        h = images.double() * 2 - 1
        h = torch.stack([(h[:, c] - shift[c]) / scale[c] for c in range(3)], dim=1)
        found = []
        for stage, convolutions in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))):
            h = F.max_pool2d(h, 2) if stage else h
            for i in convolutions:
                h = F.conv2d(h, weights[f"features.{i}.weight"], weights[f"features.{i}.bias"], padding=1).clamp(min=0)
            found.append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    expected = torch.zeros(2, dtype=torch.float64)
    for k, (a, b) in enumerate(zip(features(x), features(y), strict=True)):
        for c, weight in enumerate(weights[f"lin{k}.model.1.weight"].flatten().tolist()):
            expected += weight * (a[:, c] - b[:, c]).square().mean(dim=(1, 2))
    distance = lpips(x, y)
    assert distance.shape == (2,) and distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(lpips(y, x), distance)
    assert (lpips(x, x) == 0).all() and (distance > 0.01).all()


def test_lpips_stays_float32(lpips):
    x, y = pictures(1, 16, 1).bfloat16(), pictures(1, 16, 2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = lpips(x, y)
    assert torch.equal(distance, lpips(x.float(), y.float())) and distance.dtype == torch.float32


def test_lpips_gives_the_gradient_of_its_value(lpips):
    x, y = pictures(1, 16, 1).double().requires_grad_(), pictures(1, 16, 2).double()
    exact = Lpips().double()
    exact.load_state_dict(lpips.state_dict())
    (gradient,) = torch.autograd.grad(exact(x, y).sum(), x)
    for seed in range(3):
        step = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1e-6
        with torch.no_grad():
            change = (exact(x + step, y) - exact(x - step, y)) / 2
        assert float(change) == pytest.approx(float((gradient * step).sum()), rel=1e-4)


def test_lpips_has_a_gradient_where_a_place_has_no_features(lpips):
    """The root of a sum of squares has none at zero."""
    dark = Lpips()
    dark.load_state_dict(lpips.state_dict())
    dark.features[0].bias.fill_(-1e3)  # nothing gets through the first ReLU
    dark.features[2].bias.fill_(-1.0)
    x = pictures(1, 16).requires_grad_()
    dark(x, pictures(1, 16, 1)).sum().backward()
    assert x.grad.isfinite().all()
    x.grad = None
    lpips(x, x.detach()).sum().backward()  # at its least
    assert (x.grad == 0).all()


def test_lpips_is_frozen_and_has_the_published_names(lpips):
    assert not any(parameter.requires_grad for parameter in lpips.parameters()) and not lpips.training
    shapes = {name: tuple(value.shape) for name, value in lpips.state_dict().items()}
    widths = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256}
    widths |= dict.fromkeys((17, 19, 21, 24, 26, 28), 512)
    before = [3, *widths.values()]
    expected = {}
    for b, (i, width) in zip(before, widths.items(), strict=False):
        expected |= {f"features.{i}.weight": (width, b, 3, 3), f"features.{i}.bias": (width,)}
    expected |= {f"lin{k}.model.1.weight": (1, w, 1, 1) for k, w in enumerate((64, 128, 256, 512, 512))}
    assert shapes == expected
