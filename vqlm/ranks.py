"""Several processes of one run (torch.distributed): sums and rows of all ranks. Alone, everything passes unchanged."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def rank_count() -> int:
    """Processes of this run; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's tensor (any shape, equal on all ranks), on each rank; `x` itself is left alone."""
    if rank_count() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of every rank's tensor, for a term of a loss that all ranks compute from it.

    The gradient is that of the rank's own `x`, as if it were the mean: once gradients are averaged over ranks, as in
    data-parallel training, that is the gradient of the term over everything that the ranks hold together.
    """
    if rank_count() == 1:
        return x
    return x + (sum_over_ranks(x.detach()) / rank_count() - x.detach())


def rows_of_ranks(x_ND: Tensor) -> Tensor:
    """Every rank's rows below each other, in the order of ranks; ranks may bring unequal numbers of rows."""
    if rank_count() == 1:
        return x_ND
    count = torch.tensor([len(x_ND)], device=x_ND.device)
    counts = [torch.zeros_like(count) for _ in range(rank_count())]
    dist.all_gather(counts, count)
    longest = max(int(n) for n in counts)
    padded = torch.cat([x_ND, x_ND.new_zeros(longest - len(x_ND), *x_ND.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(rank_count())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])
