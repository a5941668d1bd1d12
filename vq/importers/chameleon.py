"""Chameleon's image tokenizer as transformers keeps it: the encoder alone."""

from __future__ import annotations

from collections.abc import Set

from vq.backbones.none import NoDecoder
from vq.importers.convolutional import vqgan_encoder
from vq.importers.naming import Parts
from vq.importers.source import Built, Request, Source, nearest_code
from vq.importers.taming import ENCODER

REASON = (
    "transformers' ChameleonVQVAE keeps the encoder alone. Chameleon's own checkpoint (vqgan.ckpt) has both halves: "
    "import that with source=taming"
)


class Chameleon(Source):
    """transformers' ChameleonVQVAE (Chameleon, arXiv 2405.09818), alone or inside ChameleonForConditionalGeneration.

    There is no decoder in these files: the tokenizer encodes, and its `decode` is refused with the reason, which is
    saved in the folder too.

    Parity: tests compare codes with transformers' own class on random weights.
    """

    name, title = "chameleon", "Chameleon VQ (transformers)"
    parity = "tests compare codes with transformers' ChameleonVQVAE"
    pixels = "[-1, 1], as here (transformers' own processor computes 0.0078·byte - 1, a little less at white)"
    usual_size = 512

    def fits(self, names: Set[str]) -> bool:
        needed = {
            "encoder.down.0.block.0.conv1.weight",
            "quant_conv.weight",
            "quantize.embedding.weight",
        }
        return names >= needed and not any(name.startswith("decoder.") for name in names)

    def build(self, parts: Parts, request: Request) -> Built:
        encoder = vqgan_encoder(parts, ENCODER)
        quantizer = nearest_code(parts, "quantize.embedding.weight", request.lookup or "euclidean")
        parts.leave_out("of the decoder that is not there", r"post_quant_conv\.")
        decoder = NoDecoder(encoder.latent_dim, encoder.downsample, REASON)
        size = request.config.get("vq_config", request.config).get("resolution")
        return Built(encoder, quantizer, decoder, size, [f"ENCODES ONLY: {REASON}"])
