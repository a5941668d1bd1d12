"""Encoder and decoder of MoVQ as Emu3 has them, for single pictures: pixels ↔ latent.

MoVQ (Zheng et al. 2022, arXiv 2209.09002) is a VQGAN whose decoder normalises with scale and shift computed from the
latent at each position. Emu3's (Wang et al. 2024, arXiv 2409.18869) adds convolutions over time before the latent and
after it. For a picture, which is repeated to fill the time, these are plain convolutions: `folded_time` says why. So
everything here is two-dimensional. Knows nothing of codes, video or other projects' files.

Legend: B batch, H W picture height and width, h w grid, C channels, D latent width, T frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vq.backbones import Backbone
from vq.backbones.vqgan import DecoderTrunk, EncoderTrunk, check_trunk, group_norm
from vqlm.checkpoint import declared


class SpatialNorm(nn.Module):
    """GroupNorm of x (B,C,·,·), then scale and shift from the latent (B,D,h,w) at the nearest position."""

    def __init__(self, width: int, latent_dim: int, groups: int):
        super().__init__()
        self.norm = group_norm(groups)(width)
        self.scale, self.shift = nn.Conv2d(latent_dim, width, 1), nn.Conv2d(latent_dim, width, 1)

    def forward(self, x: Tensor, latent_BDhw: Tensor) -> Tensor:
        # A 1x1 convolution and repeating positions commute; at the grid there are fewer positions to convolve.
        scale, shift = (
            F.interpolate(made, size=x.shape[2:], mode="nearest")
            for made in (self.scale(latent_BDhw), self.shift(latent_BDhw))
        )
        return self.norm(x) * scale + shift


class Affine(nn.Module):
    """x · weight + bias for each channel: a batch norm with its statistics folded in."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class TimeBlock(nn.Module):
    """Residual block of the stack over time, at one frame: (B,C,h,w) → the same shape."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.conv1 = Affine(width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = Affine(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Activated(nn.Conv2d):
    """Convolution 3x3, then SiLU."""

    def __init__(self, width_in: int, width: int):
        super().__init__(width_in, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


def folded_time(kernel: Tensor, frames: int, identical: bool) -> Tensor:
    """A convolution over time and space of stride 2 in time, as one over space with frames as channels. Exact.

    kernel (C',C,4,k,k), causal: two frames of zeros come first, so output t sees inputs 2t-2 … 2t+1. Frames become
    channels: the result is (T/2·C', T·C, k, k), or (T/2·C', C, k, k) where all T input frames are `identical`.
    """
    outputs, inputs, taps = kernel.shape[:3]
    halved = frames // 2
    folded = kernel.new_zeros(halved, outputs, frames, inputs, *kernel.shape[3:])
    for t in range(halved):
        for tap in range(taps):
            frame = 2 * t + tap - 2
            if 0 <= frame < frames:
                folded[t, :, frame] = kernel[:, :, tap]
    if identical:
        return folded.sum(2).flatten(0, 1)
    return folded.flatten(2, 3).flatten(0, 1)


@declared
class MovqEncoder(Backbone):
    """Pixels (B,3,H,W) in [-1,1] → latent (B,D,H/f,W/f), f = 2^(len(channels)-1).

    channels, blocks, attention, stem, groups: as in `VqganEncoder`; heads: of every attention; frames: how often a
    picture is repeated to fill the time (a power of 2; 1 where time is not folded).
    """

    def __init__(
        self,
        channels: list[int],
        latent_dim: int,
        blocks: int = 2,
        attention: list[int] | None = None,
        stem: int | None = None,
        heads: int = 1,
        frames: int = 4,
        groups: int = 32,
    ):
        super().__init__()
        attention = attention or []
        check_trunk(channels, latent_dim, blocks, attention, groups, stem)
        check_time(channels, attention, heads, frames)
        self.downsample, self.latent_dim = 2 ** (len(channels) - 1), latent_dim
        self.trunk = EncoderTrunk(
            channels, latent_dim, blocks, attention, stem or channels[0], group_norm(groups), heads
        )
        halvings = frames.bit_length() - 1
        counts = [frames >> n for n in range(halvings + 1)]
        # The frames that go into the first are all one picture, so it sees that once.
        self.time = nn.Sequential(
            *(
                Activated(latent_dim * (before if n else 1), latent_dim * after)
                for n, (before, after) in enumerate(pairwise(counts))
            )
        )
        self.time_blocks = nn.Sequential(*(TimeBlock(latent_dim) for _ in range(blocks)))
        self.to_latent = nn.Conv2d(latent_dim, latent_dim, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.to_latent(self.time_blocks(self.time(self.trunk(x_BCHW))))


@declared
class MovqDecoder(Backbone):
    """Latent (B,D,h,w) → pixels (B,3,h·f,w·f), unbounded (the tokenizer clamps). Mirror of `MovqEncoder`.

    Time is unfolded by repeating frames, each then seen together with those before it: the first frame, which is the
    picture, depends on itself alone.
    """

    def __init__(
        self,
        channels: list[int],
        latent_dim: int,
        blocks: int = 2,
        attention: list[int] | None = None,
        heads: int = 1,
        frames: int = 4,
        groups: int = 32,
    ):
        super().__init__()
        attention = attention or []
        check_trunk(channels, latent_dim, blocks, attention, groups)
        check_time(channels, attention, heads, frames)
        self.downsample, self.latent_dim = 2 ** (len(channels) - 1), latent_dim
        self.from_latent = nn.Conv2d(latent_dim, latent_dim, 1)
        self.time_blocks = nn.Sequential(*(TimeBlock(latent_dim) for _ in range(blocks)))
        self.time = nn.Sequential(
            *(Activated(latent_dim, latent_dim) for _ in range(frames.bit_length() - 1))
        )
        norm = partial(SpatialNorm, latent_dim=latent_dim, groups=groups)
        self.trunk = DecoderTrunk(channels, latent_dim, blocks, attention, norm, heads)

    @property
    def last_weight(self) -> nn.Parameter:
        return self.trunk.head.weight  # type: ignore[return-value]

    def forward(self, z_BDhw: Tensor) -> Tensor:
        both = torch.cat([self.from_latent(z_BDhw), z_BDhw])
        x, condition = self.time(self.time_blocks(both)).chunk(2)
        return self.trunk(x, condition)


def check_time(channels: Sequence[int], attention: Sequence[int], heads: int, frames: int) -> None:
    """ValueError on heads that do not divide the widths, or frames that cannot be halved down to one."""
    if frames < 1 or frames & (frames - 1):
        raise ValueError(f"frames={frames}: must be a power of 2")
    widths = {channels[-1], *(channels[i] for i in attention)}
    if heads < 1 or any(width % heads for width in widths):
        raise ValueError(f"heads={heads}: must divide the widths under attention, {sorted(widths)}")
