"""The one LightningModule of vq: a tokenizer in training. What a batch costs, and what happens after a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vq.codebook import CodebookReset, NoReset
from vq.images import from_bytes
from vq.losses.reconstruction import Loss
from vq.quantizers import LibraryResidualQuantizer
from vq.tokenizer import ImageTokenizer, Reconstruction
from vqlm.training import Budget, Learner


class TokenizerLearner(Learner):
    """losses: name → loss, summed; reset: re-initialises unused codes; others as in `vqlm.training.Learner`."""

    model: ImageTokenizer

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        losses: dict[str, Loss],
        reset: CodebookReset | NoReset,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
        budget: Budget,
        clip: float = 1.0,
        max_bad_batches: int = 10,
    ):
        if not losses:
            raise ValueError("losses is empty: a tokenizer needs at least a reconstruction loss")
        super().__init__(channels_last(tokenizer), optimizer, budget, clip, max_bad_batches)
        self.terms, self.reset = losses, reset
        self._made: Reconstruction | None = None  # kept from the forward pass for `after_step`

    def losses(self, batch: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        x_BCHW = batch.contiguous(memory_format=torch.channels_last)
        made = self._made = self.model(x_BCHW)
        return {name: term(x_BCHW, made) for name, term in self.terms.items()}, {}

    def after_step(self) -> dict[str, float]:
        made, quantizer = self._made, self.model.quantizer
        self._made = None
        assert made is not None
        if made.quantized.codes_BhwQ is None or not isinstance(quantizer, LibraryResidualQuantizer):
            return {}
        z = made.z_BDhw.detach()
        replaced = self.reset.observe(quantizer, z, made.quantized.codes_BhwQ, self.progress)
        return {f"replaced_{depth}": float(count) for depth, count in enumerate(replaced)}

    @torch.no_grad()
    def finish(self, x_NCHW: Tensor, batch_size: int) -> list[int]:
        """After training: see to it that every code is used on the training pictures (uint8). Unused ones per depth."""
        model = self.model.eval()
        if not isinstance(model.quantizer, LibraryResidualQuantizer):
            return []
        device = next(model.parameters()).device
        latents = [model.encoder(from_bytes(x).to(device)).float() for x in x_NCHW.split(batch_size)]
        return self.reset.finish(model.quantizer, torch.cat(latents))

    def extra_state(self) -> dict[str, Tensor]:
        return {f"reset/{k}": v for k, v in self.reset.state_dict().items()}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.reset.load_state_dict({k.removeprefix("reset/"): v for k, v in state.items()})


def channels_last(tokenizer: ImageTokenizer) -> ImageTokenizer:
    """Convolution weights in the layout in which bf16 convolutions are fastest; values unchanged."""
    convert: Any = tokenizer.to  # torch's stub knows memory_format with other arguments alone
    return convert(memory_format=torch.channels_last)
