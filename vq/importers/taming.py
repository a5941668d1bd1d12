"""VQGAN as CompVis published it (taming-transformers), and what shares its files: Chameleon's own checkpoint."""

from __future__ import annotations

from collections.abc import Set

from vq.importers.convolutional import Half, vqgan_decoder, vqgan_encoder
from vq.importers.naming import Parts
from vq.importers.source import Built, Request, Source, nearest_code
from vq.quantizers.gumbel import GumbelQuantizer
from vqlm.errors import ConfigError

ENCODER = Half("encoder", "down.{}", "downsample.conv")
DECODER = Half("decoder", "up.{}", "upsample.conv")

BLOCKS = {"encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight", "quant_conv.weight"}
CODEBOOK, GUMBEL = "quantize.embedding.weight", "quantize.embed.weight"


class Taming(Source):
    """VQGAN (Esser et al. 2021, arXiv 2012.09841): f8 and f16, nearest code or Gumbel; latent diffusion's VQ models.

    Chameleon's own vqgan.ckpt (arXiv 2405.09818) has the same layout, with its decoder. Which of the two quantizers
    is told by the names. Sizes are read from the tensors, and so is where attention stands.

    Parity: CompVis/taming-transformers (VQModel with both its nearest-code quantizers, GumbelVQ) and
    facebookresearch/chameleon, run with random weights, gave the same codes, and pixels within 1e-4; Gumbel's code is
    the largest logit, without the noise that its forward pass adds even in eval. They are no packages that tests could
    install: tests hold the layout against transformers' JanusVQVAE, the same network, under these names.
    """

    name, title = "taming", "VQGAN (taming-transformers)"
    parity = "the published code with random weights gave equal codes, and pixels within 1e-4"
    pixels = "[-1, 1], as here"
    usual_size = 256

    def fits(self, names: Set[str]) -> bool:
        if "decoder.up.0.upsample.conv.weight" in names:  # coarsest first: the transformers layout of Janus
            return False
        return names >= BLOCKS and (CODEBOOK in names or GUMBEL in names)

    def build(self, parts: Parts, request: Request) -> Built:
        encoder, decoder = vqgan_encoder(parts, ENCODER), vqgan_decoder(parts, DECODER)
        if GUMBEL in parts.tensors:
            quantizer, notes = (
                gumbel(parts, request),
                ["Gumbel: the code is the largest logit (the published code adds noise to it, also in eval)"],
            )
        else:
            quantizer, notes = nearest_code(parts, CODEBOOK, request.lookup or "euclidean"), []
        leave_out_training(parts)
        parts.leave_out("averaged weights (this project decodes with the others)", r"model_ema\.")
        return Built(encoder, quantizer, decoder, None, notes)


def gumbel(parts: Parts, request: Request) -> GumbelQuantizer:
    """Logits are a 1x1 convolution of the latent; decoding looks the code up in another table."""
    if request.lookup:
        raise ConfigError(f"lookup={request.lookup}: a Gumbel quantizer has its own; leave it out")
    codes, width = parts.shape(GUMBEL)
    quantizer = GumbelQuantizer(width, codes)
    parts.fill(quantizer, {"logits": "quantize.proj", "embedding": "quantize.embed"})
    return quantizer


def leave_out_training(parts: Parts) -> None:
    """What only training uses: losses with their discriminator and perceptual network, averages of a codebook."""
    parts.leave_out("training alone: losses, discriminator, perceptual network", r"loss\.")
    parts.leave_out(
        "training alone: averages behind the codebook", r"quantize\.embedding\.(cluster_size|embed_avg)$"
    )
    parts.leave_out("drawing of segmentation maps", r"colorize$")
