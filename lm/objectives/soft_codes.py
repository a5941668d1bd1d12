"""Soft targets and stochastic codes (RQ-Transformer, Lee et al. 2022, arXiv 2203.01941, §3.2.3), from codebooks alone.

Legend: B rows, T positions, W columns, n codes, Q depth, K codebook size, D width of a code vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm.objectives.scoring import Soften
from lm.sequence import NONE
from lm.vocab import Vocabulary

CHUNK = 2**24  # probabilities that exist at once while codes are drawn


class SoftCodes:
    """The target of code c is the distribution softmax_k(-‖e_c - e_k‖² / temperature), and what the model reads in its
    place is a code drawn from it.

    An approximation: the paper measures from the residual vector r that was quantized, softmax_k(-‖r - e_k‖² / τ) with
    τ = 0.5, and quantizes the rest of r again after a code was drawn. A store holds no vectors, so e_c stands for r
    (as if it had been quantized without error), and the deeper codes stay those of the picture. The temperature is in
    squared units of the codebook: what suits one tokenizer is no hint for another. Towards 0 it is `NextToken` without
    soft targets.

    `look_at` gives it the code vectors before training.
    """

    def __init__(self, temperature: float = 0.5):
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        self.temperature = temperature
        self.vectors_QKD: Tensor | None = None

    def look_at(self, vectors_QKD: Tensor) -> None:
        """vectors_QKD: the code vectors of each depth, in which a step of the same length means the same change."""
        self.vectors_QKD = vectors_QKD.detach().float()

    def targets(self, depth: int) -> Soften:
        """Codes (n) of one depth → target distributions (n,K)."""
        return lambda codes_n: self.distribution(codes_n, depth)

    @torch.no_grad()
    def distribution(self, codes_n: Tensor, depth: int) -> Tensor:
        """(n,K): how probable each code is in place of `codes_n`. RuntimeError before `look_at`."""
        if self.vectors_QKD is None:
            raise RuntimeError("SoftCodes has no code vectors: call look_at(vectors_QKD) before training")
        self.vectors_QKD = self.vectors_QKD.to(codes_n.device)
        vectors_KD = self.vectors_QKD[depth]
        with torch.autocast(codes_n.device.type, enabled=False):
            squares_nK = torch.cdist(vectors_KD[codes_n], vectors_KD).square()
        return torch.softmax(-squares_nK / self.temperature, -1)

    @torch.no_grad()
    def replace(self, vocabulary: Vocabulary, ids_BTW: Tensor, next_BTW: Tensor) -> tuple[Tensor, Tensor]:
        """ids and next ids, with a drawn code in place of each code that is to be predicted.

        A position reads the same draw that the head before it was told of. A code that was disturbed on purpose, so
        that it differs from its label, stays as it is.
        """
        drawn_BTW = next_BTW.clone()
        for depth in range(vocabulary.depth):
            ids = vocabulary.image_range(depth)
            at_BTW = (next_BTW >= ids.start) & (next_BTW < ids.stop)
            drawn_BTW[at_BTW] = self._draw(next_BTW[at_BTW] - ids.start, depth) + ids.start
        read_BTW = ids_BTW.clone()
        true_BTW = (ids_BTW[:, 1:] == next_BTW[:, :-1]) & (next_BTW[:, :-1] != NONE)
        read_BTW[:, 1:] = torch.where(true_BTW, drawn_BTW[:, :-1], ids_BTW[:, 1:])
        return read_BTW, drawn_BTW

    def _draw(self, codes_n: Tensor, depth: int) -> Tensor:
        if not len(codes_n):
            return codes_n
        assert self.vectors_QKD is not None, "look_at first"
        rows = max(1, CHUNK // self.vectors_QKD.shape[1])
        parts = [torch.multinomial(self.distribution(part, depth), 1)[:, 0] for part in codes_n.split(rows)]
        return torch.cat(parts)
