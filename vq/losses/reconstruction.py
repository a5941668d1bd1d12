"""How far decoded pixels are from the picture."""

from __future__ import annotations

from torch import Tensor

from vq.batches import PictureBatch
from vq.losses import Weighted
from vq.tokenizer import Reconstruction


class Squared(Weighted):
    """weight · mean((x - x̂)²), pixels in [-1,1]: its minimum has the best PSNR."""

    def __call__(self, batch: PictureBatch, made: Reconstruction) -> Tensor:
        return self.weight * (made.x_BCHW - batch.x_BCHW).square().mean()


class Absolute(Weighted):
    """weight · mean(|x - x̂|): sharper edges than `Squared` at a little PSNR."""

    def __call__(self, batch: PictureBatch, made: Reconstruction) -> Tensor:
        return self.weight * (made.x_BCHW - batch.x_BCHW).abs().mean()
