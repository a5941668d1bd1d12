"""Captions → vectors, and captions ↔ bytes: the text side of what gives codes a meaning. Knows nothing of pictures.

    WordEncoder      trained here: hashed words and trigrams, averaged; the order of words is not seen
    PretrainedText   any text encoder that transformers loads; frozen unless told otherwise
    to_bytes         what a decoder that writes captions reads and predicts

No vocabulary is made from data: a text side is whole once it is constructed. A caption of any length, of any
characters, with halves of surrogate pairs in it, is cut and mended (`tidy`), never refused.

Legend: C captions, E width of a text encoder's vectors, T tokens of the longest caption.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vqlm.checkpoint import declared
from vqlm.errors import ConfigError
from vqlm.hub import check_model_folder

WORD = re.compile(r"\w+|[^\w\s]")
CHARACTERS_PER_TOKEN = 16  # of what a pretrained encoder is given: more than any tokenizer's average
END = 256  # begins and ends a caption of bytes
PADDING = -100  # label without a loss, as torch's cross-entropy has it


def tidy(caption: str, characters: int) -> str:
    """The first `characters` of a caption, without outer space, "?" for what UTF-8 cannot hold (lone surrogates)."""
    return caption.strip()[:characters].encode("utf-8", "replace").decode("utf-8")


def captioned(captions: list[str]) -> list[int]:
    """Places of the captions that say something."""
    return [place for place, caption in enumerate(captions) if caption.strip()]


def to_bytes(captions: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Captions → ids read (C,T) and labels to predict (C,T), int64: UTF-8 bytes 0..255 between two END.

    Column 0 of what is read is END, the label of a caption's last byte is END. Captions are cut at `length` labels;
    one that is cut is not followed by END. Labels behind the end are PADDING.
    """
    labels = [[*tidy(caption, length).encode("utf-8"), END][:length] for caption in captions]
    longest = max(map(len, labels), default=0)
    read = [[END, *line[:-1]] + [END] * (longest - len(line)) for line in labels]
    padded = [line + [PADDING] * (longest - len(line)) for line in labels]
    shape = len(captions), longest
    return torch.tensor(read, dtype=torch.long).view(shape), torch.tensor(padded, dtype=torch.long).view(
        shape
    )


class TextEncoder(nn.Module):
    """Captions → vectors (C,E) float32. An empty list gives (0,E), an empty caption a vector like any other."""

    width: int  # E

    def forward(self, captions: list[str], device: torch.device) -> Tensor:
        raise NotImplementedError


@declared
class WordEncoder(TextEncoder):
    """The mean of learned vectors of a caption's words and of the trigrams of their characters, then two layers.

    Words that share a stem share trigrams, so a word that training never showed is not unknown (subword units:
    Bojanowski et al. 2017, arXiv 1607.04606). Words and trigrams share `buckets` rows by CRC-32, the same on every
    machine; two that meet in a row are one to the encoder. Case is ignored; so is the order of words.

    width: E; words: how many of a caption are read.
    """

    def __init__(self, width: int = 128, buckets: int = 8192, words: int = 64):
        super().__init__()
        if width < 1 or buckets < 2 or words < 1:
            raise ValueError(
                f"width={width} and words={words} must be at least 1, buckets={buckets} at least 2"
            )
        self.width, self.buckets, self.words = width, buckets, words
        self.rows = nn.EmbeddingBag(buckets, width, mode="mean")
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, captions: list[str], device: torch.device) -> Tensor:
        bags = [self._places(caption) for caption in captions]
        starts, total = [], 0
        for bag in bags:
            starts.append(total)
            total += len(bag)
        places = torch.tensor([place for bag in bags for place in bag], dtype=torch.long)
        offsets = torch.tensor(starts, dtype=torch.long)
        return self.layers(self.rows(places.to(device), offsets.to(device)).float())

    def _places(self, caption: str) -> list[int]:
        """Rows of the words and trigrams of a caption."""
        found = []
        for word in WORD.findall(tidy(caption, 32 * self.words).lower())[: self.words]:
            framed = f"<{word}>"
            pieces = [framed, *(framed[i : i + 3] for i in range(len(framed) - 2))]
            found += [zlib.crc32(piece.encode()) % self.buckets for piece in pieces]
        return found


@declared
class PretrainedText(TextEncoder):
    """A text encoder that transformers' AutoModel and AutoTokenizer load: CLIP, SigLIP, MiniLM, T5, a language model.

    path: a folder or a hub id; of a model of two towers (CLIP) the text tower is taken, of an encoder-decoder (T5)
    the encoder. Weights must be safetensors, and no code from a download is run.
    pooling: "mean" over a caption's tokens (sentence encoders such as MiniLM), or "own", the model's own pooled
    vector (CLIP: its end-of-text token). tokens: where captions are cut, if the model's own limit is not lower.
    frozen: true: never trained and in no checkpoint: a saved scorer, or a resumed run, reads `path` again and refuses
    other weights than it was made with. false: trained with the tokenizer and saved with it.

    Raises:
        ConfigError: the path holds no such model, or a file that lacks weights.
    """

    def __init__(
        self, path: str, pooling: Literal["mean", "own"] = "mean", tokens: int = 77, frozen: bool = True
    ):
        super().__init__()
        if tokens < 1:
            raise ValueError(f"tokens={tokens} must be at least 1")
        if pooling not in ("mean", "own"):
            raise ValueError(f"pooling={pooling!r}: one of mean, own")
        self.path, self.pooling, self.frozen = path, pooling, frozen
        net, self._split = _load(path, pooling)
        self.tokens = min(tokens, _limit(self._split, net))
        if frozen:
            self._outside = (net.eval().requires_grad_(False),)  # a tuple: not a part of this module
            self._digest = _digest(net)
        else:
            self.net = net
        try:
            self.width = int(self.eval()(["a"], torch.device("cpu")).shape[1])
        except (
            Exception
        ) as error:  # each architecture has exceptions of its own; shown before any data is read
            raise ConfigError(f"path={path}: {type(net).__name__} does not encode a text: {error}") from error
        self.train()

    def forward(self, captions: list[str], device: torch.device) -> Tensor:
        if not captions:
            return torch.zeros(0, self.width, device=device)
        net: Any = self._outside[0].to(device) if self.frozen else self.net
        texts = [tidy(caption, CHARACTERS_PER_TOKEN * self.tokens) or " " for caption in captions]
        read = self._split(
            texts, padding=True, truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(device)
        with torch.no_grad() if self.frozen else nullcontext():
            made = net(input_ids=read["input_ids"], attention_mask=read["attention_mask"])
        if self.pooling == "own":
            return made.pooler_output.float()
        told_CT1 = read["attention_mask"].unsqueeze(2).float()
        return (made.last_hidden_state.float() * told_CT1).sum(1) / told_CT1.sum(1).clamp(min=1)

    def get_extra_state(self) -> Tensor:
        """What ties a checkpoint to the frozen weights, which it does not hold."""
        return torch.tensor(list(self._digest if self.frozen else b""), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if self.frozen and bytes(state.tolist()) != self._digest:
            raise ConfigError(
                f"path={self.path}: the weights there have changed since this was trained "
                f"({self._digest.hex()}, was {bytes(state.tolist()).hex()}); name the encoder it was trained with"
            )


def _load(path: str, pooling: str) -> tuple[nn.Module, Any]:
    """The text encoder and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer  # two seconds, which nothing else here needs

    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ConfigError(f"path={path} is not a folder")
    check_model_folder(path)
    try:
        split = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        net, found = AutoModel.from_pretrained(
            path, dtype="float32", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # what the library raises depends on which file is wrong, and how
        raise ConfigError(
            f"path={path}: neither a folder nor a hub id at hand that holds a text encoder and its tokenizer as "
            f"transformers saves them, with safetensors: {str(error).splitlines()[0]}"
        ) from error
    missing = sorted(name for name in found["missing_keys"] if pooling == "own" or "pooler" not in name)
    if missing:
        raise ConfigError(f"path={path}: weights are missing there: {', '.join(missing)}")
    if net.config.is_encoder_decoder:
        net = net.get_encoder()
    net = getattr(net, "text_model", net)
    if split.pad_token is None:
        split.pad_token = split.eos_token
    split.padding_side = "right"
    return net, split


def _limit(split: Any, net: Any) -> int:
    """How many tokens a model reads; both numbers are absent, or absurd, for some."""
    return min(split.model_max_length, getattr(net.config, "max_position_embeddings", None) or 2**20)


def _digest(net: nn.Module) -> bytes:
    """8 bytes that other weights do not have."""
    told = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        told.update(name.encode())
        told.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return told.digest()[:8]
