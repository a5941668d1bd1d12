"""How far the latent is from its codes: losses that the quantizer gives, each with a weight."""

from __future__ import annotations

from torch import Tensor

from vq.batches import PictureBatch
from vq.losses import Weighted
from vq.tokenizer import ImageTokenizer, Reconstruction
from vqlm.errors import ConfigError, nearest


class Codes(Weighted):
    """weight · the quantizer's own loss `term`; its class says which terms it gives, and what weights its paper took.

    "commitment": mean((latent - sg[code])²), the β term of van den Oord et al. 2017 (arXiv 1711.00937, eq. 3).
    """

    def __init__(self, term: str, weight: float = 1.0):
        super().__init__(weight)
        self.term = term

    def check(self, tokenizer: ImageTokenizer) -> None:
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
