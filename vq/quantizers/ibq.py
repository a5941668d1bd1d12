"""Index backpropagation: the choice itself is differentiable, so that all codes of the codebook learn at each step.

Legend: B batch, D latent width, h w grid, K codebook size, N = B·h·w vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vq.quantizers import (
    Quantized,
    Quantizer,
    check_codes,
    check_latent,
    check_sizes,
    to_grid,
    to_rows,
)
from vq.quantizers.soft import entropy_penalty, sample, straight_through
from vqlm.checkpoint import declared


@declared
class IndexBackpropagationQuantizer(Quantizer):
    """IBQ (Shi et al. 2024, arXiv 2412.02692): logits z·E, softmax, and a straight-through choice of the largest.

    Losses, with the weights of its authors' code:
        "soft" 1: mean((z_q - z)²), z_q carrying the gradient of the softmax
        "commitment" 1: mean((sg[e] - z)²)     "codebook" 0.25: mean((e - sg[z])²), e the chosen code
        "entropy" 0.05: E[H(p)] - H(E[p]), p = softmax(logits / temperature), on at most `positions` vectors of a batch
    Training keeps a few matrices of N×K, with gradient: 1 GB each for N = 16,384 and K = 16,384.
    """

    terms = ("soft", "commitment", "codebook", "entropy")

    def __init__(self, dim: int, codebook_size: int, temperature: float = 0.01, positions: int = 1024):
        super().__init__()
        check_sizes(dim, codebook_size)
        if temperature <= 0 or positions < 1:
            raise ValueError(
                f"temperature={temperature} must be positive and positions={positions} at least 1"
            )
        self.dim, self.depth, self.codebook_size = dim, 1, codebook_size
        self.temperature, self.positions = temperature, positions
        self.embedding = nn.Embedding(codebook_size, dim)

    def forward(self, z_BDhw: Tensor) -> Quantized:
        check_latent(z_BDhw, self.dim)
        with torch.autocast(z_BDhw.device.type, enabled=False):
            x_ND = to_rows(z_BDhw.float())
            logits_NK = x_ND @ self.embedding.weight.T
            indices_N = logits_NK.argmax(-1)
            chosen_ND, losses = self.embedding(indices_N), {}
            if self.training:
                z_ND = straight_through(logits_NK.softmax(-1), indices_N, self.embedding.weight)
                losses = self._losses(x_ND, z_ND, chosen_ND, logits_NK)
                chosen_ND = z_ND
        B, _, h, w = z_BDhw.shape
        return Quantized(to_grid(chosen_ND, z_BDhw), indices_N.reshape(B, h, w, 1), losses)

    def _losses(self, x_ND: Tensor, z_ND: Tensor, chosen_ND: Tensor, logits_NK: Tensor) -> dict[str, Tensor]:
        return {
            "soft": F.mse_loss(z_ND, x_ND),
            "commitment": F.mse_loss(x_ND, chosen_ND.detach()),
            "codebook": F.mse_loss(chosen_ND, x_ND.detach()),
            "entropy": entropy_penalty(sample(logits_NK, self.positions) / self.temperature),
        }

    def lookup(self, codes_BhwQ: Tensor) -> Tensor:
        check_codes(codes_BhwQ, 1, self.codebook_size)
        return self.embedding(codes_BhwQ[..., 0].long()).permute(0, 3, 1, 2)
