"""Image tokenizers of other projects → `ImageTokenizer`, from their files alone: none of their code is needed.

One file for each layout of files. A source infers sizes from the tensors, and fills our backbones (`vqgan.py`,
`movq.py`, `magvit2.py` in `vq/backbones`) and one of our quantizers, so that what is imported can be trained further.
Knows nothing of commands.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vq.importers.chameleon import Chameleon
from vq.importers.emu3 import Emu3
from vq.importers.janus import Janus
from vq.importers.llamagen import LlamaGen
from vq.importers.naming import Parts, check_sound, find_prefix
from vq.importers.seed_voken import IBQ, Magvit2
from vq.importers.source import Built, Lookup, Request, Source
from vq.importers.taming import Taming
from vq.importers.weights import Weights, read_weights
from vq.tokenizer import ImageTokenizer
from vqlm.errors import ConfigError, nearest

SourceName = Literal["taming", "llamagen", "chameleon", "janus", "emu3", "ibq", "magvit2"]
SOURCES: dict[str, Source] = {
    each.name: each for each in (Taming(), LlamaGen(), Chameleon(), Janus(), Emu3(), IBQ(), Magvit2())
}


@dataclass
class Imported:
    """A tokenizer, and what a person should know of how it came here."""

    tokenizer: ImageTokenizer
    source: Source
    origin: str  # file
    prefix: str  # of the tokenizer's tensors in it
    notes: list[str]
    left_out: dict[str, int]  # why → how many tensors


def import_tokenizer(
    source: str,
    path: str,
    image_size: int | None = None,
    lookup: Lookup | None = None,
    prefix: str | None = None,
) -> Imported:
    """Read a tokenizer of another project.

    Args:
        source: whose layout the files have: a key of `SOURCES`.
        path: a file of weights, or a folder that holds one; a whole model's files will do.
        image_size: side of pictures drawn; null: from config.json, else the size published for the source.
        lookup: how codes are chosen, where files do not say what a model was trained with; null: the source's own.
        prefix: what stands before the tokenizer's tensors, where a file holds several tokenizers; null: found.

    Raises:
        ConfigError: unknown source; unusable file; another source's file (says which fits); missing or unknown
            tensors or other shapes (lists all).
    """
    if source not in SOURCES:
        raise ConfigError(f"source={source}: there are {', '.join(SOURCES)}{nearest(source, SOURCES)}")
    chosen, weights = SOURCES[source], read_weights(path)
    found = _prefix(chosen, weights, prefix)
    inside = [name for name in weights.names if name.startswith(found)]
    loaded = weights.load(inside)
    check_sound(weights.origin, loaded)
    parts = Parts(weights.origin, found, {name[len(found) :]: loaded[name] for name in inside})
    built = _built(chosen, parts, Request(weights.config, lookup))
    parts.finish()
    notes = [*built.notes]
    if weights.inside:
        notes.append(f"tensors taken from the file's entry {weights.inside!r}")
    size = _image_size(image_size, built, chosen, notes)
    tokenizer = _assembled(built, size, weights.origin)
    left_out = {why: len(names) for why, names in parts.left_out.items()}
    if len(inside) < len(weights.names):
        left_out[f"outside {found}*: the rest of a larger model"] = len(weights.names) - len(inside)
    return Imported(tokenizer, chosen, weights.origin, found, notes, left_out)


def fitting(names: Iterable[str]) -> dict[str, list[str]]:
    """Sources whose layout these names have → the prefixes at which they have it."""
    names = tuple(names)
    found = {name: find_prefix(names, each.fits, each.anchor) for name, each in SOURCES.items()}
    return {name: prefixes for name, prefixes in found.items() if prefixes}


def _prefix(source: Source, weights: Weights, given: str | None) -> str:
    found = find_prefix(weights.names, source.fits, source.anchor)
    if given is not None:
        if given not in found:
            there = ", ".join(repr(each) for each in found) or "none"
            raise ConfigError(f"prefix={given!r}: no {source.title} there; prefixes with one: {there}")
        return given
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"{weights.origin} holds {len(found)} tokenizers, under {', '.join(found)}; choose one with prefix="
        )
    others = fitting(weights.names)
    hint = (
        f"it has the layout of source={' or source='.join(others)}"
        if others
        else f"no source fits; it has {len(weights.names)} tensors, the first: {', '.join(weights.names[:3])}"
    )
    raise ConfigError(f"{weights.origin} cannot be read as source={source.name} ({source.title}): {hint}")


def _image_size(given: int | None, built: Built, source: Source, notes: list[str]) -> int:
    if given is not None:
        return given
    if built.image_size:
        return built.image_size
    notes.append(f"image_size {source.usual_size}: published for this source (image_size= sets another)")
    return source.usual_size


def _built(source: Source, parts: Parts, request: Request) -> Built:
    """A stranger's file may hold any shapes and settings: whatever cannot be built from them is told as one thing."""
    try:
        return source.build(parts, request)
    except ConfigError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(
            f"{parts.origin}: its tensors and config.json do not make a {source.title} "
            f"({type(error).__name__}: {error})"
        ) from error


def _assembled(built: Built, image_size: int, origin: str) -> ImageTokenizer:
    try:
        return ImageTokenizer(built.encoder, built.quantizer, built.decoder, image_size).eval()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: {error}") from error
