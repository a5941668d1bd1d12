"""Learned codebooks: plain VQ (depth 1) and residual VQ.

Codebooks live in the library's own buffers, so a state dict trained by either class below loads into the other.
Never replaces unused codes: that is `vq/codebook.py`'s job alone, the library's own replacement is off.

Legend: B batch, D latent width, h w grid, Q depth (codes per position), K codebook size, N = B·h·w vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vector_quantize_pytorch import ResidualVQ
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from vq.quantizers import CodebookQuantizer, Quantized, check_codes, check_latent
from vq.quantizers.nearest import nearest_codes
from vqlm.checkpoint import declared


@declared
class LibraryResidualQuantizer(CodebookQuantizer):
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
        self.rotation_trick, self.books = rotation_trick, depth
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
        check_latent(z_BDhw, self.dim)
        B, D, h, w = z_BDhw.shape
        with torch.autocast(z_BDhw.device.type, enabled=False):
            z_BND, codes_BNQ, loss = self.quantize(z_BDhw.float().permute(0, 2, 3, 1).reshape(B, h * w, D))
        z = z_BND.reshape(B, h, w, D).permute(0, 3, 1, 2)
        losses = {"commitment": loss} if self.training else {}
        return Quantized(z, codes_BNQ.reshape(B, h, w, self.depth), losses)

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

    terms = ("commitment",)

    def book_of(self, depth: int) -> int:
        return depth

    def codebook(self, book: int) -> Tensor:
        return self._book(book).embed[0]

    def _book(self, book: int) -> Any:
        """The library's codebook module: embed, embed_avg (1,K,D) and cluster_size (1,K)."""
        return self.vq.layers[book]._codebook

    def vectors(self, state_ND: Tensor, depth: int) -> Tensor:
        return state_ND

    def leave(self, state_ND: Tensor, depth: int, indices_N: Tensor) -> Tensor:
        return state_ND - self.codebook(self.book_of(depth))[indices_N]

    @torch.no_grad()
    def replace_codes(self, book: int, indices: Tensor, vectors: Tensor) -> None:
        """Codes `indices` (n) of one book become `vectors` (n,D), in all EMA buffers together.

        The count given is the average one: a smaller count would let the next EMA step move the code at once,
        and writing only the embedding would be undone by it.
        """
        stored = self._book(book)
        count = stored.cluster_size.mean().clamp(min=1.0)
        stored.embed[0, indices] = vectors
        stored.cluster_size[0, indices] = count
        stored.embed_avg[0, indices] = vectors * count


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
