"""Latent ↔ codes: one adapter over vector-quantize-pytorch.

The library's classes speak several dialects (shapes, losses, dtypes); here they have one: a latent (B,D,h,w) goes
in, flattened to (B, h·w, D) for the library, and a `Quantized` comes out. Codebooks live in the library's own
buffers, so a state dict trained by either class below loads into the other. Knows nothing of pixels, and never
replaces unused codes: that is `vq/codebook.py`'s job alone, the library's own replacement is off.

Legend: B batch, D latent width, h w grid, Q depth (codes per position), K codebook size, N = B·h·w vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import ResidualVQ
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from vqlm.checkpoint import declared

CHUNK_BYTES = (
    16 * 2**20
)  # of the (rows, K) distance buffer: stays near the cache, far below the library's N×K
GROUP = 64  # width of the first stage of `nearest_codes`


@dataclass
class Quantized:
    """What a quantizer returns."""

    z_BDhw: Tensor  # quantized latent; gradients reach the encoder through it
    codes_BhwQ: Tensor | None  # int64 in [0, K); None from NoQuantizer
    loss: Tensor  # commitment loss, scalar


class Quantizer(nn.Module):
    """What every quantizer offers: `forward`, `lookup`, and the numbers that describe its codes."""

    dim: int  # D
    depth: int  # Q, 0 for a continuous tokenizer
    codebook_size: int  # K, 0 for a continuous tokenizer

    def forward(self, z_BDhw: Tensor) -> Quantized:
        raise NotImplementedError

    def lookup(self, codes_BhwQ: Tensor) -> Tensor:
        raise NotImplementedError


@declared
class LibraryResidualQuantizer(Quantizer):
    """Residual quantization (Lee et al. 2022, arXiv 2203.01941) by the library's own forward pass.

    depth Q = 1 is plain VQ with an EMA codebook (van den Oord et al. 2017, arXiv 1711.00937). `decay` is that of
    the EMA; `rotation_trick` chooses the gradient estimator (Fifty et al. 2024, arXiv 2410.06424; otherwise
    straight-through). As in the library each depth estimates its own gradient, so the encoder receives their sum.
    Kept as the reference that `ResidualQuantizer` is tested against and measured beside.
    """

    def __init__(
        self, dim: int, codebook_size: int, depth: int = 1, decay: float = 0.99, rotation_trick: bool = False
    ):
        super().__init__()
        if dim < 1 or depth < 1 or codebook_size < 2:
            raise ValueError(
                f"dim={dim}, depth={depth}, codebook_size={codebook_size}: need at least 1, 1 and 2"
            )
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay}: must lie between 0 and 1 (both excluded)")
        self.dim, self.depth, self.codebook_size, self.decay = dim, depth, codebook_size, decay
        self.rotation_trick = rotation_trick
        self.vq = ResidualVQ(
            dim=dim,
            num_quantizers=depth,
            codebook_size=codebook_size,
            decay=decay,
            commitment_weight=1.0,
            rotation_trick=rotation_trick,
            threshold_ema_dead_code=0,
            kmeans_init=False,
        )

    def forward(self, z_BDhw: Tensor) -> Quantized:
        B, D, h, w = z_BDhw.shape
        if self.dim != D:
            raise ValueError(f"latent has {D} channels, the quantizer was built for dim={self.dim}")
        with torch.autocast(z_BDhw.device.type, enabled=False):
            z_BND, codes_BNQ, loss = self.quantize(z_BDhw.float().permute(0, 2, 3, 1).reshape(B, h * w, D))
        z = z_BND.reshape(B, h, w, D).permute(0, 3, 1, 2)
        return Quantized(z, codes_BNQ.reshape(B, h, w, self.depth), loss)

    def quantize(self, z_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B,N,D) → quantized (B,N,D), codes (B,N,Q), commitment loss (mean over depths)."""
        z, codes, losses = self.vq(z_BND)
        return z, codes, losses.mean()

    def lookup(self, codes_BhwQ: Tensor) -> Tensor:
        """Codes (B,h,w,Q) in [0,K) → latent (B,D,h,w); ValueError outside (the library decodes -1 to zeros)."""
        check_codes(codes_BhwQ, self.depth, self.codebook_size)
        B, h, w, Q = codes_BhwQ.shape
        codes = codes_BhwQ.reshape(-1, Q).long()  # torch reads uint8 indices as a mask
        z = torch.stack([self.codebook(d)[codes[:, d]] for d in range(Q)]).sum(0)
        return z.reshape(B, h, w, self.dim).permute(0, 3, 1, 2)

    def codebook(self, depth: int) -> Tensor:
        """(K,D): the codebook of one depth, as a view of the library's buffer."""
        return self._book(depth).embed[0]

    def _book(self, depth: int) -> Any:
        """The library's codebook module of one depth: embed, embed_avg (1,K,D) and cluster_size (1,K)."""
        return self.vq.layers[depth]._codebook

    @torch.no_grad()
    def residuals(self, z_BDhw: Tensor) -> tuple[Tensor, Tensor]:
        """What each depth is given and what it leaves: residuals (Q,N,D) and squared errors (Q,N)."""
        residual = z_BDhw.float().permute(0, 2, 3, 1).reshape(-1, self.dim)
        given, errors = [], []
        for d in range(self.depth):
            given.append(residual)
            residual = residual - self.codebook(d)[nearest_codes(residual, self.codebook(d))]
            errors.append(residual.square().sum(1))
        return torch.stack(given), torch.stack(errors)

    @torch.no_grad()
    def replace_codes(self, depth: int, indices: Tensor, vectors: Tensor) -> None:
        """Codes `indices` (n) of one depth become `vectors` (n,D), in all EMA buffers together.

        The count given is the average one: a smaller count would let the next EMA step move the code at once,
        and writing only the embedding would be undone by it.
        """
        book = self._book(depth)
        count = book.cluster_size.mean().clamp(min=1.0)
        book.embed[0, indices] = vectors
        book.cluster_size[0, indices] = count
        book.embed_avg[0, indices] = vectors * count


@declared
class ResidualQuantizer(LibraryResidualQuantizer):
    """The same quantizer without the library's N×K matrices: equal codes, outputs, gradients, losses and buffers.

    The library builds distances, a one-hot matrix and two einsums over N×K. Here distances exist for one chunk of
    rows at a time, and counts and sums are taken by index. `benchmarks/quantizer.py` measures both.
    """

    def quantize(self, z_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        residual = z_BND.reshape(-1, self.dim)
        total = torch.zeros_like(residual)
        codes, losses = [], []
        for d in range(self.depth):
            book = self.codebook(d)
            indices = nearest_codes(residual.detach(), book)
            chosen = book[indices]
            if self.training:
                losses.append(F.mse_loss(chosen, residual))
                self._update_averages(d, residual.detach(), indices)
            passed = (
                self._pass_gradient(residual, chosen) if self.training and z_BND.requires_grad else chosen
            )
            residual = residual - passed.detach()
            total = total + passed
            codes.append(indices)
        loss = torch.stack(losses).mean() if losses else z_BND.new_zeros(())
        return total.reshape(z_BND.shape), torch.stack(codes, -1).reshape(*z_BND.shape[:-1], self.depth), loss

    def _pass_gradient(self, residual: Tensor, chosen: Tensor) -> Tensor:
        if self.rotation_trick:
            return rotate_to(residual, chosen)
        return residual + (chosen - residual).detach()

    @torch.no_grad()
    def _update_averages(self, depth: int, residual: Tensor, indices: Tensor) -> None:
        """EMA of counts and sums, then the codebook as their Laplace-smoothed ratio (1711.00937, appendix A.1)."""
        book = self._book(depth)
        counts = torch.bincount(indices, minlength=self.codebook_size).to(residual.dtype)
        sums = torch.zeros_like(book.embed_avg[0]).index_add_(0, indices, residual)
        book.cluster_size[0].lerp_(counts, 1 - self.decay)
        book.embed_avg[0].lerp_(sums, 1 - self.decay)
        book.update_ema()


@declared
class NoQuantizer(Quantizer):
    """The null member: the latent passes unchanged, there are no codes (a continuous autoencoder)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim, self.depth, self.codebook_size = dim, 0, 0

    def forward(self, z_BDhw: Tensor) -> Quantized:
        return Quantized(z_BDhw, None, z_BDhw.new_zeros(()))

    def lookup(self, codes_BhwQ: Tensor) -> Tensor:
        raise ValueError("a continuous tokenizer (NoQuantizer) has no codes to look up")


@torch.no_grad()
def nearest_codes(x_ND: Tensor, book_KD: Tensor) -> Tensor:
    """Index (N) of the Euclidean-nearest row of the codebook for each vector; ties go to the lowest index.

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


def check_codes(codes_BhwQ: Tensor, depth: int, codebook_size: int) -> None:
    """ValueError unless codes are integers of shape (B,h,w,depth) in [0, codebook_size)."""
    if codes_BhwQ.ndim != 4 or codes_BhwQ.shape[-1] != depth:
        raise ValueError(f"codes have shape {tuple(codes_BhwQ.shape)}; expected (B, h, w, {depth})")
    if codes_BhwQ.is_floating_point() or codes_BhwQ.is_complex() or codes_BhwQ.dtype == torch.bool:
        raise ValueError(f"codes are {codes_BhwQ.dtype}; expected integers")
    if codes_BhwQ.numel() and not 0 <= int(codes_BhwQ.min()) <= int(codes_BhwQ.max()) < codebook_size:
        low, high = int(codes_BhwQ.min()), int(codes_BhwQ.max())
        raise ValueError(f"codes lie in [{low}, {high}]; this codebook has codes 0..{codebook_size - 1}")
