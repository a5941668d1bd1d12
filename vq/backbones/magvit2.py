"""The convolutional encoder and decoder of Open-MAGVIT2, side by side: pixels ↔ latent.

As in Luo et al. 2024 (arXiv 2409.04410), after MAGVIT-v2 (Yu et al. 2023, arXiv 2310.05737): residual blocks without
attention and without biases, and a decoder in which statistics of the whole latent scale and shift each stage. Weights
from there compute the same here; `vq/importers` brings them. Knows nothing of codes, losses or other projects' files.

Legend: B batch, H W picture height and width, h w grid, C channels, D latent width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vq.backbones import Backbone
from vq.backbones.conv import Upsample
from vq.backbones.vqgan import Stage, check_trunk, group_norm
from vqlm.checkpoint import declared

EPSILON = 1e-6


@declared
class Magvit2Encoder(Backbone):
    """Pixels (B,3,H,W) in [-1,1] → latent (B,D,H/f,W/f), f = 2^(len(channels)-1).

    channels: width of each stage, finest first; blocks: residual blocks in each stage and in the middle; stem: width
    before the first stage, null for its own width; groups: of every GroupNorm.
    """

    def __init__(
        self,
        channels: list[int],
        latent_dim: int,
        blocks: int = 4,
        stem: int | None = None,
        groups: int = 32,
    ):
        super().__init__()
        check_trunk(channels, latent_dim, blocks, [], groups, stem)
        self.downsample, self.latent_dim = 2 ** (len(channels) - 1), latent_dim
        norm, before, last = group_norm(groups), stem or channels[0], channels[-1]
        self.stem = nn.Conv2d(3, before, 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        for i, width in enumerate(channels):
            halve = nn.Conv2d(width, width, 3, stride=2, padding=1) if i < len(channels) - 1 else None
            self.stages.append(Stage(before, width, blocks, 0, norm, resample=halve, bias=False))
            before = width
        self.middle = Stage(last, last, blocks, 0, norm, bias=False)
        self.norm = norm(last)
        self.to_latent = nn.Conv2d(last, latent_dim, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.stem(x_BCHW)
        for stage in self.stages:
            x = stage(x)
        return self.to_latent(F.silu(self.norm(self.middle(x))))


class StatisticsNorm(nn.Module):
    """GroupNorm of x (B,C,·,·), then a scale from the latent's deviations and a shift from its means, per channel."""

    def __init__(self, width: int, latent_dim: int, groups: int):
        super().__init__()
        self.groups = groups
        self.scale, self.shift = nn.Linear(latent_dim, width), nn.Linear(latent_dim, width)

    def forward(self, x: Tensor, latent_BDhw: Tensor) -> Tensor:
        flat_BDN = latent_BDhw.flatten(2)
        if flat_BDN.shape[2] < 2:
            raise ValueError(
                "a grid of one position has no deviation; this decoder needs two positions or more"
            )
        deviation_BD = (flat_BDN.var(2) + EPSILON).sqrt()
        scale, shift = self.scale(deviation_BD), self.shift(flat_BDN.mean(2))
        return F.group_norm(x, self.groups, eps=EPSILON) * scale[..., None, None] + shift[..., None, None]


@declared
class Magvit2Decoder(Backbone):
    """Latent (B,D,h,w) → pixels (B,3,h·f,w·f), unbounded (the tokenizer clamps). Mirror of `Magvit2Encoder`.

    ValueError on a grid of one position, which has no statistics.
    """

    def __init__(self, channels: list[int], latent_dim: int, blocks: int = 4, groups: int = 32):
        super().__init__()
        check_trunk(channels, latent_dim, blocks, [], groups)
        self.downsample, self.latent_dim = 2 ** (len(channels) - 1), latent_dim
        norm, coarser = group_norm(groups), [*channels[1:], channels[-1]]
        self.stem = nn.Conv2d(latent_dim, channels[-1], 3, padding=1)
        self.middle = Stage(channels[-1], channels[-1], blocks, 0, norm, bias=False)
        self.adaptive = nn.ModuleList(StatisticsNorm(width, latent_dim, groups) for width in coarser)
        self.stages = nn.ModuleList(
            Stage(
                before,
                width,
                blocks,
                0,
                norm,
                resample=Upsample(width, width) if i else None,
                bias=False,
            )
            for i, (before, width) in enumerate(zip(coarser, channels, strict=True))
        )
        self.norm = norm(channels[0])
        self.head = nn.Conv2d(channels[0], 3, 3, padding=1)

    @property
    def last_weight(self) -> nn.Parameter:
        return self.head.weight  # type: ignore[return-value]

    def forward(self, z_BDhw: Tensor) -> Tensor:
        x = self.middle(self.stem(z_BDhw))
        for adapt, stage in zip(reversed(self.adaptive), reversed(self.stages), strict=True):
            x = stage(adapt(x, z_BDhw))
        return self.head(F.silu(self.norm(x)))
