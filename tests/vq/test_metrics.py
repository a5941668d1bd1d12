"""Metrics against torchmetrics, against slow independent implementations, and against what they must mean."""

import math

import numpy as np
import pytest
import torch

from vq import metrics
from vq.metrics import (
    CodeUse,
    FrechetWavelet,
    code_use,
    entropy_bits,
    frechet_distance,
    frechet_wavelet_distance,
    grid_bits,
    kernel_distance,
    ms_ssim,
    psnr,
    ssim,
    wavelet_level,
)


def pictures(n, side=16, seed=0, width=None):
    """Made pictures in [-1, 1], blocks of plain colour with a little grain: (n, 3, side, width)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(n, 3, 4, 4, generator=generator) * 1.6 - 0.8
    sharp = torch.nn.functional.interpolate(blocks, size=(side, width or side), mode="nearest")
    return sharp + (torch.rand(sharp.shape, generator=generator) - 0.5) * 0.2


def noisy(x, amount, seed=1):
    return (x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(-1, 1)


# --- PSNR and SSIM


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    assert psnr(a, b) == pytest.approx(
        (20 + 40) / 2
    )  # 10 log10(4 / 0.04), 10 log10(4 / 0.0004); not one pooled MSE


def test_psnr_agrees_with_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a = pictures(70)
    b = noisy(a, 0.1)
    theirs = peak_signal_noise_ratio(a, b, data_range=2.0, dim=(1, 2, 3))
    assert psnr(a, b) == pytest.approx(float(theirs), abs=1e-4)


def test_psnr_of_identical_pictures_is_infinite():
    assert psnr(pictures(3), pictures(3)) == math.inf


def slow_ssim(a, b):
    """One channel at a time, one window a pixel, in [0, 1]: the formula of the paper, borders mirrored."""
    offsets = np.arange(11) - 5
    g = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(g, g) / np.outer(g, g).sum()
    values = []
    for p, q in zip((a.double().numpy() + 1) / 2, (b.double().numpy() + 1) / 2, strict=True):
        for x, y in zip(p, q, strict=True):
            x, y = np.pad(x, 5, mode="reflect"), np.pad(y, 5, mode="reflect")
            for i in range(x.shape[0] - 10):
                for j in range(x.shape[1] - 10):
                    u, v = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                    mu, mv = (window * u).sum(), (window * v).sum()
                    uu, vv = (window * u * u).sum() - mu * mu, (window * v * v).sum() - mv * mv
                    uv = (window * u * v).sum() - mu * mv
                    c1, c2 = 0.01**2, 0.03**2
                    values.append(
                        (2 * mu * mv + c1) * (2 * uv + c2) / ((mu**2 + mv**2 + c1) * (uu + vv + c2))
                    )
    return np.mean(values)


def test_ssim_equals_the_formula_on_unit_intensities():
    a = pictures(2, side=14, width=13)
    b = noisy(a, 0.3)
    assert ssim(a, b) == pytest.approx(slow_ssim(a, b), abs=1e-4)
    assert ssim(a, a) == pytest.approx(1.0)


def test_ssim_is_a_mean_over_all_pictures(monkeypatch):
    a = pictures(5)
    b = noisy(a, 0.3)
    each = [ssim(a[i : i + 1], b[i : i + 1]) for i in range(5)]
    monkeypatch.setattr(metrics, "CHUNK", 2)  # the last chunk is smaller and must not weigh more
    assert ssim(a, b) == pytest.approx(np.mean(each), abs=1e-6)
    assert len(set(each)) == 5


def test_ssim_of_a_small_picture_says_why():
    with pytest.raises(ValueError, match=r"at least 11 pixels.*16×10"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


def slow_ms_ssim(a, b):
    """One picture: per channel, contrast · structure at four scales and SSIM at the fifth, to the paper's powers."""
    offsets = np.arange(11) - 5
    g = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(g, g) / np.outer(g, g).sum()
    c1, c2 = 0.01**2, 0.03**2

    def filtered(x):
        from scipy.signal import correlate2d

        return correlate2d(np.pad(x, 5, mode="reflect"), window, mode="valid")

    x, y = ((each.double().numpy() + 1) / 2 for each in (a, b))
    product = 1.0
    for scale, power in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        terms = []
        for u, v in zip(x, y, strict=True):
            mu, mv = filtered(u), filtered(v)
            uu, vv = filtered(u * u) - mu * mu, filtered(v * v) - mv * mv
            structure = (2 * (filtered(u * v) - mu * mv) + c2) / (uu + vv + c2)
            if scale < 4:  # windows that lie inside
                terms.append(structure[5:-5, 5:-5].mean())
            else:  # all windows, borders mirrored, as torchmetrics' SSIM
                terms.append((structure * (2 * mu * mv + c1) / (mu**2 + mv**2 + c1)).mean())
        product *= max(np.mean(terms), 0) ** power
        if scale < 4:
            x, y = (
                each.reshape(3, each.shape[1] // 2, 2, each.shape[2] // 2, 2).mean((2, 4)) for each in (x, y)
            )
    return product


def test_ms_ssim_equals_the_formula(monkeypatch):
    a = pictures(3, side=176, width=208)
    b = noisy(a, 0.3)
    each = [slow_ms_ssim(p, q) for p, q in zip(a, b, strict=True)]
    monkeypatch.setattr(metrics, "CHUNK", 2)
    assert ms_ssim(a, b) == pytest.approx(np.mean(each), abs=1e-5)
    assert ms_ssim(a, a) == pytest.approx(1.0)


def test_ms_ssim_of_a_small_picture_says_why():
    with pytest.raises(ValueError, match=r"ms_ssim needs sides of at least 176 pixels.*200×175"):
        ms_ssim(torch.zeros(1, 3, 175, 200), torch.zeros(1, 3, 175, 200))


@pytest.mark.parametrize("metric", [psnr, ssim, frechet_wavelet_distance])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (torch.zeros(2, 16, 16), "must be \\(B, 3, H, W\\)"),
        (torch.zeros(2, 1, 16, 16), "must be \\(B, 3, H, W\\)"),
        (torch.zeros(0, 3, 16, 16), "B ≥ 1"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "float in \\[-1, 1\\]"),
        (torch.full((2, 3, 16, 16), 1.01), "from 1.01 to 1.01"),
        (torch.full((2, 3, 16, 16), -128.0), "must lie in \\[-1, 1\\]"),
        (torch.full((2, 3, 16, 16), math.nan), "nan"),
    ],
)
def test_wrong_pictures_are_refused_on_either_side(metric, bad, reason):
    good = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match=f"second.*{reason}|{reason}.*second"):
        metric(good, bad)
    with pytest.raises(ValueError, match=f"first.*{reason}|{reason}.*first"):
        metric(bad, good)


def test_unequal_pairs_are_refused():
    with pytest.raises(ValueError, match="in pairs"):
        psnr(torch.zeros(2, 3, 16, 16), torch.zeros(3, 3, 16, 16))
    with pytest.raises(ValueError, match="different sizes"):
        frechet_wavelet_distance(torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 8))


# --- FWD


def haar_matrix(n):
    """Orthonormal one-level Haar analysis: the first n/2 rows are sums, the others differences."""
    matrix = np.zeros((n, n))
    for i in range(n // 2):
        matrix[i, 2 * i : 2 * i + 2] = np.sqrt(0.5), np.sqrt(0.5)
        matrix[n // 2 + i, 2 * i : 2 * i + 2] = np.sqrt(0.5), -np.sqrt(0.5)
    return matrix


def slow_packets(x, level):
    """(N, C, H, W) → list of packets by explicit matrices."""
    if level == 0:
        return [x]
    height, width = x.shape[-2:]
    y = haar_matrix(height) @ x @ haar_matrix(width).T
    halves = [
        (slice(0, height // 2), slice(height // 2, None)),
        (slice(0, width // 2), slice(width // 2, None)),
    ]
    return [p for r in halves[0] for c in halves[1] for p in slow_packets(y[..., r, c], level - 1)]


def slow_fwd(a, b, level):
    """The definition: np.cov, and the trace of the root as the sum of the roots of the eigenvalues of ΣΣ'."""
    unit = [(x.double().numpy() + 1) / 2 for x in (a, b)]
    total = 0.0
    packets = [slow_packets(x, level) for x in unit]
    for p, q in zip(*packets, strict=True):
        p, q = p.reshape(len(p), -1), q.reshape(len(q), -1)
        sigma, other = np.cov(p.T), np.cov(q.T)
        eigenvalues = np.linalg.eigvals(sigma @ other)
        root = np.sqrt(np.maximum(eigenvalues.real, 0)).sum()
        total += ((p.mean(0) - q.mean(0)) ** 2).sum() + np.trace(sigma) + np.trace(other) - 2 * root
    return total / len(packets[0])


@pytest.mark.parametrize(
    ("side", "width", "level", "n", "m"),
    [(16, 16, 2, 60, 70), (8, 16, 1, 30, 9), (16, 16, 3, 40, 30), (8, 8, 1, 5, 130)],
)
def test_fwd_equals_the_definition(side, width, level, n, m):
    a = pictures(n, side, seed=1, width=width)
    b = noisy(pictures(m, side, seed=2, width=width), 0.2)
    # abs: the slow form takes roots of eigenvalues that are 0 up to rounding, about 1e-8 each
    assert frechet_wavelet_distance(a, b, level) == pytest.approx(slow_fwd(a, b, level), rel=1e-5, abs=1e-5)


def test_packets_are_the_explicit_ones_in_some_order():
    x = pictures(3, 16)
    ours = torch.stack(list(metrics._packets(x, 2))).numpy()
    theirs = slow_packets(x.double().numpy(), 2)
    assert len(ours) == 16
    for packet in theirs:
        assert min(np.abs(ours - packet).max(axis=(1, 2, 3, 4))) < 1e-12
    assert (ours**2).sum() == pytest.approx((x.double() ** 2).sum().item())  # orthonormal: energy is kept


def test_fwd_is_zero_on_itself_and_symmetric(monkeypatch):
    a, b = pictures(20, seed=1), pictures(30, seed=2)
    assert frechet_wavelet_distance(a, a) < 1e-10
    assert frechet_wavelet_distance(a, a.flip(0)) < 1e-10  # a set, not a list of pairs
    value = frechet_wavelet_distance(a, b)
    assert value == pytest.approx(frechet_wavelet_distance(b, a), rel=1e-9)
    monkeypatch.setattr(metrics, "CHUNK", 7)
    assert frechet_wavelet_distance(a, b) == pytest.approx(value, rel=1e-12)


def test_fwd_orders_real_noise_blur():
    real, other = pictures(256, 32, seed=1), pictures(256, 32, seed=2)
    blurred = torch.nn.functional.avg_pool2d(other, 7, stride=1, padding=3)
    values = [frechet_wavelet_distance(real, x) for x in (other, noisy(other, 0.1), blurred)]
    assert values[0] < values[1] < values[2]


def test_fwd_level():
    sides = {4: 1, 8: 1, 16: 2, 32: 3, 48: 3, 64: 4, 128: 4, 256: 4, 36: 2}
    assert {side: wavelet_level(side, side) for side in sides} == sides
    assert wavelet_level(16, 256) == wavelet_level(256, 16) == 2
    with pytest.raises(ValueError, match="divisible by 2, got 31×32"):
        wavelet_level(32, 31)
    with pytest.raises(ValueError, match="level 3 needs sides divisible by 8, got 12×16"):
        frechet_wavelet_distance(torch.zeros(2, 3, 16, 12), torch.zeros(2, 3, 16, 12), level=3)
    with pytest.raises(ValueError, match="level 0"):
        frechet_wavelet_distance(torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16), level=0)
    a, b = pictures(9, 16, seed=1), pictures(9, 16, seed=2)
    assert frechet_wavelet_distance(a, b) == frechet_wavelet_distance(a, b, level=2)


def test_fwd_needs_two_pictures():
    with pytest.raises(ValueError, match=r"at least 2 pictures.*1 and 2"):
        frechet_wavelet_distance(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))


def direct_fwd(a, b, level):
    """Nothing of ours: PyWavelets' packets, np.cov, scipy's root of the matrix product."""
    import pywt
    from scipy.linalg import sqrtm

    sets = []
    for x in (a, b):
        tree = pywt.WaveletPacket2D((x.double().numpy() + 1) / 2, "haar", maxlevel=level, axes=(-2, -1))
        sets.append({node.path: node.data.reshape(len(x), -1) for node in tree.get_level(level)})
    total = 0.0
    for path, p in sets[0].items():
        q = sets[1][path]
        sigma, other = np.cov(p.T), np.cov(q.T)
        root = np.trace(sqrtm(sigma @ other)).real
        total += ((p.mean(0) - q.mean(0)) ** 2).sum() + np.trace(sigma) + np.trace(other) - 2 * root
    return total / len(sets[0])


@pytest.mark.parametrize(("height", "width", "level"), [(16, 16, 2), (8, 16, 1), (16, 32, 3)])
def test_fwd_equals_pywavelets_and_scipy(height, width, level):
    depth = 3 * height * width // 4**level
    a = pictures(depth + 40, height, seed=1, width=width)
    b = noisy(pictures(depth + 9, height, seed=2, width=width), 0.2)
    assert frechet_wavelet_distance(a, b, level) == pytest.approx(direct_fwd(a, b, level), rel=1e-9)


def drawn(count, seed, side=32):
    """Pictures from integer arithmetic, the same on every machine: uint8 (count, 3, side, side)."""
    n, c, i, j = np.ogrid[:count, :3, :side, :side]
    hashed = (n * 7919 + c * 104729 + i * 1299709 + j * 15485863 + seed * 86028121) * 2654435761 % 2**32 >> 24
    waves = (i * (n % 5 + 1) + j * (n % 7 + 1) + c * 40 + n * 11) * (seed + 2) % 256
    return ((waves * 3 + hashed) // 4).astype(np.uint8)


# What `pytorchfwd.fwd.compute_fwd([folder, folder], "haar", level, False, 32, None)` gave for folders of PNG files of
# `drawn`: the authors' package 1.0.1 with ptwt 0.1.8, scipy 1.11.1, numpy 1.26.4, PyWavelets 1.6.0, torch 2.13.0 (CPU).
# It asks torchvision for ToTensor and Compose alone; a file of its name with these two stood in. Where pictures are
# fewer than the numbers of a packet, its root of a singular matrix carries an error of about 1e-6.
@pytest.mark.parametrize(
    ("first", "second", "level", "theirs", "tolerance"),
    [
        ((90, 1), (70, 2), 3, 1.6458647833321178, 1e-12),
        ((40, 1, 16), (50, 3, 16), 2, 2.440672032897882, 1e-7),
        ((90, 1), (70, 2), 2, 9.769105187695788, 1e-6),
        ((40, 1, 16), (50, 3, 16), 1, 12.03362560386351, 1e-6),
    ],
)
def test_fwd_equals_the_authors_package(first, second, level, theirs, tolerance):
    a, b = (torch.from_numpy(drawn(*each)).double() / 127.5 - 1 for each in (first, second))
    assert frechet_wavelet_distance(a, b, level) == pytest.approx(theirs, rel=tolerance)


def test_fwd_batch_by_batch_is_the_same():
    """Whatever the batches, before and after pictures are folded into triangles (48 numbers in a packet here)."""
    a, b = pictures(150, 16, seed=1), noisy(pictures(49, 16, seed=2), 0.2)
    whole = frechet_wavelet_distance(a, b)
    for sizes in ((150,), (1, 2, 47, 100), (48, 48, 54), (149, 1)):
        first, second = FrechetWavelet(), FrechetWavelet()
        for part in a.split(list(sizes)):
            first.update(part)
        for part in b.split(10):
            second.update(part)
        assert first.count == 150 and second.count == 49
        assert first.distance(second) == pytest.approx(whole, rel=1e-10)
        assert second.distance(first) == pytest.approx(whole, rel=1e-10)
        second.update(b[:30])  # more may come after a distance was asked for
        assert first.distance(second) == pytest.approx(
            frechet_wavelet_distance(a, torch.cat([b, b[:30]])), rel=1e-10
        )


def test_fwd_keeps_few_pictures_in_memory():
    wavelet = FrechetWavelet(level=2)
    for seed in range(6):
        wavelet.update(pictures(40, 16, seed))
    assert wavelet.count == 240
    assert sum(map(len, wavelet._waiting)) <= 48
    assert {tuple(r.shape) for r in wavelet._roots} == {(49, 49)}


def test_fwd_keeps_its_digits():
    """Two shifted copies of one set differ by the shift alone, however small beside the pictures' own spread."""
    a = pictures(100, 16, seed=3).double() * 0.9
    assert frechet_wavelet_distance(a, a + 1e-5, level=2) == pytest.approx(
        4 * 48 * (4 * 0.5e-5) ** 2 / 64, rel=1e-3
    )


def test_fwd_refuses_what_does_not_belong_together():
    one, two = FrechetWavelet(), FrechetWavelet(level=1)
    one.update(pictures(3, 16))
    with pytest.raises(ValueError, match=r"16×8 pixels among pictures of 16×16"):
        one.update(pictures(3, 8, width=16))
    with pytest.raises(ValueError, match="at least 2 pictures in each set, got 3 and 0"):
        one.distance(two)
    two.update(pictures(3, 16))
    with pytest.raises(ValueError, match="different sizes or levels"):
        one.distance(two)


def test_default_dtype_is_left_alone():
    frechet_wavelet_distance(pictures(4, 8), pictures(4, 8, seed=1))
    assert torch.get_default_dtype() == torch.float32


# --- feature vectors


def vectors(n, width=20, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) / 3
    return torch.rand(n, width, generator=generator) @ mixing + shift


def test_kernel_distance_equals_the_definition():
    a, b = vectors(7).double(), vectors(5, seed=1, shift=0.1).double()

    def k(x, y):
        return (float(x @ y) / 20 + 1) ** 3

    within_a = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    within_b = np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    across = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a.float(), b.float()) == pytest.approx(within_a + within_b - 2 * across, rel=1e-5)


def test_kernel_distance_agrees_with_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    a, b = vectors(60).double(), vectors(60, seed=1, shift=0.05).double()
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_kernel_distance_is_unbiased():
    """Drawn from one distribution, its mean is zero within the noise; the biased estimate is far from it."""
    pool = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn_values = [kernel_distance(pool[i : i + 10], pool[i + 10 : i + 20]) for i in range(0, 4000, 20)]
    standard_error = np.std(drawn_values) / len(drawn_values) ** 0.5
    assert abs(np.mean(drawn_values)) < 4 * standard_error
    biased = np.mean([float(((x @ x.T / 8 + 1) ** 3).mean()) for x in pool.split(10)])
    across = np.mean(
        [
            float(((x @ y.T / 8 + 1) ** 3).mean())
            for x, y in zip(pool[:2000].split(10), pool[2000:].split(10), strict=True)
        ]
    )
    assert 2 * (biased - across) > 20 * standard_error


@pytest.mark.parametrize(("n", "m"), [(200, 90), (12, 15), (200, 9)])
def test_frechet_distance_equals_the_definition(n, m):
    from scipy.linalg import sqrtm

    a, b = vectors(n).double(), vectors(m, seed=1, shift=0.1).double()
    sigma, other = np.cov(a.T), np.cov(b.T)
    if min(n, m) > 20:
        root = sqrtm(sigma)
    else:  # scipy's loses half of the digits on singular matrices
        values, axes = np.linalg.eigh(sigma)
        root = axes * np.sqrt(np.maximum(values, 0)) @ axes.T
    eigenvalues = np.linalg.eigvalsh(root @ other @ root)
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(sigma) + np.trace(other)
    expected -= 2 * np.sqrt(np.maximum(eigenvalues, 0)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(a, a) < 1e-12


@pytest.mark.parametrize("distance", [kernel_distance, frechet_distance])
def test_feature_distances_refuse(distance):
    good = vectors(4)
    for bad, reason in (
        (good[:1], "N ≥ 2"),
        (good[0], "N ≥ 2"),
        (good.long(), "float"),
        (good * math.nan, "NaN or infinite"),
        (good[:, :5], "different widths"),
    ):
        with pytest.raises(ValueError, match=reason):
            distance(good, bad)
        with pytest.raises(ValueError, match=reason):
            distance(bad, good)


# --- code use


def test_bits_of_codes():
    assert grid_bits(4, 6, 2, 1024) == 4 * 6 * 2 * 10
    uniform = torch.arange(8).reshape(1, 2, 4, 1)
    assert entropy_bits(2, 4, code_use(uniform, 8)["perplexity"]) == pytest.approx(grid_bits(2, 4, 1, 8))
    skewed = torch.tensor([0, 0, 0, 1]).reshape(1, 2, 2, 1)
    assert entropy_bits(2, 2, code_use(skewed, 8)["perplexity"]) == pytest.approx(3 * math.log2(4 / 3) + 2)
    assert entropy_bits(2, 3, [2.0, 8.0]) == 6 * (1 + 3)
    constant = torch.zeros(1, 2, 2, 3, dtype=torch.int64)
    assert entropy_bits(2, 2, code_use(constant, 8)["perplexity"]) == 0


def test_code_use_of_known_codes():
    uniform = torch.arange(8).reshape(2, 2, 2, 1)  # all 8 codes once
    skewed = torch.tensor([0, 0, 0, 0, 0, 0, 5, 5]).reshape(2, 2, 2, 1)
    result = code_use(torch.cat([uniform, skewed], dim=-1), 8)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert result["used"] == [1.0, 0.25]
    assert result["dead"] == [0, 6]
    assert result["perplexity"] == pytest.approx([8.0, math.exp(entropy)])


def test_code_use_accumulates():
    codes = torch.randint(0, 5, (6, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    use = CodeUse(2, 7)
    use.update(codes[:4])
    use.update(codes[4:].to(torch.int32))
    use.update(codes[:0])
    assert use.result() == code_use(codes, 7)
    for q in range(2):
        assert use.counts_QK[q].tolist() == [int((codes[..., q] == k).sum()) for k in range(7)]


def test_code_use_refuses_what_it_cannot_count():
    use = CodeUse(2, 4)
    with pytest.raises(ValueError, match="no codes"):
        use.result()
    for codes in (
        torch.tensor([[0, 4]]),
        torch.tensor([[-1, 0]]),
    ):  # without the check 4 would count for depth 1
        with pytest.raises(ValueError, match=r"outside \[0, 4\)"):
            use.update(codes)
    with pytest.raises(ValueError, match="depth 2"):
        use.update(torch.zeros(3, 3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="integers"):
        use.update(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="at least 1"):
        CodeUse(0, 4)
    assert int(use.counts_QK.sum()) == 0
