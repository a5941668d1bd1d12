"""Every backbone that a YAML file names: shapes, gradients, the last layer, saving, layouts and precisions.

Sizes are tiny: TINY gives them by the encoder's name, and a YAML file whose classes it lacks fails here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F

from vq import ImageTokenizer
from vq.backbones import dcae, vit
from vq.backbones.dcae import DCAEDecoder, DCAEEncoder
from vq.backbones.vit import ViTDecoder, ViTEncoder
from vq.quantizers.none import NoQuantizer
from vq.quantizers.residual import ResidualQuantizer
from vqlm.schema import locate

FOLDER = Path(__file__).parents[2] / "conf" / "backbone"
DIM = 8
TINY = {
    "ConvEncoder": {"channels": [8, 16], "blocks": 1, "patch": 2},
    "ViTEncoder": {"patch": 4, "width": 24, "layers": 2, "heads": 3},
    "DCAEEncoder": {"channels": [8, 16], "blocks": 1, "patch": 2, "attention": 1},
    "VqganEncoder": {"channels": [8, 8, 16], "blocks": 1, "attention": [2], "groups": 4},
}
# those that name classes; the others give sizes to one of them
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if "_target_" in path.read_text())
SIZES = [(16, 16), (8, 20), (24, 4)]


def pair(name):
    """The encoder and the decoder of conf/backbone/NAME.yaml, tiny, every parameter random (zeros hide faults)."""
    nodes = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    kinds = [locate(nodes[part]["_target_"]) for part in ("encoder", "decoder")]
    torch.manual_seed(0)
    parts = [kind(latent_dim=DIM, **TINY[kinds[0].__name__]) for kind in kinds]
    for part in parts:
        for parameter in part.parameters():
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return parts


def pixels(height=16, width=16, count=2):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("height, width", SIZES)
def test_grid_is_the_picture_divided(name, height, width):
    encoder, decoder = pair(name)
    f = encoder.downsample
    z_BDhw = encoder(pixels(height, width))
    assert f == decoder.downsample == 4 and encoder.latent_dim == decoder.latent_dim == DIM
    assert z_BDhw.shape == (2, DIM, height // f, width // f)
    assert decoder(z_BDhw).shape == (2, 3, height, width)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    encoder, decoder = pair(name)
    (decoder(encoder(pixels(8, 20))) - pixels(8, 20)).square().mean().backward()
    for part in (encoder, decoder):
        for key, parameter in part.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", NAMES)
def test_last_weight_is_the_last_layer(name):
    """The output is affine in it, and passes through nothing else: without it no latent is seen."""
    _, decoder = pair(name)
    z_BDhw = torch.randn(2, DIM, 2, 3)
    weight = decoder.last_weight
    first, second = weight.detach().clone(), torch.randn_like(weight)

    def out(value):
        with torch.no_grad():
            weight.copy_(value)
            return decoder(z_BDhw)

    mixed = 0.3 * out(first) + 0.7 * out(second)
    torch.testing.assert_close(out(0.3 * first + 0.7 * second), mixed, atol=1e-4, rtol=1e-4)
    blind = out(torch.zeros_like(weight))
    torch.testing.assert_close(blind[0], blind[1], atol=0, rtol=0)
    assert not torch.allclose(out(first)[0], out(first)[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "quantizer", [NoQuantizer(DIM), ResidualQuantizer(DIM, 16, 2)], ids=["none", "codes"]
)
def test_saved_and_loaded_it_computes_the_same_bits(tmp_path, name, quantizer):
    encoder, decoder = pair(name)
    tokenizer = ImageTokenizer(encoder, quantizer, decoder, 16).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert type(loaded.encoder) is type(encoder) and type(loaded.decoder) is type(decoder)
    with torch.no_grad():
        assert torch.equal(loaded(pixels(8, 20)).x_BCHW, tokenizer(pixels(8, 20)).x_BCHW)
    with pytest.raises(ValueError, match="multiples of 4"):
        loaded(pixels(16, 18))


def relative_error(made, expected):
    return ((made.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_layout_and_precision_change_little(name):
    encoder, decoder = pair(name)
    x_BCHW, latent_BDhw = pixels(16, 24), torch.randn(2, DIM, 4, 6)
    for part, given in ((encoder, x_BCHW), (decoder, latent_BDhw)):
        expected = part(given)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(part(given), expected) < 0.03
        part.to(memory_format=torch.channels_last)
        last = given.contiguous(memory_format=torch.channels_last)
        assert relative_error(part(last), expected) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(part(last), expected) < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_learn_a_picture(name):
    """As initialised, not as perturbed: the pair can be trained."""
    nodes = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    kinds = [locate(nodes[part]["_target_"]) for part in ("encoder", "decoder")]
    torch.manual_seed(0)
    parts = [kind(latent_dim=DIM, **TINY[kinds[0].__name__]) for kind in kinds]
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], 3e-3)
    x_BCHW = F.interpolate(pixels(4, 4), scale_factor=4, mode="bilinear")
    errors = []
    for _ in range(100):
        error = (parts[1](parts[0](x_BCHW)) - x_BCHW).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.3 * x_BCHW.var()


# --- DC-AE ----------------------------------------------------------------------------------------------------


def test_down_shortcut_is_a_mean_over_neighbours_and_groups():
    """By hand: position (i, j) of group g is the mean of its C·r²/channels inputs, channel by channel, row by row."""
    x = torch.randn(2, 6, 4, 8)
    made = dcae.space_to_channel(x, 4, 2)
    assert made.shape == (2, 4, 2, 4)
    for i in range(2):
        for j in range(4):
            flat = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(2, 24)
            torch.testing.assert_close(made[:, :, i, j], flat.view(2, 4, 6).mean(2))


def test_up_shortcut_repeats_channels_into_neighbours():
    x = torch.randn(2, 8, 3, 5)
    made = dcae.channel_to_space(x, 4, 2)
    assert made.shape == (2, 4, 6, 10)
    for channel in range(
        4
    ):  # 16 values of 8 channels, each twice: a channel of the output holds two of the input
        upper, lower = made[:, channel, ::2], made[:, channel, 1::2]
        for part, source in ((upper, 2 * channel), (lower, 2 * channel + 1)):
            assert torch.equal(part[..., ::2], x[:, source]) and torch.equal(part[..., 1::2], x[:, source])


@pytest.mark.parametrize("wide, narrow, factor", [(16, 8, 2), (32, 8, 2), (8, 8, 2), (16, 32, 2), (32, 8, 1)])
def test_down_shortcut_undoes_the_up_shortcut(wide, narrow, factor):
    """`wide` at the coarse scale (or the trunk: factor 1), `narrow` at the fine one."""
    if factor == 1:
        wide, narrow = narrow, wide  # up from the latent: few channels to many
    x = torch.randn(2, wide, 3, 5)
    assert torch.equal(dcae.space_to_channel(dcae.channel_to_space(x, narrow, factor), wide, factor), x)


def test_without_convolutions_only_the_shortcuts_are_left():
    """An encoder whose branches are zero is the composition of the formulas, at the latent projection too."""
    parts = {"channels": [16, 32, 64], "latent_dim": 16, "blocks": 1, "patch": 2, "attention": 1}
    encoder, decoder = DCAEEncoder(**parts), DCAEDecoder(**parts)
    stem: Any = encoder.layers[1]
    head: Any = decoder.layers[-2]
    for part in (encoder, decoder):
        for key, parameter in part.named_parameters():
            if parameter is not stem.weight and parameter is not head.weight and "norm.weight" not in key:
                torch.nn.init.zeros_(parameter)
    x = pixels(16, 32)
    made = F.conv2d(F.pixel_unshuffle(x, 2), stem.weight, padding=1)
    for channels, factor in ((32, 2), (64, 2), (16, 1)):
        made = dcae.space_to_channel(made, channels, factor)
    torch.testing.assert_close(encoder(x), made)
    seen = []
    decoder.layers[-4].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    decoder(made)
    expected = made
    for channels, factor in ((64, 1), (32, 2), (16, 2)):
        expected = dcae.channel_to_space(expected, channels, factor)
    torch.testing.assert_close(seen[0], expected)


def test_linear_attention_is_attention_with_a_relu_kernel():
    q, k, v = torch.randn(3, 2, 4, 8, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights_nm = torch.einsum("bhen,bhem->bhnm", q.relu(), k.relu())
    expected = torch.einsum("bhnm,bhem->bhen", weights_nm / weights_nm.sum(-1, keepdim=True), v)
    expected = expected.nan_to_num(0)  # a query that is nowhere positive sees nothing
    torch.testing.assert_close(dcae.relu_attention(q, k, v), expected)


def test_rms_norm_is_over_channels():
    norm = dcae.RMSNorm(6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 3, 4)
    scaled = x / x.square().mean(1, keepdim=True).add(1e-5).sqrt()
    expected = scaled * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(x), expected)


def test_dcae_reaches_strong_downsampling():
    parts = {"channels": [8, 16, 32, 32, 64], "latent_dim": 32, "blocks": 1, "patch": 4, "attention": 2}
    encoder, decoder = DCAEEncoder(**parts), DCAEDecoder(**parts)
    assert encoder.downsample == 64
    assert decoder(encoder(pixels(64, 128))).shape == (2, 3, 64, 128)


def test_a_latent_that_does_not_divide_has_no_shortcut():
    """FSQ's width is its number of levels, five say: the projections are then convolutions alone."""
    parts = {"channels": [8, 16], "latent_dim": 5, "blocks": 1, "patch": 2}
    encoder, decoder = DCAEEncoder(**parts), DCAEDecoder(**parts)
    assert not encoder.layers[-1].shortcut and not decoder.layers[0].shortcut
    assert decoder(encoder(pixels())).shape == (2, 3, 16, 16)


# --- ViT ------------------------------------------------------------------------------------------------------


def test_positions_differ_and_rows_are_not_columns():
    angles = vit.rotary_angles(5, 7, 16, torch.device("cpu"))
    assert angles.shape == (35, 8)
    assert len(torch.unique(angles, dim=0)) == 35
    grid = angles.view(5, 7, 8)
    assert torch.equal(grid[:, 0, :4], grid[:, 6, :4]) and torch.equal(grid[0, :, 4:], grid[4, :, 4:])
    assert torch.equal(vit.rotary_angles(9, 9, 16, torch.device("cpu")).view(9, 9, 8)[:5, :7], grid)


def test_attention_sees_offsets_alone():
    """Scores of turned queries and keys depend on the difference of positions: any grid is like the training one."""
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = vit.rotary_angles(6, 6, 16, torch.device("cpu")).double()
    turned_q = vit.rotate(q.expand(1, 1, 36, 16), angles.cos(), angles.sin())
    turned_k = vit.rotate(k.expand(1, 1, 36, 16), angles.cos(), angles.sin())
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1).expand(1, 1, 36))
    scores = (turned_q @ turned_k.transpose(2, 3)).view(6, 6, 6, 6)
    torch.testing.assert_close(scores[1, 2, 3, 5], scores[0, 0, 2, 3], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scores[4, 3, 1, 1], scores[5, 4, 2, 2], atol=1e-6, rtol=1e-6)
    assert (scores[0, 0, 2, 3] - scores[0, 0, 3, 2]).abs() > 1e-3
    assert (scores[0, 0, 2, 3] - scores[2, 3, 0, 0]).abs() > 1e-3


@torch.no_grad()
def test_a_block_does_not_see_where_the_grid_begins():
    """Moved by 3 rows and 5 columns, all positions keep their offsets. That needs queries and keys both turned."""
    torch.manual_seed(0)
    block, tokens = vit.Block(24, 3).double(), torch.randn(2, 12, 24, dtype=torch.float64)
    angles = vit.rotary_angles(8, 8, 8, torch.device("cpu")).double().view(8, 8, 4)
    here, there = angles[:3, :4].reshape(12, 4), angles[3:6, 4:8].reshape(12, 4)
    out = block(tokens, here.cos(), here.sin())
    torch.testing.assert_close(block(tokens, there.cos(), there.sin()), out, atol=1e-6, rtol=1e-6)
    still = torch.zeros_like(here)
    assert relative_error(block(tokens, still.cos(), still.sin()), out) > 1e-3


@torch.no_grad()
def test_where_a_patch_lies_matters():
    """Without positions, permuting patches would permute latents and nothing more."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"patch": 4, "width": 24, "layers": 2, "heads": 3}
    order = torch.randperm(16)

    def permuted(x, side):
        patches_BNp = F.unfold(x, side, stride=side).transpose(1, 2)[:, order]
        return F.fold(patches_BNp.transpose(1, 2), (4 * side, 4 * side), side, stride=side)

    for part, given, before, after in (
        (ViTEncoder(DIM, **sizes), pixels(), 4, 1),
        (ViTDecoder(DIM, **sizes), torch.randn(2, DIM, 4, 4), 1, 4),
    ):
        assert relative_error(part(permuted(given, before)), permuted(part(given), after)) > 1e-3


# --- wrong sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, wrong, told",
    [
        (DCAEEncoder, {"channels": []}, "channels"),
        (DCAEEncoder, {"channels": [8, 40]}, "40"),
        (DCAEDecoder, {"channels": [8, 10]}, "multiple of 4"),
        (DCAEEncoder, {"channels": [8, 16], "attention": 3}, "attention=3"),
        (DCAEDecoder, {"channels": [32, 68], "attention": 1, "blocks": 0}, "blocks=0"),
        (DCAEEncoder, {"channels": [25, 100], "attention": 1}, "multiples of 32"),
        (ViTEncoder, {"patch": 0}, "patch=0"),
        (ViTDecoder, {"width": 100, "heads": 8}, "multiple of 32"),
        (ViTEncoder, {"layers": 0}, "layers=0"),
    ],
)
def test_wrong_sizes_are_refused(kind, wrong, told):
    with pytest.raises(ValueError, match=told):
        kind(latent_dim=8, **wrong)
