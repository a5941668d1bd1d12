"""Gumbel-softmax: codes are drawn while training, with a temperature that falls (the dVAE of DALL·E).

Legend: B batch, D latent width, h w grid, K codebook size, N = B·h·w vectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vq.quantizers import (
    Quantized,
    Quantizer,
    check_codes,
    check_latent,
    check_sizes,
    to_grid,
    to_rows,
)
from vq.quantizers.soft import straight_through
from vqlm.checkpoint import declared


@declared
class GumbelQuantizer(Quantizer):
    """A 1x1 convolution scores all K codes; training draws one with Gumbel noise, eval takes the best.

    Ramesh et al. 2021 (DALL·E, arXiv 2102.12092, section 2.1 and appendix A.2), with the straight-through sample of
    Jang et al. 2016 (arXiv 1611.01144) as VQGAN's Gumbel variant has it: the decoder sees one code, the gradient the
    softmax. The temperature falls along a half cosine from `start` to `end`, which it reaches when the share `until`
    of the run is done. Loss "divergence": KL(q ‖ uniform) in nats per position, 5e-4 in VQGAN. Training keeps a few
    matrices of N×K, with gradient.
    """

    terms = ("divergence",)

    def __init__(
        self, dim: int, codebook_size: int, start: float = 1.0, end: float = 0.0625, until: float = 0.5
    ):
        super().__init__()
        check_sizes(dim, codebook_size)
        if not 0 < end <= start:
            raise ValueError(f"start={start}, end={end}: temperatures with 0 < end ≤ start")
        if not 0 < until <= 1:
            raise ValueError(f"until={until}: a share of the run, above 0 and at most 1")
        self.dim, self.depth, self.codebook_size = dim, 1, codebook_size
        self.start, self.end, self.until = start, end, until
        self.temperature = start
        self.logits = nn.Conv2d(dim, codebook_size, 1)
        self.embedding = nn.Embedding(codebook_size, dim)

    def anneal(self, progress: float) -> None:
        share = min(1.0, progress / self.until)
        self.temperature = self.end + (self.start - self.end) * (1 + math.cos(math.pi * share)) / 2

    def forward(self, z_BDhw: Tensor) -> Quantized:
        check_latent(z_BDhw, self.dim)
        with torch.autocast(z_BDhw.device.type, enabled=False):
            logits_NK = to_rows(self.logits(z_BDhw.float()))
            z_ND, indices_N, losses = self._drawn(logits_NK) if self.training else self._best(logits_NK)
        B, _, h, w = z_BDhw.shape
        return Quantized(to_grid(z_ND, z_BDhw), indices_N.reshape(B, h, w, 1), losses)

    def _drawn(self, logits_NK: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        p_NK = ((logits_NK + gumbel_noise(logits_NK)) / self.temperature).softmax(-1)
        indices_N = p_NK.argmax(-1)
        log_NK = logits_NK.log_softmax(-1)
        divergence = (log_NK.exp() * log_NK).sum(-1).mean() + math.log(self.codebook_size)
        return (
            straight_through(p_NK, indices_N, self.embedding.weight),
            indices_N,
            {"divergence": divergence},
        )

    def _best(self, logits_NK: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        indices_N = logits_NK.argmax(-1)
        return self.embedding(indices_N), indices_N, {}

    def lookup(self, codes_BhwQ: Tensor) -> Tensor:
        check_codes(codes_BhwQ, 1, self.codebook_size)
        return self.embedding(codes_BhwQ[..., 0].long()).permute(0, 3, 1, 2)


def gumbel_noise(like: Tensor) -> Tensor:
    """Independent draws from the standard Gumbel distribution, -log(-log(u))."""
    return -torch.empty_like(like).exponential_().log()
