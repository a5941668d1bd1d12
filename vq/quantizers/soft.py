"""Probabilities over all codes: how a gradient passes through a choice, and how sure and how even choices are.

Everything here takes (N,K) at once; `sample` bounds N where an estimate is enough. Knows no quantizer.

Legend: N vectors, D width, K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqlm.ranks import mean_over_ranks


def straight_through(probabilities_NK: Tensor, indices_N: Tensor, book_KD: Tensor) -> Tensor:
    """The chosen rows of the codebook (N,D), with the gradient of the probabilities behind them.

    Equals h·E with h = onehot(index) + p - sg[p], so that every code that p depends on receives a gradient, without the
    N×K matrix h: h·E = E[index] + (p·sg[E] - sg[p·E]).
    """
    expected_ND = probabilities_NK @ book_KD.detach()
    return book_KD[indices_N] + (expected_ND - expected_ND.detach())


def entropy_penalty(logits_NK: Tensor, gamma: float = 1.0) -> Tensor:
    """E[H(p)] - gamma · H(E[p]) in nats, p = softmax(logits): low when each choice is sure and all codes are chosen.

    Yu et al. 2023 (MAGVIT-v2, arXiv 2310.05737, eq. 4). E[p] is taken over all ranks, which must bring equally many
    rows for it to be the mean over all of them.
    """
    log_NK = logits_NK.log_softmax(-1)
    p_NK = log_NK.exp()
    mean_K = mean_over_ranks(p_NK.mean(0))
    unsure = -(p_NK * log_NK).sum(-1).mean()
    return unsure + gamma * torch.special.xlogy(mean_K, mean_K.clamp(min=1e-20)).sum()


def sample(x_ND: Tensor, count: int) -> Tensor:
    """At most `count` rows, drawn without replacement; all of them, in their order, where there are no more."""
    if len(x_ND) <= count:
        return x_ND
    return x_ND[torch.randperm(len(x_ND), device=x_ND.device)[:count]]
