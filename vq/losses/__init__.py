"""What a tokenizer is trained for. Each loss is called with a batch and its reconstruction: a weighted scalar returns.

A loss has one name: its key in the configuration, in the logs and in the sum. Dropping its line drops the loss.

    reconstruction.py  pixels against pixels         adversarial.py  a discriminator
    perceptual.py      features against features     semantic.py     latents against captions
    codes.py           latents against their codes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from vq.batches import PictureBatch
from vq.tokenizer import ImageTokenizer, Reconstruction

Shapes = Sequence[tuple[int, int]]  # (height, width) of pictures


def sides(tokenizer: ImageTokenizer, shapes: Shapes) -> list[int]:
    """Every side that pictures have, ascending."""
    return sorted({side for shape in shapes or [(tokenizer.image_size,)] for side in shape})


class Loss(Protocol):
    """What the learner calls. A loss that is an `nn.Module` is trained, moved and saved with the run."""

    def check(self, tokenizer: ImageTokenizer, shapes: Shapes = ()) -> None:
        """ConfigError if the loss cannot work with this tokenizer, or with pictures of these (height, width); none
        given: those of the tokenizer. Called before data is read."""

    def __call__(self, batch: PictureBatch, made: Reconstruction) -> Tensor: ...


class Weighted:
    """A loss with a positive weight."""

    def __init__(self, weight: float = 1.0):
        if weight <= 0:
            raise ValueError(f"weight={weight} must be positive; to drop a loss, drop its line")
        self.weight = weight

    def check(self, tokenizer: ImageTokenizer, shapes: Shapes = ()) -> None:
        """ConfigError if the loss cannot work with this tokenizer, or with pictures of these (height, width); none
        given: those of the tokenizer. Called before data is read."""
