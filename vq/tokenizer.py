"""ImageTokenizer = encoder + quantizer + decoder: pixels → codes and back, saved as one folder.

A plain `nn.Module`: loading one needs no losses, no training code and no Lightning. Knows nothing of files of
pictures (`vq/images.py`) or of language models.

Legend: B batch, H W picture, h w grid (H/f, W/f), D latent width, Q depth, K codebook size, f downsampling factor.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vq.backbones
import vq.quantizers
from vq.backbones import Backbone
from vq.card import card
from vq.quantizers import Quantized, Quantizer, check_codes
from vqlm.checkpoint import declared, fingerprint, load_module, save_module
from vqlm.errors import ConfigError
from vqlm.files import write_text
from vqlm.hub import Hub, check_repo_id, local_folder, upload


class NonFiniteError(ArithmeticError):
    """A NaN or infinity before the quantizer. Raised so that it can never enter the codebook's averages.

    rows: which pictures of the batch.
    """

    def __init__(self, what: str, rows: list[int]):
        super().__init__(
            f"{what} in picture {', '.join(map(str, rows))} of the batch; no codebook was touched"
        )
        self.what, self.rows = what, rows


@dataclass
class Reconstruction:
    """A forward pass."""

    x_BCHW: Tensor  # decoded pixels, unclamped
    quantized: Quantized
    z_BDhw: Tensor  # the encoder's latent, before quantization
    quantizer: Quantizer  # that made `quantized`


@declared
class ImageTokenizer(nn.Module):
    """Pixels (B,3,H,W) in [-1,1] ↔ codes (B,H/f,W/f,Q) in [0,K). H and W: any multiples of f.

    image_size: the side of the pictures that it was trained on, in pixels; the default size of pictures drawn.
    """

    def __init__(self, encoder: Backbone, quantizer: Quantizer, decoder: Backbone, image_size: int):
        super().__init__()
        widths = {"encoder": encoder.latent_dim, "quantizer": quantizer.dim, "decoder": decoder.latent_dim}
        if len(set(widths.values())) > 1:
            raise ValueError(f"latent widths differ: {widths}; they must be one number")
        if encoder.downsample != decoder.downsample:
            raise ValueError(
                f"the encoder divides by {encoder.downsample}, the decoder by {decoder.downsample}"
            )
        if image_size < 1 or image_size % encoder.downsample:
            raise ValueError(
                f"image_size={image_size} is not a multiple of the downsampling {encoder.downsample}"
            )
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.image_size = image_size

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def depth(self) -> int:
        return self.quantizer.depth

    @property
    def downsample(self) -> int:
        return self.encoder.downsample

    @property
    def fingerprint(self) -> str:
        """16 hex digits over configuration and weights; a store or an LM made with another one is refused."""
        return fingerprint(self)

    def forward(self, x_BCHW: Tensor) -> Reconstruction:
        """The path of training: encode, quantize, decode, with gradients through the quantizer.

        NonFiniteError on NaN or infinite pixels or latents while training, before the quantizer sees them.
        """
        z_BDhw = self._latent(x_BCHW)
        return self._decoded(z_BDhw, self.quantizer(z_BDhw))

    def autoencode(self, x_BCHW: Tensor) -> Reconstruction:
        """As `forward`, but the latent passes unquantized: a warm-up before the codes (arXiv 2605.06870)."""
        z_BDhw = self._latent(x_BCHW)
        return self._decoded(z_BDhw, Quantized(z_BDhw, None))

    def _latent(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self._check_pixels(x_BCHW)
        if self.training:
            _check_finite(x_BCHW, "NaN or infinite pixels")
        z_BDhw = self.encoder(x_BCHW).float()
        if self.training:
            _check_finite(z_BDhw, "NaN or infinite values from the encoder")
        return z_BDhw

    def _decoded(self, z_BDhw: Tensor, quantized: Quantized) -> Reconstruction:
        return Reconstruction(self.decoder(quantized.z_BDhw).float(), quantized, z_BDhw, self.quantizer)

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Pixels (B,3,H,W) float in [-1,1] → codes (B,h,w,Q) int64. ValueError on other shapes, sizes or values."""
        x_BCHW = self._check_pixels(x_BCHW).float()
        if not x_BCHW.numel():
            raise ValueError(f"no pixels in shape {tuple(x_BCHW.shape)}")
        if not (x_BCHW.min() >= -1.001 and x_BCHW.max() <= 1.001):
            low, high = float(x_BCHW.min()), float(x_BCHW.max())
            raise ValueError(
                f"pixels lie in [{low:.3g}, {high:.3g}]; expected [-1, 1] (vq.images.to_pixels gives that)"
            )
        was_training = self.training
        self.eval()
        try:
            codes = self.quantizer(self.encoder(x_BCHW).float()).codes_BhwQ
        finally:
            self.train(was_training)
        if codes is None:
            raise ValueError("a continuous tokenizer (NoQuantizer) has no codes")
        return codes

    @torch.no_grad()
    def decode(self, codes_BhwQ: Tensor) -> Tensor:
        """Codes (B,h,w,Q) in [0,K) → pixels (B,3,h·f,w·f) float in [-1,1]. ValueError on a code outside."""
        check_codes(codes_BhwQ, self.depth, self.codebook_size)
        was_training = self.training
        self.eval()
        try:
            return self.decoder(self.quantizer.lookup(codes_BhwQ)).float().clamp(-1, 1)
        finally:
            self.train(was_training)

    def reconstruct(self, x_BCHW: Tensor) -> Tensor:
        """Pixels (B,3,H,W) float in [-1,1] of any size → what their codes tell of them, of the same size.

        Sides that are no multiples of the downsampling are filled up with their last pixels, and cut again. ValueError
        as for `encode`.
        """
        high, wide = _check_kind(x_BCHW).shape[-2:]
        filled = F.pad(x_BCHW, (0, -wide % self.downsample, 0, -high % self.downsample), mode="replicate")
        return self.decode(self.encode(filled))[..., :high, :wide]

    def _check_pixels(self, x_BCHW: Tensor) -> Tensor:
        if _check_kind(x_BCHW).shape[2] % self.downsample or x_BCHW.shape[3] % self.downsample:
            raise ValueError(
                f"picture of {x_BCHW.shape[2]}x{x_BCHW.shape[3]} px: sides must be multiples of {self.downsample}"
            )
        return x_BCHW

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, atomically."""
        save_module(folder, self)

    def save_card(
        self,
        folder: str | Path,
        metrics: dict[str, Any] | None = None,
        repo_id: str = "",
        license: str | None = None,
        trained_on: str | None = None,
    ) -> None:
        """Write the card, README.md, into a saved folder. The arguments are those of `push_to_hub`."""
        write_text(Path(folder, "README.md"), card(self, metrics or {}, repo_id, license, trained_on))

    def push_to_hub(
        self,
        repo_id: str,
        metrics: dict[str, Any] | None = None,
        license: str | None = None,
        trained_on: str | None = None,
        private: bool = True,
        token: str | None = None,
        hub: Hub | None = None,
    ) -> str:
        """Upload it with a card to the Hugging Face hub; returns the address of the upload.

        metrics: what `vq-train` wrote into metrics.json. license: of these weights, as the hub names licences; None:
        the card says that none was given. private: of a repository that is made now. ValueError on a repo_id that is
        none, and on metrics of another tokenizer.
        """
        check_repo_id(repo_id)
        with TemporaryDirectory() as place:
            folder = Path(place, "tokenizer")
            self.save_pretrained(folder)
            self.save_card(folder, metrics, repo_id, license, trained_on)
            files = ("README.md", "config.json", "model.safetensors")
            return upload(folder, repo_id, files, private, token=token, hub=hub)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ImageTokenizer:
        """Load a folder written by `save_pretrained`, or a hub id, in eval mode.

        ConfigError says which file is unusable and why.
        """
        declare_families()
        module = load_module(local_folder(folder), cls)
        if not isinstance(module, ImageTokenizer):
            raise ConfigError(f"{folder} does not hold an image tokenizer")
        return module


def declare_families() -> None:
    """Import every backbone and quantizer, so that a saved folder may name it."""
    for family in (vq.backbones, vq.quantizers):
        for module in pkgutil.iter_modules(family.__path__):
            importlib.import_module(f"{family.__name__}.{module.name}")


def _check_kind(x_BCHW: Tensor) -> Tensor:
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] != 3:
        raise ValueError(f"pixels have shape {tuple(x_BCHW.shape)}; expected (B, 3, H, W)")
    if not x_BCHW.is_floating_point():
        raise ValueError(f"pixels are {x_BCHW.dtype}; expected float in [-1, 1]")
    return x_BCHW


def _check_finite(x_BCHW: Tensor, what: str) -> None:
    if not torch.isfinite(x_BCHW).all():
        rows = (~torch.isfinite(x_BCHW).flatten(1).all(1)).nonzero().flatten().tolist()
        raise NonFiniteError(what, rows)
