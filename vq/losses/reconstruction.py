"""How far decoded pixels are from the picture, and how far the latent is from its codes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vq.tokenizer import Reconstruction


class Loss(Protocol):
    """What the learner calls."""

    def __call__(self, x_BCHW: Tensor, made: Reconstruction) -> Tensor: ...


class Weighted:
    """A loss with a positive weight."""

    def __init__(self, weight: float = 1.0):
        if weight <= 0:
            raise ValueError(f"weight={weight} must be positive; to drop a loss, drop its line")
        self.weight = weight


class Squared(Weighted):
    """weight · mean((x - x̂)²), pixels in [-1,1]: its minimum has the best PSNR."""

    def __call__(self, x_BCHW: Tensor, made: Reconstruction) -> Tensor:
        return self.weight * (made.x_BCHW - x_BCHW).square().mean()


class Absolute(Weighted):
    """weight · mean(|x - x̂|): sharper edges than `Squared` at a little PSNR."""

    def __call__(self, x_BCHW: Tensor, made: Reconstruction) -> Tensor:
        return self.weight * (made.x_BCHW - x_BCHW).abs().mean()


class Commitment(Weighted):
    """weight · mean over depths of mean((residual - sg[code])²): keeps the encoder near its codes.

    β of van den Oord et al. 2017 (arXiv 1711.00937, eq. 3; 0.25 there). The codes follow by EMA, not by a loss.
    """

    def __call__(self, x_BCHW: Tensor, made: Reconstruction) -> Tensor:
        return self.weight * made.quantized.loss
