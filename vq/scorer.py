"""Latents judged against captions: the networks that semantic losses train, and the folder that keeps them.

    Aligner    pictures and captions in one space: cosine
    Captioner  a small decoder that writes captions: log-likelihood
    Scorer     either of them, saved, and bound to the tokenizer whose latents it reads: it re-ranks drawn pictures

Knows latents and texts; neither losses nor pictures' files.

Legend: B pictures, D latent width, h w grid, S = h·w positions, C captions, E width, T bytes of the longest caption.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vq.text import END, PADDING, TextEncoder, to_bytes
from vq.tokenizer import ImageTokenizer
from vqlm.checkpoint import declared, load_module, save_module
from vqlm.errors import ConfigError

PAIRS = 512  # captions told of pictures that are computed at once


class Judge(nn.Module):
    """What a scorer is made of."""

    dim: int  # D

    def score(self, z_BDhw: Tensor, captions: list[str]) -> Tensor:
        """Latents and captions → (B,C): how well each caption fits each picture; larger is better."""
        raise NotImplementedError


@declared
class Aligner(Judge):
    """One space for pictures and captions, both unit vectors (B,E) and (C,E); grids of any size.

    A picture is the mean over positions, LayerNorm and a linear map, as in UniTok (its `models/unitok.py`), with one
    layer before the mean, because latents are narrow. A caption is its encoder's vector and a linear map.
    """

    def __init__(self, dim: int, text: TextEncoder, width: int = 128):
        super().__init__()
        if dim < 1 or width < 1:
            raise ValueError(f"dim={dim} and width={width} must be at least 1")
        self.dim, self.text = dim, text
        self.positions = nn.Sequential(nn.Linear(dim, 2 * width), nn.GELU())
        self.picture = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, width))
        self.caption = nn.Linear(text.width, width)

    def pictures(self, z_BDhw: Tensor) -> Tensor:
        """(B,D,h,w) → unit vectors (B,E) float32."""
        z_BSD = z_BDhw.flatten(2).transpose(1, 2)
        return F.normalize(self.picture(self.positions(z_BSD).mean(1)).float(), dim=1)

    def captions(self, captions: list[str], device: torch.device) -> Tensor:
        """C captions → unit vectors (C,E) float32."""
        return F.normalize(self.caption(self.text(captions, device)).float(), dim=1)

    def score(self, z_BDhw: Tensor, captions: list[str]) -> Tensor:
        """Cosines (B,C)."""
        return self.pictures(z_BDhw) @ self.captions(captions, z_BDhw.device).T


@declared
class Captioner(Judge):
    """A causal transformer over a caption's UTF-8 bytes that looks at a picture's latents by cross-attention.

    Small on purpose: what it cannot know of language it must read from the latents. Latents of any grid are taken;
    their places are told by sinusoids over both axes. length: where captions are cut, in bytes.
    """

    def __init__(self, dim: int, width: int = 128, layers: int = 2, heads: int = 4, length: int = 64):
        super().__init__()
        if min(dim, layers, heads, length) < 1:
            raise ValueError(f"dim={dim}, layers={layers}, heads={heads}, length={length} must be at least 1")
        if width < 4 or width % 4 or width % heads:
            raise ValueError(f"width={width} must be a multiple of 4 and of heads={heads}")
        self.dim, self.width, self.length = dim, width, length
        self.latents = nn.Sequential(nn.Linear(dim, width), nn.LayerNorm(width))
        self.symbols, self.places = nn.Embedding(END + 1, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, END + 1))

    def forward(self, z_BDhw: Tensor, ids_BT: Tensor) -> Tensor:
        """Logits (B,T,257) float32 of the byte that follows each id, seen from it and those before it."""
        _, _, h, w = z_BDhw.shape
        T = ids_BT.shape[1]
        z_BSE = self.latents(z_BDhw.flatten(2).transpose(1, 2)) + grid_places(h, w, self.width, z_BDhw.device)
        x_BTE = self.symbols(ids_BT) + self.places(torch.arange(T, device=ids_BT.device))
        later_TT = torch.ones(T, T, dtype=torch.bool, device=ids_BT.device).triu(1)
        for layer in self.layers:
            x_BTE = layer(x_BTE, z_BSE, tgt_mask=later_TT)
        return self.out(x_BTE).float()

    def surprise(self, z_BDhw: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        """One caption for each picture → −log p of each of its bytes (B,T), 0 at padding, and which are bytes (B,T)."""
        ids_BT, labels_BT = (each.to(z_BDhw.device) for each in to_bytes(captions, self.length))
        logits_BTV = self(z_BDhw, ids_BT)
        cost_BT = F.cross_entropy(
            logits_BTV.transpose(1, 2), labels_BT, ignore_index=PADDING, reduction="none"
        )
        return cost_BT, labels_BT != PADDING

    def score(self, z_BDhw: Tensor, captions: list[str]) -> Tensor:
        """log p(caption | picture) (B,C), natural logarithms, summed over bytes.

        It ranks pictures for a caption. To rank captions for a picture, take each caption's own log p from it, or
        short and frequent ones always win.
        """
        B, C = len(z_BDhw), len(captions)
        order = sorted(
            range(C), key=lambda place: len(captions[place])
        )  # equal lengths together: little padding
        pairs = [(b, c) for c in order for b in range(B)]
        found = z_BDhw.new_zeros(B, C, dtype=torch.float32)
        for some in _chunks(pairs, PAIRS):
            rows, columns = [b for b, _ in some], [c for _, c in some]
            cost_BT, _ = self.surprise(z_BDhw[rows], [captions[c] for c in columns])
            found[rows, columns] = -cost_BT.sum(1)
        return found


def _chunks(pairs: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def grid_places(h: int, w: int, width: int, device: torch.device) -> Tensor:
    """(h·w, width) sinusoids, half of the channels for rows and half for columns (as Vaswani et al. 2017, 3.5)."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(width // 4, device=device) / (width // 4))

    def along(count: int) -> Tensor:
        angles = torch.arange(count, device=device)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], 1)

    rows, columns = along(h)[:, None].expand(h, w, -1), along(w)[None].expand(h, w, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


@declared
class Scorer(nn.Module):
    """A judge and the fingerprint of the tokenizer whose latents it was trained on.

    `score` takes codes or pixels; pixels are encoded first, so both give the same numbers. A scorer must be bound to
    its tokenizer: `Scorer.from_pretrained(folder, tokenizer)`, or `Scorer(judge, print).bind(tokenizer)`.
    """

    def __init__(self, judge: Judge, tokenizer: str):
        super().__init__()
        if not isinstance(judge, Judge) or not isinstance(tokenizer, str):
            raise ValueError(
                f"a judge and a fingerprint are needed, found {judge!r:.80} and {tokenizer!r:.80}"
            )
        self.judge, self.fingerprint = judge, tokenizer
        self._tokenizer: tuple[ImageTokenizer, ...] = ()  # a tuple: it is saved in a folder of its own

    def bind(self, tokenizer: ImageTokenizer) -> Scorer:
        """Read this tokenizer's codes. ConfigError, with both fingerprints, if it is not the scorer's own."""
        if tokenizer.fingerprint != self.fingerprint:
            raise ConfigError(
                f"this scorer reads the codes of tokenizer {self.fingerprint}, not of {tokenizer.fingerprint}: "
                "load the tokenizer that it was trained with"
            )
        self._tokenizer = (tokenizer,)
        return self

    @torch.no_grad()
    def score(self, pictures: Tensor, captions: list[str]) -> Tensor:
        """Codes (B,h,w,Q) int64 or pixels (B,3,H,W) float in [-1,1], and C captions → (B,C), larger fits better.

        Cosines in [-1,1] from an `Aligner`, log-likelihoods from a `Captioner`. ValueError on codes or pixels that
        the tokenizer does not take, RuntimeError before `bind`.
        """
        if not self._tokenizer:
            raise RuntimeError("bind the scorer to its tokenizer first: scorer.bind(tokenizer)")
        device = next(self.judge.parameters()).device
        return self.judge.score(quantized_latent(self._tokenizer[0], pictures).to(device), captions)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, atomically. A frozen text encoder is named, not copied."""
        save_module(folder, self)

    @classmethod
    def from_pretrained(cls, folder: str | Path, tokenizer: ImageTokenizer) -> Scorer:
        """Load and bind, in eval mode. ConfigError on an unusable folder, or the fingerprint of another tokenizer."""
        module = load_module(folder, cls)
        assert isinstance(module, Scorer)
        return module.bind(tokenizer)


@torch.no_grad()
def quantized_latent(tokenizer: ImageTokenizer, pictures: Tensor) -> Tensor:
    """Codes (B,h,w,Q), or pixels (B,3,H,W) float, which are encoded → the latent (B,D,h,w) that the decoder reads."""
    if not pictures.is_floating_point():
        return tokenizer.quantizer.lookup(pictures).float()
    if tokenizer.depth:
        return tokenizer.quantizer.lookup(tokenizer.encode(pictures)).float()
    return tokenizer.eval().autoencode(pictures).z_BDhw  # continuous: there are no codes
