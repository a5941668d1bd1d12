"""Metrics against torchmetrics, against slow independent implementations, and against what they must mean."""

import math

import numpy as np
import pytest
import torch

from vq import metrics
from vq.metrics import CodeUse, code_use, frechet_wavelet_distance, psnr, ssim, wavelet_level


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


# --- code use


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
