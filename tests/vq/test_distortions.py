"""Each distortion against what is known of it: colorsys, FFT, Pillow, energies and permutations."""

import colorsys

import pytest
import torch

from vq.distortions import DISTORTIONS, HIGH, LOW, band_noise, distort
from vq.images import from_bytes, to_bytes
from vqlm.errors import ConfigError


def pictures(count=3, height=16, width=24, seed=0, reach=0.7):
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 6, generator=random) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear") * reach


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


STRENGTHS = {"blur": 1, "jpeg": 80, "noise": 0.1, "hue": 0.3, "shuffle": 4, "low": 0.05, "high": 0.05}


@pytest.mark.parametrize("name", DISTORTIONS)
def test_nothing_at_0_something_above_and_the_same_for_a_seed(name):
    x, kept = pictures(), pictures()
    assert distort(name, x, 0, seeded()) is x
    made = distort(name, x, STRENGTHS[name], seeded(1))
    assert made.shape == x.shape and made.dtype == x.dtype
    assert float(made.abs().max()) <= 1 and not torch.equal(made, x)
    assert torch.equal(made, distort(name, x, STRENGTHS[name], seeded(1)))
    assert torch.equal(x, kept)


def test_bands_of_one_energy_and_no_frequency_in_common():
    x = pictures(4, 32, 32)
    f = torch.hypot(torch.fft.fftfreq(32).double()[:, None], torch.fft.fftfreq(32).double()[None])
    inside = {"low": (f > 0) & (f <= LOW), "high": f >= HIGH}
    for name, band in inside.items():
        added = distort(name, x, 0.05, seeded()).double() - x.double()
        power = torch.fft.fft2(added).abs().square()
        assert added.square().mean((1, 2, 3)).tolist() == pytest.approx([0.0025] * 4, rel=1e-5)
        assert float(power[..., ~band].sum() / power.sum()) < 1e-9
        # Parseval: what the band holds is what the pixels hold.
        assert torch.allclose(power[..., band].sum() / 32**2, added.square().sum(), rtol=1e-6, atol=0)


def test_band_noise_fills_its_band_evenly():
    power = (
        torch.fft.fft2(band_noise(torch.Size([2000, 1, 9, 12]), HIGH, 1, seeded()).double())
        .abs()
        .square()
        .mean((0, 1))
    )
    f = torch.hypot(torch.fft.fftfreq(9).double()[:, None], torch.fft.fftfreq(12).double()[None])
    inside = power[f >= HIGH]
    assert float(inside.std() / inside.mean()) < 0.1
    with pytest.raises(ValueError, match="no frequency"):
        band_noise(torch.Size([1, 3, 4, 4]), 0, LOW, seeded())


def test_hue_is_that_of_colorsys():
    x = torch.rand(1, 3, 6, 6, generator=seeded()) * 2 - 1
    x[:, :, 0, 0] = 0.3  # grey
    made = (distort("hue", x, 0.37, seeded()) + 1) / 2
    for row in range(6):
        for column in range(6):
            h, s, v = colorsys.rgb_to_hsv(*((x[0, :, row, column] + 1) / 2).tolist())
            expected = colorsys.hsv_to_rgb((h + 0.37) % 1, s, v)
            assert made[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_turns_of_hue():
    x = pictures()
    assert torch.allclose(distort("hue", x, 1, seeded()), x, atol=1e-5)
    assert torch.allclose(distort("hue", x, 1 / 3, seeded()), x.roll(1, dims=1), atol=1e-5)


def test_blur_is_a_gaussian():
    x = torch.zeros(1, 3, 33, 33)
    x[..., 16, 16] = 1
    made = distort("blur", x, 1.5, seeded())[0, 1].double()
    place = torch.arange(33).double() - 16
    assert float(made.sum()) == pytest.approx(1, abs=1e-5)
    assert float((made.sum(0) * place**2).sum()) == pytest.approx(1.5**2, rel=1e-2)  # its variance
    assert torch.allclose(made, made.T, atol=1e-5)
    flat = torch.full((1, 3, 9, 9), 0.4)
    assert torch.allclose(distort("blur", flat, 5, seeded()), flat, atol=1e-5)


def test_jpeg_is_the_codec_of_that_quality(tmp_path):
    from PIL import Image

    x = from_bytes(to_bytes(pictures(1, 32, 32)))
    array = to_bytes(x)[0].permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "x.jpg", quality=20)
    read = torch.tensor(list(Image.open(tmp_path / "x.jpg").tobytes()), dtype=torch.uint8).view(32, 32, 3)
    assert torch.equal(to_bytes(distort("jpeg", x, 80, seeded()))[0], read.permute(2, 0, 1))


def test_shuffled_cells_are_a_permutation():
    x = torch.arange(2 * 3 * 9 * 12).view(2, 3, 9, 12) / 648
    made = distort("shuffle", x, 4, seeded())
    assert torch.equal(made[:, :, 8:], x[:, :, 8:])  # 9 rows hold 4 cells of 2
    orders = []
    for before, after in zip(x, made, strict=True):
        cells = [
            [each[:, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3] for r in range(4) for c in range(4)]
            for each in (before, after)
        ]
        orders.append(
            [next(n for n, old in enumerate(cells[0]) if torch.equal(old, new)) for new in cells[1]]
        )
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert orders[0] != orders[1]
    with pytest.raises(ValueError, match="cannot be cut"):
        distort("shuffle", x, 16, seeded())


def test_noise_has_its_deviation_and_stays_in_range():
    x = torch.zeros(20, 3, 32, 32)
    assert float(distort("noise", x, 0.1, seeded()).std()) == pytest.approx(0.1, rel=0.01)
    assert float(distort("noise", x, 2, seeded()).abs().max()) == 1


def test_refusals():
    with pytest.raises(ConfigError, match=r"'blurr' is no distortion.*did you mean"):
        distort("blurr", pictures(), 1, seeded())
    with pytest.raises(ConfigError, match="jpeg: strength 100: from 0"):
        distort("jpeg", pictures(), 100, seeded())
