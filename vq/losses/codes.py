"""How far the latent is from its codes, and how evenly codes are used. Knows neither pixels nor captions.

Legend: B batch, D latent width, D' width of a codebook's vectors, h w grid, K codebook size, N vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vq.batches import PictureBatch
from vq.losses import Shapes, Weighted
from vq.quantizers import CodebookQuantizer
from vq.quantizers.nearest import nearest_codes
from vq.quantizers.soft import entropy_penalty, sample
from vq.tokenizer import ImageTokenizer, Reconstruction
from vqlm.errors import ConfigError, nearest


class Codes(Weighted):
    """weight · the quantizer's own loss `term`; its class says which terms it gives, and what weights its paper took.

    "commitment": mean((latent - sg[code])²), the β term of van den Oord et al. 2017 (arXiv 1711.00937, eq. 3).
    """

    def __init__(self, term: str, weight: float = 1.0):
        super().__init__(weight)
        self.term = term

    def check(self, tokenizer: ImageTokenizer, shapes: Shapes = ()) -> None:
        terms = tokenizer.quantizer.terms
        if self.term not in terms:
            kind = type(tokenizer.quantizer).__name__
            raise ConfigError(
                f"term={self.term}: {kind} gives {', '.join(terms) or 'no loss'}{nearest(self.term, terms)}"
            )

    def __call__(self, batch: PictureBatch, made: Reconstruction) -> Tensor:
        if made.quantized.codes_BhwQ is None:  # before the codes, in the continuous warm-up
            return made.z_BDhw.new_zeros(())
        return self.weight * made.quantized.losses[self.term]


class Entropy(Weighted):
    """weight · (E[H(p)] - gamma·H(E[p])), p = softmax(-‖x - e‖² / temperature) over the codes e: mean over depths.

    Pushes each vector x towards one code and all vectors together towards all codes (MAGVIT-v2, arXiv 2310.05737,
    eq. 4; for learned codebooks in LlamaGen, arXiv 2406.06525, which leaves it out by default). It reaches the
    encoder, and codebooks that learn by gradient. positions: at most so many vectors of a batch are looked at, since a
    matrix of positions×K is held with its gradient; with fewer positions than codes H(E[p]) stays below ln K.
    """

    def __init__(
        self, weight: float = 0.1, gamma: float = 1.0, temperature: float = 0.01, positions: int = 1024
    ):
        super().__init__(weight)
        if gamma < 0 or temperature <= 0 or positions < 1:
            raise ValueError(
                f"gamma={gamma} must not be negative, temperature={temperature} must be positive and "
                f"positions={positions} at least 1"
            )
        self.gamma, self.temperature, self.positions = gamma, temperature, positions

    def check(self, tokenizer: ImageTokenizer, shapes: Shapes = ()) -> None:
        quantizer = tokenizer.quantizer
        if not isinstance(quantizer, CodebookQuantizer):
            raise ConfigError(
                f"this entropy needs a codebook quantizer, not {type(quantizer).__name__}"
                + (', which gives its own as term "entropy"' if "entropy" in quantizer.terms else "")
            )

    def __call__(self, batch: PictureBatch, made: Reconstruction) -> Tensor:
        if made.quantized.codes_BhwQ is None:  # before the codes, in the continuous warm-up
            return made.z_BDhw.new_zeros(())
        assert isinstance(made.quantizer, CodebookQuantizer)
        with torch.autocast(made.z_BDhw.device.type, enabled=False):
            return self.weight * self._mean(made.quantizer, made.z_BDhw)

    def _mean(self, quantizer: CodebookQuantizer, z_BDhw: Tensor) -> Tensor:
        state_ND, penalties = sample(quantizer.start(z_BDhw), self.positions), []
        for depth in range(quantizer.depth):
            vectors_ND, book_KD = (
                quantizer.vectors(state_ND, depth),
                quantizer.codebook(quantizer.book_of(depth)),
            )
            logits_NK = -squared_distances(vectors_ND, book_KD) / self.temperature
            penalties.append(entropy_penalty(logits_NK, self.gamma))
            state_ND = quantizer.leave(state_ND, depth, nearest_codes(vectors_ND.detach(), book_KD.detach()))
        return torch.stack(penalties).mean()


def squared_distances(x_ND: Tensor, book_KD: Tensor) -> Tensor:
    """(N,K), with gradient; up to rounding they may be below zero."""
    return x_ND.square().sum(1, keepdim=True) - 2 * x_ND @ book_KD.T + book_KD.square().sum(1)
