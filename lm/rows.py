"""The rows that a pretrained model gains for new ids: how many, and with which values they begin.

Transformers' own way draws new rows around the old mean with a covariance of 1e-9 of the old rows': thousands of all
but equal rows, which training has to tell apart first. Here they begin spread out, and shorter than the old ones unless
asked otherwise.
It knows matrices; what the ids mean it does not, but that the last Q·K of them are codes.

Legend: N old rows, n new rows, C hidden width, Q depths, K codes of a depth, D width of a code's vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vqlm.errors import ConfigError

SAMPLE = 65_536  # old rows from which statistics are taken: more change nothing
SHARES = (0.05, 0.95)  # of the old rows' lengths: a base model's unused rows lie outside, and are no model


class NewRows(Protocol):
    """How new rows begin."""

    def draw(
        self, old_NC: Tensor, n: int, vectors_QKD: Tensor | None, random: torch.Generator
    ) -> Tensor:  # (n,C)
        """n new rows; the last Q·K are those of the codes, whose vectors are given where the caller has them."""
        ...


class Statistics:
    """Around the old rows' mean, with their deviation in each of the C numbers, as long as old rows are."""

    def draw(self, old_NC: Tensor, n: int, vectors_QKD: Tensor | None, random: torch.Generator) -> Tensor:
        old_NC = sample(old_NC, random)
        deviations_nC = torch.randn(n, old_NC.shape[1], generator=random) * old_NC.std(0)
        return as_long_as(old_NC, old_NC.mean(0) + deviations_nC, random)


class Small:
    """Around 0, with `share` of the old rows' deviation in each of the C numbers: new ids begin all but equally likely.

    Rows as long as old ones make some codes likely for no reason: with SmolLM2's tied rows a code costs 20 bits at
    first, more than twice what knowing nothing costs. And an optimizer whose steps have one size, as Adam's have, moves
    short rows further in relation to their length.
    """

    def __init__(self, share: float = 0.2):
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: must lie in (0, 1]")
        self.share = share

    def draw(self, old_NC: Tensor, n: int, vectors_QKD: Tensor | None, random: torch.Generator) -> Tensor:
        deviations_nC = torch.randn(n, old_NC.shape[1], generator=random) * sample(old_NC, random).std(0)
        return self.share * deviations_nC


class Codebook:
    """Codes that look alike begin alike: their vectors, turned into the model's width by a random rotation.

    The rows of a depth are share · deviation · (√(1-noise²) · v·R + noise of the same size), with v the code's vector
    (of a depth with mean 0 and mean square 1), R (D,C) with orthonormal rows, the same for all depths, and the
    deviation of all of the old rows' numbers: distances between codes stay what they are. Where D > C the rows of R
    cannot be orthonormal, its columns are. Ids that are no codes begin as `Small` has them.

    noise: share of a row that is its own, 0..1: codes with equal vectors can still be told apart. share: as of `Small`.
    """

    def __init__(self, noise: float = 0.3, share: float = 0.2):
        if not 0 <= noise <= 1:
            raise ValueError(f"noise={noise}: must lie in [0, 1]")
        self.noise, self.others = noise, Small(share)

    def draw(self, old_NC: Tensor, n: int, vectors_QKD: Tensor | None, random: torch.Generator) -> Tensor:
        if vectors_QKD is None:
            raise ConfigError(
                "lm/rows=codebook needs the vectors of codes, and this image tokenizer has none"
            )
        new_nC = self.others.draw(old_NC, n, None, random)
        old_NC = sample(old_NC, random)
        codes_nC = self.project(vectors_QKD, old_NC.shape[1], random) * old_NC.std(0).square().mean().sqrt()
        new_nC[-len(codes_nC) :] = self.others.share * codes_nC
        return new_nC

    def project(self, vectors_QKD: Tensor, width: int, random: torch.Generator) -> Tensor:
        """(Q,K,D) → (Q·K, width), with mean square 1 over the codes of a depth."""
        vectors_QKD = vectors_QKD.float().cpu()
        centred_QKD = vectors_QKD - vectors_QKD.mean(1, keepdim=True)
        turned_QKC = centred_QKD @ rotation(vectors_QKD.shape[-1], width, random)
        turned_QKC = turned_QKC / turned_QKC.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
        own_QKC = torch.randn(turned_QKC.shape, generator=random)
        return ((1 - self.noise**2) ** 0.5 * turned_QKC + self.noise * own_QKC).flatten(0, 1)


def rotation(height: int, width: int, random: torch.Generator) -> Tensor:
    """(height, width) with orthonormal rows, or columns if there are more rows than columns."""
    tall = torch.randn(max(height, width), min(height, width), generator=random)
    made = torch.linalg.qr(tall).Q
    return made if height >= width else made.T


def sample(rows_NC: Tensor, random: torch.Generator) -> Tensor:
    """At most SAMPLE of the rows, as float32 on the CPU."""
    if len(rows_NC) > SAMPLE:
        rows_NC = rows_NC[torch.randint(len(rows_NC), (SAMPLE,), generator=random).to(rows_NC.device)]
    return rows_NC.float().cpu()


def as_long_as(old_NC: Tensor, new_nC: Tensor, random: torch.Generator) -> Tensor:
    """The new rows with lengths that are distributed as the middle nine tenths of the old rows' lengths."""
    lengths_N = old_NC.norm(dim=1).sort().values
    low, high = (share * (len(lengths_N) - 1) for share in SHARES)
    picked_n = (low + (high - low) * torch.rand(len(new_nC), generator=random)).round().long()
    return new_nC * (lengths_N[picked_n] / new_nC.norm(dim=1).clamp(min=1e-12))[:, None]


def code_vectors(lookup: Callable[[Tensor], Tensor], codebook_size: int, depth: int) -> Tensor:
    """vectors_QKD: what each code of each depth adds to the latent, up to a constant of the depth.

    lookup: codes (B,h,w,Q) → latent (B,D,h,w), a quantizer's own. Code k of depth d stands for the latent of codes
    that are 0 but for k at d: exact where the latent is a sum (residual) or a row (product) of the depths' parts.
    """
    made = []
    for d in range(depth):
        codes_KhwQ = torch.zeros(codebook_size, 1, 1, depth, dtype=torch.int64)
        codes_KhwQ[:, 0, 0, d] = torch.arange(codebook_size)
        with torch.no_grad():
            made.append(lookup(codes_KhwQ)[:, :, 0, 0])
    return torch.stack(made)


@torch.no_grad()
def add_rows(
    lm: PreTrainedModel,
    first: int,
    size: int,
    seed: int,
    rows: NewRows | None = None,
    vectors_QKD: Tensor | None = None,
) -> int:
    """Extend a pretrained model to at least `size` rows, in place; ids below `first` keep their rows exactly.

    A model may have more rows than ids (a multiple of 64, say): new ids take those first, and what remains beyond
    `size` stays as it is. A bias of new output ids begins as the mean of the old. rows: `Small()` unless given.
    Returns the first new row: `first`, or fewer where the model has fewer rows than its tokenizer has ids.
    """
    rows = rows or Small()
    have = lm.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    first = min(first, int(have))
    if have < size:
        lm.resize_token_embeddings(size, mean_resizing=False)
    random = torch.Generator().manual_seed(seed)
    given: Any = lm.get_input_embeddings()
    output: Any = lm.get_output_embeddings()
    for weight in {id(w): w for w in (given.weight, output.weight)}.values():  # one entry if tied
        new_nC = rows.draw(weight[:first], size - first, vectors_QKD, random)
        weight[first:size] = new_nC.to(weight)
    bias = getattr(output, "bias", None)
    if bias is not None:
        bias[first:size] = bias[:first].mean()
    return first
