"""Open-MAGVIT2 and IBQ as TencentARC published them (SEED-Voken)."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor

from vq.backbones.magvit2 import Magvit2Decoder, Magvit2Encoder
from vq.importers.convolutional import residual, sized, vqgan_decoder, vqgan_encoder
from vq.importers.naming import Modules, Parts, grouped, lines
from vq.importers.source import Built, Request, Source, nearest_code
from vq.importers.taming import BLOCKS, CODEBOOK, DECODER, ENCODER, leave_out_training
from vq.quantizers.library import LookupFreeQuantizer
from vqlm.errors import ConfigError

AVERAGES = "model_ema."


class IBQ(Source):
    """IBQ (Shi et al. 2024, arXiv 2412.02692): VQGAN's network, codes by the largest inner product.

    The names are those of VQGAN (source=taming), which chooses the nearest code instead: only the user knows which of
    the two trained a file. Averaged weights are taken where the file has them, as in the project's own evaluation.

    Parity: TencentARC/SEED-Voken (src/IBQ), run with random weights, gave the same codes, and pixels within 1e-4. It is
    no package that tests could install: tests hold the layout against transformers' JanusVQVAE under these names.
    """

    name, title = "ibq", "IBQ (SEED-Voken)"
    parity = "the published code with random weights gave equal codes, and pixels within 1e-4"
    pixels = "[-1, 1], as here"
    usual_size = 256

    def fits(self, names: Set[str]) -> bool:
        return names >= BLOCKS | {CODEBOOK} and "decoder.up.0.upsample.conv.weight" not in names

    def build(self, parts: Parts, request: Request) -> Built:
        notes = average(parts)
        encoder, decoder = vqgan_encoder(parts, ENCODER), vqgan_decoder(parts, DECODER)
        quantizer = nearest_code(parts, CODEBOOK, request.lookup or "inner")
        leave_out_training(parts)
        return Built(encoder, quantizer, decoder, None, notes)


class Magvit2(Source):
    """Open-MAGVIT2's tokenizers for pictures (Luo et al. 2024, arXiv 2409.04410): lookup-free, a code is signs.

    There a code's lowest bit is the first channel of the latent, here its last: channels are reversed in the last
    layer of the encoder and the first of the decoder, so that codes are the same integers. Averaged weights are
    taken where the file has them, as in the project's own evaluation. The video tokenizer is not read.

    Parity: TencentARC/SEED-Voken (src/Open_MAGVIT2), run with random weights, gave the same codes, and pixels within
    1e-4. It is no package that tests could install: tests compare with the network written out from its publication.
    """

    name, title = "magvit2", "Open-MAGVIT2 (SEED-Voken)"
    parity = "the published code with random weights gave equal codes, and pixels within 1e-4"
    pixels = "[-1, 1], as here"
    usual_size = 256

    def fits(self, names: Set[str]) -> bool:
        return names >= {
            "encoder.down.0.block.0.conv1.weight",
            "encoder.mid_block.0.conv1.weight",
            "decoder.adaptive.0.gamma.weight",
            "decoder.up.0.block.0.conv1.weight",
        }

    def build(self, parts: Parts, request: Request) -> Built:
        if request.lookup:
            raise ConfigError(
                f"lookup={request.lookup}: a lookup-free quantizer has no codebook; leave it out"
            )
        notes = average(parts)
        reverse_latent(parts)
        bits = parts.shape("encoder.conv_out.weight")[0]
        encoder, decoder = magvit2_encoder(parts, bits), magvit2_decoder(parts, bits)
        leave_out_training(parts)
        return Built(encoder, LookupFreeQuantizer(bits, 2**bits), decoder, None, notes)


def average(parts: Parts) -> list[str]:
    """Put averaged weights in the place of the others. Their names there are the others' without dots."""
    averages = {name: each for name, each in parts.tensors.items() if name.startswith(AVERAGES)}
    if not averages:
        return ["the file holds no averaged weights"]
    for name in averages:
        del parts.tensors[name]
    replaced, without = [], []
    for name in parts.tensors:
        averaged: Tensor | None = averages.pop(AVERAGES + name.replace(".", ""), None)
        if averaged is not None:
            parts.tensors[name] = averaged
            replaced.append(name)
        elif name.startswith(("encoder.", "decoder.", "quant", "post_quant")):
            without.append(name)
    if without:
        raise ConfigError(
            f"{parts.origin} holds averaged weights, but not of all tensors.\n"
            + lines("without", grouped(parts.prefix, without))
        )
    parts.left_out["weights whose averages are taken instead"] = replaced
    unknown = [name for name in averages if name[len(AVERAGES) :] not in ("decay", "num_updates")]
    parts.tensors |= {name: averages[name] for name in unknown}  # reported as unknown
    return ["averaged weights (model_ema), as in the project's own evaluation"]


def reverse_latent(parts: Parts) -> None:
    """Reverse the latent's channels, and give the decoder's upsampling our order of channels."""
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
        parts.tensors[name] = parts.take(name).flip(0)
    for name in list(parts.tensors):
        reads_latent = name == "decoder.conv_in.weight" or (
            name.startswith("decoder.adaptive.") and name.endswith(".weight")
        )
        if reads_latent:
            parts.tensors[name] = parts.take(name).flip(1)
        if name.startswith("decoder.up.") and ".upsample.conv1." in name:
            parts.tensors[name] = position_last(parts.take(name))


def position_last(tensor: Tensor) -> Tensor:
    """Output channels (2·2·C, …) ordered by position, then channel → by channel, then position (pixel_shuffle's)."""
    return tensor.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)


def magvit2_encoder(parts: Parts, bits: int) -> Magvit2Encoder:
    channels, blocks = sizes(parts, "encoder.down.{}")
    with sized(parts, "encoder"):
        encoder = Magvit2Encoder(channels, bits, blocks, parts.shape("encoder.conv_in.weight")[0])
    named = {"stem": "encoder.conv_in", "norm": "encoder.norm_out", "to_latent": "encoder.conv_out"}
    named |= {f"stages.{i}.resample": f"encoder.down.{i}.downsample" for i in range(len(channels))}
    parts.fill(encoder, {**named, **blocks_of("encoder", "down", len(channels), blocks)})
    return encoder


def magvit2_decoder(parts: Parts, bits: int) -> Magvit2Decoder:
    channels, blocks = sizes(parts, "decoder.up.{}")
    with sized(parts, "decoder"):
        decoder = Magvit2Decoder(channels, bits, blocks)
    named = {"stem": "decoder.conv_in", "norm": "decoder.norm_out", "head": "decoder.conv_out"}
    for i in range(len(channels)):
        named[f"stages.{i}.resample.conv"] = f"decoder.up.{i}.upsample.conv1"
        named[f"adaptive.{i}.scale"] = f"decoder.adaptive.{i}.gamma"
        named[f"adaptive.{i}.shift"] = f"decoder.adaptive.{i}.beta"
    parts.fill(decoder, {**named, **blocks_of("decoder", "up", len(channels), blocks)})
    return decoder


def sizes(parts: Parts, stages: str) -> tuple[list[int], int]:
    """Widths of the stages, finest first, and blocks in each."""
    names = [stages.format(i) for i in range(parts.count(stages))]
    channels = [parts.shape(f"{name}.block.0.conv1.weight")[0] for name in names]
    return channels, parts.count(f"{names[0]}.block.{{}}")


def blocks_of(root: str, stages: str, count: int, blocks: int) -> Modules:
    found = {}
    for j in range(blocks):
        found |= residual(f"middle.blocks.{j}", f"{root}.mid_block.{j}")
        for i in range(count):
            found |= residual(f"stages.{i}.blocks.{j}", f"{root}.{stages}.{i}.block.{j}")
    return found
