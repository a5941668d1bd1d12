"""What an unused code becomes: a family. Each member is given what was seen and proposes new codes.

    BatchRandom    a vector, drawn evenly        ErrorWeighted   a vector, drawn the likelier the larger its error
    SplitMostUsed  a copy of a code in much use  ClosestAnchor   every code moves towards its nearest vector

Legend: D width of a book, K codebook size, N vectors, n replaced codes.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from vq.codebook.seen import Seen, draw, new_rows
from vq.quantizers.nearest import nearest_codes


class Policy:
    """What every policy offers. Draws come from `random` alone, so equal on every rank."""

    memory: float = 0.99  # decay, per batch, of the shares that it is given
    moves_all: bool = False  # whether it decides by itself which codes move

    def propose(self, seen: Seen, unused: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which codes (n), all of them in `unused` unless `moves_all`, become which vectors (n,D)."""
        raise NotImplementedError


class BatchRandom(Policy):
    """Vectors drawn evenly: codes come to lie as densely as the data (RQ-VAE, arXiv 2203.01941, and others)."""

    def propose(self, seen: Seen, unused: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = draw(seen.vectors_ND, (seen.worth_N > 0).float(), len(unused), random)
        return unused[: len(rows)], rows


class ErrorWeighted(Policy):
    """Vectors drawn in proportion to their squared error ** power; power 1 is k-means++ (Arthur, Vassilvitskii 2007).

    The larger the power, the more codes go to what is rare and badly drawn, and the less evenly codes are used.
    """

    def __init__(self, power: float = 0.5):
        if power < 0:
            raise ValueError(f"power={power}: must not be negative; 0 draws evenly")
        self.power = power

    def propose(self, seen: Seen, unused: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        weights_N = torch.where(seen.worth_N > 0, seen.worth_N**self.power, 0)
        rows = draw(seen.vectors_ND, weights_N, len(unused), random)
        return unused[: len(rows)], rows


class SplitMostUsed(Policy):
    """Copies of the most used codes plus noise (Linde, Buzo and Gray 1980). A copied code then counts half.

    noise: standard deviation as a share of that of the vectors that chose the code. A code whose vectors all equal
    it cannot be split.
    """

    def __init__(self, noise: float = 0.1):
        if noise <= 0:
            raise ValueError(f"noise={noise}: must be positive, a copy without noise is never chosen")
        self.noise = noise

    def propose(self, seen: Seen, unused: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        K, D = seen.book_KD.shape
        worth_K = seen.worth_N.new_zeros(K).index_add_(0, seen.chosen_N, seen.worth_N)
        uses_K = torch.bincount(seen.chosen_N, minlength=K)
        spread_K = (worth_K / uses_K.clamp(min=1) / D).sqrt()
        parents = most_used(seen.counts_K * (spread_K > 0), len(unused)).to(unused.device)
        noise = torch.randn(len(parents), D, generator=random).to(seen.book_KD)
        rows = seen.book_KD[parents] + self.noise * spread_K[parents, None] * noise
        return unused[: len(rows)], rows


def most_used(counts_K: Tensor, wanted: int) -> Tensor:
    """The code with the largest count, `wanted` times; each time its count is halved. Fewer if all counts are 0."""
    heap = [(-count, code) for code, count in enumerate(counts_K.tolist()) if count]
    heapq.heapify(heap)
    found = []
    while heap and len(found) < wanted:
        count, code = heap[0]
        found.append(code)
        heapq.heapreplace(heap, (count / 2, code))
    return torch.tensor(found, dtype=torch.int64)


class ClosestAnchor(Policy):
    """Every code moves towards its nearest vector, the farther the less it is used: CVQ (arXiv 2307.15139, eq. 4-6).

    e_k ← (1-α) e_k + α z, α = exp(-strength · K · p_k / (1-memory) - 0.001), p_k the average share of uses. Neither
    threshold nor cooldown matters. Where several codes share a nearest vector one takes it and the others take
    vectors drawn evenly, because equal codes would never part again.
    """

    moves_all = True

    def __init__(self, strength: float = 10.0, memory: float = 0.99):
        if strength <= 0 or not 0 < memory < 1:
            raise ValueError(f"strength={strength} must be positive and memory={memory} lie between 0 and 1")
        self.strength, self.memory = strength, memory

    def propose(self, seen: Seen, unused: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        scale = self.strength * len(seen.shares_K) / (1 - self.memory)
        alpha_K = torch.exp(-scale * seen.shares_K - 1e-3)
        moving = (alpha_K > 0.01).nonzero().flatten()  # what moves less is left as it is
        anchors_nD = seen.vectors_ND[nearest_codes(seen.book_KD[moving], seen.vectors_ND)]
        apart = new_rows(anchors_nD)
        others = draw(seen.vectors_ND, (seen.worth_N > 0).float(), int((~apart).sum()), random)
        anchors_nD[(~apart).nonzero().flatten()[: len(others)]] = others
        return moving, torch.lerp(seen.book_KD[moving], anchors_nD, alpha_K[moving, None])
