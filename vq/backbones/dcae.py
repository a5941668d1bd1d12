"""Deep-compression encoder and decoder, side by side: pixels ↔ latent, for f = 16 to 64.

DC-AE (Chen et al. 2024, arXiv 2410.10733): every change of scale carries a shortcut without parameters, so that the
convolutions learn only what differs from moving space into channels and back. With r = 2:

    down: PixelUnshuffle(conv(x), r) + mean over groups of channels of PixelUnshuffle(x, r)
    up:   PixelShuffle(conv(x), r)   + PixelShuffle(each channel of x repeated, r)

and the same with r = 1 at the two projections to and from the latent. The down shortcut undoes the up shortcut
exactly. Blocks are those of the code published with it (mit-han-lab/efficientvit): convolutions with an RMS norm at
the end of the branch, and, at the coarse scales if asked for, linear attention with a gated convolution. What differs:
batch norm in its decoder is RMS norm here, as everywhere else. Knows nothing of codes or losses.

Legend: B batch, H W picture height and width, h w grid, N = h·w positions, C channels, D latent width, M heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vq.backbones import Backbone
from vqlm.checkpoint import declared

HEAD_DIM = 32  # channels of an attention head, at most


def space_to_channel(x: Tensor, channels: int, factor: int) -> Tensor:
    """(B,C,h,w) → (B,channels,h/r,w/r): neighbours into channels, then the mean of each group of C·r²/channels."""
    return F.pixel_unshuffle(x, factor).unflatten(1, (channels, -1)).mean(2)


def channel_to_space(x: Tensor, channels: int, factor: int) -> Tensor:
    """(B,C,h,w) → (B,channels,h·r,w·r): each channel channels·r²/C times in a row, then channels into neighbours."""
    return F.pixel_shuffle(x.repeat_interleave(channels * factor**2 // x.shape[1], 1), factor)


class RMSNorm(nn.Module):
    """(B,C,h,w) divided by the root mean square over channels; scale and shift by channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # One dtype for all, or torch leaves its fast path.
        weight, bias = self.weight.type_as(x), self.bias.type_as(x)
        return (F.rms_norm(x.movedim(1, -1), weight.shape, weight, eps=1e-5) + bias).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """x + norm(conv(act(conv(x)))): (B,C,h,w) → the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = RMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))


class LinearAttention(nn.Module):
    """Attention whose kernel is relu(q)·relu(k), so that its cost grows with N, not N². (B,C,h,w) → the same shape.

    out_n = Σ_m (q_n·k_m) v_m / Σ_m (q_n·k_m), computed as (Σ_m v_m k_mᵀ) q_n in float32. Cai et al. 2023,
    arXiv 2205.14756.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(1, channels // HEAD_DIM)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = RMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)  # each (B, M, C/M, N)
        with torch.autocast(x.device.type, enabled=False):
            mixed = relu_attention(q.float(), k.float(), v.float())
        return self.norm(self.out(mixed.flatten(1, 2).unflatten(2, x.shape[2:]).type_as(x)))


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each (B, M, E, N) → (B, M, E, N)."""
    q, k = q.relu(), k.relu()
    totals = k.sum(-1, keepdim=True).transpose(2, 3) @ q  # (B, M, 1, N)
    return (v @ k.transpose(2, 3) @ q) / (totals + 1e-15)


class GatedConvolution(nn.Module):
    """1x1 to 2·4·C channels, 3x3 by channel, one half gates the other, 1x1 back: (B,C,h,w) → the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.widen = nn.Conv2d(channels, 8 * channels, 1)
        self.mix = nn.Conv2d(8 * channels, 8 * channels, 3, padding=1, groups=8 * channels)
        self.narrow = nn.Conv2d(4 * channels, channels, 1, bias=False)
        self.norm = RMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.mix(F.silu(self.widen(x))).chunk(2, dim=1)
        return self.norm(self.narrow(value * F.silu(gate)))


class AttentionBlock(nn.Module):
    """x + attention(x), then x + gated(x): (B,C,h,w) → the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.attention, self.gated = LinearAttention(channels), GatedConvolution(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.gated(x)


class Down(nn.Module):
    """(B,C,h,w) → (B,C',h/r,w/r): convolution at the fine scale, space to channel, shortcut."""

    def __init__(self, width: int, following: int, factor: int = 2):
        super().__init__()
        self.channels, self.factor = following, factor
        self.shortcut = width * factor**2 % following == 0
        self.conv = nn.Conv2d(width, following // factor**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_unshuffle(self.conv(x), self.factor)
        return y + space_to_channel(x, self.channels, self.factor) if self.shortcut else y


class Up(nn.Module):
    """(B,C,h,w) → (B,C',h·r,w·r): convolution at the coarse scale, channel to space, shortcut. Mirror of `Down`."""

    def __init__(self, width: int, following: int, factor: int = 2):
        super().__init__()
        self.channels, self.factor = following, factor
        self.shortcut = following * factor**2 % width == 0
        self.conv = nn.Conv2d(width, following * factor**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_shuffle(self.conv(x), self.factor)
        return y + channel_to_space(x, self.channels, self.factor) if self.shortcut else y


def check_sizes(channels: Sequence[int], latent_dim: int, blocks: int, patch: int, attention: int) -> None:
    if not channels or any(c < 1 for c in channels):
        raise ValueError(f"channels={list(channels)}: give one positive width for each scale, finest first")
    if min(latent_dim, blocks, patch) < 1:
        raise ValueError(f"latent_dim={latent_dim}, blocks={blocks}, patch={patch}: each must be at least 1")
    for width, following in pairwise(channels):
        if following % 4 or 4 * width % following:
            raise ValueError(
                f"channels={list(channels)}: after {width} must come a multiple of 4 that divides {4 * width} (four "
                f"neighbours become one position), not {following}"
            )
    if not 0 <= attention <= len(channels):
        raise ValueError(f"attention={attention}: a number of scales from 0 to {len(channels)}")
    for width in channels[len(channels) - attention :]:
        if width % max(1, width // HEAD_DIM):
            raise ValueError(
                f"channels={list(channels)}: attention needs multiples of {HEAD_DIM}, not {width}"
            )


def stages(channels: Sequence[int], blocks: int, attention: int) -> list[list[nn.Module]]:
    """The blocks of each scale, finest first; the last `attention` scales have attention blocks."""
    kinds = [
        AttentionBlock if i >= len(channels) - attention else ResidualBlock for i in range(len(channels))
    ]
    return [[kind(width) for _ in range(blocks)] for kind, width in zip(kinds, channels, strict=True)]


@declared
class DCAEEncoder(Backbone):
    """Pixels (B,3,H,W) in [-1,1] → latent (B,D,H/f,W/f), f = patch · 2^(len(channels)-1).

    channels: widths from the finest scale to the grid, each at most four times the one before; blocks: at each scale;
    patch: side of the square of pixels folded into channels before the first convolution (the published networks: 2);
    attention: how many of the coarsest scales have linear attention (published: 3 of 6). The projection to the latent
    has its shortcut where latent_dim divides the last width.
    """

    def __init__(
        self, channels: list[int], latent_dim: int, blocks: int = 2, patch: int = 2, attention: int = 0
    ):
        super().__init__()
        check_sizes(channels, latent_dim, blocks, patch, attention)
        self.downsample = patch * 2 ** (len(channels) - 1)
        self.latent_dim = latent_dim
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(patch),
            nn.Conv2d(3 * patch**2, channels[0], 3, padding=1),
        ]
        for i, stage in enumerate(stages(channels, blocks, attention)):
            layers += [Down(channels[i - 1], channels[i]), *stage] if i else stage
        self.layers = nn.Sequential(*layers, Down(channels[-1], latent_dim, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.layers(x_BCHW)


@declared
class DCAEDecoder(Backbone):
    """Latent (B,D,h,w) → pixels (B,3,h·f,w·f), unbounded (the tokenizer clamps). Mirror of `DCAEEncoder`."""

    def __init__(
        self, channels: list[int], latent_dim: int, blocks: int = 2, patch: int = 2, attention: int = 0
    ):
        super().__init__()
        check_sizes(channels, latent_dim, blocks, patch, attention)
        self.downsample = patch * 2 ** (len(channels) - 1)
        self.latent_dim = latent_dim
        layers: list[nn.Module] = [Up(latent_dim, channels[-1], 1)]
        for i, stage in reversed(list(enumerate(stages(channels, blocks, attention)))):
            layers += [*stage, Up(channels[i], channels[i - 1])] if i else stage
        layers += [RMSNorm(channels[0]), nn.ReLU()]
        layers += [nn.Conv2d(channels[0], 3 * patch**2, 3, padding=1), nn.PixelShuffle(patch)]
        self.layers = nn.Sequential(*layers)

    @property
    def last_weight(self) -> nn.Parameter:
        return self.layers[-2].weight  # type: ignore[return-value]

    def forward(self, z_BDhw: Tensor) -> Tensor:
        return self.layers(z_BDhw)
