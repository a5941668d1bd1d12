"""Tokenizers of other projects: the same pixels give the same codes, the same codes the same pixels; or a refusal.

References are transformers' own classes with random weights. JanusVQVAE is VQGAN's network, so its tensors under the
public names of VQGAN, LlamaGen and IBQ, with each one's own rule for choosing codes, stand for those; Open-MAGVIT2 is
written out below from its publication.
"""

import json
import math
import pickle
import re
from copy import deepcopy
from functools import cache

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import ChameleonVQVAEConfig, Emu3VQVAEConfig, JanusVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE
from transformers.models.janus.modeling_janus import JanusVQVAE

from vq import ImageTokenizer
from vq.import_ import main
from vq.importers import SOURCES, fitting, import_tokenizer
from vqlm.command import run
from vqlm.errors import ConfigError

SIZES = [(32, 32), (16, 40)]
K = 64


def pixels(height=32, width=32, count=2):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def disturbed(model, seed=0):
    """Random weights of a size that keeps signals alive; norms and their statistics away from their defaults."""
    torch.manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if "running_var" in name:
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        elif tensor.ndim == 1:
            shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensor.copy_(torch.randn_like(tensor) * 0.3 + shift)
        else:
            tensor.copy_(torch.randn_like(tensor) * 1.2 / tensor[0].numel() ** 0.5)
    return model.eval()


def spread(book, latents):
    """Codes near latents that occur, so that many of them are chosen."""
    rows = latents.movedim(-3, -1).reshape(-1, book.shape[1])
    rows = rows[torch.randint(len(rows), (len(book),))]
    book.data = rows + 0.3 * rows.std() * torch.randn_like(rows)


def loaded(source, path, tmp_path, **options):
    """Imported, saved, and loaded as anyone would."""
    import_tokenizer(source, str(path), **options).tokenizer.save_pretrained(tmp_path / "tokenizer")
    return ImageTokenizer.from_pretrained(tmp_path / "tokenizer")


def decoded(tokenizer, codes):
    """Pixels before they are clamped."""
    return tokenizer.decoder(tokenizer.quantizer.lookup(codes[..., None]))


def same_codes(tokenizer, expected_Bhw, x):
    codes = tokenizer.encode(x)
    assert codes.shape == (*expected_Bhw.shape, 1)
    assert torch.equal(codes[..., 0], expected_Bhw)
    assert len(expected_Bhw.unique()) > 10, "too few codes to tell readings apart"


def close(made, expected):
    assert expected.std() > 0.1
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


# --- transformers' own classes ------------------------------------------------------------------------------


@torch.no_grad()
def chameleon(**options):
    sizes = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "num_embeddings": K}
    config = ChameleonVQVAEConfig(
        **{**sizes, "latent_channels": 12, "embed_dim": 8, "resolution": 32, **options}
    )
    model = disturbed(ChameleonVQVAE(config))
    spread(model.quantize.embedding.weight, model.quant_conv(model.encoder(pixels())))
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_resolutions": [16], "channel_multiplier": [2, 1]},
        {"attn_type": "none", "num_res_blocks": 2},
    ],
    ids=["plain", "attention", "none"],
)
def test_chameleon_gives_transformers_codes(tmp_path, options):
    model = chameleon(**options)
    model.save_pretrained(tmp_path / "theirs")
    tokenizer = loaded("chameleon", tmp_path / "theirs", tmp_path)
    for height, width in SIZES:
        x = pixels(height, width)
        same_codes(tokenizer, model.encode(x).image_tokens.view(-1, height // 2, width // 2), x)
    assert tokenizer.image_size == 32


@torch.no_grad()
def test_chameleon_from_transformers_encodes_only_and_says_so(tmp_path, capsys):
    chameleon().save_pretrained(tmp_path / "theirs")
    run(main, arguments("chameleon", tmp_path / "theirs", tmp_path / "out"))
    assert "ENCODES ONLY" in capsys.readouterr().out
    folder = tmp_path / "out" / "tokenizer"
    assert "vqgan.ckpt" in json.loads((folder / "config.json").read_text())["model"]["decoder"]["reason"]
    tokenizer = ImageTokenizer.from_pretrained(folder)
    with pytest.raises(ConfigError, match=r"no decoder: .*source=taming"):
        tokenizer.decode(tokenizer.encode(pixels()))


@cache
def usual_janus():
    return drawn_janus()


def janus():
    """A copy, since some tests change it."""
    return deepcopy(usual_janus())


@torch.no_grad()
def drawn_janus(**options):
    sizes = {"base_channels": 32, "channel_multiplier": [1, 2, 2], "num_res_blocks": 1, "num_embeddings": K}
    config = JanusVQVAEConfig(**{**sizes, "latent_channels": 12, "embed_dim": 8, "num_patches": 8, **options})
    model = disturbed(JanusVQVAE(config))
    spread(model.quantize.embedding.weight, latent(model, pixels()))
    return model


def latent(model, x):
    return model.quant_conv(model.encoder(x))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"channel_multiplier": [2, 1, 3], "num_res_blocks": 2}])
def test_janus_gives_transformers_codes_and_pixels(tmp_path, options):
    model = drawn_janus(**options)
    model.save_pretrained(tmp_path / "theirs")
    tokenizer = loaded("janus", tmp_path / "theirs", tmp_path)
    for height, width in SIZES:
        x = pixels(height, width)
        same_codes(tokenizer, model.encode(x).image_tokens.view(-1, height // 4, width // 4), x)
    codes = torch.randint(K, (2, 8, 8))
    close(decoded(tokenizer, codes), model.decode(codes.view(2, -1)))
    model.quantize.quant_state_dims = [3, 5]  # its decode knows one grid
    close(decoded(tokenizer, codes[:, :3, :5]), model.decode(codes[:, :3, :5].reshape(2, -1)))
    assert tokenizer.image_size == 32


@torch.no_grad()
def test_janus_with_cosine_lookup_compares_directions(tmp_path):
    model = janus()
    model.save_pretrained(tmp_path / "theirs")
    tokenizer = loaded("janus", tmp_path / "theirs", tmp_path, lookup="cosine")
    expected = nearest_direction(latent(model, pixels()), model.quantize.embedding.weight)
    same_codes(tokenizer, expected, pixels())
    assert not torch.equal(expected.view(-1), model.encode(pixels()).image_tokens.view(-1))


def nearest_direction(z, book):
    distances = torch.cdist(F.normalize(z.movedim(1, -1), dim=-1).flatten(0, 2), F.normalize(book, dim=-1))
    return distances.argmin(1).view(z.shape[0], *z.shape[2:])


@torch.no_grad()
def emu3(**options):
    sizes = {"base_channels": 32, "channel_multiplier": [1, 2, 2], "num_res_blocks": 1, "codebook_size": K}
    heads = {"attn_resolutions": [1, 2], "hidden_size": 64, "num_attention_heads": 2}
    model = disturbed(Emu3VQVAE(Emu3VQVAEConfig(**{**sizes, **heads, **options})))
    frames = model.config.temporal_downsample_factor
    hidden = model.encoder(pixels().unsqueeze(1).repeat(1, frames, 1, 1, 1))
    z = model.quant_conv(hidden.permute(0, 2, 1, 3, 4))
    spread(model.quantize.embedding.weight, z[:, :, 0])
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temporal_downsample_factor": 1},
        {"temporal_downsample_factor": 8, "attn_resolutions": [2], "num_res_blocks": 2},
        {"num_attention_heads": 1, "embed_dim": 6, "latent_channels": 6},
    ],
)
def test_emu3_gives_transformers_codes_and_pixels(tmp_path, options):
    model = emu3(**options)
    model.save_pretrained(tmp_path / "theirs")
    tokenizer = loaded("emu3", tmp_path / "theirs", tmp_path, image_size=32)
    for height, width in SIZES:
        x = pixels(height, width)
        expected = model.encode(x, torch.tensor([[height, width]] * len(x))).image_tokens
        same_codes(tokenizer, torch.stack(list(expected)), x)
    codes = torch.randint(K, (2, 3, 5))
    close(decoded(tokenizer, codes), model.decode(codes))


# --- the layouts of other projects --------------------------------------------------------------------------


def as_taming(model):
    """JanusVQVAE's tensors under the names of taming-transformers: the decoder's stages stand finest first."""
    count = len(model.decoder.up)
    return {
        re.sub(r"decoder\.up\.(\d+)", lambda at: f"decoder.up.{count - 1 - int(at[1])}", name): tensor
        for name, tensor in model.state_dict().items()
    }


def as_llamagen(model):
    """The same under the names of LlamaGen."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        for old, new in (
            (r"\.(down|up)\.", ".conv_blocks."),
            (r"\.block\.", ".res."),
            (r"\.mid\.block_1\.", ".mid.0."),
            (r"\.mid\.attn_1\.", ".mid.1."),
            (r"\.mid\.block_2\.", ".mid.2."),
        ):
            name = re.sub(old, new, name)
        renamed[name] = tensor
    return renamed


def stored(tensors, path):
    save_file({name: each.contiguous().clone() for name, each in tensors.items()}, str(path))
    return path


def rebuilt(model, values_BDhw):
    return model.decoder(model.post_quant_conv(values_BDhw))


@torch.no_grad()
def test_taming_takes_the_nearest_code(tmp_path):
    model = janus()
    extra = {"loss.discriminator.main.0.weight": torch.zeros(4), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": as_taming(model) | extra, "epoch": 3}, tmp_path / "last.ckpt")
    imported = import_tokenizer("taming", str(tmp_path / "last.ckpt"), image_size=64)
    assert list(imported.left_out.values()) == [2] and "discriminator" in next(iter(imported.left_out))
    tokenizer = loaded("taming", tmp_path / "last.ckpt", tmp_path)
    for height, width in SIZES:
        x = pixels(height, width)
        same_codes(tokenizer, model.encode(x).image_tokens.view(-1, height // 4, width // 4), x)
    codes = torch.randint(K, (2, 3, 5))
    values = model.quantize.embedding.weight[codes].permute(0, 3, 1, 2)
    close(decoded(tokenizer, codes), rebuilt(model, values))


@torch.no_grad()
def test_gumbel_takes_the_largest_logit_and_decodes_another_table(tmp_path):
    model = drawn_janus(latent_channels=8)
    z, tensors = latent(model, pixels()), as_taming(model)
    table = tensors.pop("quantize.embedding.weight")
    weight, bias = torch.randn(K, 8, 1, 1), torch.randn(K) * 0.3
    tensors |= {"quantize.embed.weight": table, "quantize.proj.weight": weight, "quantize.proj.bias": bias}
    tokenizer = loaded("taming", stored(tensors, tmp_path / "gumbel.safetensors"), tmp_path)
    same_codes(tokenizer, F.conv2d(z, weight, bias).argmax(1), pixels())
    codes = torch.randint(K, (2, 3, 5))
    close(decoded(tokenizer, codes), rebuilt(model, table[codes].permute(0, 3, 1, 2)))


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "gen_vision_model."])
def test_llamagen_compares_and_decodes_directions(tmp_path, prefix):
    """With the prefix: DeepSeek's own files of Janus."""
    model, x = janus(), pixels(24, 48)
    tensors = {prefix + name: each for name, each in as_llamagen(model).items()}
    tensors[prefix + "quantize.codebook_used"] = torch.zeros(65536)
    torch.save(
        {"model": tensors | {"language_model.norm": torch.ones(2)} if prefix else tensors}, tmp_path / "vq.pt"
    )
    tokenizer = loaded("llamagen", tmp_path / "vq.pt", tmp_path)
    book = model.quantize.embedding.weight
    same_codes(tokenizer, nearest_direction(latent(model, x), book), x)
    codes = torch.randint(K, (2, 3, 5))
    close(decoded(tokenizer, codes), rebuilt(model, F.normalize(book, dim=1)[codes].permute(0, 3, 1, 2)))
    unscaled = loaded("llamagen", tmp_path / "vq.pt", tmp_path, lookup="euclidean")
    same_codes(unscaled, model.encode(x).image_tokens.view(2, 6, 12), x)


def averaged(tensors):
    """A file as lightning leaves it with averaged weights: the averages are `tensors`, the others something else."""
    raw = {name: torch.randn_like(each) for name, each in tensors.items()}
    averages = {f"model_ema.{name.replace('.', '')}": each for name, each in tensors.items()}
    counters = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)}
    return raw | averages | counters


@torch.no_grad()
@pytest.mark.parametrize("average", [False, True])
def test_ibq_takes_the_largest_product_and_averages(tmp_path, average):
    model = janus()
    book, tensors = model.quantize.embedding.weight, as_taming(model)
    path = stored(averaged(tensors) if average else tensors, tmp_path / "ibq.safetensors")
    tokenizer = loaded("ibq", path, tmp_path)
    products = torch.einsum("bdhw,kd->bkhw", latent(model, pixels()), book)
    assert torch.equal(tokenizer.encode(pixels())[..., 0], products.argmax(1))
    codes = torch.randint(K, (2, 3, 5))
    close(decoded(tokenizer, codes), rebuilt(model, book[codes].permute(0, 3, 1, 2)))


def magvit2_tensors(widths=(32, 64), stem=32, blocks=2, bits=6):
    """Names and shapes as in SEED-Voken's improved_model.py, written from reading it."""
    torch.manual_seed(0)
    tensors = {}

    def conv(name, out, inside, side, bias=True):
        tensors[f"{name}.weight"] = torch.randn(out, inside, side, side) * 1.2 / math.sqrt(inside * side**2)
        if bias:
            tensors[f"{name}.bias"] = torch.randn(out) * 0.3

    def norm(name, width):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = (
            torch.randn(width) * 0.3 + 1,
            torch.randn(width) * 0.3,
        )

    def block(name, inside, out):
        norm(f"{name}.norm1", inside)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv1", out, inside, 3, bias=False)
        conv(f"{name}.conv2", out, out, 3, bias=False)
        if inside != out:
            conv(f"{name}.nin_shortcut", out, inside, 1, bias=False)

    last = len(widths) - 1
    conv("encoder.conv_in", stem, 3, 3, bias=False)
    conv("encoder.conv_out", bits, widths[-1], 1)
    conv("decoder.conv_in", widths[-1], bits, 3)
    conv("decoder.conv_out", 3, widths[0], 3)
    norm("encoder.norm_out", widths[-1])
    norm("decoder.norm_out", widths[0])
    for j in range(blocks):
        block(f"encoder.mid_block.{j}", widths[-1], widths[-1])
        block(f"decoder.mid_block.{j}", widths[-1], widths[-1])
    for i, width in enumerate(widths):
        finer, coarser = (widths[i - 1] if i else stem), (widths[i + 1] if i < last else widths[-1])
        for j in range(blocks):
            block(f"encoder.down.{i}.block.{j}", width if j else finer, width)
            block(f"decoder.up.{i}.block.{j}", width if j else coarser, width)
        if i < last:
            conv(f"encoder.down.{i}.downsample", width, width, 3)
        if i:
            conv(f"decoder.up.{i}.upsample.conv1", 4 * width, width, 3)
        for name in ("gamma", "beta"):
            tensors[f"decoder.adaptive.{i}.{name}.weight"] = torch.randn(coarser, bits) / math.sqrt(bits)
            tensors[f"decoder.adaptive.{i}.{name}.bias"] = torch.randn(coarser) * 0.3
    return tensors


class Magvit2Reference:
    """Open-MAGVIT2 (arXiv 2409.04410) from its tensors, function by function."""

    def __init__(self, tensors, stages=2, blocks=2):
        self.tensors, self.stages, self.blocks = tensors, stages, blocks

    def conv(self, x, name, **options):
        weight = self.tensors[f"{name}.weight"]
        return F.conv2d(x, weight, self.tensors.get(f"{name}.bias"), padding=weight.shape[-1] // 2, **options)

    def active(self, x, name):
        x = F.group_norm(x, 32, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], 1e-6)
        return x * torch.sigmoid(x)

    def run(self, x, name):
        for j in range(self.blocks):
            inner = self.conv(self.active(x, f"{name}.{j}.norm1"), f"{name}.{j}.conv1")
            inner = self.conv(self.active(inner, f"{name}.{j}.norm2"), f"{name}.{j}.conv2")
            shortcut = f"{name}.{j}.nin_shortcut"
            x = (self.conv(x, shortcut) if f"{shortcut}.weight" in self.tensors else x) + inner
        return x

    def encode(self, x):
        """Bits as ±1; the code is their sum with the first as the lowest."""
        x = self.conv(x, "encoder.conv_in")
        for i in range(self.stages):
            x = self.run(x, f"encoder.down.{i}.block")
            if i < self.stages - 1:
                x = self.conv(x, f"encoder.down.{i}.downsample", stride=2)
        x = self.active(self.run(x, "encoder.mid_block"), "encoder.norm_out")
        bits = (self.conv(x, "encoder.conv_out") > 0).long()
        return (bits * 2 ** torch.arange(bits.shape[1]).view(-1, 1, 1)).sum(1)

    def decode(self, codes, bits=6):
        z = torch.stack([(codes >> n & 1) * 2.0 - 1 for n in range(bits)], 1)
        x = self.run(self.conv(z, "decoder.conv_in"), "decoder.mid_block")
        for i in reversed(range(self.stages)):
            name = f"decoder.adaptive.{i}"
            deviation, mean = (z.var((2, 3)) + 1e-6).sqrt(), z.mean((2, 3))
            scale = F.linear(
                deviation, self.tensors[f"{name}.gamma.weight"], self.tensors[f"{name}.gamma.bias"]
            )
            shift = F.linear(mean, self.tensors[f"{name}.beta.weight"], self.tensors[f"{name}.beta.bias"])
            x = F.group_norm(x, 32, eps=1e-6) * scale[..., None, None] + shift[..., None, None]
            x = self.run(x, f"decoder.up.{i}.block")
            if i:
                x = self.conv(x, f"decoder.up.{i}.upsample.conv1")
                B, C, h, w = x.shape
                x = x.view(B, 2, 2, C // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(B, C // 4, 2 * h, 2 * w)
        return self.conv(self.active(x, "decoder.norm_out"), "decoder.conv_out")


@torch.no_grad()
@pytest.mark.parametrize("average", [False, True])
def test_magvit2_gives_the_same_integers_and_pixels(tmp_path, average):
    tensors = magvit2_tensors()
    path = stored(averaged(tensors) if average else tensors, tmp_path / "m.safetensors")
    tokenizer, reference = loaded("magvit2", path, tmp_path), Magvit2Reference(tensors)
    for height, width in SIZES:
        same_codes(tokenizer, reference.encode(pixels(height, width)), pixels(height, width))
    codes = torch.randint(64, (2, 3, 5))
    close(decoded(tokenizer, codes), reference.decode(codes))
    with pytest.raises(ValueError, match="two positions"):
        tokenizer.decode(codes[:, :1, :1, None])


# --- where files come from ----------------------------------------------------------------------------------


def arguments(source, path, out, **options):
    given = {"source": source, "path": str(path), "out": str(out), "image_size": None}
    return {**given, "lookup": None, "prefix": None, **options}


@torch.no_grad()
def test_a_whole_model_in_shards(tmp_path, capsys):
    """The tokenizer stands under a prefix, in several files, its config inside a larger one."""
    model = janus()
    names = sorted(model.state_dict())
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    weight_map = {f"model.vqmodel.{name}": shard for shard, part in shards.items() for name in part}
    for shard, part in shards.items():
        tensors = {f"model.vqmodel.{name}": model.state_dict()[name].bfloat16() for name in part}
        stored(tensors | {f"lm_head.{shard[0]}": torch.zeros(3)}, tmp_path / shard)
        weight_map[f"lm_head.{shard[0]}"] = shard
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "janus", "vq_config": {"num_patches": 6}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run(main, arguments("janus", tmp_path, tmp_path / "out"))
    said = capsys.readouterr().out
    for expected in ("model.vqmodel.*", "2 tensors: outside", "K = 64, Q = 1, D = 8, f = 4", "6x6 codes"):
        assert expected in said
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    halved = disturbed(janus().bfloat16()).float()
    halved.load_state_dict({n: t.bfloat16().float() for n, t in model.state_dict().items()})
    same_codes(tokenizer, halved.encode(pixels()).image_tokens.view(2, 8, 8), pixels())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"not there: .*b\.safetensors"):
        import_tokenizer("janus", str(tmp_path))


@torch.no_grad()
def test_which_of_two_tokenizers_is_asked(tmp_path):
    first, second = janus(), disturbed(janus(), seed=5)
    tensors = {f"first_stage_model.{n}": t for n, t in as_taming(first).items()}
    tensors |= {f"cond_stage_model.{n}": t for n, t in as_taming(second).items()}
    path = stored(tensors, tmp_path / "both.safetensors")
    with pytest.raises(ConfigError, match=r"2 tokenizers, under cond_stage_model\., first_stage_model\."):
        import_tokenizer("taming", str(path))
    with pytest.raises(ConfigError, match="prefix='third"):
        import_tokenizer("taming", str(path), prefix="third_stage_model.")
    tokenizer = loaded("taming", path, tmp_path, prefix="first_stage_model.")
    same_codes(tokenizer, first.encode(pixels()).image_tokens.view(2, 8, 8), pixels())


def layouts():
    model = janus()
    gumbel = {n: t for n, t in as_taming(model).items() if "embedding" not in n}
    gumbel |= {"quantize.embed.weight": torch.zeros(4, 8), "quantize.proj.weight": torch.zeros(4, 8, 1, 1)}
    return {
        "taming": as_taming(model),
        "gumbel": gumbel,
        "llamagen": as_llamagen(model),
        "janus": model.state_dict(),
        "chameleon": chameleon().state_dict(),
        "emu3": emu3().state_dict(),
        "magvit2": magvit2_tensors(),
    }


def test_a_layout_is_told_by_its_names(tmp_path):
    tensors = layouts()
    assert {layout: set(fitting(names)) for layout, names in tensors.items()} == {
        "taming": {"taming", "ibq"},
        "gumbel": {"taming"},
        "llamagen": {"llamagen"},
        "janus": {"janus"},
        "chameleon": {"chameleon"},
        "emu3": {"emu3"},
        "magvit2": {"magvit2"},
    }
    path = stored(tensors["llamagen"], tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"source=emu3 .*has the layout of source=llamagen"):
        import_tokenizer("emu3", str(path))
    path = stored({"some.weight": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ConfigError, match=r"no source fits; .*some\.weight"):
        import_tokenizer("emu3", str(path))
    with pytest.raises(ConfigError, match="did you mean 'llamagen'"):
        import_tokenizer("lamagen", str(path))


# --- what does not fit --------------------------------------------------------------------------------------

FILES = {
    "taming": lambda: as_taming(janus()),
    "llamagen": lambda: as_llamagen(janus()),
    "ibq": lambda: as_taming(janus()),
    "janus": lambda: janus().state_dict(),
    "chameleon": lambda: chameleon().state_dict(),
    "emu3": lambda: emu3().state_dict(),
    "magvit2": magvit2_tensors,
}


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_every_tensor_is_needed_and_none_is_ignored(tmp_path, source):
    """Remove a few tensors, add two, change a shape: each is named, with the shapes."""
    tensors = dict(FILES[source]())
    path = tmp_path / "x.safetensors"
    names = [
        n for n in tensors if n.endswith(("conv2.weight", "norm1.bias", "conv_out.bias", "quant_conv.bias"))
    ]
    if source == "chameleon":
        names = [n for n in names if not n.startswith("post_quant")]
    for gone in names[:: max(1, len(names) // 5)]:
        stored({n: t for n, t in tensors.items() if n != gone}, path)
        with pytest.raises(ConfigError, match=f"missing: .*{re.escape(gone)}|{re.escape(gone)} is missing"):
            import_tokenizer(source, str(path))
    two = {f"encoder.extra.{i}.weight": torch.zeros(1) for i in range(2)}
    stored(tensors | two, path)
    with pytest.raises(ConfigError, match=r"unknown: encoder\.extra\.N\.weight \(2 of them"):
        import_tokenizer(source, str(path))
    name = next(n for n in names if n.endswith("conv2.weight"))
    stored(tensors | {name: torch.zeros(32, 32, 5, 5)}, path)
    with pytest.raises(
        ConfigError, match=rf"{re.escape(name)} is \(32, 32, 5, 5\), expected \(\d+, \d+, 3, 3\)"
    ):
        import_tokenizer(source, str(path))


def test_all_that_is_missing_is_listed_at_once(tmp_path):
    tensors = dict(as_taming(janus()))
    gone = [n for n in tensors if ".mid.attn_1.k." in n or n == "encoder.norm_out.weight"]
    path = stored({n: t for n, t in tensors.items() if n not in gone}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError) as refused:
        import_tokenizer("taming", str(path))
    assert all(name in str(refused.value) for name in gone if name.startswith("encoder."))


def test_averages_of_some_tensors_alone_are_refused(tmp_path):
    tensors = averaged(as_taming(janus()))
    del tensors["model_ema.encoderconv_inweight"]
    path = stored(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"without: encoder\.conv_in\.weight"):
        import_tokenizer("ibq", str(path))
    tensors |= {"model_ema.encoderconv_inweight": torch.zeros(32, 3, 3, 3), "model_ema.else": torch.zeros(1)}
    stored(tensors, path)
    with pytest.raises(ConfigError, match=r"unknown: model_ema\.else"):
        import_tokenizer("ibq", str(path))


class Anything:
    """Stands for the objects that training frameworks leave in their files."""


def test_python_objects_are_refused_with_the_way_out(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": as_taming(janus()), "callbacks": {Anything: 1}}, path)
    with pytest.raises(ConfigError, match="would run code") as refused:
        import_tokenizer("taming", str(path))
    said = str(refused.value)
    assert "save_file(" in said and f"{tmp_path / 'last.safetensors'}" in said
    code = said[said.index('-c "') + 4 : said.rindex('"')]
    exec(code, {})  # what it tells to run works, and what that leaves can be imported
    import_tokenizer("taming", str(tmp_path / "last.safetensors"))


def test_unusable_files_say_why(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file or folder; did you mean 'tokenizer\.pt'"):
        (tmp_path / "tokenizer.pt").write_bytes(pickle.dumps([1]))
        import_tokenizer("taming", str(tmp_path / "tokeniser.pt"))
    (tmp_path / "tokenizer.pt").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match=r"tokenizer\.pt"):
        import_tokenizer("taming", str(tmp_path / "tokenizer.pt"))
    torch.save({"steps": 3}, tmp_path / "tokenizer.pt")
    with pytest.raises(ConfigError, match="no tensors by name"):
        import_tokenizer("taming", str(tmp_path / "tokenizer.pt"))
    (tmp_path / "other.safetensors").write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"found: other\.safetensors, tokenizer\.pt"):
        import_tokenizer("taming", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot read .*other\.safetensors"):
        import_tokenizer("taming", str(tmp_path / "other.safetensors"))


@torch.no_grad()
def test_wrong_options_are_refused(tmp_path):
    tensors = layouts()
    path = stored(tensors["janus"], tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="image_size=30 is not a multiple"):
        import_tokenizer("janus", str(path), image_size=30)
    stored(tensors["magvit2"], path)
    with pytest.raises(ConfigError, match="lookup=cosine: a lookup-free quantizer"):
        import_tokenizer("magvit2", str(path), lookup="cosine")
    stored(tensors["gumbel"], path)
    with pytest.raises(ConfigError, match="lookup=inner: a Gumbel quantizer"):
        import_tokenizer("taming", str(path), lookup="inner")
    narrow = janus().state_dict() | {"encoder.conv_in.weight": torch.zeros(31, 3, 3, 3)}
    stored(narrow, path)
    with pytest.raises(ConfigError, match="encoder has sizes that are not read here: stem=31"):
        import_tokenizer("janus", str(path))


def huge(shape):
    """A tensor that says it is large and holds one number."""
    return torch.zeros(1).expand(shape)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("encoder.conv_in.weight", torch.full((32, 3, 3, 3), float("nan")), "NaN or infinite"),
        ("encoder.conv_in.weight", torch.zeros(2**40, 0, 3, 3), "holds nothing"),
        ("quantize.embedding.weight", huge((2**20, 2**20)), "not in the file"),
        ("encoder.conv_in.weight", torch.zeros(32, 3, 3, 3).to_sparse(), "not a plain tensor"),
        ("encoder.conv_in.weight", torch.zeros(32), "do not make a|not read here|other shape"),
        ("quantize.embedding.weight", torch.zeros(1, 8), "do not make a|at least"),
    ],
)
def test_tensors_that_lie_are_refused(tmp_path, name, tensor, message):
    path = tmp_path / "x.pt"
    torch.save(as_taming(janus()) | {name: tensor}, path)
    with pytest.raises(ConfigError, match=message):
        import_tokenizer("taming", str(path))


@torch.no_grad()
def test_one_name_cannot_ask_for_a_million_layers(tmp_path):
    path = stored(as_taming(janus()) | {"encoder.down.3000000.x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"unknown: encoder\.down\.3000000\.x"):
        import_tokenizer("taming", str(path))


@pytest.mark.parametrize("pickled", [b"", b"\x80", b"\x80\x02.", b"\x80\x02h\x05."])
def test_broken_pickles_are_unusable_files(tmp_path, pickled):
    import zipfile

    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/version", "3\n")
    with pytest.raises(ConfigError, match=r"x\.pt"):
        import_tokenizer("taming", str(path))
