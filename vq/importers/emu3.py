"""Emu3's tokenizer as transformers keeps it: its path for pictures."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from vq.backbones.movq import MovqDecoder, MovqEncoder, folded_time
from vq.importers.convolutional import Half, sized
from vq.importers.naming import Parts
from vq.importers.source import Built, Request, Source, nearest_code
from vqlm.errors import ConfigError

SHARED = {
    "attention_norm": "attn_norms.{}",
    "middle": ("middle_block.block_1", "middle_block.attn_1", "middle_block.block_2"),
    "middle_norm": "middle_block.attn_norm",
    "projections": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
ENCODER = Half("encoder", "down_block.down.{}", "downsample.conv", **SHARED)
DECODER = Half("decoder", "up_block.up.{}", "upsample.conv", **SHARED)

EPSILON = 1e-5  # of torch's batch norm, which the stacks over time use


class Emu3(Source):
    """transformers' Emu3VQVAE (Emu3, arXiv 2409.18869), alone or inside Emu3ForConditionalGeneration.

    A video tokenizer; here its path for single pictures, which transformers repeats over the frames that one code
    covers. Convolutions over time are folded exactly (`vq/backbones/movq.py`). The number of attention heads shows in
    no tensor: it is read from config.json, or transformers' default of 1, which the published model has.

    Parity: tests compare codes and pixels with transformers' own class on random weights.
    """

    name, title = "emu3", "Emu3 VQ (transformers)"
    parity = "tests compare codes and pixels with transformers' Emu3VQVAE"
    pixels = "[-1, 1], as here (image_mean and image_std 0.5 in the published processor)"
    usual_size = 512

    def fits(self, names: Set[str]) -> bool:
        return names >= {
            "encoder.down_block.down.0.block.0.conv1.weight",
            "decoder.up_block.up.0.block.0.conv1.weight",
            "quantize.embedding.weight",
            "quant_conv.conv.weight",
        }

    def build(self, parts: Parts, request: Request) -> Built:
        heads = request.config.get("vq_config", request.config).get("num_attention_heads")
        notes = ["the path for single pictures; convolutions over time are folded into space"]
        if heads is None:
            notes.append("attention heads: 1 (transformers' default; no config.json says otherwise)")
        parts.leave_out("counters of batch norms", r".*\.num_batches_tracked$")
        flat = without_time(parts)
        frames = 2 ** parts.count("encoder.time_conv.{}")
        encoder, decoder = movq_encoder(flat, heads or 1, frames), movq_decoder(flat, heads or 1, frames)
        quantizer = nearest_code(flat, "quantize.embedding.weight", request.lookup or "euclidean")
        parts.taken |= flat.taken
        return Built(encoder, quantizer, decoder, None, notes)


def movq_encoder(parts: Parts, heads: int, frames: int) -> MovqEncoder:
    sizes = ENCODER.sizes(parts)
    with_middle(parts, sizes)
    with sized(parts, "encoder"):
        encoder = MovqEncoder(
            latent_dim=parts.shape("quant_conv.conv.weight")[0],
            stem=parts.shape("encoder.conv_in.weight")[0],
            heads=heads,
            frames=frames,
            **sizes,
        )
    names = ENCODER.modules({**sizes})
    parts.fill(
        encoder, {**names, **time_modules("encoder", frames, sizes["blocks"]), "to_latent": "quant_conv.conv"}
    )
    return encoder


def movq_decoder(parts: Parts, heads: int, frames: int) -> MovqDecoder:
    sizes = DECODER.sizes(parts)
    with_middle(parts, sizes)
    names = DECODER.modules(sizes)
    sizes["blocks"] -= 1
    with sized(parts, "decoder"):
        decoder = MovqDecoder(
            latent_dim=parts.shape("post_quant_conv.conv.weight")[1], heads=heads, frames=frames, **sizes
        )
    names |= time_modules("decoder", frames, sizes["blocks"])
    parts.fill(decoder, {**names, "from_latent": "post_quant_conv.conv"})
    return decoder


def with_middle(parts: Parts, sizes: dict) -> None:
    """Attention in the middle is always there; ConfigError where the file has none."""
    if not sizes.pop("middle_attention"):
        raise ConfigError(f"{parts.origin}: no attention in the middle, {parts.prefix}*.middle_block.attn_1")


def time_modules(root: str, frames: int, blocks: int) -> dict[str, str]:
    found = {f"time.{n}": f"{root}.time_conv.{n}.conv.conv" for n in range(frames.bit_length() - 1)}
    for n in range(blocks):
        ours, theirs = f"time_blocks.{n}", f"{root}.time_res_stack.{n}"
        found |= {f"{ours}.{each}": f"{theirs}.{each}" for each in ("norm1", "norm2")}
        found |= {f"{ours}.{each}": f"{theirs}.{each}.conv" for each in ("conv1", "conv2")}
    return found


def without_time(parts: Parts) -> Parts:
    """The same tensors with every kernel over time folded, and every batch norm as a scale and a shift."""
    flat = Parts(parts.origin, parts.prefix, dict(parts.tensors))
    halvings = parts.count("encoder.time_conv.{}")
    for n in range(halvings):
        fold_frames(parts, flat, f"encoder.time_conv.{n}.conv.conv", 2 ** (halvings - n), identical=n == 0)
    for name, tensor in parts.tensors.items():
        if tensor.ndim == 5 and not name.startswith("encoder.time_conv."):
            if tensor.shape[2] != 3:
                raise ConfigError(
                    f"{parts.origin}: {parts.prefix}{name} is {tuple(tensor.shape)}, expected 3 taps over time"
                )
            # Two frames of zeros come first, so one frame, or the first of several, meets the last tap alone.
            flat.tensors[name] = tensor.float()[:, :, 2]
        if name.endswith(".running_var"):
            fold_statistics(parts, flat, name.removesuffix(".running_var"))
    return flat


def fold_frames(parts: Parts, flat: Parts, name: str, frames: int, identical: bool) -> None:
    kernel = parts.take(f"{name}.weight")
    if kernel.ndim != 5 or kernel.shape[2] != 4:
        raise ConfigError(
            f"{parts.origin}: {parts.prefix}{name}.weight is {tuple(kernel.shape)}, expected 4 taps over time"
        )
    flat.tensors[f"{name}.weight"] = folded_time(kernel, frames, identical)
    flat.tensors[f"{name}.bias"] = parts.take(f"{name}.bias").repeat(frames // 2)


def fold_statistics(parts: Parts, flat: Parts, name: str) -> None:
    scale: Tensor = parts.take(f"{name}.weight") * torch.rsqrt(parts.take(f"{name}.running_var") + EPSILON)
    flat.tensors[f"{name}.weight"] = scale
    flat.tensors[f"{name}.bias"] = parts.take(f"{name}.bias") - parts.take(f"{name}.running_mean") * scale
