"""The backbones of VQGAN, MoVQ and Open-MAGVIT2: shapes, what they are made of, wrong sizes; and the null decoder.

That they compute what other projects' code computes is pinned in test_importers.py; what every backbone with a YAML
file owes, in test_backbones.py.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from vq import ImageTokenizer
from vq.backbones.magvit2 import Magvit2Decoder, Magvit2Encoder
from vq.backbones.movq import MovqDecoder, MovqEncoder, folded_time
from vq.backbones.none import NoDecoder
from vq.backbones.vqgan import AttentionBlock, Downsample, VqganDecoder, VqganEncoder, group_norm
from vq.quantizers.residual import GradientQuantizer
from vqlm.errors import ConfigError

SMALL = {"channels": [8, 8, 16], "latent_dim": 6, "blocks": 1, "groups": 4}
PAIRS = {
    "vqgan": (
        VqganEncoder(**SMALL, attention=[1], stem=4, hidden_dim=5),
        VqganDecoder(**SMALL, attention=[2], hidden_dim=7, middle_attention=False),
    ),
    "movq": (
        MovqEncoder(**SMALL, attention=[2], heads=2, frames=4),
        MovqDecoder(**SMALL, attention=[0], heads=4, frames=4),
    ),
    "magvit2": (Magvit2Encoder(**SMALL, stem=4), Magvit2Decoder(**SMALL)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("height, width", [(16, 16), (8, 20)])
def test_grid_is_the_picture_divided_and_gradients_reach_all(name, height, width):
    encoder, decoder = PAIRS[name]
    x = torch.rand(2, 3, height, width) * 2 - 1
    z = encoder(x)
    assert encoder.downsample == decoder.downsample == 4
    assert z.shape == (2, 6, height // 4, width // 4)
    made = decoder(z)
    assert made.shape == x.shape
    (made - x).square().mean().backward()
    for part in (encoder, decoder):
        for key, parameter in part.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
        part.zero_grad()


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_saved_and_loaded_it_computes_the_same_in_every_layout(tmp_path, name):
    encoder, decoder = PAIRS[name]
    tokenizer = ImageTokenizer(encoder, GradientQuantizer(6, 16), decoder, 16).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.fingerprint == tokenizer.fingerprint
    x, z = torch.rand(2, 3, 8, 20) * 2 - 1, torch.randn(2, 6, 2, 5)
    assert torch.equal(loaded.encoder(x), encoder(x)) and torch.equal(loaded.decoder(z), decoder(z))
    loaded.to(memory_format=torch.channels_last)
    for part, given in ((loaded.encoder, x), (loaded.decoder, z)):
        expected = part(given)
        last = given.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(part(last), expected, atol=1e-4, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert (part(last).float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", PAIRS)
def test_last_weight_is_that_of_the_last_layer(name):
    decoder = PAIRS[name][1]
    assert decoder.last_weight.shape[0] == 3
    with torch.no_grad():
        before = decoder.last_weight.clone()
        decoder.last_weight.zero_()
        flat = decoder(torch.randn(1, 6, 2, 3))
        decoder.last_weight.copy_(before)
    assert torch.equal(flat, flat[:, :, :1, :1].expand_as(flat))


@torch.no_grad()
def test_attention_is_softmax_over_all_positions():
    block, x = AttentionBlock(8, group_norm(4), heads=2), torch.randn(2, 8, 3, 5)
    tokens = block.norm(x).permute(0, 2, 3, 1).reshape(2, 15, 8)
    q, k, v = (part.reshape(2, 15, 2, 4) for part in block.qkv(tokens).split(8, -1))
    weights = (torch.einsum("bnhc,bmhc->bhnm", q, k) / math.sqrt(4)).softmax(-1)
    mixed = torch.einsum("bhnm,bmhc->bnhc", weights, v).reshape(2, 15, 8)
    expected = x + block.out(mixed).reshape(2, 3, 5, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_downsampling_sees_each_square_and_what_follows_it():
    """Output (i, j) is centred at input (2i+1, 2j+1): nothing is padded above or to the left."""
    layer, x = Downsample(1).eval(), torch.zeros(1, 1, 6, 6)
    layer.bias.zero_()
    x[0, 0, 0, 0] = 1
    expected = torch.zeros(3, 3)
    expected[0, 0] = layer.weight[0, 0, 0, 0]
    assert torch.equal(layer(x)[0, 0], expected)


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_folded_time_is_the_convolution_over_time(frames):
    kernel = torch.randn(3, 5, 4, 3, 3, dtype=torch.float64)
    x = torch.randn(2, 5, frames, 4, 6, dtype=torch.float64)

    def convolved(clip):
        made = F.conv3d(F.pad(clip, (1, 1, 1, 1, 2, 0)), kernel, stride=(2, 1, 1))
        return made.transpose(1, 2).flatten(1, 2)

    as_channels = x.transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(
        F.conv2d(as_channels, folded_time(kernel, frames, False), padding=1), convolved(x)
    )
    still = x[:, :, :1].expand(-1, -1, frames, -1, -1)
    folded = folded_time(kernel, frames, True)
    torch.testing.assert_close(F.conv2d(x[:, :, 0], folded, padding=1), convolved(still))


@pytest.mark.parametrize(
    "kind, wrong, told",
    [
        (VqganEncoder, {"channels": []}, "channels"),
        (VqganEncoder, {"channels": [8, 12], "groups": 8}, "multiple of groups=8"),
        (VqganEncoder, {"attention": [3]}, r"attention=\[3\].*0 \(finest\) to 2"),
        (VqganEncoder, {"stem": 6}, "stem=6"),
        (VqganDecoder, {"blocks": 0}, "blocks=0"),
        (VqganDecoder, {"attention": [-1]}, "attention"),
        (MovqEncoder, {"frames": 3}, "frames=3: must be a power of 2"),
        (MovqDecoder, {"heads": 5}, r"heads=5: must divide .*\[16\]"),
        (Magvit2Encoder, {"latent_dim": 0}, "latent_dim=0"),
        (Magvit2Decoder, {"groups": 0}, "groups=0"),
    ],
)
def test_wrong_sizes_are_refused(kind, wrong, told):
    with pytest.raises(ValueError, match=told):
        kind(**{**SMALL, **wrong})


def test_the_null_decoder_says_why(tmp_path):
    encoder = PAIRS["vqgan"][0]
    tokenizer = ImageTokenizer(encoder, GradientQuantizer(6, 16), NoDecoder(6, 4, "it was lost"), 16)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    codes = loaded.encode(torch.zeros(1, 3, 16, 16))
    for refused in (lambda: loaded.decode(codes), lambda: loaded(torch.zeros(1, 3, 16, 16))):
        with pytest.raises(ConfigError, match="no decoder: it was lost"):
            refused()
    with pytest.raises(ConfigError, match="it was lost"):
        _ = loaded.decoder.last_weight
