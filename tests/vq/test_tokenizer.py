"""Pixels ↔ codes, and the folder that a tokenizer is saved in."""

import json

import pytest
import torch

from vq import ImageTokenizer
from vq.backbones.conv import ConvDecoder, ConvEncoder
from vq.quantizers.none import NoQuantizer
from vq.quantizers.residual import ResidualQuantizer
from vq.tokenizer import NonFiniteError
from vqlm.errors import ConfigError


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 40), (24, 8)])
def test_the_grid_is_the_picture_divided(tiny_tokenizer, height, width):
    codes = tiny_tokenizer.encode(torch.rand(2, 3, height, width) * 2 - 1)
    assert codes.shape == (2, height // 8, width // 8, 2)
    assert codes.dtype == torch.int64
    assert tiny_tokenizer.decode(codes).shape == (2, 3, height, width)


def test_decode_of_encode_is_the_forward_pass_in_eval(tiny_tokenizer):
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    made = tiny_tokenizer(x)
    codes = tiny_tokenizer.encode(x)
    assert torch.equal(codes, made.quantized.codes_BhwQ)
    torch.testing.assert_close(tiny_tokenizer.decode(codes), made.x_BCHW.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_decoded_pixels_stay_in_range(tiny_tokenizer):
    with torch.no_grad():
        tiny_tokenizer.decoder.layers[-2].weight.mul_(1e3)
    pixels = tiny_tokenizer.decode(torch.randint(0, 16, (1, 2, 2, 2)))
    assert pixels.abs().max() == 1


def test_encode_in_training_leaves_buffers_and_state_alone(tiny_tokenizer):
    tiny_tokenizer.train()
    before = {k: v.clone() for k, v in tiny_tokenizer.state_dict().items()}
    tiny_tokenizer.encode(torch.rand(2, 3, 16, 16))
    assert tiny_tokenizer.training
    assert all(torch.equal(v, tiny_tokenizer.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(3, 16, 16), "shape"),
        (torch.zeros(1, 1, 16, 16), "shape"),
        (torch.zeros(1, 3, 16, 12), "multiples of 8"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "float"),
        (torch.full((1, 3, 16, 16), 255.0), "expected"),
        (torch.full((1, 3, 16, 16), float("nan")), "expected"),
    ],
)
def test_wrong_pixels_are_refused(tiny_tokenizer, pixels, message):
    with pytest.raises(ValueError, match=message):
        tiny_tokenizer.encode(pixels)


@pytest.mark.parametrize("bad", [-1, 16])
def test_codes_outside_the_codebook_are_refused(tiny_tokenizer, bad):
    codes = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
    codes[0, 0, 0, 1] = bad
    with pytest.raises(ValueError, match=r"0\.\.15"):
        tiny_tokenizer.decode(codes)


def test_one_nan_never_reaches_the_codebook(tiny_tokenizer):
    # measured in the library: one NaN float made 53 of 64 codes NaN
    tiny_tokenizer.train()
    before = {k: v.clone() for k, v in tiny_tokenizer.quantizer.state_dict().items()}
    x = torch.zeros(4, 3, 16, 16)
    x[1, 2, 3, 4] = float("nan")
    with pytest.raises(NonFiniteError):
        tiny_tokenizer(x)
    assert all(torch.equal(v, tiny_tokenizer.quantizer.state_dict()[k]) for k, v in before.items())


def test_saved_and_loaded_is_the_same(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tok")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "tok")
    x = torch.rand(3, 3, 16, 16)
    assert torch.equal(loaded.encode(x), tiny_tokenizer.encode(x))
    assert loaded.fingerprint == tiny_tokenizer.fingerprint
    assert (loaded.codebook_size, loaded.depth, loaded.downsample, loaded.image_size) == (16, 2, 8, 16)


def test_the_fingerprint_follows_every_weight(tiny_tokenizer):
    before = tiny_tokenizer.fingerprint
    with torch.no_grad():
        tiny_tokenizer.quantizer.codebook(1)[3, 0] += 1e-3
    assert tiny_tokenizer.fingerprint != before


def test_unusable_folders_say_what_is_wrong(tiny_tokenizer, tmp_path):
    folder = tmp_path / "tok"
    tiny_tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="did you mean 'tok'"):
        ImageTokenizer.from_pretrained(tmp_path / "tokk")

    config = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"format": 99}, "format 99"),
        ({"model": {"type": "os.system", "command": "true"}}, "unknown type"),
        ({"model": {**config["model"], "image_size": 15}}, "multiple"),
        ({"model": {**config["model"], "colour": 1}}, "colour"),
    ]:
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            ImageTokenizer.from_pretrained(folder)

    (folder / "config.json").write_text(json.dumps(config))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        ImageTokenizer.from_pretrained(folder)


def test_a_number_that_changed_on_the_disk_is_noticed(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "t")
    path = tmp_path / "t" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="not what was saved"):
        ImageTokenizer.from_pretrained(tmp_path / "t")


def test_weights_of_another_shape_are_refused(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tok")
    config = json.loads((tmp_path / "tok/config.json").read_text())
    config["model"]["quantizer"]["codebook_size"] = 32
    (tmp_path / "tok/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="other shape"):
        ImageTokenizer.from_pretrained(tmp_path / "tok")


def test_parts_that_do_not_fit_are_refused():
    encoder, decoder = ConvEncoder([8, 8], 4, 1, 4), ConvDecoder([8, 8], 4, 1, 4)
    with pytest.raises(ValueError, match="latent widths"):
        ImageTokenizer(encoder, ResidualQuantizer(5, 16), decoder, 16)
    with pytest.raises(ValueError, match="divides by"):
        ImageTokenizer(encoder, ResidualQuantizer(4, 16), ConvDecoder([8], 4, 1, 4), 16)
    with pytest.raises(ValueError, match="multiple"):
        ImageTokenizer(encoder, ResidualQuantizer(4, 16), decoder, 20)


def test_a_continuous_tokenizer_has_no_codes():
    tokenizer = ImageTokenizer(
        ConvEncoder([8], 4, 1, 4), NoQuantizer(4), ConvDecoder([8], 4, 1, 4), 16
    ).eval()
    assert tokenizer(torch.zeros(1, 3, 16, 16)).x_BCHW.shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="no codes"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16))


def test_residual_blocks_start_as_the_identity():
    from vq.backbones.conv import ResidualBlock

    x = torch.randn(1, 8, 4, 4)
    block = ResidualBlock(8)
    torch.nn.init.zeros_(block.conv2.bias)
    assert torch.equal(block(x), x)
