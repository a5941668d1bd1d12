"""LlamaGen's tokenizers, and Janus as DeepSeek published it, which shares their code."""

from __future__ import annotations

from collections.abc import Set

from vq.importers.convolutional import Half, vqgan_decoder, vqgan_encoder
from vq.importers.naming import Parts
from vq.importers.source import Built, Request, Source, nearest_code

MIDDLE = {"block": "res.{}", "middle": ("mid.0", "mid.1", "mid.2"), "middle_norm": "mid.1.norm"}
ENCODER = Half("encoder", "conv_blocks.{}", "downsample.conv", **MIDDLE)
DECODER = Half("decoder", "conv_blocks.{}", "upsample.conv", coarsest_first=True, **MIDDLE)


class LlamaGen(Source):
    """VQ-8 and VQ-16 of LlamaGen (Sun et al. 2024, arXiv 2406.06525); the image half of DeepSeek's own Janus files.

    Codes and latents are compared after both are brought to length 1, and decoding uses the codes at length 1.
    Files do not say whether a model was trained without that (codebook_l2_norm): lookup=euclidean reads those.

    Parity: FoundationVision/LlamaGen (tokenizer_image/vq_model.py) and deepseek-ai/Janus (models/vq_model.py), run
    with random weights, gave the same codes, and pixels within 1e-4. They are no packages that tests could install:
    tests hold the layout against transformers' JanusVQVAE, the same network, under these names.
    """

    name, title = "llamagen", "LlamaGen VQ"
    parity = "the published code with random weights gave equal codes, and pixels within 1e-4"
    pixels = "[-1, 1], as here"
    usual_size = 256

    def fits(self, names: Set[str]) -> bool:
        return names >= {
            "encoder.conv_blocks.0.res.0.conv1.weight",
            "decoder.conv_blocks.0.res.0.conv1.weight",
            "quantize.embedding.weight",
            "quant_conv.weight",
        }

    def build(self, parts: Parts, request: Request) -> Built:
        encoder, decoder = vqgan_encoder(parts, ENCODER), vqgan_decoder(parts, DECODER)
        quantizer = nearest_code(parts, "quantize.embedding.weight", request.lookup or "cosine")
        parts.leave_out("training alone: record of codes used", r"quantize\.codebook_used$")
        notes = [] if request.lookup else ["codes compared at length 1 (lookup=cosine)"]
        return Built(encoder, quantizer, decoder, None, notes)
