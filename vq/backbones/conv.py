"""Convolutional encoder and decoder, side by side: pixels ↔ latent.

The shape of VQGAN (Esser et al. 2021, arXiv 2012.09841): residual blocks at each scale, a strided step between
scales. What differs: pixels are first folded into channels (`patch`), so that no convolution runs at full
resolution, where channels are few and a CPU or GPU is badly used. Knows nothing of codes or losses.

Legend: B batch, H W picture height and width, h w grid, C channels, D latent width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from vq.backbones import Backbone
from vqlm.checkpoint import declared


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))): (B,C,h,w) → the same shape; starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(group_count(channels), channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(group_count(channels), channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def group_count(channels: int) -> int:
    """Groups of at least 8 channels, at most 32 groups; 1 for narrow test models."""
    return next(n for n in (32, 16, 8, 4, 2, 1) if channels % n == 0 and channels // n >= min(8, channels))


def check_sizes(channels: Sequence[int], blocks: int, patch: int, latent_dim: int) -> None:
    if not channels or any(c < 1 for c in channels):
        raise ValueError(f"channels={list(channels)}: give one positive width for each scale, finest first")
    if blocks < 1 or latent_dim < 1:
        raise ValueError(f"blocks={blocks}, latent_dim={latent_dim}: both must be at least 1")
    if patch < 1:
        raise ValueError(f"patch={patch}: must be at least 1 (1 folds nothing)")


@declared
class ConvEncoder(Backbone):
    """Pixels (B,3,H,W) in [-1,1] → latent (B,D,H/f,W/f), f = patch · 2^(len(channels)-1).

    channels: widths from the finest scale to the grid; blocks: residual blocks at each scale;
    patch: side of the square of pixels folded into channels before the first convolution.
    """

    def __init__(self, channels: list[int], latent_dim: int, blocks: int = 2, patch: int = 2):
        super().__init__()
        check_sizes(channels, blocks, patch, latent_dim)
        self.downsample = patch * 2 ** (len(channels) - 1)
        self.latent_dim = latent_dim
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(patch),
            nn.Conv2d(3 * patch**2, channels[0], 3, padding=1),
        ]
        for width, following in zip(channels, [*channels[1:], None], strict=True):
            layers += [ResidualBlock(width) for _ in range(blocks)]
            if following:
                layers.append(nn.Conv2d(width, following, 3, stride=2, padding=1))
        last = channels[-1]
        layers += [nn.GroupNorm(group_count(last), last), nn.SiLU(), nn.Conv2d(last, latent_dim, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.layers(x_BCHW)


@declared
class ConvDecoder(Backbone):
    """Latent (B,D,h,w) → pixels (B,3,h·f,w·f), unbounded (the tokenizer clamps). Mirror of `ConvEncoder`."""

    def __init__(self, channels: list[int], latent_dim: int, blocks: int = 2, patch: int = 2):
        super().__init__()
        check_sizes(channels, blocks, patch, latent_dim)
        self.downsample = patch * 2 ** (len(channels) - 1)
        self.latent_dim = latent_dim
        finest, last = channels[0], channels[-1]
        layers: list[nn.Module] = [nn.Conv2d(latent_dim, last, 3, padding=1)]
        for width, following in zip(channels[::-1], [*channels[-2::-1], None], strict=True):
            layers += [ResidualBlock(width) for _ in range(blocks)]
            if following:
                layers.append(Upsample(width, following))
        layers += [nn.GroupNorm(group_count(finest), finest), nn.SiLU()]
        layers += [nn.Conv2d(finest, 3 * patch**2, 3, padding=1), nn.PixelShuffle(patch)]
        self.layers = nn.Sequential(*layers)

    @property
    def last_weight(self) -> nn.Parameter:
        return self.layers[-2].weight  # type: ignore[return-value]

    def forward(self, z_BDhw: Tensor) -> Tensor:
        return self.layers(z_BDhw)


class Upsample(nn.Module):
    """(B,C,h,w) → (B,C',2h,2w): convolve at the coarse scale into 4·C' channels, then unfold them into space."""

    def __init__(self, width: int, following: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * following, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)
