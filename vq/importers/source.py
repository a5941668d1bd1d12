"""What an importer is: how it knows its files, and how it builds a tokenizer from them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from vq.backbones import Backbone
from vq.importers.naming import Parts
from vq.quantizers import Quantizer
from vq.quantizers.ibq import IndexBackpropagationQuantizer
from vq.quantizers.residual import CosineGradientQuantizer, GradientQuantizer
from vqlm.errors import ConfigError

# How a code is chosen: the nearest; the nearest at length 1; the largest inner product.
Lookup = Literal["euclidean", "cosine", "inner"]
LOOKUPS: dict[Lookup, type[Quantizer]] = {
    "euclidean": GradientQuantizer,
    "cosine": CosineGradientQuantizer,
    "inner": IndexBackpropagationQuantizer,
}


@dataclass(frozen=True)
class Request:
    """What the user may say beside where the files are."""

    config: dict[str, Any]  # the file beside the weights; empty where there is none
    lookup: Lookup | None  # null: the source's own


@dataclass
class Built:
    """Three parts that fit, and what a reader should know of them."""

    encoder: Backbone
    quantizer: Quantizer
    decoder: Backbone
    image_size: int | None  # that the config states
    notes: list[str] = field(default_factory=list)


class Source:
    """An importer. Its class docstring says where the format comes from, and how parity was shown."""

    name: str  # what users type
    title: str
    parity: str  # how it was shown that codes and pixels are those of the original
    pixels: str  # the original's range of pixels
    usual_size: int  # of pictures, as published
    anchor = "encoder.conv_in.weight"  # a name that is there in every file, after the prefix

    def fits(self, names: Set[str]) -> bool:
        """Whether these names, without their prefix, are this source's."""
        raise NotImplementedError

    def build(self, parts: Parts, request: Request) -> Built:
        """Tensors → encoder, quantizer, decoder. ConfigError says what does not fit."""
        raise NotImplementedError


def nearest_code(parts: Parts, name: str, lookup: Lookup) -> Quantizer:
    """The quantizer that compares latents with the rows of the codebook called `name`."""
    book = parts.take(name)
    if book.ndim != 2:
        raise ConfigError(
            f"{parts.origin}: {parts.prefix}{name} is {tuple(book.shape)}; expected (codes, width)"
        )
    return filled(LOOKUPS[lookup](book.shape[1], book.shape[0]), book)


def filled(quantizer: Quantizer, book: Tensor) -> Quantizer:
    """Put a codebook into a quantizer whose only tensor that is."""
    (name,) = quantizer.state_dict()
    quantizer.load_state_dict({name: book})
    return quantizer
