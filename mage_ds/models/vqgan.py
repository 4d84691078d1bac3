"""The tokenizer: a convolutional VQGAN without attention (paper section 1).

Shapes: B pictures (B, 3, H, W) in [0, 1], codes on a grid h = H / factor, w = W / factor, D = code_dim.
Parameters are named as in the published files.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Distances that the search for the nearest code holds at once. More is slower on a CPU: an allocation of 32 MiB and
# more is fresh memory each time.
_SEARCH_BYTES = 2**24


def _norm(width: int) -> nn.GroupNorm:
    # 32 groups in the paper's sizes; small presets have widths that 32 does not divide.
    return nn.GroupNorm(math.gcd(32, width), width, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two (norm, swish, 3x3 convolution without bias), added to the input.

    Where the width changes the input is not used: the output is h + W h, h being the branch. It looks like a
    slip, but the published weights were trained so.
    """

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.norm2 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(width, width, 1, bias=False) if width != width_in else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class Upsample(nn.Module):
    """x2 nearest, then a 3x3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, and the way to the next finer one."""

    def __init__(self, width_in: int, width: int, blocks: int, upsample: bool = False):
        super().__init__()
        self.block = nn.Sequential(*(ResidualBlock(width if i else width_in, width) for i in range(blocks)))
        self.upsample = Upsample(width) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.block(x))


def _middle(width: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict((f"block_{i}", ResidualBlock(width, width)) for i in (1, 2)))


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) -> (B, D, h, w); widths: of the levels, finest first."""

    def __init__(self, *, channels: int, widths: Sequence[int], blocks: int, code_dim: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        before = [channels, *widths[:-1]]
        self.down = nn.ModuleList(Level(w_in, w, blocks) for w_in, w in zip(before, widths, strict=True))
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], code_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for i, level in enumerate(self.down):
            h = level(F.avg_pool2d(h, 2) if i else h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(B, D, h, w) -> pictures (B, 3, H, W), not clamped; widths: of the levels, finest first."""

    def __init__(self, *, widths: Sequence[int], blocks: int, code_dim: int):
        super().__init__()
        self.conv_in = nn.Conv2d(code_dim, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1])
        before = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level(w_in, w, blocks, upsample=i > 0) for i, (w_in, w) in enumerate(zip(before, widths, strict=True))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):  # up.0 is the finest
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Quantizer(nn.Module):
    """The codebook: nearest code by squared L2 distance, found in float64 whatever the module's dtype."""

    def __init__(self, *, codes: int, code_dim: int):
        super().__init__()
        self.codes = codes
        self.embedding = nn.Embedding(codes, code_dim)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """z (B, D, h, w) -> tokens int64 (B, h w) in raster order; of equally near codes the lowest index.

        Pictures are searched a few at a time: at most _SEARCH_BYTES of distances (or one picture's) are in memory.
        """
        # A call, not .weight: where the parameter is sharded, it is whole in its own module's forward only.
        codebook = self.embedding(torch.arange(self.codes, device=z.device)).double()
        at_once = max(1, _SEARCH_BYTES // (8 * self.codes * z.shape[2] * z.shape[3]))
        points = z.flatten(2).transpose(1, 2)
        return torch.cat([_nearest(some.double(), codebook) for some in points.split(at_once)])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z (B, D, h, w) -> codes (B, D, h, w), tokens int64 (B, h w), codebook and commitment loss (B,).

        The codes have z's dtype and pass their gradient straight to z. The losses are float32 means over
        positions and channels: |sg(z) - e|^2 moves the codebook, |z - sg(e)|^2 the encoder.
        """
        tokens = self.nearest(z)
        e = self.codes_at(tokens, z.shape[2:])
        codebook_loss = (_exact(z.detach()) - _exact(e)).square().mean(dim=(1, 2, 3))
        commitment_loss = (_exact(z) - _exact(e.detach())).square().mean(dim=(1, 2, 3))
        straight = e.detach().to(z.dtype) + (z - z.detach())  # in this order the value is e exactly
        return straight, tokens, codebook_loss, commitment_loss

    def codes_at(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """tokens (B, h w), grid (h, w) -> their codes (B, D, h, w)."""
        return self.embedding(tokens).unflatten(1, tuple(grid)).permute(0, 3, 1, 2)


class Vqgan(nn.Module):
    """Encoder, quantizer and detokenizer. A new one must be given its initial values by `models.initialize`.

    Args: channels x multipliers: widths of the levels, finest first, each half the size of the one before;
    blocks: residual blocks of a level; code_dim: D; codes: size of the codebook.
    `factor`: how many pixels along a side make one token.
    """

    def __init__(self, *, channels: int, multipliers: Sequence[int], blocks: int, code_dim: int, codes: int):
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.factor = 2 ** (len(widths) - 1)
        self.encoder = Encoder(channels=channels, widths=widths, blocks=blocks, code_dim=code_dim)
        self.quantize = Quantizer(codes=codes, code_dim=code_dim)
        self.decoder = Decoder(widths=widths, blocks=blocks, code_dim=code_dim)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] (B, 3, H, W) -> z (B, D, h, w). ValueError if `factor` does not divide H, W."""
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(f"image size {tuple(images.shape[2:])} does not divide by {self.factor}")
        return self.encoder(images)

    def tokenize(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] (B, 3, H, W) -> tokens int64 (B, h w) in raster order."""
        return self.quantize.nearest(self.encode(images))

    def detokenize(self, tokens: Tensor) -> Tensor:
        """tokens int64 (B, N) -> pictures (B, 3, H, W), not clamped. ValueError: N is no square number."""
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens are not a square grid")
        return self.decoder(self.quantize.codes_at(tokens, (side, side)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures (B, 3, H, W) -> reconstruction (B, 3, H, W), tokens and the losses of `Quantizer`."""
        codes, tokens, codebook_loss, commitment_loss = self.quantize(self.encode(images))
        return self.decoder(codes), tokens, codebook_loss, commitment_loss

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Initial value of the parameter `name`, float32 on the CPU.

        Codes uniform +-1/codes (paper section 1); GroupNorm 1 and 0; convolutions as torch's, uniform
        +-1/sqrt(fan in). Takes the full `shape` as an argument, because the parameter itself may be sharded.
        """
        value = torch.zeros(shape, dtype=torch.float32, device="cpu")
        module = self.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.GroupNorm):
            return value if name.endswith("bias") else value.fill_(1.0)
        if isinstance(module, nn.Embedding):
            bound = 1.0 / module.num_embeddings
        else:
            bound = (module.in_channels * math.prod(module.kernel_size)) ** -0.5
        return value.uniform_(-bound, bound, generator=generator)


def _nearest(points: Tensor, codebook: Tensor) -> Tensor:
    """points (b, N, D), codebook (K, D), both float64 -> indices (b, N) of the nearest codes.

    The choice is that of exact arithmetic wherever float32 could tell two distances apart. A product of matrices
    may round two equal codes differently: distances are equal that differ by no more than its rounding can make.
    """
    norms = codebook.square().sum(dim=1)
    # |z - e|^2 without |z|^2, which is equal for all codes
    distance = torch.addmm(norms, points.flatten(0, 1), codebook.T, alpha=-2.0).view(*points.shape[:2], len(codebook))
    rounding = codebook.shape[1] * torch.finfo(torch.float64).eps * (points.square().sum(dim=2) + norms.amax())
    least = distance.amin(dim=2) + rounding
    return (distance <= least[..., None]).view(torch.uint8).argmax(dim=2)  # the first


def _exact(x: Tensor) -> Tensor:
    """x in float32, or float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
