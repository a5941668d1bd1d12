"""The convolutional encoder and decoder of VQGAN, side by side: pixels ↔ latent.

As in Esser et al. 2021 (arXiv 2012.09841) and the code published with it, to the last bit of padding, so that weights
trained there compute the same here; `vq/importers` brings them. `conv.py` is the lighter relative. Knows nothing of
codes, losses or other projects' files.

Legend: B batch, H W picture height and width, h w grid, N = h·w positions, C channels, D latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from vq.backbones import Backbone
from vqlm.checkpoint import declared

# Width → a normalisation of (B,C,h,w). What it is conditioned on, if anything, is passed along all layers.
Norm = Callable[[int], nn.Module]


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))): (B,C,h,w) → (B,C',h,w); x passes a 1x1 convolution where C' ≠ C."""

    def __init__(self, width_in: int, width: int, norm: Norm, bias: bool = True):
        super().__init__()
        self.norm1, self.conv1 = norm(width_in), nn.Conv2d(width_in, width, 3, padding=1, bias=bias)
        self.norm2, self.conv2 = norm(width), nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.shortcut = nn.Conv2d(width_in, width, 1, bias=bias) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x, *condition)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h, *condition)))


class AttentionBlock(nn.Module):
    """x + attention over all positions: (B,C,h,w) → the same shape."""

    def __init__(self, width: int, norm: Norm, heads: int = 1):
        super().__init__()
        self.heads, self.norm = heads, norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        tokens_BNC = self.norm(x, *condition).flatten(2).transpose(1, 2)
        B, N, C = tokens_BNC.shape
        parts = self.qkv(tokens_BNC).view(B, N, 3, self.heads, C // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed_BNC = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
        return x + self.out(mixed_BNC).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Conv2d):
    """(B,C,h,w) → (B,C,h/2,w/2). One row below and one column to the right are padded, none on the other sides."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """(B,C,h,w) → (B,C,2h,2w): each position four times, then a convolution."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """Residual blocks, the first `attentions` of them followed by attention, then a change of scale if given."""

    def __init__(
        self,
        width_in: int,
        width: int,
        blocks: int,
        attentions: int,
        norm: Norm,
        heads: int = 1,
        resample: nn.Module | None = None,
        bias: bool = True,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(width if j else width_in, width, norm, bias) for j in range(blocks)
        )
        self.attentions = nn.ModuleList(AttentionBlock(width, norm, heads) for _ in range(attentions))
        self.resample = resample or nn.Identity()

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        for j, block in enumerate(self.blocks):
            x = block(x, *condition)
            if j < len(self.attentions):
                x = self.attentions[j](x, *condition)
        return self.resample(x)


class EncoderTrunk(nn.Module):
    """Pixels (B,3,H,W) → (B,width_out,H/f,W/f), f = 2^(len(channels)-1). See `VqganEncoder` for the arguments."""

    def __init__(
        self,
        channels: Sequence[int],
        width_out: int,
        blocks: int,
        attention: Sequence[int],
        stem: int,
        norm: Norm,
        heads: int = 1,
        middle_attention: bool = True,
    ):
        super().__init__()
        last = len(channels) - 1
        self.stem = nn.Conv2d(3, stem, 3, padding=1)
        self.stages = nn.ModuleList(
            Stage(
                channels[i - 1] if i else stem,
                width,
                blocks,
                blocks * (i in attention),
                norm,
                heads,
                Downsample(width) if i < last else None,
            )
            for i, width in enumerate(channels)
        )
        self.middle = Stage(channels[-1], channels[-1], 2, int(middle_attention), norm, heads)
        self.norm = norm(channels[-1])
        self.head = nn.Conv2d(channels[-1], width_out, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.stem(x_BCHW)
        for stage in self.stages:
            x = stage(x)
        return self.head(F.silu(self.norm(self.middle(x))))


class DecoderTrunk(nn.Module):
    """(B,width_in,h,w) → pixels (B,3,h·f,w·f); one block more a stage than the encoder. Stages stand finest first.

    `condition` goes to every normalisation.
    """

    def __init__(
        self,
        channels: Sequence[int],
        width_in: int,
        blocks: int,
        attention: Sequence[int],
        norm: Norm,
        heads: int = 1,
        middle_attention: bool = True,
    ):
        super().__init__()
        self.stem = nn.Conv2d(width_in, channels[-1], 3, padding=1)
        self.middle = Stage(channels[-1], channels[-1], 2, int(middle_attention), norm, heads)
        self.stages = nn.ModuleList(
            Stage(
                coarser,
                width,
                blocks + 1,
                (blocks + 1) * (i in attention),
                norm,
                heads,
                Upsample(width) if i else None,
            )
            for i, (width, coarser) in enumerate(zip(channels, [*channels[1:], channels[-1]], strict=True))
        )
        self.norm = norm(channels[0])
        self.head = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        x = self.middle(self.stem(x), *condition)
        for stage in reversed(self.stages):
            x = stage(x, *condition)
        return self.head(F.silu(self.norm(x, *condition)))


def check_trunk(
    channels: Sequence[int],
    latent_dim: int,
    blocks: int,
    attention: Sequence[int],
    groups: int,
    stem: int | None = None,
) -> None:
    """ValueError on sizes that no trunk has."""
    if blocks < 1 or latent_dim < 1 or groups < 1:
        raise ValueError(
            f"blocks={blocks}, latent_dim={latent_dim}, groups={groups}: each must be at least 1"
        )
    if not channels or any(c < 1 or c % groups for c in channels):
        raise ValueError(
            f"channels={list(channels)}: give one positive width for each stage, finest first, each a multiple of "
            f"groups={groups}"
        )
    if stem is not None and (stem < 1 or stem % groups):
        raise ValueError(f"stem={stem}: must be a positive multiple of groups={groups}")
    if any(i not in range(len(channels)) for i in attention):
        raise ValueError(
            f"attention={list(attention)}: indices of stages, 0 (finest) to {len(channels) - 1} (the grid's own)"
        )


def group_norm(groups: int) -> Norm:
    """GroupNorm with the published epsilon."""
    return partial(nn.GroupNorm, groups, eps=1e-6)


@declared
class VqganEncoder(Backbone):
    """Pixels (B,3,H,W) in [-1,1] → latent (B,D,H/f,W/f), f = 2^(len(channels)-1).

    channels: width of each stage, finest first (published as ch · ch_mult); blocks: residual blocks a stage;
    attention: stages in which attention follows each block (published as the sides of feature maps at the training
    size, attn_resolutions; stage i has side size/2^i); stem: width before the first stage, null for its own width;
    hidden_dim: width between the last 3x3 and the 1x1 convolution to the latent (z_channels), null for latent_dim;
    middle_attention: attention in the middle, at the grid; groups: of every GroupNorm (32 as published).
    """

    def __init__(
        self,
        channels: list[int],
        latent_dim: int,
        blocks: int = 2,
        attention: list[int] | None = None,
        stem: int | None = None,
        hidden_dim: int | None = None,
        middle_attention: bool = True,
        groups: int = 32,
    ):
        super().__init__()
        attention = attention or []
        check_trunk(channels, latent_dim, blocks, attention, groups, stem)
        stem, hidden = stem or channels[0], hidden_dim or latent_dim
        self.downsample, self.latent_dim = 2 ** (len(channels) - 1), latent_dim
        norm = group_norm(groups)
        self.trunk = EncoderTrunk(
            channels, hidden, blocks, attention, stem, norm, middle_attention=middle_attention
        )
        self.to_latent = nn.Conv2d(hidden, latent_dim, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.to_latent(self.trunk(x_BCHW))


@declared
class VqganDecoder(Backbone):
    """Latent (B,D,h,w) → pixels (B,3,h·f,w·f), unbounded (the tokenizer clamps). Mirror of `VqganEncoder`.

    As published it has blocks + 1 residual blocks in each stage.
    """

    def __init__(
        self,
        channels: list[int],
        latent_dim: int,
        blocks: int = 2,
        attention: list[int] | None = None,
        hidden_dim: int | None = None,
        middle_attention: bool = True,
        groups: int = 32,
    ):
        super().__init__()
        hidden, attention = hidden_dim or latent_dim, attention or []
        check_trunk(channels, latent_dim, blocks, attention, groups)
        self.downsample, self.latent_dim = 2 ** (len(channels) - 1), latent_dim
        self.from_latent = nn.Conv2d(latent_dim, hidden, 1)
        norm = group_norm(groups)
        self.trunk = DecoderTrunk(
            channels, hidden, blocks, attention, norm, middle_attention=middle_attention
        )

    @property
    def last_weight(self) -> nn.Parameter:
        return self.trunk.head.weight  # type: ignore[return-value]

    def forward(self, z_BDhw: Tensor) -> Tensor:
        return self.trunk(self.from_latent(z_BDhw))
