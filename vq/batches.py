"""Pictures in memory → training batches, with augmentation drawn per batch from (seed, n).

Legend: N pictures, B batch, C H W picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from vq.data import PictureSet
from vq.images import from_bytes
from vqlm.batches import Order, generator


@dataclass(frozen=True)
class PictureBatch:
    """Pictures of one shape with what is said of them."""

    x_BCHW: Tensor  # float in [-1,1]
    ids: list[str]
    captions: list[str]

    @property
    def samples(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> PictureBatch:
        return PictureBatch(self.x_BCHW.to(device), self.ids, self.captions)


class Augment:
    """Random changes for tokenizer training: a tokenizer that has met more pictures reconstructs unseen ones better.

    share: part of a batch that is warped (the rest stays sharp: resampling blurs); shift (px), scale (relative),
    rotate (degrees): largest warp; flip: mirror left to right half of the time; colours: share whose channels are
    permuted. Corners that a warp uncovers repeat the border.
    """

    def __init__(
        self,
        share: float = 0.5,
        shift: float = 3.0,
        scale: float = 0.15,
        rotate: float = 15.0,
        flip: bool = True,
        colours: float = 0.3,
    ):
        if not (0 <= share <= 1 and 0 <= colours <= 1 and 0 <= scale < 1 and shift >= 0 and rotate >= 0):
            raise ValueError(
                f"share={share}, colours={colours} must lie in [0, 1], scale={scale} in [0, 1), "
                f"shift={shift} and rotate={rotate} must not be negative"
            )
        self.share, self.shift, self.scale, self.rotate = share, shift, scale, rotate
        self.flip, self.colours = flip, colours

    def __call__(self, x_BCHW: Tensor, random: torch.Generator) -> Tensor:
        B, _, _, width = x_BCHW.shape
        if self.flip:
            mirrored = torch.rand(B, generator=random) < 0.5
            x_BCHW = torch.where(mirrored[:, None, None, None], x_BCHW.flip(3), x_BCHW)
        warped = (torch.rand(B, generator=random) < self.share).nonzero().flatten()
        if len(warped):
            grid = F.affine_grid(
                self._affine(len(warped), width, random), list(x_BCHW[warped].shape), align_corners=False
            )
            x_BCHW = x_BCHW.index_copy(
                0, warped, F.grid_sample(x_BCHW[warped], grid, padding_mode="border", align_corners=False)
            )
        recoloured = (torch.rand(B, generator=random) < self.colours).nonzero().flatten()
        for i in recoloured.tolist():
            x_BCHW[i] = x_BCHW[i, torch.randperm(3, generator=random)]
        return x_BCHW

    def _affine(self, count: int, width: int, random: torch.Generator) -> Tensor:
        """(count,2,3) maps from output to input coordinates in [-1,1]."""

        def uniform(limit: float) -> Tensor:
            return (torch.rand(count, generator=random) * 2 - 1) * limit

        angle, zoom = uniform(math.radians(self.rotate)), 1 + uniform(self.scale)
        cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        right, down = uniform(2 * self.shift / width), uniform(2 * self.shift / width)
        return torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)


class NoAugment:
    """The null member."""

    def __call__(self, x_BCHW: Tensor, random: torch.Generator) -> Tensor:
        return x_BCHW


class PictureBatches(Dataset):
    """Item n is the n-th `PictureBatch` of a run: a function of (seed, n) alone."""

    def __init__(
        self, pictures: PictureSet, batch_size: int, seed: int, augment: Augment | NoAugment, total: int
    ):
        self.pictures, self.seed, self.augment, self.total = pictures, seed, augment, total
        self.order = Order(len(pictures), batch_size, seed)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, n: int) -> PictureBatch:
        chosen = self.pictures.select(self.order.indices(n).tolist())
        x_BCHW = self.augment(from_bytes(chosen.x_NCHW), generator(self.seed, n))
        return PictureBatch(x_BCHW, chosen.ids, chosen.captions)
