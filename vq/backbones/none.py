"""The null decoder: it has the shape of one and refuses to work, saying why."""

from __future__ import annotations

from torch import Tensor, nn

from vq.backbones import Backbone
from vqlm.checkpoint import declared
from vqlm.errors import ConfigError


@declared
class NoDecoder(Backbone):
    """Stands where a decoder is not known: pictures can be encoded, codes cannot be decoded.

    `reason` is saved with the tokenizer and is what `decode` says, as a ConfigError.
    """

    def __init__(self, latent_dim: int, downsample: int, reason: str):
        super().__init__()
        self.latent_dim, self.downsample, self.reason = latent_dim, downsample, reason

    @property
    def last_weight(self) -> nn.Parameter:
        raise ConfigError(f"this tokenizer has no decoder: {self.reason}")

    def forward(self, z_BDhw: Tensor) -> Tensor:
        raise ConfigError(f"this tokenizer has no decoder: {self.reason}")
