"""SimVQ, LFQ, BSQ, FSQ and their residual kin: vector-quantize-pytorch's own modules behind our interface.

The library speaks several dialects: images in some classes and not in others, int32 codes, losses as scalar, vector or
not at all, codes outside the codebook that wrap around in silence. Here (B,N,D) goes in everywhere, int64 comes out,
and codes are checked before the library sees them. Where the latent width differs from the width of the codes, the
library's own linear projections stand between.

Legend: B batch, D latent width, h w grid, Q depth, K codebook size, b = log2(K) bits, N = h·w positions of a picture.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ, ResidualFSQ, ResidualLFQ, SimVQ

from vq.quantizers import Quantized, Quantizer, check_codes, check_latent, check_sizes
from vq.quantizers.soft import entropy_penalty, sample
from vqlm.checkpoint import declared


class LibraryQuantizer(Quantizer):
    """A module of the library, `vq`. A subclass says what it returns (`quantize`) and what codes mean (`decode`)."""

    vq: Any

    def __init__(self, dim: int, codebook_size: int, depth: int = 1):
        super().__init__()
        check_sizes(dim, codebook_size, depth)
        self.dim, self.codebook_size, self.depth = dim, codebook_size, depth

    def forward(self, z_BDhw: Tensor) -> Quantized:
        check_latent(z_BDhw, self.dim)
        B, _, h, w = z_BDhw.shape
        with torch.autocast(z_BDhw.device.type, enabled=False):
            z_BND, codes, losses = self.quantize(z_BDhw.float().flatten(2).transpose(1, 2))
        z = (
            z_BND.transpose(1, 2).contiguous().reshape(z_BDhw.shape)
        )  # one layout, or the decoder rounds otherwise
        return Quantized(z, codes.long().reshape(B, h, w, self.depth), losses if self.training else {})

    def lookup(self, codes_BhwQ: Tensor) -> Tensor:
        check_codes(codes_BhwQ, self.depth, self.codebook_size)
        B, h, w, Q = codes_BhwQ.shape
        z_BND = self.decode(codes_BhwQ.reshape(B, h * w, Q).long())
        return z_BND.transpose(1, 2).contiguous().reshape(B, self.dim, h, w)

    def quantize(self, x_BND: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(B,N,D) → quantized (B,N,D), codes (B,N) or (B,N,Q), losses."""
        raise NotImplementedError

    def decode(self, codes_BNQ: Tensor) -> Tensor:
        """Codes (B,N,Q) → (B,N,D)."""
        raise NotImplementedError


@declared
class SimVQQuantizer(LibraryQuantizer):
    """SimVQ (Zhu et al. 2024, arXiv 2411.02038): code = W · frozen Gaussian vector; W learns, so all codes move.

    Losses as in the library: "codebook" 1: mean((sg[z] - e)²), "commitment" 0.25: mean((z - sg[e])²). With the rotation
    trick where `rotation_trick` (the library's default), else straight-through. The library holds distances of (B,N,K).
    """

    terms = ("commitment", "codebook")

    def __init__(self, dim: int, codebook_size: int, rotation_trick: bool = True):
        super().__init__(dim, codebook_size)
        self.vq = SimVQ(
            dim, codebook_size, rotation_trick=rotation_trick, input_to_quantize_commit_loss_weight=0.0
        )

    def quantize(self, x_BND: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        z_BND, codes_BN, codebook = self.vq(x_BND)
        chosen_BND = self.vq.indices_to_codes(codes_BN).detach()
        if not self.training:  # the rotation reaches its target up to rounding, and not at all from zero
            z_BND = chosen_BND
        return z_BND, codes_BN, {"commitment": F.mse_loss(x_BND, chosen_BND), "codebook": codebook}

    def decode(self, codes_BNQ: Tensor) -> Tensor:
        return self.vq.indices_to_codes(codes_BNQ[..., 0])


@declared
class LookupFreeQuantizer(LibraryQuantizer):
    """LFQ (Yu et al. 2023, MAGVIT-v2, arXiv 2310.05737): a code is the signs of b = log2(K) numbers. No codebook.

    depth: above 1 residual LFQ, where depth d has codes of ±2^-d.
    Losses, means over depths, weights as in Open-MAGVIT2 (Luo et al. 2024, arXiv 2409.04410):
        "entropy" 0.1: E[H(p)] - gamma·H(E[p]), p = softmax(2·x·C / temperature) over all K codes C, on at most
        `positions` vectors x of a batch, since a matrix of positions×K is held
        "commitment" 0.25: mean((x - sg[e])²)
    """

    terms = ("entropy", "commitment")
    spherical = False

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        depth: int = 1,
        gamma: float = 1.0,
        temperature: float = 0.01,
        positions: int = 1024,
    ):
        super().__init__(dim, codebook_size, depth)
        if codebook_size & (codebook_size - 1):
            lower = 2 ** int(math.log2(codebook_size))
            raise ValueError(f"codebook_size={codebook_size}: a power of 2, such as {lower} or {2 * lower}")
        if gamma < 0 or temperature <= 0 or positions < 1:
            raise ValueError(
                f"gamma={gamma} must not be negative, temperature={temperature} must be positive and "
                f"positions={positions} at least 1"
            )
        self.gamma, self.temperature, self.positions = gamma, temperature, positions
        self.vq = ResidualLFQ(
            dim=dim,
            codebook_size=codebook_size,
            num_quantizers=depth,
            spherical=self.spherical,
            commitment_loss_weight=1.0,  # above 0, or it is not computed
        )

    def quantize(self, x_BND: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        residual_BNb = self.vq.project_in(x_BND)
        parts, codes, entropy, commitment = [], [], [], []
        for layer in self.vq.layers:
            # The library's own entropy drops what its all_reduce returns (1.32.0), so with several ranks it is that of
            # no distribution. Ours takes its place; here the library computes its own on a single vector.
            layer.frac_per_sample_entropy = min(1.0, 1.5 / residual_BNb[..., 0].numel())
            (part_BNb, codes_BN, _), of_layer = layer(residual_BNb, return_loss_breakdown=True)
            if self.training:
                entropy.append(self._entropy(layer, residual_BNb))
                commitment.append(of_layer.commitment)
            residual_BNb = residual_BNb - part_BNb.detach()
            parts.append(part_BNb)
            codes.append(codes_BN)
        losses = {}
        if self.training:
            losses = {"entropy": torch.stack(entropy).mean(), "commitment": torch.stack(commitment).mean()}
        return self.vq.project_out(sum(parts)), torch.stack(codes, -1), losses

    def _entropy(self, layer: Any, x_BNb: Tensor) -> Tensor:
        x_Nb = layer.maybe_l2norm(sample(x_BNb.flatten(0, 1), self.positions))
        codes_Kb = layer.maybe_l2norm(layer.codebook)
        return entropy_penalty(2 * x_Nb @ codes_Kb.T / self.temperature, self.gamma)

    def decode(self, codes_BNQ: Tensor) -> Tensor:
        parts = [layer.indices_to_codes(codes_BNQ[..., d]) for d, layer in enumerate(self.vq.layers)]
        return self.vq.project_out(sum(parts))


@declared
class BinarySphericalQuantizer(LookupFreeQuantizer):
    """BSQ (Zhao et al. 2024, arXiv 2406.07548): as LFQ, but vectors and codes lie on the unit sphere."""

    spherical = True


@declared
class FiniteScalarQuantizer(LibraryQuantizer):
    """FSQ (Mentzer et al. 2023, arXiv 2309.15505): each of a few numbers is rounded to one of its levels. No losses.

    levels: of each number, 3 or more; K is their product. The paper's: [8, 5, 5, 5] for about 2^10 codes,
    [7, 5, 5, 5, 5] for 2^12, [8, 8, 8, 6, 5] for 2^14, [8, 8, 8, 5, 5, 5] for 2^16.
    """

    def __init__(self, dim: int, levels: list[int]):
        check_levels(levels)
        super().__init__(dim, math.prod(levels))
        self.vq = FSQ(list(levels), dim=dim)

    def quantize(self, x_BND: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return *self.vq(x_BND), {}

    def decode(self, codes_BNQ: Tensor) -> Tensor:
        return self.vq.indices_to_codes(codes_BNQ[..., 0])


@declared
class ResidualFiniteScalarQuantizer(LibraryQuantizer):
    """FSQ in Q depths, each on what the one before has left, at a scale smaller by the number of levels. No losses.

    levels: as in FiniteScalarQuantizer. The library rounds symmetrically here (Parker et al. 2024, arXiv 2411.19842).
    """

    def __init__(self, dim: int, levels: list[int], depth: int):
        check_levels(levels)
        super().__init__(dim, math.prod(levels), depth)
        self.vq = ResidualFSQ(dim=dim, levels=list(levels), num_quantizers=depth)

    def quantize(self, x_BND: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return *self.vq(x_BND), {}

    def decode(self, codes_BNQ: Tensor) -> Tensor:
        return self.vq.get_output_from_indices(codes_BNQ)


def check_levels(levels: list[int]) -> None:
    """ValueError unless there are levels, three or more each (two are a sign: that is LFQ)."""
    if not levels or min(levels) < 3:
        raise ValueError(
            f"levels={list(levels)}: at least one number, each 3 or more (2 is LookupFreeQuantizer)"
        )
