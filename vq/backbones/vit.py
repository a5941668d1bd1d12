"""Transformer encoder and decoder, side by side: pixels ↔ latent.

The shape of ViT-VQGAN (Yu et al. 2021, arXiv 2110.04627; Parti uses it too): patches of pixels through one linear
map, pre-norm transformer blocks (ViT's, with GELU), and at the end of encoder and decoder a two-layer head with a tanh
in the middle. Its sizes: small = 8 layers, 8 heads, width 512; base = 12, 12, 768; patch 8. What differs: positions.
There they are embeddings of one grid; here queries and keys are turned by angles that grow with row and column (axial
rotary embedding, base 100, after Heo et al. 2024, arXiv 2403.13298). Attention then sees offsets alone, so that any
h×w works with one set of weights and no table has an end. Knows nothing of codes or losses.

Legend: B batch, H W picture height and width, h w grid, N = h·w tokens, C width, D latent width, M heads, E = C/M.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vq.backbones import Backbone
from vqlm.checkpoint import declared

ROTARY_BASE = 100.0


def check_sizes(latent_dim: int, patch: int, width: int, layers: int, heads: int) -> None:
    if min(latent_dim, patch, width, layers, heads) < 1:
        raise ValueError(
            f"latent_dim={latent_dim}, patch={patch}, width={width}, layers={layers}, heads={heads}: each must be at "
            "least 1"
        )
    if width % (4 * heads):
        raise ValueError(
            f"width={width}, heads={heads}: the width of a head must be a multiple of 4 (pairs for rows and for "
            f"columns), so width a multiple of {4 * heads}"
        )


def rotary_angles(h: int, w: int, head_dim: int, device: torch.device) -> Tensor:
    """(N, E/2) float32: by how much each pair of a head's numbers is turned; half by the row, half by the column."""
    count = head_dim // 4
    speeds = ROTARY_BASE ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
    rows, columns = torch.meshgrid(
        torch.arange(h, device=device, dtype=torch.float32),
        torch.arange(w, device=device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.cat([rows.reshape(-1, 1) * speeds, columns.reshape(-1, 1) * speeds], 1)


def rotate(x_BMNE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+E/2}) of every token by its angle. cos_NE, sin_NE: (N, E/2)."""
    first, second = x_BMNE.chunk(2, dim=-1)
    turned = [first * cos_NE - second * sin_NE, first * sin_NE + second * cos_NE]
    return torch.cat(turned, -1).type_as(x_BMNE)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (B,N,C) → the same shape."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BNC: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
        x_BNC = x_BNC + self._attend(self.norm1(x_BNC), cos_NE, sin_NE)
        return x_BNC + self.mlp(self.norm2(x_BNC))

    def _attend(self, x_BNC: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
        B, N, C = x_BNC.shape
        q, k, v = self.qkv(x_BNC).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos_NE, sin_NE), rotate(k, cos_NE, sin_NE)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class Transformer(nn.Module):
    """Tokens on a grid (B,width_in,h,w) → (B,width_out,h,w): linear map, blocks, norm, linear · tanh · linear."""

    def __init__(self, width_in: int, width: int, layers: int, heads: int, width_out: int):
        super().__init__()
        self.head_dim = width // heads
        self.embed = nn.Linear(width_in, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, width_out))

    @property
    def last_weight(self) -> nn.Parameter:
        return self.head[-1].weight  # type: ignore[return-value]

    def forward(self, x_BChw: Tensor) -> Tensor:
        h, w = x_BChw.shape[2:]
        angles = rotary_angles(h, w, self.head_dim, x_BChw.device)
        cos_NE, sin_NE = angles.cos(), angles.sin()
        x_BNC = self.embed(x_BChw.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x_BNC = block(x_BNC, cos_NE, sin_NE)
        return self.head(self.norm(x_BNC)).transpose(1, 2).unflatten(2, (h, w))


@declared
class ViTEncoder(Backbone):
    """Pixels (B,3,H,W) in [-1,1] → latent (B,D,H/f,W/f), f = patch.

    patch: side of the square of pixels that becomes a token; width, layers, heads: of the transformer. ValueError
    unless width is a multiple of 4 · heads.
    """

    def __init__(self, latent_dim: int, patch: int = 8, width: int = 512, layers: int = 8, heads: int = 8):
        super().__init__()
        check_sizes(latent_dim, patch, width, layers, heads)
        self.downsample, self.latent_dim = patch, latent_dim
        self.transformer = Transformer(3 * patch**2, width, layers, heads, latent_dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.transformer(F.pixel_unshuffle(x_BCHW, self.downsample))


@declared
class ViTDecoder(Backbone):
    """Latent (B,D,h,w) → pixels (B,3,h·f,w·f), unbounded (the tokenizer clamps). Mirror of `ViTEncoder`."""

    def __init__(self, latent_dim: int, patch: int = 8, width: int = 512, layers: int = 8, heads: int = 8):
        super().__init__()
        check_sizes(latent_dim, patch, width, layers, heads)
        self.downsample, self.latent_dim = patch, latent_dim
        self.transformer = Transformer(latent_dim, width, layers, heads, 3 * patch**2)

    @property
    def last_weight(self) -> nn.Parameter:
        return self.transformer.last_weight

    def forward(self, z_BDhw: Tensor) -> Tensor:
        return F.pixel_shuffle(self.transformer(z_BDhw), self.downsample)
