"""How good reconstructions are, and how well codes are used: one function each, for training and evaluation alike.

Pictures are compared as they are, without weights from elsewhere: PSNR, SSIM and the Fréchet Wavelet Distance.
This file knows neither tokenizers nor files: only pictures, and grids of integers.

Shapes: B pictures, C = 3 channels, H W pixels, h w grid, Q codes per cell (depth), K codes in the book;
N, M pictures of two sets, D numbers in a flattened wavelet packet.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 64  # pictures worked on at once: bounds the temporary memory of SSIM and of the first wavelet step
RANGE_TOLERANCE = 1e-4  # float32 rounding passes, an un-clamped decoder or a [0, 255] picture does not
SSIM_WINDOW = 11
SMALLEST_PACKET = 4  # sides of a wavelet packet at the default level, where the picture allows it
DEEPEST_LEVEL = 4


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB: per picture, then the mean over pictures.

    `a`, `b`: float (B, 3, H, W) in [-1, 1], so the peak is 2. An identical pair counts as infinite, and one such
    pair makes the mean infinite: nothing is capped. The same as torchmetrics with `data_range=2, dim=(1, 2, 3)`.
    ValueError on other shapes, integer pictures, values outside [-1, 1], NaN, or no pictures.
    """
    _check_pair(a, b)
    errors_B = torch.cat([_squared_error(p, q) for p, q in zip(a.split(CHUNK), b.split(CHUNK), strict=True)])
    return float((10 * torch.log10(4 / errors_B)).mean())


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity, mean over pictures: 1 for identical ones (Wang et al. 2004; Gaussian window 11, σ 1.5).

    `a`, `b`: float (B, 3, H, W) in [-1, 1] with sides of at least 11 pixels. They are mapped to [0, 1] first, since
    the luminance term supposes intensities that are not negative; the rest is torchmetrics with `data_range=1`: one
    window for each pixel, mirrored at the border (the authors' own script takes inner windows only).
    ValueError as `psnr`, and on smaller pictures.
    """
    _check_pair(a, b)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim needs sides of at least {SSIM_WINDOW} pixels (its window), got {_size(a)}")
    # Imported here: torchmetrics brings transformers along, two seconds that PSNR and FWD need not wait for.
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = []
    for p, q in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
        value_B = structural_similarity_index_measure(_unit(p), _unit(q), data_range=1.0, reduction="none")
        assert isinstance(value_B, Tensor)  # a tuple only where the full map is asked for
        values.append(value_B.double().reshape(-1))
    return float(torch.cat(values).mean())


def frechet_wavelet_distance(a: Tensor, b: Tensor, level: int | None = None) -> float:
    """Fréchet Wavelet Distance between two sets of pictures (Veeramacheneni et al., arXiv 2312.15289). 0: same sets.

    `a`: float (N, 3, H, W), `b`: float (M, 3, H, W), both in [-1, 1], N and M ≥ 2, not paired. Each picture, mapped
    to [0, 1], is split into 4^level Haar wavelet packets; each packet p, flattened to D = 3·H·W/4^level numbers, has
    a mean μ and an unbiased covariance Σ over the set, and
        FWD = mean over p of ‖μ − μ'‖² + Tr(Σ + Σ' − 2 (Σ Σ')^½),
    in float64. `level` defaults to `wavelet_level(H, W)`: 4 at 256 pixels as in the paper, less for smaller pictures.

    Report N (and the level) beside the value: few pictures bias it upwards, and values of different N, sizes or
    levels do not compare. Time grows with 4^level · D³, memory with about 2/3 of the larger set as float32.
    ValueError on pictures as in `psnr`, fewer than two of them, or sides that 2^level does not divide.
    """
    _check_pictures(a, "first")
    _check_pictures(b, "second")
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"pictures of different sizes cannot be compared: {_size(a)} and {_size(b)}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs at least 2 pictures in each set, got {len(a)} and {len(b)}")
    level = wavelet_level(*a.shape[-2:]) if level is None else _checked_level(level, *a.shape[-2:])
    pairs = zip(_packets(a, level), _packets(b, level), strict=True)
    distances = [_frechet(p.flatten(1), q.flatten(1)) for p, q in pairs]
    # The pictures are still in [-1, 1]. Going to [0, 1] halves every difference and every deviation (the shift
    # cancels), and the distance is quadratic: a quarter, at no cost in memory.
    return max(0.0, float(torch.stack(distances).mean()) / 4)


def wavelet_level(height: int, width: int) -> int:
    """Default level of the FWD: packets keep sides of at least 4 pixels, 1 ≤ level ≤ 4, and 2^level divides both sides.

    32 px: 3, 64 px: 4, 256 px: 4. ValueError if a side is odd, for then there is no level at all.
    """
    level = min(max((min(height, width) // SMALLEST_PACKET).bit_length() - 1, 1), DEEPEST_LEVEL)
    while level > 1 and (height % 2**level or width % 2**level):
        level -= 1
    return _checked_level(level, height, width)


class CodeUse:
    """Counts how often each code of each depth is drawn, over as many batches as are given.

    Use, perplexity and dead codes mean something over a whole set, not over a batch: feed all of it, then read.
    """

    def __init__(self, depth: int, codebook_size: int):
        if depth < 1 or codebook_size < 1:
            raise ValueError(f"depth and codebook_size must be at least 1, got {depth} and {codebook_size}")
        self.counts_QK = torch.zeros(depth, codebook_size, dtype=torch.int64)

    def update(self, codes_BhwQ: Tensor) -> None:
        """Count integer codes (…, Q) in [0, K). ValueError on another depth or a code outside the codebook."""
        depth, size = self.counts_QK.shape
        if codes_BhwQ.is_floating_point() or codes_BhwQ.ndim < 1 or codes_BhwQ.shape[-1] != depth:
            found = f"{codes_BhwQ.dtype} of shape {tuple(codes_BhwQ.shape)}"
            raise ValueError(f"codes must be integers with depth {depth} as last dimension, got {found}")
        if codes_BhwQ.numel() == 0:
            return
        codes_MQ = codes_BhwQ.reshape(-1, depth).long()
        if codes_MQ.min() < 0 or codes_MQ.max() >= size:
            raise ValueError(
                f"codes outside [0, {size}): found {int(codes_MQ.min())} … {int(codes_MQ.max())}"
            )
        rows_MQ = codes_MQ + size * torch.arange(depth, device=codes_MQ.device)
        counts = torch.bincount(rows_MQ.flatten(), minlength=depth * size)
        self.counts_QK += counts.reshape(depth, size).to(self.counts_QK.device)

    def result(self) -> dict[str, list[float] | list[int]]:
        """Lists with one entry per depth: `used` (fraction of K drawn at least once), `perplexity` (exp of the
        entropy in nats, 1 … K) and `dead` (number of codes never drawn). ValueError before any code was counted."""
        if not int(self.counts_QK.sum()):
            raise ValueError("no codes were counted yet")
        p_QK = self.counts_QK.double() / self.counts_QK.sum(dim=1, keepdim=True)
        entropy_Q = -torch.special.xlogy(p_QK, p_QK).sum(dim=1)
        used_Q = (self.counts_QK > 0).sum(dim=1)
        size = self.counts_QK.shape[1]
        return {
            "used": [int(n) / size for n in used_Q],
            "perplexity": [float(h) for h in entropy_Q.exp()],
            "dead": [size - int(n) for n in used_Q],
        }


def code_use(codes_BhwQ: Tensor, K: int) -> dict[str, list[float] | list[int]]:
    """`CodeUse.result` of one tensor of codes (…, Q) with K codes per depth."""
    use = CodeUse(codes_BhwQ.shape[-1], K)
    use.update(codes_BhwQ)
    return use.result()


# --- pictures -------------------------------------------------------------------------------------------------


def _check_pictures(x_BCHW: Tensor, which: str) -> None:
    """ValueError unless float (B ≥ 1, 3, H, W), finite and in [-1, 1]."""
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] != 3 or x_BCHW.numel() == 0:
        raise ValueError(f"{which} pictures must be (B, 3, H, W) with B ≥ 1, got {tuple(x_BCHW.shape)}")
    if not x_BCHW.is_floating_point():
        raise ValueError(f"{which} pictures must be float in [-1, 1], got {x_BCHW.dtype}")
    low, high = (float(v) for v in torch.aminmax(x_BCHW))  # NaN spreads into both
    if not (low >= -1 - RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(f"{which} pictures must lie in [-1, 1], found values from {low:.4g} to {high:.4g}")


def _check_pair(a: Tensor, b: Tensor) -> None:
    _check_pictures(a, "first")
    _check_pictures(b, "second")
    if a.shape != b.shape:
        raise ValueError(f"pictures are compared in pairs, got shapes {tuple(a.shape)} and {tuple(b.shape)}")


def _size(x_BCHW: Tensor) -> str:
    return f"{x_BCHW.shape[-1]}×{x_BCHW.shape[-2]} pixels"


def _unit(x_BCHW: Tensor) -> Tensor:
    """[-1, 1] → [0, 1], float32."""
    return (x_BCHW.float() + 1) / 2


def _squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each picture, float64 (B,)."""
    return (a.double() - b.double()).square().mean(dim=(1, 2, 3))


# --- Fréchet Wavelet Distance ---------------------------------------------------------------------------------


def _checked_level(level: int, height: int, width: int) -> int:
    if level < 1 or height % 2**level or width % 2**level:
        divisor = 2 ** max(level, 1)
        raise ValueError(
            f"wavelet level {level} needs sides divisible by {divisor}, got {width}×{height} pixels"
        )
    return level


def _packets(x_BCHW: Tensor, level: int) -> Iterator[Tensor]:
    """The 4^level Haar packets (B, C, H/2^level, W/2^level) float64, depth first: one path of the tree is in memory."""
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        band = torch.cat([_band(part, *signs) for part in x_BCHW.split(CHUNK)])
        if level == 1:
            yield band
        else:
            yield from _packets(band, level - 1)


def _band(x_BCHW: Tensor, down: int, across: int) -> Tensor:
    """One of the four Haar bands: ½ (a ± b ± c ± d) over blocks of 2×2 pixels; the sign −1 takes the difference."""
    x_BCHW = x_BCHW.double()
    rows = x_BCHW[..., 0::2, :] + down * x_BCHW[..., 1::2, :]
    return (rows[..., 0::2] + across * rows[..., 1::2]) / 2


def _frechet(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """Squared Fréchet distance between the Gaussians of two samples."""
    r, s = _root(x_ND), _root(y_MD)
    shift = (x_ND.mean(dim=0) - y_MD.mean(dim=0)).square().sum()
    # With Σ = rᵀr and Σ' = sᵀs, the eigenvalues of Σ^½ Σ' Σ^½ are the squared singular values of r sᵀ. Taking those
    # keeps full precision: roots of eigenvalues that should be 0 would add noise of 1e-8 each.
    overlap = torch.linalg.svdvals(r @ s.T).sum()
    return shift + r.square().sum() + s.square().sum() - 2 * overlap


def _root(x_ND: Tensor) -> Tensor:
    """A matrix r of at most D rows with rᵀr = the unbiased covariance of x."""
    centred_ND = (x_ND - x_ND.mean(dim=0)) / (len(x_ND) - 1) ** 0.5
    if len(centred_ND) <= centred_ND.shape[1]:
        return centred_ND
    return torch.linalg.qr(centred_ND, mode="r").R
