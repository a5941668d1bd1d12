"""What the codes of a book are compared with, and draws from it. Knows nothing of when or why codes are replaced.

Legend: D latent width, D' width of a book, K codebook size, N vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vq.quantizers import CodebookQuantizer
from vq.quantizers.nearest import nearest_codes

MOST_ROWS = 2**18  # positions looked at for one replacement
SAME = 1e-5  # of the mean squared length: vectors whose squared error is below it are codes already


@dataclass
class Seen:
    """One book and the vectors that its depths were given, of all ranks."""

    book_KD: Tensor
    vectors_ND: Tensor
    chosen_N: Tensor
    errors_N: Tensor  # squared distance to the chosen code
    counts_K: Tensor  # uses in the window
    shares_K: Tensor  # average share of all uses, over a longer time; sums to at most 1

    @property
    def worth_N(self) -> Tensor:
        return worth(self.vectors_ND, self.errors_N)


def worth(x_ND: Tensor, errors_N: Tensor) -> Tensor:
    """The errors, 0 where a vector is a code already (up to rounding): to draw it would gain nothing."""
    return errors_N * (errors_N > SAME * x_ND.square().sum(1).mean())


def depths_of(quantizer: CodebookQuantizer, state_ND: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Each depth in its turn: depth, vectors (N,D'), chosen codes (N), squared errors (N)."""
    for depth in range(quantizer.depth):
        x_ND, book_KD = quantizer.vectors(state_ND, depth), quantizer.codebook(quantizer.book_of(depth))
        chosen_N = nearest_codes(x_ND, book_KD)
        yield depth, x_ND, chosen_N, squared_errors(x_ND, book_KD, chosen_N)
        state_ND = quantizer.leave(state_ND, depth, chosen_N)


def squared_errors(x_ND: Tensor, book_KD: Tensor, chosen_N: Tensor) -> Tensor:
    return (x_ND - book_KD[chosen_N]).square().sum(1)


def see(
    quantizer: CodebookQuantizer, state_ND: Tensor, book: int, counts_K: Tensor, shares_K: Tensor
) -> Seen:
    """All depths that read the book, below each other."""
    last = max(d for d in range(quantizer.depth) if quantizer.book_of(d) == book)
    found = []
    for depth, *parts in depths_of(quantizer, state_ND):
        if quantizer.book_of(depth) == book:
            found.append(parts)
        if depth == last:
            break
    x_ND, chosen_N, errors_N = (torch.cat(part) for part in zip(*found, strict=True))
    return Seen(quantizer.codebook(book), x_ND, chosen_N, errors_N, counts_K, shares_K)


def thinned(x_ND: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spread."""
    return x_ND[:: -(-len(x_ND) // most)] if len(x_ND) > most else x_ND


def generator(seed: int, batch: int) -> torch.Generator:
    """Of the draws after one batch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + batch * 101) % 2**63)


def draw(x_ND: Tensor, weights_N: Tensor, wanted: int, random: torch.Generator) -> Tensor:
    """Up to `wanted` vectors (n,D), no two equal, with probability in proportion to their weights; none of weight 0.

    The n largest of weight/Exp(1) are a weighted draw without replacement (Efraimidis and Spirakis 2006).
    """
    weights = weights_N.cpu().double()  # not every device has float64, nor equal generators
    keys = weights / torch.empty_like(weights).exponential_(generator=random)
    order = keys.argsort(descending=True)[: min(int((weights > 0).sum()), 4 * wanted)]
    rows = x_ND[order.to(x_ND.device)]
    return rows[new_rows(rows)][:wanted]


def new_rows(x_ND: Tensor) -> Tensor:
    """(N) bool: whether no earlier row equals this one."""
    bits_ND = (x_ND.cpu().float() + 0.0).contiguous().view(torch.int32).long()  # + 0.0: -0.0 equals 0.0
    # one number for each row, in integers that wrap: exact in any order of summation, unlike a product of floats
    odd_D = torch.randint(2**62, (x_ND.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    marks_N = (bits_ND * odd_D).sum(1)
    _, group_N = marks_N.unique(return_inverse=True)
    rows = torch.arange(len(x_ND))
    first = torch.full_like(rows, len(rows)).scatter_reduce_(0, group_N, rows, "amin")
    return (first[group_N] == rows).to(x_ND.device)
