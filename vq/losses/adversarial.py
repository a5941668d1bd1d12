"""A discriminator beside the tokenizer, and the null member: none."""

from __future__ import annotations

from torch import Tensor, nn

from vq.batches import PictureBatch
from vq.tokenizer import ImageTokenizer, Reconstruction


class NoAdversary(nn.Module):
    """The null member: no discriminator."""

    def check(self, tokenizer: ImageTokenizer, precision: str) -> None:
        """ConfigError if this cannot train such a tokenizer in this precision."""

    def loss(
        self,
        batch: PictureBatch,
        made: Reconstruction,
        others: Tensor,
        last_weight: nn.Parameter,
        progress: float,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What the tokenizer pays, by name, and numbers to log. others: the sum of its other losses."""
        return {}, {}

    def step(
        self, batch: PictureBatch, made: Reconstruction, progress: float, rate: float
    ) -> dict[str, float]:
        """After the tokenizer's step: train the discriminator on the same pictures; numbers to log."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass
