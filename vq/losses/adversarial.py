"""A discriminator beside the tokenizer, and the null member: none.

What the tokenizer pays for being told apart, and how the discriminator learns from the same pictures. Both count
their own steps: a framework's step count means other things with two optimizers. Knows nothing of codes.

Legend: B batch, C H W picture, h w map of logits (one for each patch).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vq.backbones.conv import group_count
from vq.batches import PictureBatch
from vq.losses import Shapes, sides
from vq.tokenizer import ImageTokenizer, Reconstruction
from vqlm.errors import ConfigError

MOST_SKIPPED_IN_A_ROW = 10


class NoAdversary(nn.Module):
    """The null member: no discriminator. Also what the learner calls, in the order of a step."""

    def check(self, tokenizer: ImageTokenizer, shapes: Shapes = ()) -> None:
        """ConfigError if this cannot train such a tokenizer. Called before data is read."""

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
        """After the tokenizer's step: train the discriminator on the same pictures; numbers to log.

        rate: factor on the learning rate, 0..1.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""


class PatchDiscriminator(nn.Module):
    """Pictures (B,3,H,W) → logits (B,h,w), one for each of many overlapping patches: high means "real".

    The PatchGAN of pix2pix (Isola et al. 2017, arXiv 1611.07004, appendix 6.1.2) that VQGAN took over: `layers`
    4x4 convolutions of stride 2, one of stride 1, one to a logit; widths `channels`, doubled up to 8 times; leaky
    ReLU 0.2; weights from N(0, 0.02). A logit sees 16, 34, 70, 142 px for 1, 2, 3, 4 layers. What differs: group
    instead of batch normalization, so that a logit depends on its own picture alone, real and made pictures may
    share a batch, and there are no averages that a step of the tokenizer would change.
    """

    def __init__(self, channels: int = 64, layers: int = 3):
        super().__init__()
        if channels < 1 or not 1 <= layers <= 6:
            raise ValueError(f"channels={channels} must be at least 1 and layers={layers} from 1 to 6")
        self.layers = layers
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for index, (narrow, wide) in enumerate(pairwise(widths), start=1):
            parts += [
                nn.Conv2d(narrow, wide, 4, 2 if index < layers else 1, 1, bias=False),
                nn.GroupNorm(group_count(wide), wide),
                nn.LeakyReLU(0.2),
            ]
        self.patches = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for part in self.patches:
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0.0, 0.02)

    @property
    def smallest(self) -> int:
        """The smallest side of a picture for which a logit is left."""
        return 3 * 2**self.layers

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits = self.patches(x_BCHW).squeeze(1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # a mean in bf16 has three digits


class Adversary(NoAdversary):
    """A discriminator that learns to tell pictures from reconstructions, while the tokenizer learns to pass.

    The tokenizer pays  weight · ramp · λ · (−mean D(x̂)),  the discriminator minimises the hinge loss plus
    lecam · LeCAM. λ balances the two sides at the decoder's last layer (Esser et al. 2021, arXiv 2012.09841, eq. 7;
    1e-4 and the clip as in their code):
    λ = clip(‖∇ others‖ / (‖∇ −mean D(x̂)‖ + 1e-4), lowest, highest), a constant for the step.

    start: share of the run after which the discriminator learns; before, nothing is paid or computed. ramp: share of
    the run over which the tokenizer's part then grows from 0 to 1: a jump ruins reconstructions (CompVis
    taming-transformers #44, #93). lowest, highest: bounds of λ; equal ones make it that constant. lecam: weight of
    the regularisation; decay: of its averages. clip: largest norm of the discriminator's gradient. optimizer:
    parameters → optimizer; its learning rate follows the tokenizer's schedule.
    A step of the discriminator that is not finite is skipped: nothing changes, `skipped` counts it; 10 in a row end
    the run. `steps` counts the others.
    """

    def __init__(
        self,
        discriminator: PatchDiscriminator,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
        weight: float = 0.5,
        start: float = 0.3,
        ramp: float = 0.2,
        lecam: float = 0.05,
        decay: float = 0.999,
        clip: float = 1.0,
        lowest: float = 0.0,
        highest: float = 1e4,
    ):
        super().__init__()
        if weight <= 0 or clip <= 0 or lecam < 0:
            raise ValueError(
                f"weight={weight}, clip={clip} must be positive, lecam={lecam} not negative; "
                "to train without a discriminator, choose adversary=none"
            )
        if not 0 <= start < 1 or not 0 <= ramp <= 1 - start:
            raise ValueError(
                f"start={start} is a share of the run from 0 to below 1, ramp={ramp} one from 0 to 1 - start"
            )
        if not 0 <= decay < 1 or not 0 <= lowest <= highest or highest == 0:
            raise ValueError(
                f"decay={decay} must lie in [0, 1), lowest={lowest} in [0, highest={highest}], highest be positive"
            )
        self.discriminator, self.optimizer = discriminator, optimizer(discriminator.parameters())
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.weight, self.start, self.ramp, self.clip = weight, start, ramp, clip
        self.lecam, self.decay, self.lowest, self.highest = lecam, decay, lowest, highest
        self.averages_2: Tensor | None = None  # mean logit of real pictures, of reconstructions
        self.steps = 0
        self.skipped = 0
        self.skipped_in_a_row = 0

    def check(self, tokenizer: ImageTokenizer, shapes: Shapes = ()) -> None:
        smallest, layers = self.discriminator.smallest, self.discriminator.layers
        side = sides(tokenizer, shapes)[0]
        if side < smallest:
            raise ConfigError(
                f"adversary.discriminator.layers={layers} needs sides of at least {smallest} px, pictures "
                f"have {side} px: take fewer layers (smallest side: 3·2^layers)"
            )

    def share(self, progress: float) -> float:
        """How much of its part the tokenizer pays: 0 up to `start`, then rising to 1 within `ramp`."""
        if progress < self.start:
            return 0.0
        return min(1.0, (progress - self.start) / self.ramp) if self.ramp else 1.0

    def loss(
        self,
        batch: PictureBatch,
        made: Reconstruction,
        others: Tensor,
        last_weight: nn.Parameter,
        progress: float,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        share = self.share(progress)
        if not share:
            return {}, {}
        self.discriminator.requires_grad_(False)  # its own gradients are no part of the tokenizer's step
        against = -self.discriminator(made.x_BCHW).mean()
        self.discriminator.requires_grad_(True)
        if not against.requires_grad:  # without gradients there is no λ, and nobody to pay
            return {}, {"adversary_generator": float(against)}
        balance = self._balance(others, against, last_weight)
        logs = {"adversary_generator": float(against.detach()), "adversary_balance": float(balance)}
        return {"adversary": self.weight * share * balance * against}, logs

    def _balance(self, others: Tensor, against: Tensor, last_weight: nn.Parameter) -> Tensor:
        if self.lowest == self.highest:
            return others.new_tensor(self.lowest)
        ours = gradient_norm(others, last_weight)
        theirs = gradient_norm(against, last_weight)
        return (ours / (theirs + 1e-4)).clamp(self.lowest, self.highest)

    def step(
        self, batch: PictureBatch, made: Reconstruction, progress: float, rate: float
    ) -> dict[str, float]:
        if progress < self.start:
            return {}
        with torch.enable_grad():
            both = torch.cat([batch.x_BCHW, made.x_BCHW.detach().to(batch.x_BCHW.dtype)])
            real, fake = self.discriminator(both).chunk(2)
            means_2 = torch.stack([real.mean(), fake.mean()]).detach()
            averages_2 = means_2 if self.averages_2 is None else self.averages_2.to(means_2.device)
            loss = hinge(real, fake) + self.lecam * lecam(real, fake, averages_2)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.clip)
        if not torch.isfinite(loss.detach() + norm):
            return self._skip(float(loss.detach()), float(norm))
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averages_2 = self.decay * averages_2 + (1 - self.decay) * means_2
        self.steps += 1
        self.skipped_in_a_row = 0
        return {
            "adversary_discriminator": float(loss.detach()),
            "adversary_real": float(means_2[0]),
            "adversary_fake": float(means_2[1]),
        }

    def _skip(self, loss: float, norm: float) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self.skipped_in_a_row += 1
        told = f"loss {loss}, gradient norm {norm}"
        warnings.warn(f"a step of the discriminator was skipped, nothing changed: {told}", stacklevel=2)
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps of the discriminator in a row were not finite (last: {told}). "
                "Lower its learning rate. Checkpoints that were saved before are intact."
            )
        return {"adversary_skipped": float(self.skipped)}

    def state(self) -> dict[str, Tensor]:
        state = {f"discriminator/{k}": v for k, v in self.discriminator.state_dict().items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{index}/{k}": torch.as_tensor(v) for k, v in entries.items()}
        if self.averages_2 is not None:
            state["averages"] = self.averages_2
        return state | {"counters": torch.tensor([self.steps, self.skipped, self.skipped_in_a_row])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        weights, moments = {}, {}
        for key, tensor in state.items():
            part, _, name = key.partition("/")
            if part == "discriminator":
                weights[name] = tensor
            elif part == "optimizer":
                index, _, entry = name.partition("/")
                moments.setdefault(int(index), {})[entry] = tensor
        self.discriminator.load_state_dict(weights)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.averages_2 = state["averages"].clone() if "averages" in state else None
        self.steps, self.skipped, self.skipped_in_a_row = state["counters"].tolist()


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """½ · (mean relu(1 − D(x)) + mean relu(1 + D(x̂))), the discriminator's loss (Lim & Ye 2017, arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def lecam(real: Tensor, fake: Tensor, averages_2: Tensor) -> Tensor:
    """mean relu(D(x) − average of fake)² + mean relu(average of real − D(x̂))²: keeps the two sides near each other.

    Tseng et al. 2021 (arXiv 2104.03310), one-sided as in their code. averages_2: of real, of fake logits.
    """
    return F.relu(real - averages_2[1]).square().mean() + F.relu(averages_2[0] - fake).square().mean()


def gradient_norm(loss: Tensor, weight: nn.Parameter) -> Tensor:
    """‖∂loss/∂weight‖, detached; the graph stays. 0 where the loss does not depend on the weight."""
    if not loss.requires_grad:
        return loss.new_zeros(())
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True, allow_unused=True)
    return loss.new_zeros(()) if gradient is None else gradient.detach().norm()
