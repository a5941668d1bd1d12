"""One vocabulary for text and pictures: which id means what. Codes ↔ ids, text ↔ ids.

    0 ………… text ………… | specials | image: depth 0's K ids | depth 1's K ids | … |
                                 ^ image_offset                              ^ size

The specials: <begin>, <end> and <pad> (the tokenizer's own, where it has them), <image_start>, <image_end>; a model of
several picture sizes has one id for each size; one that marks the ends of rows has <row_end>.

The image block is contiguous, Q·K ids long, and named `<|image_0|>` … as special tokens of the Hugging Face
tokenizer, so that plain transformers loads it. Users' text never becomes a special id, however it is spelt.

Legend: K codebook size, Q depth (codes per position), ids int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
IMAGE_START, IMAGE_END, ROW_END = "<|image_start|>", "<|image_end|>", "<|row_end|>"


@dataclass(frozen=True)
class Vocabulary:
    """The ranges of ids. All specials lie below `image_offset`.

    row_end: null where the ends of a picture's rows are not marked. sizes: the id that announces each grid, in the
    order of the format's grids; empty where there is one grid only.
    """

    bos: int
    eos: int
    pad: int
    image_start: int
    image_end: int
    image_offset: int
    codebook_size: int
    depth: int
    row_end: int | None = None
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not all(0 <= i < self.image_offset for i in self.specials):
            raise ValueError(f"special ids {self.specials} must lie in [0, image_offset={self.image_offset})")
        if self.codebook_size < 1 or self.depth < 1:
            raise ValueError(
                f"codebook_size={self.codebook_size}, depth={self.depth}: both must be at least 1"
            )

    @property
    def specials(self) -> tuple[int, ...]:
        """Ids that are no text, below `image_offset`."""
        row_end = () if self.row_end is None else (self.row_end,)
        return (self.bos, self.eos, self.pad, self.image_start, self.image_end, *row_end, *self.sizes)

    @property
    def size(self) -> int:
        """Number of ids: one past the last image id."""
        return self.image_offset + self.depth * self.codebook_size

    def image_range(self, depth: int) -> slice:
        """The ids of one depth."""
        start = self.image_offset + depth * self.codebook_size
        return slice(start, start + self.codebook_size)

    def codes_to_ids(self, codes_Q: Tensor) -> Tensor:
        """Codes (…, Q) in [0,K) → ids (…, Q), each depth in its own range. ValueError on a code outside."""
        if codes_Q.shape[-1] != self.depth:
            raise ValueError(f"codes have {codes_Q.shape[-1]} depths, the vocabulary has {self.depth}")
        if codes_Q.numel() and not 0 <= int(codes_Q.min()) <= int(codes_Q.max()) < self.codebook_size:
            low, high = int(codes_Q.min()), int(codes_Q.max())
            raise ValueError(f"codes lie in [{low}, {high}]; the vocabulary has 0..{self.codebook_size - 1}")
        return codes_Q + self._offsets(codes_Q)

    def ids_to_codes(self, ids_Q: Tensor) -> Tensor:
        """Inverse of `codes_to_ids`. ValueError on an id that is not in its depth's range."""
        if ids_Q.shape[-1] != self.depth:
            raise ValueError(f"ids have {ids_Q.shape[-1]} depths, the vocabulary has {self.depth}")
        codes_Q = ids_Q - self._offsets(ids_Q)
        if codes_Q.numel() and not 0 <= int(codes_Q.min()) <= int(codes_Q.max()) < self.codebook_size:
            wrong = ids_Q[(codes_Q < 0) | (codes_Q >= self.codebook_size)]
            raise ValueError(
                f"ids {wrong.flatten()[:4].tolist()} stand where image ids of their depth must stand"
            )
        return codes_Q

    def _offsets(self, like: Tensor) -> Tensor:
        return self.image_offset + self.codebook_size * torch.arange(self.depth, device=like.device)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"sizes": list(self.sizes)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Vocabulary:
        """Inverse of `to_json`. TypeError or ValueError on anything else."""
        given = {k: int(v) for k, v in data.items() if k not in ("row_end", "sizes")}
        row_end = data.get("row_end")
        sizes = tuple(int(i) for i in data.get("sizes", ()))
        return cls(**given, row_end=None if row_end is None else int(row_end), sizes=sizes)


def train_text_tokenizer(texts: list[str], size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any string can be written, nothing is unknown) trained on `texts`; at most `size` ids."""
    if size < 300:
        raise ValueError(
            f"a byte-level vocabulary needs its 256 bytes and some merges: size={size}, at least 300"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def extend(
    tokenizer: PreTrainedTokenizerFast,
    codebook_size: int,
    depth: int,
    grids: Sequence[tuple[int, int]] = (),
    row_ends: bool = False,
) -> Vocabulary:
    """Add specials and Q·K image tokens to any fast tokenizer, in place. Existing ids keep their meaning.

    BOS, EOS and PAD are the tokenizer's own where it has them. grids: heights and widths in cells; more than one bring
    an id for each, <|grid_HxW|>. row_ends: also <|row_end|>.
    """
    for attribute, token in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", PAD)):
        if getattr(tokenizer, attribute) is None:
            tokenizer.add_special_tokens({attribute: token})
    if tokenizer.pad_token_id == tokenizer.eos_token_id:  # a common stand-in; here an end must be predictable
        tokenizer.add_special_tokens({"pad_token": PAD})
    sizes = [grid_name(grid) for grid in grids] if len(grids) > 1 else []
    marks = [IMAGE_START, IMAGE_END, *([ROW_END] if row_ends else []), *sizes]
    tokenizer.add_tokens(marks, special_tokens=True)
    names = [f"<|image_{i}|>" for i in range(depth * codebook_size)]
    offset = len(tokenizer)
    if tokenizer.add_tokens(names, special_tokens=True) != len(names):
        raise ValueError(
            "the tokenizer has some of the tokens <|image_0|> … already; start from its unextended form"
        )
    return Vocabulary(
        bos=token_id(tokenizer, tokenizer.bos_token),
        eos=token_id(tokenizer, tokenizer.eos_token),
        pad=token_id(tokenizer, tokenizer.pad_token),
        image_start=token_id(tokenizer, IMAGE_START),
        image_end=token_id(tokenizer, IMAGE_END),
        image_offset=offset,
        codebook_size=codebook_size,
        depth=depth,
        row_end=token_id(tokenizer, ROW_END) if row_ends else None,
        sizes=tuple(token_id(tokenizer, name) for name in sizes),
    )


def grid_name(grid: tuple[int, int]) -> str:
    """The token that announces pictures of so many cells."""
    return f"<|grid_{grid[0]}x{grid[1]}|>"


def token_id(tokenizer: PreTrainedTokenizerFast, token: Any) -> int:
    """The id of one token by its name."""
    found: Any = tokenizer.convert_tokens_to_ids(str(token))
    return int(found)


def text_to_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """A user's text → ids. The name of a special token in it is spelt out as ordinary text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    named: Any = tokenizer.all_special_ids
    special = {i for i in named if i != tokenizer.unk_token_id}
    if special.isdisjoint(ids):
        return ids
    # a Unigram model takes the name for a piece of text of its own: it is put together from its letters
    return [part for i in ids for part in (_letters(tokenizer, i) if i in special else [i])]


def _letters(tokenizer: PreTrainedTokenizerFast, token: int) -> list[int]:
    vocabulary: Any = tokenizer.get_vocab()
    pieces = [
        piece
        for letter in str(tokenizer.convert_ids_to_tokens(token))
        for piece in ([letter] if letter in vocabulary else [f"<0x{byte:02X}>" for byte in letter.encode()])
    ]
    return [vocabulary.get(piece, tokenizer.unk_token_id) for piece in pieces]


def ids_to_text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Inverse of `text_to_ids`, up to the leading space that a byte-level tokenizer adds."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
