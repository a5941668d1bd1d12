"""Janus' image tokenizer as transformers keeps it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from vq.importers.convolutional import vqgan_decoder, vqgan_encoder
from vq.importers.naming import Parts
from vq.importers.source import Built, Request, Source, filled, nearest_code
from vq.importers.taming import BLOCKS, CODEBOOK, DECODER, ENCODER, leave_out_training
from vq.quantizers.unit import UnitLookupQuantizer

UNLIKE = (
    "transformers' class compares codes and latents at their own lengths, the code that trained Janus at length 1; "
    "lookup=cosine is the latter (codes: {agree})"
)


class Janus(Source):
    """transformers' JanusVQVAE (Janus-Pro, arXiv 2501.17811), alone or inside JanusForConditionalGeneration.

    That class takes the Euclidean-nearest code, and decodes with codes brought to length 1; so does this importer.
    DeepSeek's own code (deepseek-ai/Janus, vq_model.py) compares at length 1 too, and converting to transformers
    leaves the codebook as it was: unless all its rows have one length, the two choose different codes.
    lookup=cosine chooses as DeepSeek's code does. Files in DeepSeek's own layout are read by source=llamagen.

    Parity: tests compare codes and pixels with transformers' own class on random weights.
    """

    name, title = "janus", "Janus VQ (transformers)"
    parity = "tests compare codes and pixels with transformers' JanusVQVAE"
    pixels = "[-1, 1], as here"
    usual_size = 384

    def fits(self, names: Set[str]) -> bool:
        return names >= BLOCKS | {CODEBOOK, "decoder.up.0.upsample.conv.weight"}

    def build(self, parts: Parts, request: Request) -> Built:
        encoder = vqgan_encoder(parts, ENCODER)
        decoder = vqgan_decoder(parts, replace(DECODER, coarsest_first=True))
        notes = []
        if request.lookup:
            quantizer = nearest_code(parts, CODEBOOK, request.lookup)
        else:
            book = parts.take(CODEBOOK)
            quantizer = filled(UnitLookupQuantizer(book.shape[1], book.shape[0]), book)
            shortest, longest = (float(each) for each in book.norm(dim=1).aminmax())
            agree = f"lengths from {shortest:.4g} to {longest:.4g}"
            notes = [UNLIKE.format(agree=agree)]
        leave_out_training(parts)
        patches = request.config.get("vq_config", request.config).get("num_patches")
        return Built(encoder, quantizer, decoder, patches * encoder.downsample if patches else None, notes)
