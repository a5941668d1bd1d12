"""How far decoded pixels are from the picture: as they are, or split into scales first.

The splits (`wavelet_bands`, `laplacian_bands`) are linear, so they are taken of the difference of two pictures, and
each has its inverse beside it. Nothing here has weights. Knows nothing of codes.

Legend: B batch, C H W picture, h w a band.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vq.batches import PictureBatch
from vq.losses import Shapes, Weighted, sides
from vq.tokenizer import ImageTokenizer, Reconstruction
from vqlm.errors import ConfigError

_R = math.sqrt(3)
# Low-pass filters with sum √2 and norm 1 (Daubechies 1988), by number of vanishing moments.
LOW_PASS = {
    "haar": [math.sqrt(0.5)] * 2,
    "db2": [each / (4 * math.sqrt(2)) for each in (1 + _R, 3 + _R, 3 - _R, 1 - _R)],
}
BINOMIAL = [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]
SMALLEST_BLURRED = 3  # the binomial filter mirrors two pixels at a border


class Squared(Weighted):
    """weight · mean((x - x̂)²), pixels in [-1,1]: its minimum has the best PSNR."""

    def __call__(self, batch: PictureBatch, made: Reconstruction) -> Tensor:
        return self.weight * (made.x_BCHW - batch.x_BCHW).square().mean()


class Absolute(Weighted):
    """weight · mean(|x - x̂|): sharper edges than `Squared` at a little PSNR."""

    def __call__(self, batch: PictureBatch, made: Reconstruction) -> Tensor:
        return self.weight * (made.x_BCHW - batch.x_BCHW).abs().mean()


class Wavelet(Weighted):
    """weight · mean over scales of mean(|coefficients of x - x̂|), those of a 2-D discrete wavelet transform.

    The scales are the details of each level and what is left after the last; each has the same say, however few its
    coefficients, so that an error over a large area counts for more than the same sum of scattered ones. The
    transform is orthonormal: noise has the same size at each scale. levels: sides are halved so many times.
    wavelet: "haar" or the smoother "db2".
    """

    def __init__(self, weight: float = 1.0, levels: int = 3, wavelet: Literal["haar", "db2"] = "haar"):
        super().__init__(weight)
        if not 1 <= levels <= 8:
            raise ValueError(f"levels={levels}: from 1 to 8")
        if wavelet not in LOW_PASS:
            raise ValueError(f"wavelet={wavelet!r}: one of {', '.join(LOW_PASS)}")
        self.levels, self.wavelet = levels, wavelet

    def check(self, tokenizer: ImageTokenizer, shapes: Shapes = ()) -> None:
        size = next((side for side in sides(tokenizer, shapes) if side % 2**self.levels), 0)
        if size:
            most = (size & -size).bit_length() - 1
            raise ConfigError(
                f"Wavelet: levels={self.levels} needs sides that {2**self.levels} divides, pictures are of {size} px: "
                + (
                    f"at most levels={most}"
                    if most
                    else "odd sides cannot be halved; the loss laplacian takes any"
                )
            )

    def __call__(self, batch: PictureBatch, made: Reconstruction) -> Tensor:
        bands = wavelet_bands(made.x_BCHW - batch.x_BCHW, self.levels, self.wavelet)
        return self.weight * torch.stack([band.abs().mean() for band in bands]).mean()


class Laplacian(Weighted):
    """weight · mean over scales of mean(|band of x - x̂|), the bands of a Laplacian pyramid.

    As in Bojanowski et al. 2018 (arXiv 1707.05776), where the band at scale j has weight 4^j and so each pixel of a
    coarse band that of all the pixels it stands for; ours is that sum divided by H·W and the number of bands. Unlike
    `Wavelet`, an error keeps its size when it moves by a pixel. levels: sides are halved so many times.
    """

    def __init__(self, weight: float = 1.0, levels: int = 3):
        super().__init__(weight)
        if not 1 <= levels <= 8:
            raise ValueError(f"levels={levels}: from 1 to 8")
        self.levels = levels

    def check(self, tokenizer: ImageTokenizer, shapes: Shapes = ()) -> None:
        size = sides(tokenizer, shapes)[0]
        if halved(size, self.levels - 1) < SMALLEST_BLURRED:
            most = max((n for n in range(1, 9) if halved(size, n - 1) >= SMALLEST_BLURRED), default=0)
            raise ConfigError(
                f"Laplacian: levels={self.levels} is too deep for pictures of {size} px: at most levels={most}"
            )

    def __call__(self, batch: PictureBatch, made: Reconstruction) -> Tensor:
        bands = laplacian_bands(made.x_BCHW - batch.x_BCHW, self.levels)
        return self.weight * torch.stack([band.abs().mean() for band in bands]).mean()


# --- wavelets -------------------------------------------------------------------------------------------------


def wavelet_bands(x_BCHW: Tensor, levels: int, wavelet: str = "haar") -> list[Tensor]:
    """Pictures, float32 or float64 → bands: (B,3·C,h,w) for each level, finest first; then the rest, (B,C,h,w).

    h = H/2^level. Channels of details: for each c, horizontal, vertical, diagonal. Periodic at the borders, so the
    transform is orthonormal at every size. The same numbers as PyWavelets' `wavedec2(mode="periodization")`.
    ValueError unless 2^levels divides both sides.
    """
    height, width = x_BCHW.shape[2:]
    if height % 2**levels or width % 2**levels:
        raise ValueError(
            f"pictures of {height}x{width} px: levels={levels} needs sides that 2^levels divides"
        )
    filters = _filters(x_BCHW, wavelet)
    bands, rest = [], x_BCHW
    for _ in range(levels):
        split = _split(rest, filters)
        rest = split[:, :, 0]
        bands.append(split[:, :, 1:].flatten(1, 2))
    return [*bands, rest]


def from_wavelet_bands(bands: list[Tensor], wavelet: str = "haar") -> Tensor:
    """The inverse of `wavelet_bands`: (B,C,H,W)."""
    filters = _filters(bands[-1], wavelet)
    rest = bands[-1]
    for band in reversed(bands[:-1]):
        rest = _join(torch.cat([rest.unsqueeze(2), band.unflatten(1, (-1, 3))], 2), filters)
    return rest


def _filters(like: Tensor, wavelet: str) -> Tensor:
    """(4,1,n,n): low-low, then details: horizontal (low along width), vertical, diagonal."""
    low = torch.tensor(LOW_PASS[wavelet], dtype=torch.float64)
    high = low.flip(0) * (-1.0) ** torch.arange(len(low))
    pairs = [(low, low), (high, low), (low, high), (high, high)]
    kernels = torch.stack([torch.outer(down, along) for down, along in pairs])
    return kernels.unsqueeze(1).to(like)


def _split(x_BCHW: Tensor, filters: Tensor) -> Tensor:
    """(B,C,H,W) → (B,C,4,H/2,W/2)."""
    B, C, height, width = x_BCHW.shape
    reach = (filters.shape[-1] - 2) // 2
    rows = torch.arange(-reach, height + reach, device=x_BCHW.device) % height
    columns = torch.arange(-reach, width + reach, device=x_BCHW.device) % width
    around = x_BCHW.reshape(B * C, 1, height, width)[:, :, rows][:, :, :, columns]
    with torch.autocast(x_BCHW.device.type, enabled=False):
        split = F.conv2d(around, filters, stride=2)
    return split.unflatten(0, (B, C))


def _join(split_BC4hw: Tensor, filters: Tensor) -> Tensor:
    """The transpose of `_split`, which is its inverse, for the rows of the transform are orthonormal."""
    B, C, _, h, w = split_BC4hw.shape
    around = F.conv_transpose2d(split_BC4hw.flatten(0, 1), filters, stride=2)
    reach = (filters.shape[-1] - 2) // 2
    rows = torch.arange(-reach, 2 * h + reach, device=around.device) % (2 * h)
    columns = torch.arange(-reach, 2 * w + reach, device=around.device) % (2 * w)
    folded = around.new_zeros(B * C, 1, 2 * h, around.shape[3]).index_add_(2, rows, around)
    folded = around.new_zeros(B * C, 1, 2 * h, 2 * w).index_add_(3, columns, folded)
    return folded.reshape(B, C, 2 * h, 2 * w)


# --- Laplacian pyramid ----------------------------------------------------------------------------------------


def halved(size: int, times: int) -> int:
    """A side after so many halvings, each rounded up."""
    return -(-size // 2**times)


def laplacian_bands(x_BCHW: Tensor, levels: int) -> list[Tensor]:
    """Pictures, float32 or float64 → bands (B,C,h,w), finest first; the last is what is left, blurred and thinned out.

    Burt & Adelson 1983 with the binomial filter [1 4 6 4 1]/16, mirrored at the borders; sides of any parity are
    halved rounding up. ValueError where a side is below 3 before it is halved.
    """
    bands, rest = [], x_BCHW
    for _ in range(levels):
        if min(rest.shape[2:]) < SMALLEST_BLURRED:
            height, width = x_BCHW.shape[2:]
            raise ValueError(f"pictures of {height}x{width} px are too small for levels={levels}")
        coarse = _blurred(rest)[:, :, ::2, ::2]
        bands.append(rest - _widened(coarse, rest))
        rest = coarse
    return [*bands, rest]


def from_laplacian_bands(bands: list[Tensor]) -> Tensor:
    """The inverse of `laplacian_bands`: (B,C,H,W)."""
    rest = bands[-1]
    for band in reversed(bands[:-1]):
        rest = band + _widened(rest, band)
    return rest


def _blurred(x_BCHW: Tensor, factor: float = 1.0) -> Tensor:
    side = torch.tensor(BINOMIAL, dtype=x_BCHW.dtype, device=x_BCHW.device)
    kernel = (factor * torch.outer(side, side)).expand(x_BCHW.shape[1], 1, 5, 5)
    around = F.pad(x_BCHW, (2, 2, 2, 2), mode="reflect")
    with torch.autocast(x_BCHW.device.type, enabled=False):
        return F.conv2d(around, kernel, groups=x_BCHW.shape[1])


def _widened(coarse: Tensor, like: Tensor) -> Tensor:
    """Pixels put two apart, zeros between them, blurred: (B,C,h,w) → the size of `like`."""
    spread = torch.zeros_like(like)
    spread[:, :, ::2, ::2] = coarse
    return _blurred(spread, 4.0)
