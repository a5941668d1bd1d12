"""Logits → logits, and the draw: pure functions, masked entries (-inf) stay masked.

Legend: B rows, V ids.
"""

from __future__ import annotations

import torch
from torch import Tensor


def guide(conditional_BV: Tensor, unconditional_BV: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance u + s·(c - u) (Ho & Salimans 2022, arXiv 2207.12598). 1 = none, 0 = unconditional.

    Some papers write (1+s)·c - s·u: their s is ours minus 1.
    """
    if scale == 1:
        return conditional_BV
    guided = unconditional_BV + scale * (conditional_BV - unconditional_BV)
    return guided.masked_fill(conditional_BV == -torch.inf, -torch.inf)  # -inf minus -inf would be NaN


def temper(logits_BV: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature, up to a constant for each row; 0 leaves only the largest logit (greedy)."""
    if temperature == 0:
        best = logits_BV.argmax(-1, keepdim=True)
        return torch.full_like(logits_BV, -torch.inf).scatter(-1, best, 0.0)
    # the largest becomes 0 first, so that a tiny temperature cannot overflow
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature


def top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keep the k largest of each row (ties with the k-th too); 0 = all."""
    if k == 0 or k >= logits_BV.shape[-1]:
        return logits_BV
    least = logits_BV.topk(k, dim=-1).values[..., -1:]
    return logits_BV.masked_fill(logits_BV < least, -torch.inf)


def top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Nucleus (Holtzman et al. 2019, arXiv 1904.09751): the fewest ids whose probabilities reach p; 1 = all."""
    if p >= 1:
        return logits_BV
    ordered, index = logits_BV.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    keep = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before < p)
    return logits_BV.masked_fill(~keep, -torch.inf)


def draw(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """One id for each row (B), from softmax(logits)."""
    probabilities = logits_BV.float().softmax(-1)
    return torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(logits_BV.device)


def check_sampling(guidance: float, temperature: float, k: int, p: float) -> None:
    """ValueError on settings that no draw can be made with."""
    if not (temperature >= 0 and temperature < float("inf")):
        raise ValueError(f"temperature={temperature}: must be 0 (greedy) or a positive number")
    if k < 0:
        raise ValueError(f"top_k={k}: must be 0 (all) or positive")
    if not 0 < p <= 1:
        raise ValueError(f"top_p={p}: must lie in (0, 1]; 1 keeps all")
    if not (guidance >= 0 and guidance < float("inf")):
        raise ValueError(f"guidance={guidance}: must be 0 (unconditional), 1 (none) or more")
