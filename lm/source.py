"""Where a language model comes from: random weights, or any Hugging Face folder. Both end with image ids added."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lm.model import add_rows, from_scratch
from lm.vocab import Vocabulary, extend, train_text_tokenizer
from vqlm.errors import ConfigError


@dataclass
class Extended:
    """A language model whose vocabulary holds image ids."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary


class Scratch:
    """Random weights from a transformers configuration, and a byte-level BPE trained on the captions.

    config: `model_type` and arguments of its configuration class; the vocabulary's size is filled in.
    text_vocabulary: largest number of text ids.
    """

    def __init__(self, config: dict[str, Any], text_vocabulary: int = 2048):
        if "model_type" not in config:
            raise ValueError("config needs model_type, e.g. qwen3")
        if text_vocabulary < 300:
            raise ValueError(f"text_vocabulary={text_vocabulary}: at least 300 (256 bytes and some merges)")
        self.config, self.text_vocabulary = config, text_vocabulary

    def build(self, captions: list[str], codebook_size: int, depth: int, seed: int) -> Extended:
        tokenizer = train_text_tokenizer(captions, self.text_vocabulary)
        vocabulary = extend(tokenizer, codebook_size, depth)
        try:
            config = {
                "bos_token_id": vocabulary.bos,
                "eos_token_id": vocabulary.eos,
                "pad_token_id": vocabulary.pad,
            }
            lm = from_scratch({**self.config, **config}, vocabulary.size, seed)
            lm(input_ids=torch.tensor([[0, 1]]))  # sizes that do not go together show here, before any data
        except Exception as error:  # each architecture has checks, and exceptions, of its own
            raise ConfigError(f"lm.config does not make a language model: {error}") from error
        return Extended(lm, tokenizer, vocabulary)


class Pretrained:
    """A causal language model in a Hugging Face folder or hub id; its own ids and rows stay as they are."""

    def __init__(self, path: str):
        if Path(path).is_absolute() and not Path(path).is_dir():
            raise ValueError(f"path={path} is not a folder")
        self.path = path

    def build(self, captions: list[str], codebook_size: int, depth: int, seed: int) -> Extended:
        if Path(self.path).is_dir() and not Path(self.path, "config.json").is_file():
            raise ConfigError(f"lm.path={self.path}: no model there, config.json is missing")
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path)
            lm = AutoModelForCausalLM.from_pretrained(self.path, dtype="float32", attn_implementation="sdpa")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"lm.path={self.path}: neither a Hugging Face folder nor a hub id at hand: {error}"
            ) from error
        first = len(tokenizer)
        try:
            vocabulary = extend(tokenizer, codebook_size, depth)
        except ValueError as error:
            raise ConfigError(f"lm.path={self.path}: {error}") from error
        add_rows(lm, first, vocabulary.size, seed)
        return Extended(lm, tokenizer, vocabulary)
