"""Known harm to pictures, in steps: what a metric of pictures must notice, and what shows which harm it weighs most.

    blur      Gaussian, strength σ in pixels           jpeg      100 − quality
    noise     white Gaussian, strength σ               hue       share of a whole turn
    shuffle   cells a side that are permuted           low, high noise of one band, strength σ

Strength 0 is the picture itself. `low` and `high` have equal energy, to the last digit, wherever nothing is clipped:
two harms of one PSNR that differ in frequency alone. The others are those of the papers that judge such metrics
(Heusel et al., arXiv 1706.08500, appendix A1; Veeramacheneni et al., arXiv 2312.15289).

It knows no metric and no data set: pictures in, pictures out.

Shape suffixes: B pictures, C = 3 channels, H W pixels, g cells a side.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vq.images import from_bytes, picture_bytes, to_image
from vqlm.errors import ConfigError, nearest

LOW = 1 / 8  # cycles a pixel: `low` ends here,
HIGH = 1 / 4  # and `high` begins; 1/2 is the finest that pixels can show along an axis


def distort(name: str, x_BCHW: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """Pictures float (B, 3, H, W) in [-1, 1] → the same, harmed and clamped to that range.

    name: of `DISTORTIONS`. random: what is drawn is a function of its state alone.

    Raises:
        ConfigError: an unknown name, a strength out of range.
        ValueError: pictures too small for the band or the cells.
    """
    check_strength(name, strength)
    if not strength:
        return x_BCHW
    return DISTORTIONS[name].harm(x_BCHW, strength, random).clamp(-1, 1)


def check_strength(name: str, strength: float) -> None:
    """ConfigError unless `name` is a distortion and `strength` one of its strengths."""
    if name not in DISTORTIONS:
        raise ConfigError(f"{name!r} is no distortion: {', '.join(DISTORTIONS)}{nearest(name, DISTORTIONS)}")
    most = DISTORTIONS[name].most
    if not 0 <= strength <= most:
        raise ConfigError(f"{name}: strength {strength}: from 0 (nothing) to {most:g}")


# --- one by one -----------------------------------------------------------------------------------------------


def blur(x_BCHW: Tensor, sigma: float, random: torch.Generator) -> Tensor:
    """Gaussian of `sigma` pixels, cut off at 4σ; the border's pixels go on beyond it."""
    reach = math.ceil(4 * sigma)
    places = torch.arange(-reach, reach + 1, dtype=x_BCHW.dtype)
    weights = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = (weights / weights.sum()).expand(x_BCHW.shape[1], 1, 1, -1)
    padded = F.pad(x_BCHW, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel, groups=x_BCHW.shape[1])
    return F.conv2d(across, kernel.transpose(2, 3), groups=x_BCHW.shape[1])


def jpeg(x_BCHW: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """Through the codec at quality 100 − strength, with Pillow's usual subsampling of colour (4:2:0)."""
    made = []
    for x_CHW in x_BCHW:
        with io.BytesIO() as buffer:
            to_image(x_CHW).save(buffer, "JPEG", quality=round(100 - strength))
            made.append(picture_bytes(Image.open(buffer)))
    return from_bytes(torch.stack(made))


def noise(x_BCHW: Tensor, sigma: float, random: torch.Generator) -> Tensor:
    return x_BCHW + sigma * torch.randn(x_BCHW.shape, generator=random)


def hue(x_BCHW: Tensor, turn: float, random: torch.Generator) -> Tensor:
    """Every colour's hue turned by a share of the circle; its largest and smallest channel (so HSV's value and
    saturation) stay. A third of a turn makes red green, green blue, and blue red."""
    top, bottom = x_BCHW.amax(1), x_BCHW.amin(1)
    spread = (top - bottom).clamp(min=1e-12)  # of grey: whatever the hue, all three channels come out alike
    r, g, b = x_BCHW.unbind(1)
    sixths = torch.where(
        top == r,
        (g - b) / spread,
        torch.where(top == g, 2 + (b - r) / spread, 4 + (r - g) / spread),
    )
    turned = sixths + 6 * turn
    # Channel n of a hue of h sixths, from HSV's definition: full within one sixth of its own colour, none beyond two.
    channels = [(2 - ((turned - own + 3) % 6 - 3).abs()).clamp(0, 1) for own in (0, 2, 4)]
    return torch.stack([bottom + (top - bottom) * each for each in channels], dim=1)


def shuffle(x_BCHW: Tensor, cells: float, random: torch.Generator) -> Tensor:
    """Cut into g×g cells (sides are cut short to a multiple of g, the rest stays) which are permuted, another way in
    each picture. More cells leave less of what is drawn, and every pixel's value is kept."""
    g = round(cells)
    B, C, H, W = x_BCHW.shape
    high, wide = H // g, W // g
    if not high or not wide:
        raise ValueError(f"{W}×{H} pixels cannot be cut into {g}×{g} cells")
    cut = x_BCHW[:, :, : g * high, : g * wide].reshape(B, C, g, high, g, wide)
    cells_BgChw = cut.permute(0, 2, 4, 1, 3, 5).reshape(B, g * g, C, high, wide)
    order_Bg = torch.rand(B, g * g, generator=random).argsort(1)
    moved = cells_BgChw[torch.arange(B)[:, None], order_Bg].reshape(B, g, g, C, high, wide)
    made = x_BCHW.clone()
    made[:, :, : g * high, : g * wide] = (
        moved.permute(0, 3, 1, 4, 2, 5).reshape(cut.shape).flatten(4).flatten(2, 3)
    )
    return made


def low(x_BCHW: Tensor, sigma: float, random: torch.Generator) -> Tensor:
    return x_BCHW + sigma * band_noise(x_BCHW.shape, 0, LOW, random)


def high(x_BCHW: Tensor, sigma: float, random: torch.Generator) -> Tensor:
    return x_BCHW + sigma * band_noise(x_BCHW.shape, HIGH, 1, random)


def band_noise(shape: torch.Size, least: float, most: float, random: torch.Generator) -> Tensor:
    """Gaussian noise float32 of shape (B, C, H, W) whose frequencies f (cycles a pixel, √(fx² + fy²)) lie in
    least ≤ f ≤ most, the mean (f = 0) left out. Its mean square is 1 in each picture, exactly and not on average.

    ValueError where the pictures are too small to have such a frequency.
    """
    H, W = shape[-2:]
    white = torch.randn(shape, generator=random, dtype=torch.float64)
    f_HW = torch.hypot(torch.fft.fftfreq(H).double()[:, None], torch.fft.rfftfreq(W).double()[None])
    kept = (f_HW >= least) & (f_HW <= most) & (f_HW > 0)
    if not kept.any():
        raise ValueError(
            f"pictures of {W}×{H} pixels have no frequency from {least} to {most} cycles a pixel"
        )
    made = torch.fft.irfft2(torch.fft.rfft2(white) * kept, s=(H, W))
    return (made / made.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()).float()


class Distortion(NamedTuple):
    """harm: (pictures, strength, random) → pictures. most: the largest strength that has a meaning."""

    harm: Callable[[Tensor, float, torch.Generator], Tensor]
    most: float


DISTORTIONS = {
    "blur": Distortion(blur, 64),
    "jpeg": Distortion(jpeg, 99),
    "noise": Distortion(noise, 2),
    "hue": Distortion(hue, 1),
    "shuffle": Distortion(shuffle, 64),
    "low": Distortion(low, 2),
    "high": Distortion(high, 2),
}
