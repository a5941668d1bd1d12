"""Latent ↔ codes: what every quantizer takes and gives. One file for each family, this one for what they share.

A latent (B,D,h,w) goes in and a `Quantized` comes out; codes are always (B,h,w,Q), Q = 1 for plain VQ. Knows
nothing of pixels.

    residual.py   learned codebooks: VQ and residual VQ      product.py   several small codebooks side by side
    library.py    SimVQ, LFQ, BSQ, FSQ and residual kin      gumbel.py, ibq.py   every code gets a gradient
    none.py       continuous: the latent passes
    nearest.py    the nearest code of each vector            soft.py      probabilities over all codes

Legend: B batch, D latent width, D' width of a codebook's vectors, h w grid, Q depth (codes per position), K codebook
size, N = B·h·w vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Quantized:
    """What a quantizer returns.

    A quantizer that drops depths while training (`least_depth`) returns the codes of the kept ones alone, so that
    codes_BhwQ may then have fewer than `depth` columns: those of depths 0, 1, … in order. No value stands for "no
    code"; whoever counts codes may count all that is there. In eval all depths are there.
    """

    z_BDhw: Tensor  # quantized latent; gradients reach the encoder through it
    codes_BhwQ: Tensor | None  # int64 in [0, K); None from NoQuantizer
    losses: dict[str, Tensor] = field(default_factory=dict)  # by name, unweighted scalars; training only


class Quantizer(nn.Module):
    """What every quantizer offers: `forward`, `lookup`, and the numbers that describe its codes."""

    dim: int  # D
    depth: int  # Q, 0 for a continuous tokenizer
    codebook_size: int  # K, 0 for a continuous tokenizer
    terms: tuple[str, ...] = ()  # names of the losses that `forward` gives while training

    def forward(self, z_BDhw: Tensor) -> Quantized:
        raise NotImplementedError

    def lookup(self, codes_BhwQ: Tensor) -> Tensor:
        """Codes (B,h,w,Q) in [0,K) → latent (B,D,h,w), that of `forward` in eval. ValueError outside."""
        raise NotImplementedError

    def anneal(self, progress: float) -> None:
        """Told before each training step what share of the run is done (0..1), for what follows a schedule."""


class CodebookQuantizer(Quantizer):
    """A quantizer whose codes are the Euclidean-nearest vectors of learned codebooks, which may be re-initialised.

    A *book* is a codebook; depths that share one have the same book. The depths are walked in order:
    `start(z)` gives the state, `vectors(state, depth)` what that depth's codes are compared with,
    `leave(state, depth, indices)` the state for the next depth.
    """

    books: int  # distinct codebooks

    def book_of(self, depth: int) -> int:
        """Which book a depth reads."""
        raise NotImplementedError

    def codebook(self, book: int) -> Tensor:
        """(K, D'): the vectors among which the nearest is taken, D' ≤ D. To be read; `replace_codes` writes."""
        raise NotImplementedError

    def book_parameter(self, book: int) -> nn.Parameter | None:
        """The parameter (…, K, D') behind a book that an optimizer updates; None where averages do."""
        return None

    def replace_codes(self, book: int, indices: Tensor, vectors: Tensor) -> None:
        """Codes `indices` (n) become `vectors` (n, D'), in everything that the next step reads them from."""
        raise NotImplementedError

    def start(self, z_BDhw: Tensor) -> Tensor:
        """(B,D,h,w) → state (N,D) float32."""
        return to_rows(z_BDhw.float())

    def vectors(self, state_ND: Tensor, depth: int) -> Tensor:
        """State → (N, D'): what the codes of one depth are compared with."""
        raise NotImplementedError

    def leave(self, state_ND: Tensor, depth: int, indices_N: Tensor) -> Tensor:
        """State after one depth has chosen its codes."""
        raise NotImplementedError


def to_rows(z_BDhw: Tensor) -> Tensor:
    """(B,D,h,w) → (N,D), position after position."""
    return z_BDhw.permute(0, 2, 3, 1).reshape(-1, z_BDhw.shape[1])


def to_grid(x_ND: Tensor, like_BDhw: Tensor) -> Tensor:
    """(N,D) → (B,D,h,w), the inverse of `to_rows`; B, h and w are those of `like_BDhw`."""
    B, _, h, w = like_BDhw.shape
    return x_ND.reshape(B, h, w, x_ND.shape[1]).permute(0, 3, 1, 2)


def check_sizes(dim: int, codebook_size: int, depth: int = 1) -> None:
    """ValueError unless there is something to quantize and something to choose from."""
    if dim < 1 or depth < 1 or codebook_size < 2:
        raise ValueError(f"dim={dim}, depth={depth}, codebook_size={codebook_size}: need at least 1, 1 and 2")


def check_codes(codes_BhwQ: Tensor, depth: int, codebook_size: int) -> None:
    """ValueError unless codes are integers of shape (B,h,w,depth) in [0, codebook_size)."""
    if codes_BhwQ.ndim != 4 or codes_BhwQ.shape[-1] != depth:
        raise ValueError(f"codes have shape {tuple(codes_BhwQ.shape)}; expected (B, h, w, {depth})")
    if codes_BhwQ.is_floating_point() or codes_BhwQ.is_complex() or codes_BhwQ.dtype == torch.bool:
        raise ValueError(f"codes are {codes_BhwQ.dtype}; expected integers")
    if codes_BhwQ.numel() and not 0 <= int(codes_BhwQ.min()) <= int(codes_BhwQ.max()) < codebook_size:
        low, high = int(codes_BhwQ.min()), int(codes_BhwQ.max())
        raise ValueError(f"codes lie in [{low}, {high}]; this codebook has codes 0..{codebook_size - 1}")


def check_latent(z_BDhw: Tensor, dim: int) -> None:
    """ValueError unless the latent is (B,dim,h,w)."""
    if z_BDhw.ndim != 4 or z_BDhw.shape[1] != dim:
        raise ValueError(f"latent has shape {tuple(z_BDhw.shape)}; the quantizer was built for dim={dim}")
