"""What judges a tokenizer's reconstructions beside their pixels (paper section 1, "details as VQGAN"): a PatchGAN with
its hinge losses and adaptive weight, and the perceptual distance LPIPS.

Pictures x, y are (B, 3, H, W) in [0, 1]. Losses are computed in float32, one number for each picture.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

_WIDEST = 8  # x `channels`: the widths double up to here

# VGG-16's five stages of 3x3 convolutions: their number and width. A pooling by two goes before each but the first.
_VGG = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


class PatchGAN(nn.Module):
    """The discriminator of VQGAN and pix2pix: one logit for each patch of a picture, higher for real ones.

    Args: channels: of the first convolution; layers: convolutions of stride 2 (3: a patch is 70 pixels wide);
    norm: "batch" (after the inner convolutions, by the statistics of the micro-batch at hand, in training and after)
    or "spectral" (of every convolution). `side(n)`: logits along a side of n pixels.

    With "spectral" a convolution's weight is named `main.N.parametrizations.weight.original`, and each forward in
    training mode takes one step of the power iteration in its two buffers. These start from constants, so they are
    the same on all ranks and in every run.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm: str = "batch"):
        super().__init__()
        self.layers = layers
        widths = [channels * min(2**i, _WIDEST) for i in range(layers + 1)]
        modules = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for i, (before, width) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < layers else 1
            modules.append(nn.Conv2d(before, width, 4, stride, padding=1, bias=norm == "spectral"))
            modules += [nn.BatchNorm2d(width, track_running_stats=False)] if norm == "batch" else []
            modules.append(nn.LeakyReLU(0.2, inplace=True))
        modules.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        if norm == "spectral":
            modules = [_spectral(each) if isinstance(each, nn.Conv2d) else each for each in modules]
        self.main = nn.Sequential(*modules)

    def side(self, pixels: int) -> int:
        return (pixels >> self.layers) - 2

    def forward(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] (B, 3, H, W) -> logits (B, 1, h, w)."""
        return self.main(2 * images - 1)

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Initial value of the parameter `name`, float32 on the CPU: convolutions normal(0, 0.02), batch norms
        normal(1, 0.02), biases 0."""
        value = torch.zeros(shape, dtype=torch.float32, device="cpu")
        if name.endswith("bias"):
            return value
        return value.normal_(1.0 if len(shape) == 1 else 0.0, 0.02, generator=generator)


@torch.no_grad()
def _spectral(convolution: nn.Conv2d) -> nn.Conv2d:
    spectral_norm(convolution)
    for vector in convolution.buffers():  # torch draws them from the global generator
        vector.fill_(vector.numel() ** -0.5)
    return convolution


def hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss (B,): half of mean max(0, 1 - real) + mean max(0, 1 + fake)."""
    real, fake = F.relu(1 - real_logits.float()), F.relu(1 + fake_logits.float())
    return 0.5 * (real.flatten(1).mean(1) + fake.flatten(1).mean(1))


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The tokenizer's adversarial loss (B,): minus the mean logit of its reconstructions."""
    return -fake_logits.float().flatten(1).mean(1)


def adaptive_weight(nll_grad: Tensor, adv_grad: Tensor, most: float) -> Tensor:
    """Weight of the adversarial loss, a scalar in [0, most]: |nll_grad| / (|adv_grad| + 1e-4).

    The two are the gradients of the reconstruction loss and of the adversarial loss at the detokenizer's last weight,
    each averaged over the ranks, so that all use one weight. Their ratio can explode: hence `most`.
    """
    nll, adversarial = (grad.detach().float().norm() for grad in (nll_grad, adv_grad))
    return (nll / (adversarial + 1e-4)).clamp(0, most)


class Lpips(nn.Module):
    """LPIPS 0.1 on VGG-16 (Zhang et al. 2018): a distance of pictures as people see it.

    Parameters are named as in the two files that `interop.lpips.load_lpips` reads: torchvision's
    `features.N.{weight,bias}` and lpips' `linK.model.1.weight`. Frozen, and float32: not to be cast.
    """

    def __init__(self):
        super().__init__()
        layers, self.ends, before = [], [], 3
        for count, width in _VGG:
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(count):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
            self.ends.append(len(layers) - 1)  # relu1_2, 2_2, 3_3, 4_3, 5_3
        self.features = nn.Sequential(*layers)
        for k, (_, width) in enumerate(_VGG):
            linear = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))  # a dropout while it was trained
            self.add_module(f"lin{k}", nn.ModuleDict({"model": linear}))
        # ImageNet's mean and standard deviation, for pictures in [-1, 1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Pictures x, y in [0, 1] (B, 3, H, W), of any floating dtype -> distance (B,) in the module's own, float32.
        Gradients flow to both; H, W >= 16."""
        with torch.autocast(x.device.type, enabled=False):
            total = 0.0
            for k, (a, b) in enumerate(zip(self._features(x), self._features(y), strict=True)):
                distance = getattr(self, f"lin{k}")["model"]((a - b).square())
                total = total + distance.mean(dim=(1, 2, 3))
            return total

    def _features(self, images: Tensor) -> list[Tensor]:
        h, found = (2 * images.to(self.shift.dtype) - 1 - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.ends:
                # vector_norm: its gradient at a zero vector is 0, that of the root of a sum of squares NaN
                found.append(h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10))
        return found
