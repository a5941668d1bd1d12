"""Logits → logits, and the draw: pure functions, masked entries (-inf) stay masked.

Legend: B rows, V ids.
"""

from __future__ import annotations

import torch
from torch import Tensor


def guide(conditional_BV: Tensor, unconditional_BV: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance u + s·(c - u) (Ho & Salimans 2022, arXiv 2207.12598). 1 = none, 0 = unconditional.

    Some papers write (1+s)·c - s·u: their s is ours minus 1. scale: a number, or (B,1).
    """
    if isinstance(scale, int | float) and scale == 1:
        return conditional_BV
    guided = unconditional_BV + scale * (conditional_BV - unconditional_BV)
    return guided.masked_fill(conditional_BV == -torch.inf, -torch.inf)  # -inf minus -inf would be NaN


def guide_edit(
    full_BV: Tensor,
    image_BV: Tensor,
    unconditional_BV: Tensor,
    scale: float | Tensor,
    image_scale: float | Tensor,
) -> Tensor:
    """Guidance of an edit u + s_i·(i - u) + s·(f - i), as Chameleon's and InstructPix2Pix's (arXiv 2211.09800, eq. 3).

    full: picture and instruction are given; image: the picture alone; unconditional: neither.
    """
    guided = unconditional_BV + image_scale * (image_BV - unconditional_BV) + scale * (full_BV - image_BV)
    return guided.masked_fill(full_BV == -torch.inf, -torch.inf)


def guide_projected(
    conditional_BV: Tensor,
    unconditional_BV: Tensor,
    scale: float | Tensor,
    parallel: float = 0.0,
    norm: float = 0.0,
) -> Tensor:
    """Adaptive projected guidance c + (s - 1)·(d⊥ + parallel·d∥) (Sadat et al. 2024, arXiv 2410.02416, §4), d = c - u.

    d∥ is the part of d along c, the one that saturates. Made for pictures, not for logits, so: both rows are centred
    over the ids that are not masked (a softmax does not feel a constant, a projection would); d is shortened to
    norm·√V (0: not at all); the momentum has no meaning from one position to the next and is left out. parallel = 1
    and norm = 0 is `guide`, scale 1 none.
    """
    legal_BV = conditional_BV != -torch.inf
    c, u = _centred(conditional_BV, legal_BV), _centred(unconditional_BV, legal_BV)
    difference = c - u
    if norm:
        longest = norm * legal_BV.sum(-1, keepdim=True).double().sqrt()
        length = difference.norm(dim=-1, keepdim=True)
        difference = difference * (longest / length.clamp(min=1e-12)).clamp(max=1)
    along = (difference * c).sum(-1, keepdim=True) / c.square().sum(-1, keepdim=True).clamp(min=1e-12) * c
    guided = c + (scale - 1) * (difference - along + parallel * along)
    return guided.masked_fill(~legal_BV, -torch.inf).to(conditional_BV.dtype)


def _centred(logits_BV: Tensor, legal_BV: Tensor) -> Tensor:
    """float64, mean 0 over the legal ids of a row, 0 elsewhere."""
    x = logits_BV.double().masked_fill(~legal_BV, 0.0)
    return (x - x.sum(-1, keepdim=True) / legal_BV.sum(-1, keepdim=True)).masked_fill(~legal_BV, 0.0)


def temper(logits_BV: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature, up to a constant for each row; 0 leaves only the largest logit (greedy)."""
    if temperature == 0:
        best = logits_BV.argmax(-1, keepdim=True)
        return torch.full_like(logits_BV, -torch.inf).scatter(-1, best, 0.0)
    # the largest becomes 0 first, and stays 0 however small the temperature is
    lowered_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).double()
    return (lowered_BV / max(temperature, 1e-30)).to(logits_BV.dtype)


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
    before[..., 0] = -1.0  # the likeliest one is always kept
    keep = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before < p)
    return logits_BV.masked_fill(~keep, -torch.inf)


def min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep ids at least p times as likely as the likeliest one (Nguyen et al. 2024, arXiv 2407.01082); 0 = all."""
    if p == 0:
        return logits_BV
    least = logits_BV.amax(-1, keepdim=True) + torch.log(torch.tensor(p))
    return logits_BV.masked_fill(logits_BV < least, -torch.inf)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One id for each row (B) from softmax(logits), by a number in [0, 1) for each: where the sum of probabilities
    passes it. A masked id has no probability and is never drawn.
    """
    cumulated_BV = logits_BV.softmax(-1, dtype=torch.float64).cumsum(-1)
    total_B1 = cumulated_BV[:, -1:].contiguous()
    at_B1 = uniform_B.to(cumulated_BV)[:, None] * total_B1
    found_B1 = torch.searchsorted(cumulated_BV, at_B1, right=True)
    last_B1 = torch.searchsorted(cumulated_BV, total_B1)  # rounding may end at the very last number
    return torch.minimum(found_B1, last_B1)[:, 0]
