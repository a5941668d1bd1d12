"""Pictures in memory → training batches, with augmentation drawn per batch from (seed, n).

A batch holds pictures of one shape. Knows nothing of where pictures come from, or of what is trained on them.

Legend: N pictures, B batch, C H W picture.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
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
        B, _, height, width = x_BCHW.shape
        if self.flip:
            mirrored = torch.rand(B, generator=random) < 0.5
            x_BCHW = torch.where(mirrored[:, None, None, None], x_BCHW.flip(3), x_BCHW)
        warped = (torch.rand(B, generator=random) < self.share).nonzero().flatten()
        if len(warped):
            grid = F.affine_grid(
                self._affine(len(warped), height, width, random),
                list(x_BCHW[warped].shape),
                align_corners=False,
            )
            x_BCHW = x_BCHW.index_copy(
                0, warped, F.grid_sample(x_BCHW[warped], grid, padding_mode="border", align_corners=False)
            )
        recoloured = (torch.rand(B, generator=random) < self.colours).nonzero().flatten()
        for i in recoloured.tolist():
            x_BCHW[i] = x_BCHW[i, torch.randperm(3, generator=random)]
        return x_BCHW

    def _affine(self, count: int, height: int, width: int, random: torch.Generator) -> Tensor:
        """(count,2,3) maps from output to input coordinates in [-1,1]. Turns are turns of pixels: in coordinates that
        run from -1 to 1 along sides of unlike length they would shear."""

        def uniform(limit: float) -> Tensor:
            return (torch.rand(count, generator=random) * 2 - 1) * limit

        angle, zoom = uniform(math.radians(self.rotate)), 1 + uniform(self.scale)
        cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        right, down = uniform(2 * self.shift / width), uniform(2 * self.shift / height)
        across, along = [cos, -sin * (height / width), right], [sin * (width / height), cos, down]
        return torch.stack([torch.stack(across, 1), torch.stack(along, 1)], 1)


class NoAugment:
    """The null member."""

    def __call__(self, x_BCHW: Tensor, random: torch.Generator) -> Tensor:
        return x_BCHW


class GroupedOrder:
    """Which group, and which of its samples, make batch n: a pure function of (seed, n), as `vqlm.batches.Order` is.

    Each group has an `Order` of its own: its shuffled epochs laid end to end and cut into batches of B. The batches
    are dealt in rounds: round r brings, shuffled among each other, the batches ⌈r·N/B⌉ to ⌈(r+1)·N/B⌉ - 1 of every
    group of N samples. So after r rounds each sample has come r times or, where the last batch of its group reached
    into the next epoch, r + 1 times, and never is a sample left out. A single group is dealt in its own order.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int):
        if not counts:
            raise ValueError("counts is empty: there must be at least one group of samples")
        self.counts, self.batch_size, self.seed = list(counts), batch_size, seed
        self.orders = [Order(count, batch_size, seed) for count in counts]
        self._round = lru_cache(maxsize=4)(self._dealt)

    def batch(self, n: int) -> tuple[int, np.ndarray]:
        """The group of batch n = 0, 1, 2, …, and the indices (batch_size) of its samples in that group."""
        # The last round that begins at or before n. A round brings at least N/B batches, N samples in all.
        last = n * self.batch_size // sum(self.counts) + 1
        number = bisect_right(range(last + 1), n, key=lambda r: sum(self._begins(r))) - 1
        begins = self._begins(number)
        groups = self._round(number)
        place = n - sum(begins)
        group = int(groups[place])
        return group, self.orders[group].indices(begins[group] + int((groups[:place] == group).sum()))

    def _begins(self, number: int) -> list[int]:
        """How many batches of each group come before this round."""
        return [-(-number * count // self.batch_size) for count in self.counts]

    def _dealt(self, number: int) -> np.ndarray:
        """The group of each batch of a round."""
        now, then = self._begins(number), self._begins(number + 1)
        groups = np.repeat(np.arange(len(now)), np.subtract(then, now))
        return np.random.default_rng([self.seed, number, 2]).permutation(groups)


class PictureBatches(Dataset):
    """Item n is the n-th `PictureBatch` of a run: a function of (seed, n) alone, whatever was read before.

    pictures: one set, or one for each shape; a batch holds pictures of one of them (see `GroupedOrder` for how often
    each picture comes). Reads no pixels before the first item.
    """

    def __init__(
        self,
        pictures: PictureSet | Sequence[PictureSet],
        batch_size: int,
        seed: int,
        augment: Augment | NoAugment,
        total: int,
    ):
        self.sets = [pictures] if isinstance(pictures, PictureSet) else list(pictures)
        self.seed, self.augment, self.total = seed, augment, total
        self.order = GroupedOrder([len(each) for each in self.sets], batch_size, seed)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, n: int) -> PictureBatch:
        group, indices = self.order.batch(n)
        chosen = self.sets[group].select(indices.tolist())
        x_BCHW = self.augment(from_bytes(chosen.x_NCHW), generator(self.seed, n))
        return PictureBatch(x_BCHW, chosen.ids, chosen.captions)
