"""The one LightningModule of vq: a tokenizer in training. What a batch costs, and what happens after a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vq.batches import PictureBatch
from vq.codebook import CodebookReset, NoReset
from vq.data import PictureSet
from vq.images import from_bytes
from vq.losses import Loss, Shapes
from vq.losses.adversarial import NoAdversary
from vq.quantizers import CodebookQuantizer
from vq.tokenizer import ImageTokenizer, NonFiniteError, Reconstruction
from vqlm.training import Budget, Learner


class TokenizerLearner(Learner):
    """losses: name → loss, summed; reset: re-initialises unused codes; adversary: a discriminator, or none;
    continuous: share of the run for which the latent passes unquantized, before the codes are put in ("continuous
    first, discrete later", arXiv 2605.06870); others as in `vqlm.training.Learner`.
    """

    model: ImageTokenizer

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        losses: dict[str, Loss],
        reset: CodebookReset | NoReset,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
        budget: Budget,
        adversary: NoAdversary | None = None,
        continuous: float = 0.0,
        average: float | None = None,
        clip: float = 1.0,
        max_bad_batches: int = 10,
    ):
        if not losses:
            raise ValueError("losses is empty: a tokenizer needs at least a reconstruction loss")
        if not 0 <= continuous < 1:
            raise ValueError(f"continuous={continuous}: a share of the run from 0 to below 1")
        for term in losses.values():
            term.check(tokenizer)
        adversary = adversary or NoAdversary()
        adversary.check(tokenizer)
        companions: dict[str, nn.Module] = {
            name: term for name, term in losses.items() if isinstance(term, nn.Module)
        }
        super().__init__(
            channels_last(tokenizer), optimizer, budget, clip, max_bad_batches, average, companions
        )
        self.terms, self.reset, self.continuous = losses, reset, continuous
        self.adversary = adversary
        self._last: tuple[PictureBatch, Reconstruction] | None = None  # of the forward pass, for `after_step`
        self._buffers: dict[str, Tensor] = {}

    def check(self, shapes: Shapes) -> None:
        """ConfigError if a loss or the adversary cannot work with pictures of one of these (height, width)."""
        for part in (*self.terms.values(), self.adversary):
            part.check(self.model, shapes)

    def losses(self, batch: PictureBatch) -> tuple[dict[str, Tensor], dict[str, float]]:
        x_BCHW = batch.x_BCHW.contiguous(memory_format=torch.channels_last)
        batch = PictureBatch(x_BCHW, batch.ids, batch.captions)
        made = self._made(batch)
        self._last = batch, made
        losses = {name: term(batch, made) for name, term in self.terms.items()}
        others = torch.stack(list(losses.values())).sum()
        against, logs = self.adversary.loss(
            batch, made, others, self.model.decoder.last_weight, self.progress
        )
        return losses | against, logs

    def _made(self, batch: PictureBatch) -> Reconstruction:
        try:
            if self.progress < self.continuous:
                return self.model.autoencode(batch.x_BCHW)
            self.model.quantizer.anneal(self.progress)
            return self.model(batch.x_BCHW)
        except NonFiniteError as error:
            named = ", ".join(batch.ids[row] for row in error.rows)
            raise ArithmeticError(f"{error.what}: {named}; no codebook was touched") from error

    def before_step(self) -> None:
        """Codebooks learn by averages inside the forward pass: remember them, a loss may turn out not to be finite."""
        self._buffers = {name: buffer.clone() for name, buffer in self.model.quantizer.named_buffers()}

    def undo_step(self) -> None:
        for name, buffer in self.model.quantizer.named_buffers():
            buffer.copy_(self._buffers[name])
        self._last = None

    def after_step(self) -> dict[str, float]:
        assert self._last is not None
        (batch, made), self._last = self._last, None
        logs = self.adversary.step(batch, made, self.progress, self.rate)
        if made.quantized.codes_BhwQ is None or not isinstance(self.model.quantizer, CodebookQuantizer):
            return logs
        z = made.z_BDhw.detach()
        replaced = self.reset.observe(
            self.model.quantizer, z, made.quantized.codes_BhwQ, self.progress, self.optimizer
        )
        self._follow_resets(replaced)
        return logs | {f"replaced_{book}": float(count) for book, count in enumerate(replaced)}

    @torch.no_grad()
    def _follow_resets(self, replaced: list[int]) -> None:
        """Codebooks of the averaged model become the live ones: an average of an old code and a new one is neither."""
        if any(replaced) and self.averaged is not None:
            kept: Any = self.averaged.module
            kept.quantizer.load_state_dict(self.model.quantizer.state_dict())

    @torch.no_grad()
    def finish(self, sets: list[PictureSet], batch_size: int) -> list[int]:
        """After training: see to it that every code is used on the training pictures. Unused ones per book."""
        model: Any = self.result.eval()
        if not isinstance(model.quantizer, CodebookQuantizer):
            return []
        # The layout that pictures are encoded in later: in another one latents differ by 1e-6, enough for two codes of
        # 65,536 to lose the one patch that they were given.
        model.to(memory_format=torch.contiguous_format)
        device = next(model.parameters()).device
        latents = [
            model.encoder(from_bytes(x).to(device)).float()
            for pictures in sets
            for x in pictures.x_NCHW.split(batch_size)
        ]
        return self.reset.finish(model.quantizer, latents)

    def extra_state(self) -> dict[str, Tensor]:
        state = {f"reset/{k}": v for k, v in self.reset.state_dict().items()}
        return state | {f"adversary/{k}": v for k, v in self.adversary.state().items()}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        for part, load in (("reset/", self.reset.load_state_dict), ("adversary/", self.adversary.load_state)):
            load({k.removeprefix(part): v for k, v in state.items() if k.startswith(part)})


def channels_last(tokenizer: ImageTokenizer) -> ImageTokenizer:
    """Convolution weights in the layout in which bf16 convolutions are fastest; values unchanged."""
    convert: Any = tokenizer.to  # torch's stub knows memory_format with other arguments alone
    return convert(memory_format=torch.channels_last)
