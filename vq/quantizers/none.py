"""The null member of the family: a continuous autoencoder."""

from __future__ import annotations

from torch import Tensor

from vq.quantizers import Quantized, Quantizer
from vqlm.checkpoint import declared


@declared
class NoQuantizer(Quantizer):
    """The null member: the latent passes unchanged, there are no codes (a continuous autoencoder)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim, self.depth, self.codebook_size = dim, 0, 0

    def forward(self, z_BDhw: Tensor) -> Quantized:
        return Quantized(z_BDhw, None)

    def lookup(self, codes_BhwQ: Tensor) -> Tensor:
        raise ValueError("a continuous tokenizer (NoQuantizer) has no codes to look up")
