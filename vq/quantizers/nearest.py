"""The nearest code of each vector: the hot spot of every learned codebook.

Legend: N vectors, D width, K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 16 * 2**20  # of the (rows, K) distance buffer: stays near the cache, far below N×K
GROUP = 64  # width of the first stage


@torch.no_grad()
def nearest_codes(x_ND: Tensor, book_KD: Tensor) -> Tensor:
    """Index (N) of the Euclidean-nearest row of the codebook for each vector; ties go to the lowest index.

    Distances are fp32 sums: vectors a hundred times farther from zero than from each other are told apart badly.

    ‖x-e‖² = ‖x‖² - 2x·e + ‖e‖², of which the first term does not matter. One buffer of at most `CHUNK_BYTES` serves
    all chunks. torch's CPU `argmin` reads about 10 GB/s and `amin` about ten times that, so the minimum of each
    group of `GROUP` codes is taken first, and `argmin` sees only the group minima and then one group.
    """
    N, K = len(x_ND), len(book_KD)
    rows = max(1, min(N, CHUNK_BYTES // (4 * K)))
    group = GROUP if K % GROUP == 0 else K
    bias, transposed = book_KD.square().sum(1), book_KD.T.contiguous()
    buffer = x_ND.new_empty(rows, K)
    indices = torch.empty(N, dtype=torch.int64, device=x_ND.device)
    for start in range(0, N, rows):
        x = x_ND[start : start + rows]
        distances = torch.addmm(bias, x, transposed, alpha=-2, out=buffer[: len(x)]).view(
            len(x), K // group, group
        )
        best_group = distances.amin(2).argmin(1)
        within = distances[torch.arange(len(x), device=x.device), best_group].argmin(1)
        indices[start : start + rows] = best_group * group + within
    return indices
