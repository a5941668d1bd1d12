"""How good reconstructions are, and how well codes are used: one function each, for training and evaluation alike.

    psnr, ssim, ms_ssim                    pictures in pairs
    frechet_wavelet_distance               two sets of pictures, without weights from elsewhere
    kernel_distance, frechet_distance      two sets of feature vectors, from whatever network
    CodeUse, grid_bits, entropy_bits       codes

This file knows neither tokenizers, feature networks nor files: only pictures, vectors, and grids of integers.

Shapes: B pictures, C = 3 channels, H W pixels, h w grid, Q codes per cell (depth), K codes in the book;
N, M members of two sets, D numbers in a flattened wavelet packet or feature vector, P packets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 64  # pictures worked on at once: bounds the temporary memory of SSIM and of the first wavelet step
RANGE_TOLERANCE = 1e-4  # float32 rounding passes, an un-clamped decoder or a [0, 255] picture does not
SSIM_WINDOW = 11
MS_SSIM_SIDE = 16 * SSIM_WINDOW  # the window must fit after four halvings
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
    # Imported here: torchmetrics brings transformers along, two seconds that PSNR and FWD need not wait for.
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(a, b)
    _check_sides("ssim", a, SSIM_WINDOW, "its window")
    return _mean_in_chunks(structural_similarity_index_measure, a, b)


def ms_ssim(a: Tensor, b: Tensor) -> float:
    """Multi-scale structural similarity, mean over pictures (Wang, Simoncelli & Bovik 2003, five scales).

    As `ssim`, with sides of at least 176 pixels: the window must fit after four halvings. Contrast terms below zero
    count as zero, since a power of them is no number. ValueError as `psnr`, and on smaller pictures.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    _check_pair(a, b)
    _check_sides("ms_ssim", a, MS_SSIM_SIDE, "its window after four halvings")
    return _mean_in_chunks(multiscale_structural_similarity_index_measure, a, b)


def frechet_wavelet_distance(a: Tensor, b: Tensor, level: int | None = None) -> float:
    """Fréchet Wavelet Distance between two sets of pictures, in one call: see `FrechetWavelet`. 0: same sets.

    `a`: float (N, 3, H, W), `b`: float (M, 3, H, W), both in [-1, 1], N and M ≥ 2, not paired.
    ValueError on pictures as in `psnr`, fewer than two of them, or sides that 2^level does not divide.
    """
    _check_pictures(a, "first")
    _check_pictures(b, "second")
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"pictures of different sizes cannot be compared: {_size(a)} and {_size(b)}")
    first, second = FrechetWavelet(level), FrechetWavelet(level)
    first.update(a)
    second.update(b)
    return first.distance(second)


class FrechetWavelet:
    """One set of pictures as the Fréchet Wavelet Distance sees it (Veeramacheneni et al., arXiv 2312.15289).

    Each picture, mapped to [0, 1], is split into P = 4^level Haar wavelet packets; each packet p, flattened to
    D = 3·H·W/4^level numbers, has a mean μ and an unbiased covariance Σ over the set, and in float64
        FWD = mean over p of ‖μ − μ'‖² + Tr(Σ + Σ' − 2 (Σ Σ')^½).

    `level`: None takes `wavelet_level(H, W)`: 4 at 256 pixels as in the paper, less for smaller pictures.
    Report N (and the level) beside the value: few pictures bias it upwards, and values of different N, sizes or
    levels do not compare.

    Memory does not grow with the set: up to D pictures wait as they came, the rest is in P triangles of D + 1 numbers
    a side (5 MB at 64 px; 1.2 GB at 256 px, once there are more than 768 pictures). Time grows with P·D³.
    """

    def __init__(self, level: int | None = None):
        self.level, self.count = level, 0
        self._shape: tuple[int, int] | None = None
        self._waiting: list[Tensor] = []
        self._roots: list[Tensor] = []  # of each packet, over the pictures that no longer wait

    def update(self, x_BCHW: Tensor) -> None:
        """Add pictures, float (B, 3, H, W) in [-1, 1]. ValueError as `psnr`, on another size than before, and on
        sides that 2^level does not divide."""
        _check_pictures(x_BCHW, "the")
        height, width = x_BCHW.shape[-2:]
        if self._shape is None:
            self.level = wavelet_level(height, width) if self.level is None else self.level
            _check_level(self.level, height, width)
            self._shape = height, width
        if (height, width) != self._shape:
            raise ValueError(
                f"pictures of {_size(x_BCHW)} among pictures of {self._shape[1]}×{self._shape[0]} pixels"
            )
        self._waiting.append(x_BCHW.detach().cpu())
        self.count += len(x_BCHW)
        assert self.level is not None
        if sum(map(len, self._waiting)) > 3 * height * width // 4**self.level:
            self._join()

    def distance(self, other: FrechetWavelet) -> float:
        """FWD between the two sets. ValueError on fewer than 2 pictures in one of them, other sizes or levels."""
        if min(self.count, other.count) < 2:
            raise ValueError(
                f"a covariance needs at least 2 pictures in each set, got {self.count} and {other.count}"
            )
        if self._shape != other._shape or self.level != other.level:
            found = " and ".join(f"{s._shape} at level {s.level}" for s in (self, other))
            raise ValueError(f"sets of different sizes or levels cannot be compared: {found}")
        pairs = zip(self._joined(), other._joined(), strict=True)
        distances = [_frechet(*_moments(r), *_moments(s)) for r, s in pairs]
        # The pictures are still in [-1, 1]. Going to [0, 1] halves every difference and every deviation (the shift
        # cancels), and the distance is quadratic: a quarter, at no cost in memory.
        return max(0.0, float(torch.stack(distances).mean()) / 4)

    def _join(self) -> None:
        for index, root in enumerate(self._joined()):
            self._roots[index : index + 1] = [root]  # one by one: old and new ones are never all in memory
        self._waiting = []

    def _joined(self) -> Iterator[Tensor]:
        """Each packet's triangle over all pictures so far."""
        assert self.level is not None
        if not self._waiting:
            yield from self._roots
            return
        packets = _packets(torch.cat(self._waiting), self.level)
        for index, packet in enumerate(packets):
            yield _triangle(packet.flatten(1), self._roots[index] if index < len(self._roots) else None)


def kernel_distance(a_ND: Tensor, b_MD: Tensor) -> float:
    """Kernel distance between two sets of feature vectors: the squared maximum mean discrepancy, unbiased, with the
    kernel (x·y / D + 1)³ (Bińkowski et al., arXiv 1801.01401), over all members rather than over drawn subsets.

    In float64. Its expectation does not depend on N and M (at least 2), so that it serves small sets too; near zero it
    may be negative. ValueError on other shapes or values that are not finite.
    """
    a_ND, b_MD = _checked_features(a_ND, b_MD)
    within = [_mean_kernel(x, x, without_diagonal=True) for x in (a_ND, b_MD)]
    return sum(within) - 2 * _mean_kernel(a_ND, b_MD, without_diagonal=False)


def frechet_distance(a_ND: Tensor, b_MD: Tensor) -> float:
    """Squared Fréchet distance between the Gaussians of two sets of feature vectors (Heusel et al., arXiv 1706.08500).

    In float64. With N or M not well above D the covariances have not full rank and the value is biased upwards by
    much: prefer `kernel_distance` there. ValueError as there.
    """
    a_ND, b_MD = _checked_features(a_ND, b_MD)
    value = _frechet(*_moments(_triangle(a_ND)), *_moments(_triangle(b_MD)))
    return max(0.0, float(value))


def wavelet_level(height: int, width: int) -> int:
    """Default level of the FWD: packets keep sides of at least 4 pixels, 1 ≤ level ≤ 4, and 2^level divides both sides.

    32 px: 3, 64 px: 4, 256 px: 4. ValueError if a side is odd, for then there is no level at all.
    """
    level = min(max((min(height, width) // SMALLEST_PACKET).bit_length() - 1, 1), DEEPEST_LEVEL)
    while level > 1 and (height % 2**level or width % 2**level):
        level -= 1
    _check_level(level, height, width)
    return level


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


def grid_bits(height: int, width: int, depth: int, codebook_size: int) -> float:
    """Bits of one picture's codes, each written with log2 K bits: h · w · Q · log2 K."""
    return height * width * depth * math.log2(codebook_size)


def entropy_bits(height: int, width: int, perplexity: list[float]) -> float:
    """Bits of one picture's codes under an ideal entropy coder that knows how often each code of each depth occurs,
    and nothing of their neighbours: h · w · Σ over depths of log2 perplexity."""
    return height * width * sum(math.log2(each) for each in perplexity)


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


def _check_sides(metric: str, x_BCHW: Tensor, smallest: int, why: str) -> None:
    if min(x_BCHW.shape[-2:]) < smallest:
        raise ValueError(f"{metric} needs sides of at least {smallest} pixels ({why}), got {_size(x_BCHW)}")


def _mean_in_chunks(similarity: Callable[..., Any], a: Tensor, b: Tensor) -> float:
    """One of torchmetrics' similarities on unit intensities, mean over pictures."""
    values = [
        similarity(_unit(p), _unit(q), data_range=1.0, reduction="none").double().reshape(-1)
        for p, q in zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    ]
    return float(torch.cat(values).mean())


def _squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each picture, float64 (B,)."""
    return (a.double() - b.double()).square().mean(dim=(1, 2, 3))


# --- wavelet packets ------------------------------------------------------------------------------------------


def _check_level(level: int, height: int, width: int) -> None:
    if level < 1 or height % 2**level or width % 2**level:
        divisor = 2 ** max(level, 1)
        raise ValueError(
            f"wavelet level {level} needs sides divisible by {divisor}, got {width}×{height} pixels"
        )


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


# --- sets of vectors ------------------------------------------------------------------------------------------


def _checked_features(a_ND: Tensor, b_MD: Tensor) -> tuple[Tensor, Tensor]:
    for which, x_ND in (("first", a_ND), ("second", b_MD)):
        if x_ND.ndim != 2 or len(x_ND) < 2 or not x_ND.is_floating_point():
            raise ValueError(
                f"{which} features must be float (N ≥ 2, D), got {x_ND.dtype} {tuple(x_ND.shape)}"
            )
        if not torch.isfinite(x_ND).all():
            raise ValueError(f"{which} features hold NaN or infinite values")
    if a_ND.shape[1] != b_MD.shape[1]:
        raise ValueError(f"features of different widths: {a_ND.shape[1]} and {b_MD.shape[1]}")
    return a_ND.double(), b_MD.double()


def _mean_kernel(x_ND: Tensor, y_MD: Tensor, without_diagonal: bool) -> float:
    """Mean of (x·y / D + 1)³ over all pairs; `without_diagonal` leaves out each member with itself (x is y)."""
    total = sum(float(_kernel(part, y_MD).sum()) for part in x_ND.split(CHUNK * 16))
    if without_diagonal:
        alone = float(((x_ND.square().sum(dim=1) / x_ND.shape[1] + 1) ** 3).sum())
        return (total - alone) / (len(x_ND) * (len(x_ND) - 1))
    return total / (len(x_ND) * len(y_MD))


def _kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3


def _triangle(x_ND: Tensor, before: Tensor | None = None) -> Tensor:
    """N, mean and covariance of vectors in one matrix of at most D + 1 rows: R of the QR factors of [1 | x].

    Its first row is ±√N · [1 | mean]; below, behind the first column, stands a root of the centred sum of squares,
    because every other column of Q is orthogonal to the ones. `before`: the matrix of other vectors, which join.
    Factors lose no digits, as sums of outer products would: those square the condition number.
    """
    rows = torch.cat([torch.ones_like(x_ND[:, :1]), x_ND], dim=1)
    return torch.linalg.qr(rows if before is None else torch.cat([before, rows]), mode="r").R


def _moments(triangle: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D), and r of at most D rows with rᵀr = the unbiased covariance."""
    first = triangle[0]
    count = round(float(first[0].square()))
    return first[1:] / first[0], triangle[1:, 1:] / math.sqrt(count - 1)


def _frechet(mean: Tensor, r: Tensor, other_mean: Tensor, s: Tensor) -> Tensor:
    """Squared Fréchet distance between two Gaussians, from means and roots of covariances."""
    # With Σ = rᵀr and Σ' = sᵀs, the eigenvalues of Σ^½ Σ' Σ^½ are the squared singular values of r sᵀ. Taking those
    # keeps full precision: roots of eigenvalues that should be 0 would add noise of 1e-8 each.
    overlap = torch.linalg.svdvals(r @ s.T).sum()
    return (mean - other_mean).square().sum() + r.square().sum() + s.square().sum() - 2 * overlap
