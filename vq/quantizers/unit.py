"""Codes chosen by distance, given at unit length: how one tokenizer from elsewhere reads its codebook.

Not for training anew: what is compared and what is decoded are different vectors, which no loss brings together.

Legend: N vectors, D latent width.
"""

from __future__ import annotations

from torch import Tensor

from vq.quantizers.residual import GradientQuantizer, to_sphere
from vqlm.checkpoint import declared


@declared
class UnitLookupQuantizer(GradientQuantizer):
    """The Euclidean-nearest code, whose direction alone is decoded: transformers' JanusVQVAE, one code a position."""

    def __init__(self, dim: int, codebook_size: int):
        super().__init__(dim, codebook_size)

    def chosen(self, depth: int, indices_N: Tensor) -> Tensor:
        return to_sphere(super().chosen(depth, indices_N))
