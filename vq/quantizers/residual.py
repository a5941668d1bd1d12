"""Learned codebooks: plain VQ (depth 1) and residual VQ; Euclidean or cosine, learned by averages or by gradient.

    class                       codes are compared     codebooks learn by
    ResidualQuantizer           as they are            averages (EMA)
    CosineQuantizer             by direction           averages (EMA)
    GradientQuantizer           as they are            gradient, of the loss "codebook"
    CosineGradientQuantizer     by direction           gradient, of the loss "codebook"
    LibraryResidualQuantizer    as ResidualQuantizer, by the library's own forward pass: the reference

Averaged codebooks live in the library's own buffers, so a state dict trained by ResidualQuantizer loads into
LibraryResidualQuantizer. Never replaces unused codes: that is `vq/codebook/`'s job alone.

Legend: B batch, D latent width, h w grid, Q depth (codes per position), K codebook size, N = B·h·w vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import ResidualVQ
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from vq.quantizers import (
    CodebookQuantizer,
    Quantized,
    check_codes,
    check_latent,
    check_sizes,
    to_grid,
    to_rows,
)
from vq.quantizers.nearest import nearest_codes
from vqlm.checkpoint import declared
from vqlm.ranks import sum_over_ranks


class LearnedQuantizer(CodebookQuantizer):
    """The walk over depths, which all learned codebooks share (residual: Lee et al. 2022, arXiv 2203.01941).

    rotation_trick: the gradient estimator of Fifty et al. 2024 (arXiv 2410.06424); otherwise straight-through. Each
    depth estimates its own gradient, as in the library, so the encoder receives their sum.
    shared: one codebook for all depths. least_depth: while training, each batch keeps a random number of depths, from
    this one to all, each as likely (quantizer dropout: Zeghidour et al. 2021, arXiv 2107.03312, section III.C); the
    others are neither trained nor counted, and the first depths learn to do alone. null keeps all.
    """

    terms = ("commitment",)

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        depth: int,
        rotation_trick: bool = False,
        shared: bool = False,
        least_depth: int | None = None,
    ):
        super().__init__()
        check_sizes(dim, codebook_size, depth)
        if least_depth is not None and not 1 <= least_depth <= depth:
            raise ValueError(
                f"least_depth={least_depth}: from 1 to depth={depth}, or null to keep all depths"
            )
        self.dim, self.codebook_size, self.depth = dim, codebook_size, depth
        self.rotation_trick, self.shared, self.least_depth = rotation_trick, shared, least_depth
        self.books = 1 if shared else depth

    def forward(self, z_BDhw: Tensor) -> Quantized:
        check_latent(z_BDhw, self.dim)
        B, _, h, w = z_BDhw.shape
        with torch.autocast(z_BDhw.device.type, enabled=False):
            z_ND, codes_NQ, losses = self.quantize(self.start(z_BDhw))
        codes_BhwQ = codes_NQ.reshape(B, h, w, codes_NQ.shape[1])
        return Quantized(to_grid(z_ND, z_BDhw), codes_BhwQ, losses if self.training else {})

    def lookup(self, codes_BhwQ: Tensor) -> Tensor:
        """Codes (B,h,w,Q) in [0,K) → latent (B,D,h,w); ValueError outside (the library decodes -1 to zeros)."""
        check_codes(codes_BhwQ, self.depth, self.codebook_size)
        codes_NQ = to_rows(codes_BhwQ.permute(0, 3, 1, 2)).long()  # torch reads uint8 indices as a mask
        z_ND = self.join([self.chosen(d, codes_NQ[:, d]) for d in range(self.depth)])
        return to_grid(z_ND, codes_BhwQ.permute(0, 3, 1, 2))

    def quantize(self, x_ND: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(N,D) → quantized (N,D), codes (N,Q) of the kept depths, losses (means over the kept depths)."""
        state_ND, parts, codes, losses = x_ND, [], [], []
        kept = self._draw_depth(x_ND.device)
        for depth in range(kept):
            vectors_ND = self.vectors(state_ND, depth)
            indices_N = nearest_codes(vectors_ND.detach(), self.codebook(self.book_of(depth)).detach())
            chosen_ND = self.chosen(depth, indices_N)
            state_ND = self.leave(state_ND, depth, indices_N)
            if self.training:
                losses.append(self.losses(vectors_ND, chosen_ND))
                self.learn(depth, vectors_ND.detach(), indices_N)
            parts.append(self._pass_gradient(vectors_ND, chosen_ND.detach()))
            codes.append(indices_N)
        if self.training:
            self.settle({self.book_of(depth) for depth in range(kept)})
        means = {name: torch.stack([each[name] for each in losses]).mean() for name in self.terms if losses}
        return self.join(parts), torch.stack(codes, 1), means

    def _draw_depth(self, device: torch.device) -> int:
        """How many depths this batch keeps; the same on every rank, or their sums of codes would not meet."""
        if not self.training or self.least_depth is None:
            return self.depth
        drawn = sum_over_ranks(torch.randint(2**31, (1,), device=device))
        return self.least_depth + int(drawn) % (self.depth - self.least_depth + 1)

    def _pass_gradient(self, vectors_ND: Tensor, chosen_ND: Tensor) -> Tensor:
        if not (self.training and vectors_ND.requires_grad):
            return chosen_ND
        if self.rotation_trick:
            return rotate_to(vectors_ND, chosen_ND)
        return vectors_ND + (chosen_ND - vectors_ND).detach()

    # what depths mean to each other ------------------------------------------------------------------------------

    def book_of(self, depth: int) -> int:
        return 0 if self.shared else depth

    def vectors(self, state_ND: Tensor, depth: int) -> Tensor:
        return state_ND

    def leave(self, state_ND: Tensor, depth: int, indices_N: Tensor) -> Tensor:
        return state_ND - self.chosen(depth, indices_N).detach()

    def join(self, parts_ND: list[Tensor]) -> Tensor:
        """What each depth has chosen → the quantized latent."""
        total_ND = parts_ND[0]
        for part_ND in parts_ND[1:]:
            total_ND = total_ND + part_ND
        return total_ND

    # how codebooks learn -----------------------------------------------------------------------------------------

    def chosen(self, depth: int, indices_N: Tensor) -> Tensor:
        """(N,D'): the vectors of the codes that one depth has chosen."""
        return self.codebook(self.book_of(depth))[indices_N]

    def losses(self, vectors_ND: Tensor, chosen_ND: Tensor) -> dict[str, Tensor]:
        """Of one depth. "commitment": mean((z - sg[e])²), of van den Oord et al. 2017 (arXiv 1711.00937, eq. 3)."""
        return {"commitment": F.mse_loss(vectors_ND, chosen_ND.detach())}

    def learn(self, depth: int, vectors_ND: Tensor, indices_N: Tensor) -> None:
        """What a codebook takes from a training batch without a gradient."""

    def settle(self, books: Iterable[int]) -> None:
        """After all depths of a training batch: books become what they have learned."""


class AveragedQuantizer(LearnedQuantizer):
    """Codebooks that follow averages of the vectors that chose them (1711.00937, appendix A.1), over all ranks.

    decay: of the averages. A shared codebook averages once for each depth, as in the library, so that a batch moves
    it with decay^Q.
    """

    cosine = False

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        depth: int = 1,
        decay: float = 0.99,
        rotation_trick: bool = False,
        shared: bool = False,
        least_depth: int | None = None,
    ):
        super().__init__(dim, codebook_size, depth, rotation_trick, shared, least_depth)
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay}: must lie between 0 and 1 (both excluded)")
        self.decay = decay
        self.vq = ResidualVQ(
            dim=dim,
            num_quantizers=depth,
            codebook_size=codebook_size,
            decay=decay,
            commitment_weight=1.0,
            rotation_trick=rotation_trick,
            threshold_ema_dead_code=0,
            kmeans_init=False,
            shared_codebook=shared,
            use_cosine_sim=self.cosine,
        )

    def codebook(self, book: int) -> Tensor:
        return self._book(book).embed[0]

    def _book(self, book: int) -> Any:
        """The library's codebook module: embed, embed_avg (1,K,D) and cluster_size (1,K)."""
        return self.vq.layers[book]._codebook

    @torch.no_grad()
    def learn(self, depth: int, vectors_ND: Tensor, indices_N: Tensor) -> None:
        """Sums and counts are taken by index: the library multiplies with a one-hot matrix of N×K."""
        book = self._book(self.book_of(depth))
        counts_K = torch.bincount(indices_N, minlength=self.codebook_size).to(vectors_ND.dtype)
        sums_KD = torch.zeros_like(book.embed_avg[0]).index_add_(0, indices_N, vectors_ND)
        book.cluster_size[0].lerp_(sum_over_ranks(counts_K), 1 - self.decay)
        book.embed_avg[0].lerp_(sum_over_ranks(sums_KD), 1 - self.decay)

    @torch.no_grad()
    def settle(self, books: Iterable[int]) -> None:
        """Each code becomes sum / count, the count Laplace-smoothed; unit vectors where directions are compared."""
        for book in books:
            self._book(book).update_ema()

    @torch.no_grad()
    def replace_codes(self, book: int, indices: Tensor, vectors: Tensor) -> None:
        """Codes `indices` (n) of one book become `vectors` (n,D), in all EMA buffers together.

        The count given is the average one: a smaller count would let the next EMA step move the code at once,
        and writing only the embedding would be undone by it.
        """
        stored = self._book(book)
        vectors = to_sphere(vectors) if self.cosine else vectors
        count = stored.cluster_size.mean().clamp(min=1.0)
        stored.embed[0, indices] = vectors
        stored.cluster_size[0, indices] = count
        stored.embed_avg[0, indices] = vectors * count


@declared
class ResidualQuantizer(AveragedQuantizer):
    """Residual quantization with averaged codebooks; depth Q = 1 is plain VQ with an EMA codebook.

    Equal codes, outputs, gradients, losses and buffers as the library, without its N×K matrices: distances exist for
    one chunk of rows at a time. `benchmarks/quantizer.py` measures both.
    """

    added_arguments = ("shared", "least_depth")  # newer than some saved tokenizers


@declared
class CosineQuantizer(AveragedQuantizer):
    """As ResidualQuantizer, but directions are compared: codes are unit vectors (Yu et al. 2021, arXiv 2110.04627).

    At depth 1 the quantized latent has unit length; at each depth the residual's direction chooses.
    """

    cosine = True

    def vectors(self, state_ND: Tensor, depth: int) -> Tensor:
        return to_sphere(state_ND)


@declared
class LibraryResidualQuantizer(AveragedQuantizer):
    """The library's own forward pass: the reference that `ResidualQuantizer` is tested against and measured beside."""

    def __init__(
        self, dim: int, codebook_size: int, depth: int = 1, decay: float = 0.99, rotation_trick: bool = False
    ):
        super().__init__(dim, codebook_size, depth, decay, rotation_trick)
        for book in range(
            self.books
        ):  # the library asks once, while it is built, whether there are other ranks
            self._book(book).all_reduce_fn = sum_in_place

    def quantize(self, x_ND: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        z_1ND, codes_1NQ, losses_Q = self.vq(x_ND[None])
        return z_1ND[0], codes_1NQ[0], {"commitment": losses_Q.mean()}


@declared
class GradientQuantizer(LearnedQuantizer):
    """Codebooks that an optimizer updates, by the loss "codebook": mean((sg[z] - e)²) (1711.00937, eq. 3).

    With depth 1 the quantizer of VQGAN (Esser et al. 2020, arXiv 2012.09841), whose weights are codebook 1,
    commitment 0.25. A new codebook is uniform in ±1/K, as there.
    """

    terms = ("commitment", "codebook")

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        depth: int = 1,
        rotation_trick: bool = False,
        shared: bool = False,
        least_depth: int | None = None,
    ):
        super().__init__(dim, codebook_size, depth, rotation_trick, shared, least_depth)
        self.embeddings = nn.ParameterList(self._new_book() for _ in range(self.books))

    @property
    def width(self) -> int:
        """D': of the vectors of a codebook."""
        return self.dim

    def _new_book(self) -> Tensor:
        return torch.empty(self.codebook_size, self.width).uniform_(
            -1 / self.codebook_size, 1 / self.codebook_size
        )

    def codebook(self, book: int) -> Tensor:
        return self.embeddings[book]

    def book_parameter(self, book: int) -> nn.Parameter:
        return self.embeddings[book]

    def losses(self, vectors_ND: Tensor, chosen_ND: Tensor) -> dict[str, Tensor]:
        return {
            "commitment": F.mse_loss(vectors_ND, chosen_ND.detach()),
            "codebook": F.mse_loss(chosen_ND, vectors_ND.detach()),
        }

    @torch.no_grad()
    def replace_codes(self, book: int, indices: Tensor, vectors: Tensor) -> None:
        """Codes `indices` (n) of one book become `vectors` (n,D'). The optimizer's moments are the caller's affair."""
        self.embeddings[book][indices] = vectors


@declared
class CosineGradientQuantizer(GradientQuantizer):
    """As GradientQuantizer, but directions are compared: latent and codes are scaled to unit length where they meet.

    With a small `dim` the quantizer of ViT-VQGAN (Yu et al. 2021, arXiv 2110.04627) and of LlamaGen (Sun et al. 2024,
    arXiv 2406.06525; dim 8, K 16,384; weights codebook 1, commitment 0.25).
    """

    def _new_book(self) -> Tensor:
        return to_sphere(torch.randn(self.codebook_size, self.width))

    def codebook(self, book: int) -> Tensor:
        return to_sphere(self.embeddings[book])

    def chosen(self, depth: int, indices_N: Tensor) -> Tensor:
        return to_sphere(self.embeddings[self.book_of(depth)][indices_N])

    def vectors(self, state_ND: Tensor, depth: int) -> Tensor:
        return to_sphere(state_ND)


def to_sphere(x_ND: Tensor) -> Tensor:
    """Rows of unit length; a zero row stays zero. The small number is the library's."""
    return F.normalize(x_ND, dim=-1, eps=1e-6)


def sum_in_place(x: Tensor) -> None:
    """The sum over all ranks takes the place of `x`."""
    x.copy_(sum_over_ranks(x))
