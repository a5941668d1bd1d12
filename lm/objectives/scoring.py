"""Cross-entropy sums in bounded memory: what a set of positions pays for the ids that follow them.

Logits are N times V numbers. Where that is more than a limit, they are made for some rows at a time, and again in the
backward pass, so that only one part of them exists at once: one matrix product in four more, memory for one part
(and for a second gradient of the output rows while it is added up). `Competition` reads what is there once forward and
once backward. Knows neither models nor modalities.

Legend: N positions, C feature width, V ids that compete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from vqlm.ranks import rank_count, sum_over_ranks

LIMIT = 2**26  # logits that exist at once: 256 MB in fp32
BLOCK = 2**18  # logits that a CPU works on at once: 1 MB in fp32, which stays in its cache
SAMPLE = 64  # rows of a part from which the entropy is estimated: all of them would cost another pass over the logits

Logits = Callable[[Tensor], Tensor]
"""(n,C) → (n,V), in the model's own precision."""
Soften = Callable[[Tensor], Tensor]
"""Target ids (n) → target distributions (n,V)."""


@dataclass
class ModalityLoss:
    """Sums over the tokens of one modality; natural logarithm."""

    nll: Tensor  # Σ -log p of the ids that follow
    z: Tensor  # Σ (log Z)²
    count: int
    entropy: Tensor | float = (
        0.0  # Σ of the entropies of the predicted distributions, estimated from some rows
    )
    soft: Tensor | None = None  # Σ of cross-entropies against target distributions, where there are such

    @property
    def mean(self) -> Tensor:
        return self.nll / max(self.count, 1)

    def __add__(self, other: ModalityLoss) -> ModalityLoss:
        soft = None if self.soft is None and other.soft is None else self.aim + other.aim
        entropy = self.entropy + other.entropy
        return ModalityLoss(self.nll + other.nll, self.z + other.z, self.count + other.count, entropy, soft)

    @property
    def aim(self) -> Tensor:
        """The sum that training lowers."""
        return self.nll if self.soft is None else self.soft


def nothing(like: Tensor) -> ModalityLoss:
    """The sums over no token."""
    return ModalityLoss(like.new_zeros(()), like.new_zeros(()), 0)


def to_bits(loss: ModalityLoss) -> float:
    return float(loss.mean.detach()) / math.log(2)


def cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, soft_NV: Tensor | None = None, allowed_V: Tensor | None = None
) -> ModalityLoss:
    """Summed over N. allowed_V: True for the ids that compete; None: all of them do. soft_NV: 0 where one does not."""
    log_z_N, chosen_N = Competition.apply(logits_NV, targets_N, allowed_V)  # type: ignore[misc]
    soft = None if soft_NV is None else (log_z_N - (soft_NV * wide(logits_NV)).sum(-1)).sum()
    nll, z = (log_z_N - chosen_N).sum(), log_z_N.square().sum()
    return ModalityLoss(nll, z, len(targets_N), _entropy(logits_NV, allowed_V), soft)


class Competition(torch.autograd.Function):
    """logits (N,V), targets (N), allowed (V) or None → log Z (N) over the allowed ids, logits of the targets (N).

    Sums are taken in fp32 (fp64 of fp64), whatever the logits are; on a CPU in blocks that stay in its cache, on a GPU
    in one copy. On a CPU `logsumexp`, `gather` and the masks of plain autograd pass some ten times over N·V numbers in
    memory, and took a fifth of a training step. ∂ log Z / ∂ logit is the id's share, softmax.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, allowed_V: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        log_z_N = torch.cat([part_nV.logsumexp(-1) for part_nV in _blocks(logits_NV, allowed_V)])
        chosen_N = wide(logits_NV.gather(-1, targets_N[:, None])[:, 0])
        if allowed_V is not None:
            chosen_N = chosen_N.masked_fill(~allowed_V[targets_N], -torch.inf)
        ctx.save_for_backward(logits_NV, targets_N, allowed_V, log_z_N)
        return log_z_N, chosen_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_log_z_N: Tensor, to_chosen_N: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, targets_N, allowed_V, log_z_N = ctx.saved_tensors
        gradient_NV, done = torch.empty_like(logits_NV), 0
        for part_nV in _blocks(logits_NV, allowed_V):
            rows = slice(done, done := done + len(part_nV))
            share_nV = part_nV.sub_(log_z_N[rows, None]).exp_().mul_(to_log_z_N[rows, None])
            if allowed_V is not None:  # a target that may not stand has an infinite loss, and no slope
                to_chosen_N = to_chosen_N.masked_fill(~allowed_V[targets_N], 0.0)
            share_nV.scatter_add_(-1, targets_N[rows, None], to_chosen_N[rows, None])
            gradient_NV[rows] = share_nV
        return gradient_NV, None, None


def _blocks(logits_NV: Tensor, allowed_V: Tensor | None) -> Iterator[Tensor]:
    """Copies (n,V) of all rows, wide enough to be summed, -inf where an id is not allowed; some at a time on a CPU."""
    rows = max(1, BLOCK // logits_NV.shape[1]) if logits_NV.device.type == "cpu" else max(1, len(logits_NV))
    for part_nV in logits_NV.split(rows):
        copy_nV = part_nV.to(_wide(part_nV), copy=True)
        yield copy_nV if allowed_V is None else copy_nV.masked_fill_(~allowed_V, -torch.inf)


def wide(x: Tensor) -> Tensor:
    return x.to(_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.no_grad()
def _entropy(logits_NV: Tensor, allowed_V: Tensor | None) -> Tensor:
    """Σ over N of the entropies, from at most `SAMPLE` rows evenly apart."""
    some_nV = wide(logits_NV.detach()[:: max(1, math.ceil(len(logits_NV) / SAMPLE))])
    if allowed_V is not None:
        some_nV = some_nV.masked_fill(~allowed_V, -torch.inf)
    log_p_nV = some_nV.log_softmax(-1)
    terms_nV = log_p_nV.exp() * log_p_nV.clamp(min=torch.finfo(log_p_nV.dtype).min)  # 0 · -inf is 0 here
    return -terms_nV.sum() * (len(logits_NV) / max(len(some_nV), 1))


def score(
    feature_NC: Tensor,
    targets_N: Tensor,
    logits: Logits,
    width: int,
    soften: Soften | None = None,
    allowed_V: Tensor | None = None,
    limit: int = LIMIT,
) -> ModalityLoss:
    """Sums over N positions whose logits are `logits(feature)`.

    targets_N: numbers within V = `width` ids. allowed_V: which of these compete, if not all. limit: logits that may
    exist at once.
    """
    rows = max(1, limit // width)
    parts = [
        _part(feature_nC, targets_n, logits, soften, allowed_V, len(feature_NC) > rows)
        for feature_nC, targets_n in zip(feature_NC.split(rows), targets_N.split(rows), strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _part(
    feature_nC: Tensor,
    targets_n: Tensor,
    logits: Logits,
    soften: Soften | None,
    allowed_V: Tensor | None,
    again: bool,
) -> ModalityLoss:
    """again: make the logits once more in the backward pass, instead of keeping them."""

    def sums(feature_nC: Tensor) -> tuple[Tensor, Tensor, Tensor | float, Tensor | None]:
        soft_nV = None if soften is None else soften(targets_n)
        made = cross_entropy(logits(feature_nC), targets_n, soft_nV, allowed_V)
        return made.nll, made.z, made.entropy, made.soft

    if again and torch.is_grad_enabled():
        found = checkpoint(sums, feature_nC, use_reentrant=False, preserve_rng_state=False)
        nll, z, entropy, soft = found  # type: ignore[misc]
    else:
        nll, z, entropy, soft = sums(feature_nC)
    return ModalityLoss(nll, z, len(targets_n), entropy, soft)


@dataclass
class Weights:
    """text, image: weights of the mean losses of the modalities; z: of the mean (log Z)² (Chameleon, §2.3)."""

    text: float
    image: float
    z: float

    def __post_init__(self) -> None:
        if self.text < 0 or self.image < 0 or self.z < 0 or self.text + self.image == 0:
            raise ValueError(
                f"text={self.text}, image={self.image}, z={self.z}: weights must not be negative, "
                "text or image positive"
            )

    def weigh(self, text: ModalityLoss, image: ModalityLoss) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Sums of this rank → weighted losses by name, and numbers of all ranks: bits and entropy per token, log_z.

        log_z: root mean square of log Z over the tokens, what the z-loss holds down. It is log V where V ids compete
        and all logits are 0, and grows with them.

        Several ranks hold one batch together, and gradients are averaged over them. A mean is therefore the rank's own
        sum times the number of ranks, over the tokens of *all* ranks: the average is then the gradient of one process
        that holds the whole batch, however unequally its tokens lie. A modality that is absent costs 0.
        """
        parts = {"text": text, "image": image}
        whole = {name: _over_ranks(part) for name, part in parts.items()}
        share = {name: rank_count() / max(float(sums[0]), 1.0) for name, sums in whole.items()}
        z = text.z * share["text"] + image.z * share["image"]
        total = {name: getattr(self, name) * part.aim * share[name] for name, part in parts.items()}
        total["z"] = self.z * z
        logs = {}
        for name, (count, nll, entropy, squares) in whole.items():
            if count:
                logs[f"{name}_bits"] = float(nll / count) / math.log(2)
                logs[f"{name}_entropy"] = float(entropy / count) / math.log(2)
                logs[f"{name}_log_z"] = math.sqrt(float(squares / count))
        return {k: v for k, v in total.items() if getattr(self, k)}, logs


def _over_ranks(part: ModalityLoss) -> Tensor:
    """(count, Σ -log p, Σ entropy, Σ (log Z)²) of all ranks."""
    own = [float(part.count), part.nll.detach(), part.entropy, part.z.detach()]
    return sum_over_ranks(
        torch.stack([torch.as_tensor(v, device=part.nll.device).float() for v in own])
    ).cpu()
