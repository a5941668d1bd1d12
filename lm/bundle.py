"""multimodal.json: what a bundle says of itself beside the plain Hugging Face folder. Written and read here.

ranges of ids, layout, grids, attention to pictures, head, sampling, fingerprint of the image tokenizer, version
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

import lm.heads.depth_transformer
import lm.heads.layered
import lm.heads.linear
import lm.heads.parallel  # noqa: F401  these declare the heads that a bundle may name
from lm.decoding import Sampling
from lm.heads import Head
from lm.sequence import LAYOUTS, SequenceFormat
from lm.vocab import Vocabulary
from vqlm import __version__
from vqlm.checkpoint import describe, rebuild
from vqlm.errors import ConfigError, nearest

FORMAT = 1


def about(form: SequenceFormat, head: Head, sampling: Sampling, fingerprint: str) -> dict[str, Any]:
    """What multimodal.json says."""
    return {
        "format": FORMAT,
        "vqlm": __version__,
        "fingerprint": fingerprint,
        "vocabulary": form.vocabulary.to_json(),
        "layout": form.layout.name,
        "grids": [list(grid) for grid in form.grids],
        "picture_attention": form.picture_attention,
        "head": describe(head),
        "sampling": asdict(sampling),
    }


def read_about(folder: Path) -> dict[str, Any]:
    """multimodal.json of a bundle; ConfigError if there is none, or of another format."""
    path = folder / "multimodal.json"
    if not path.is_file():
        siblings = [p.parent.name for p in folder.parent.glob("*/multimodal.json")]
        raise ConfigError(f"no model at {folder}: multimodal.json is missing{nearest(folder.name, siblings)}")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ConfigError(f"{path} has format {about['format']!r}; this version of vqlm reads {FORMAT}")
        missing = {"fingerprint", "vocabulary", "layout", "grids", "head"} - about.keys()
        if missing:
            raise ConfigError(f"{path} lacks {sorted(missing)}")
    except (TypeError, KeyError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}") from error
    return about


def read_parts(about: dict[str, Any], folder: Path) -> tuple[SequenceFormat, Head, Sampling]:
    """The parts that multimodal.json describes; ConfigError if it does not describe them rightly."""
    try:
        head = rebuild(about["head"])
        if not isinstance(head, Head):
            raise ConfigError(f"head is a {type(head).__name__}")
        return read_format(about), head, Sampling(**about.get("sampling", {}))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(f"{folder / 'multimodal.json'} is damaged: {error}") from error


def read_format(about: dict[str, Any]) -> SequenceFormat:
    if about["layout"] not in LAYOUTS:
        raise ConfigError(f"unknown layout {about['layout']!r}; known: {sorted(LAYOUTS)}")
    grids = tuple((int(height), int(width)) for height, width in about["grids"])
    vocabulary, layout = Vocabulary.from_json(about["vocabulary"]), LAYOUTS[about["layout"]]()
    return SequenceFormat(vocabulary, layout, grids, about.get("picture_attention", "causal"))


def check_names(tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary) -> None:
    """The names of the first and last image token stand at the ends of the image range."""
    last = vocabulary.depth * vocabulary.codebook_size - 1
    found = [tokenizer.convert_tokens_to_ids(f"<|image_{i}|>") for i in (0, last)]
    expected = [vocabulary.image_offset, vocabulary.size - 1]
    if found != expected:
        raise ConfigError(f"the text tokenizer puts image tokens at {found}, multimodal.json at {expected}")
