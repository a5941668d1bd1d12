"""One half of a VQGAN elsewhere: its sizes, read from the tensors, and its names.

Projects that share the network of VQGAN differ in what they call its parts and in which order the decoder's stages
are listed. `Half` holds those differences as data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vq.backbones.vqgan import VqganDecoder, VqganEncoder
from vq.importers.naming import Parts
from vqlm.errors import ConfigError


@dataclass(frozen=True)
class Half:
    """Names of an encoder or decoder elsewhere. `{}` is a number; names inside a stage follow the stage's own."""

    root: str  # encoder or decoder
    stages: str  # such as down.{}
    resample: str
    block: str = "block.{}"
    attention: str = "attn.{}"
    attention_norm: str = "attn.{}.norm"
    middle: tuple[str, str, str] = ("mid.block_1", "mid.attn_1", "mid.block_2")
    middle_norm: str = "mid.attn_1.norm"
    projections: tuple[str, str, str, str] = ("q", "k", "v", "proj_out")
    coarsest_first: bool = False  # how stages are numbered

    def stage(self, i: int, count: int) -> str:
        """Name of stage i, 0 the finest."""
        return f"{self.root}.{self.stages.format(count - 1 - i if self.coarsest_first else i)}"

    def sizes(self, parts: Parts) -> dict[str, Any]:
        """channels, blocks, attention and middle_attention of a backbone, as its tensors show them."""
        count = parts.count(f"{self.root}.{self.stages}")
        if not count:
            raise ConfigError(f"{parts.origin}: no tensors under {parts.prefix}{self.root}.{self.stages}")
        names = [self.stage(i, count) for i in range(count)]
        first = self.block.format(0)
        return {
            "channels": [parts.shape(f"{name}.{first}.conv1.weight")[0] for name in names],
            "blocks": parts.count(f"{names[0]}.{self.block}"),
            "attention": [
                i for i, name in enumerate(names) if parts.has(f"{name}.{self.attention.split('{}')[0]}")
            ],
            "middle_attention": parts.has(f"{self.root}.{self.middle[1]}."),
        }

    def modules(self, sizes: dict[str, Any]) -> dict[str, str | tuple[str, ...]]:
        """Module of our trunk → module elsewhere, for every module that a trunk of these sizes may have."""
        count, blocks, root = len(sizes["channels"]), sizes["blocks"], self.root
        found: dict[str, str | tuple[str, ...]] = {
            "trunk.stem": f"{root}.conv_in",
            "trunk.head": f"{root}.conv_out",
        }
        found |= norms("trunk.norm", f"{root}.norm_out")
        before, attention, after = (f"{root}.{each}" for each in self.middle)
        found |= residual("trunk.middle.blocks.0", before) | residual("trunk.middle.blocks.1", after)
        found |= self.attended("trunk.middle.attentions.0", attention, f"{root}.{self.middle_norm}")
        for i in range(count):
            ours, theirs = f"trunk.stages.{i}", self.stage(i, count)
            found[f"{ours}.resample"] = f"{theirs}.{self.resample}"
            for j in range(blocks):
                found |= residual(f"{ours}.blocks.{j}", f"{theirs}.{self.block.format(j)}")
                attention, norm = self.attention.format(j), self.attention_norm.format(j)
                found |= self.attended(f"{ours}.attentions.{j}", f"{theirs}.{attention}", f"{theirs}.{norm}")
        return found

    def attended(self, ours: str, theirs: str, norm: str) -> dict[str, str | tuple[str, ...]]:
        q, k, v, out = (f"{theirs}.{each}" for each in self.projections)
        return {f"{ours}.qkv": (q, k, v), f"{ours}.out": out, **norms(f"{ours}.norm", norm)}


def norms(ours: str, theirs: str) -> dict[str, str]:
    """A group norm, or one with scale and shift from the latent (MoVQ)."""
    inner = {"norm": "norm_layer", "scale": "conv_y", "shift": "conv_b"}
    return {ours: theirs, **{f"{ours}.{a}": f"{theirs}.{b}" for a, b in inner.items()}}


def residual(ours: str, theirs: str) -> dict[str, str]:
    named = {f"{ours}.{each}": f"{theirs}.{each}" for each in ("conv1", "conv2")}
    named[f"{ours}.shortcut"] = f"{theirs}.nin_shortcut"
    return named | norms(f"{ours}.norm1", f"{theirs}.norm1") | norms(f"{ours}.norm2", f"{theirs}.norm2")


def vqgan_encoder(parts: Parts, half: Half) -> VqganEncoder:
    """Encoder with its 1x1 convolution to the latent (quant_conv)."""
    sizes = half.sizes(parts)
    latent, hidden = parts.shape("quant_conv.weight")[:2]
    stem = parts.shape(f"{half.root}.conv_in.weight")[0]
    with sized(parts, half.root):
        encoder = VqganEncoder(latent_dim=latent, hidden_dim=hidden, stem=stem, **sizes)
    parts.fill(encoder, {**half.modules(sizes), "to_latent": "quant_conv"})
    return encoder


def vqgan_decoder(parts: Parts, half: Half) -> VqganDecoder:
    """Decoder with its 1x1 convolution from the latent (post_quant_conv)."""
    sizes = half.sizes(parts)
    hidden, latent = parts.shape("post_quant_conv.weight")[:2]
    with sized(parts, half.root):
        decoder = VqganDecoder(
            latent_dim=latent, hidden_dim=hidden, **{**sizes, "blocks": sizes["blocks"] - 1}
        )
    parts.fill(decoder, {**half.modules(sizes), "from_latent": "post_quant_conv"})
    return decoder


@contextmanager
def sized(parts: Parts, root: str) -> Iterator[None]:
    """Sizes that no backbone accepts came from the file: say so."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{parts.origin}: the {root} has sizes that are not read here: {error}") from error
