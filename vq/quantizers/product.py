"""Product quantization: the latent is cut into chunks, each with a small codebook of its own.

Codes are parallel: each describes its own part of the latent, none refines another (that is residual.py).

Legend: D latent width, Q chunks, D' = D/Q, K size of each codebook, N vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vq.quantizers.residual import CosineGradientQuantizer, to_sphere
from vqlm.checkpoint import declared


@declared
class ProductQuantizer(CosineGradientQuantizer):
    """Q codebooks side by side, directions compared (multi-codebook quantization: UniTok, arXiv 2502.20321).

    depth: the number of chunks Q, which divides `dim`; a position has K^Q possible values at the cost of Q·K vectors.
    Each chunk of the quantized latent has unit length. UniTok: dim 64, 8 chunks, K 4,096; weights codebook 1,
    commitment 0.25.
    """

    def __init__(self, dim: int, codebook_size: int, depth: int, rotation_trick: bool = False):
        if depth < 1 or dim % depth:
            raise ValueError(f"dim={dim} cannot be cut into depth={depth} equal chunks")
        super().__init__(dim, codebook_size, depth, rotation_trick)

    @property
    def width(self) -> int:
        return self.dim // self.depth

    def vectors(self, state_ND: Tensor, depth: int) -> Tensor:
        return to_sphere(state_ND[:, depth * self.width : (depth + 1) * self.width])

    def leave(self, state_ND: Tensor, depth: int, indices_N: Tensor) -> Tensor:
        return state_ND

    def join(self, parts_ND: list[Tensor]) -> Tensor:
        return torch.cat(parts_ND, 1)
