"""Codes that mean something: latents trained against captions, by alignment or by captioning.

Both losses are modules: their networks are trained with the tokenizer, saved in its checkpoints, and left out of its
folder; `save_scorer` keeps them in a folder of their own. Pictures without a caption take no part.

Legend: B pictures, N those with a caption on all ranks, D latent width, h w grid, E width of the shared space.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from vq.batches import PictureBatch
from vq.losses import Shapes
from vq.scorer import Aligner, Captioner, Judge, Scorer
from vq.text import TextEncoder, captioned
from vq.tokenizer import ImageTokenizer, Reconstruction
from vqlm.errors import ConfigError
from vqlm.ranks import rank_count, rows_of_ranks

LARGEST_SCALE = 100.0  # of CLIP's logits (Radford et al. 2021, 2.5)


class Semantic(nn.Module):
    """A loss whose network judges latents against captions."""

    judge: Judge

    def __init__(self, weight: float):
        super().__init__()
        if weight <= 0:
            raise ValueError(f"weight={weight} must be positive; to drop a loss, drop its line")
        self.weight = weight

    def check(self, tokenizer: ImageTokenizer, shapes: Shapes = ()) -> None:
        """ConfigError if the latents are not as wide as this loss was built for."""
        if self.judge.dim != tokenizer.quantizer.dim:
            raise ConfigError(
                f"dim={self.judge.dim}: this tokenizer's latents have {tokenizer.quantizer.dim} channels; "
                "write dim: ${tokenizer.quantizer.dim}"
            )


class Contrastive(Semantic):
    """weight · CLIP's loss between pooled latents and captions (VILA-U, arXiv 2409.04429, 3.1; Radford et al. 2021).

    latents: "encoder", before quantization, as VILA-U; or "codes", after it, as UniTok: gradients then pass the
    quantizer. temperature: at the start; it is learned, and the scale 1/temperature never exceeds 100.
    Negatives are the other pictures of the batch, on all ranks; pictures of one caption are none of each other
    (see `contrastive_loss`). dim: D; width: E; text: the side of the captions.
    """

    judge: Aligner

    def __init__(
        self,
        dim: int,
        text: TextEncoder,
        latents: Literal["encoder", "codes"] = "encoder",
        width: int = 128,
        temperature: float = 0.07,
        weight: float = 1.0,
    ):
        super().__init__(weight)
        if latents not in ("encoder", "codes"):
            raise ValueError(f"latents={latents!r}: one of encoder, codes")
        if temperature < 1 / LARGEST_SCALE:
            raise ValueError(f"temperature={temperature}: at least {1 / LARGEST_SCALE}")
        self.judge, self.latents = Aligner(dim, text, width), latents
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, batch: PictureBatch, made: Reconstruction) -> Tensor:
        told = captioned(batch.captions)
        captions = [batch.captions[place] for place in told]
        z_BDhw = (made.z_BDhw if self.latents == "encoder" else made.quantized.z_BDhw)[told]
        u_BE, t_BE = self.judge.pictures(z_BDhw), self.judge.captions(captions, z_BDhw.device)
        with torch.no_grad():  # the value, not its gradient: a scale above the limit must find its way back
            self.log_scale.clamp_(max=math.log(LARGEST_SCALE))
        names_N = rows_of_ranks(caption_names(captions).to(z_BDhw.device))
        u_NE, t_NE = live_rows_of_ranks(u_BE), live_rows_of_ranks(t_BE)
        return self.weight * contrastive_loss(u_NE, t_NE, names_N, self.log_scale.exp())


def contrastive_loss(u_NE: Tensor, t_NE: Tensor, names_N: Tensor, scale: Tensor) -> Tensor:
    """CLIP's ½ [CE(scale · u tᵀ, i) + CE(scale · t uᵀ, i)] over unit vectors, without false negatives.

    Pair i competes with the pairs of other names alone: what stands under its logarithm is itself and them. (Even
    targets over the pairs of a name, as in UniCL, arXiv 2204.03610, would change nothing here: where equal captions
    have equal vectors their sum is that of CLIP, and pictures of one caption go on pushing each other away.)
    With names all different it is CLIP's loss; its least value is 0. No pairs: 0, with gradients of 0.
    """
    N = len(names_N)
    if not N:
        return (u_NE.sum() + t_NE.sum()) * scale
    pairs_N = torch.arange(N, device=names_N.device)
    twins_NN = (names_N[:, None] == names_N[None]) & (pairs_N[:, None] != pairs_N[None])
    with torch.autocast(u_NE.device.type, enabled=False):  # bf16 has three digits, and the scale goes to 100
        logits_NN = (scale * u_NE @ t_NE.T).masked_fill(twins_NN, -math.inf)
    return (F.cross_entropy(logits_NN, pairs_N) + F.cross_entropy(logits_NN.T, pairs_N)) / 2


def caption_names(captions: list[str]) -> Tensor:
    """(N,) int64, equal for equal captions, on every rank; outer space does not count."""
    digests = [
        hashlib.blake2b(c.strip().encode("utf-8", "replace"), digest_size=8).digest() for c in captions
    ]
    return torch.tensor([int.from_bytes(each, "big", signed=True) for each in digests], dtype=torch.long)


def live_rows_of_ranks(x_BE: Tensor) -> Tensor:
    """Every rank's rows (N,E), as `rows_of_ranks`; gradients reach this rank's rows alone, times the number of ranks.

    Each rank computes the loss over all N. A rank's share of the gradient is that of its own rows; averaging over
    ranks, as data-parallel training does, would divide the sum of shares by their number once too often, hence the
    factor. What all ranks hold in common (the temperature) gets its whole gradient on each, and needs none.
    """
    if rank_count() == 1:
        return x_BE
    owner_N = rows_of_ranks(torch.full((len(x_BE),), dist.get_rank(), device=x_BE.device))
    own = (owner_N == dist.get_rank()).nonzero().flatten()
    detached_BE = x_BE.detach().contiguous()
    live_BE = detached_BE + rank_count() * (x_BE - detached_BE)
    return rows_of_ranks(detached_BE).index_copy(0, own, live_BE)


class Captioning(Semantic):
    """weight · mean cross-entropy, in nats a byte, of captions told from the quantized latents by a small decoder.

    The latents are those that the picture's decoder reads, so gradients reach the encoder through the quantizer
    (straight through, or as its class has it). Sizes: see `vq.scorer.Captioner`. A batch without captions costs 0.
    """

    judge: Captioner

    def __init__(
        self,
        dim: int,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        length: int = 64,
        weight: float = 1.0,
    ):
        super().__init__(weight)
        self.judge = Captioner(dim, width, layers, heads, length)

    def forward(self, batch: PictureBatch, made: Reconstruction) -> Tensor:
        told = captioned(batch.captions)
        z_BDhw = made.quantized.z_BDhw[told]
        if not told:
            return z_BDhw.sum()
        cost_BT, real_BT = self.judge.surprise(z_BDhw, [batch.captions[place] for place in told])
        return self.weight * cost_BT.sum() / real_BT.sum()


def save_scorer(terms: Mapping[str, Any], tokenizer: ImageTokenizer, folder: str | Path) -> list[Path]:
    """Keep what semantic losses among `terms` have learned: `folder`/NAME for each, bound to `tokenizer`."""
    found = {name: term for name, term in terms.items() if isinstance(term, Semantic)}
    for name, term in found.items():
        Scorer(term.judge, tokenizer.fingerprint).save_pretrained(Path(folder) / name)
    return [Path(folder) / name for name in found]
