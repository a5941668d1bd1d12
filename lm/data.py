"""Stored pictures and their captions → what a language model learns from: ids beside codes, checked and counted.

    store, JSONL --read_…--> Pairs, written documents ... (lm/mixture.py)
    large store --> PairsInParts --part--> Pairs of a shard ... (lm/parts.py)

It does not know tasks, batches or models.

Legend: N pictures, h w grid of cells, Q depth, K codes in the book.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lm.sequence import Grid, Image, Segment, SequenceFormat, Text
from lm.texts import lines, repair
from vq.store import SPLITS, CodeStore, Rows
from vqlm.errors import ConfigError, nearest

LONGEST_CAPTION = 256  # ids
LONGEST_ID = 32  # characters: what is read of a long caption for each id that it may have

Encode = Callable[[str], list[int]]


@dataclass
class Pairs:
    """Captions as ids, and their pictures' codes, of one split of a store."""

    captions: Sequence[tuple[int, ...]]  # () where there is none
    codes: Tensor | list[Tensor]  # (N,h,w,Q) of any integers; a list of (h,w,Q) where grids differ
    texts: list[str]  # the captions
    ids: list[str]
    concepts: list[str]
    counts: dict[str, int] = field(default_factory=dict)  # of captions that were empty, cut, repaired, …

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def codes_NhwQ(self) -> Tensor:
        """All codes, int64. ValueError where grids differ."""
        if not isinstance(self.codes, Tensor):
            raise ValueError("pictures of several grids have no codes_NhwQ; take `codes`, one by one")
        return self.codes.long()

    @property
    def grids(self) -> list[Grid]:
        """Of each picture."""
        if isinstance(self.codes, Tensor):
            return [(self.codes.shape[1], self.codes.shape[2])] * len(self.codes)
        return [(codes_hwQ.shape[0], codes_hwQ.shape[1]) for codes_hwQ in self.codes]

    def image(self, index: int, given: bool = False) -> Image:
        return Image(self.codes[index].long(), given)

    def text(self, index: int, given: bool = False) -> Text:
        return Text(self.captions[index], given)

    def document(self, index: int, task: str, given: bool = False) -> list[Segment]:
        """The segments of "text_to_image", "image_to_text" or "image". given: the first of two is not learnt."""
        if task == "image":
            return [self.image(index)]
        if task == "text_to_image":
            return [self.text(index, given), self.image(index)]
        if task == "image_to_text":
            return [self.image(index, given), self.text(index)]
        raise ValueError(f"task={task!r}: text_to_image, image_to_text or image")

    def report(self) -> str:
        """One line: how many pairs, and what was found in captions."""
        told = "".join(f", {count:,} captions {what}" for what, count in sorted(self.counts.items()))
        return f"{len(self):,} pairs{told}"


def open_store(folder: str | Path, form: SequenceFormat | None = None) -> CodeStore:
    """A finished store, whose codes a model of this form can read; ConfigError otherwise."""
    store = CodeStore.open(folder)
    if form is not None:
        check_store(store, form)
    return store


def check_store(store: CodeStore, form: SequenceFormat) -> None:
    """ConfigError, with both values, unless codebook size, depth and grids are those of a model.

    The tokenizer itself is compared by `store.check(images)`.
    """
    vocabulary = form.vocabulary
    pairs = (
        ("codebook_size", store.codebook_size, vocabulary.codebook_size),
        ("depth", store.depth, vocabulary.depth),
    )
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise ConfigError(
                f"the store {store.folder} has {name} {theirs}, the language model {ours}: its codes mean nothing to it"
            )
    if unknown := [grid for grid in store.grids if grid not in form.grids]:
        raise ConfigError(
            f"the store {store.folder} has pictures of {unknown[0]} cells, the language model knows "
            f"{', '.join(map(str, form.grids))}: encode the pictures at another size, or train a model on this store"
        )


def identity(
    store: CodeStore, form: SequenceFormat, texts: Sequence[str] = (), written: Sequence[Written] = ()
) -> dict[str, Any]:
    """JSON that says what a language model is trained on and how it is written: a resumed run must have the same.

    "order" is there for a store that is read in parts: its pictures come in another order than those of one in memory.
    """
    told: dict[str, Any] = {
        "store": store.digest,
        "tokenizer": store.tokenizer_fingerprint,
        "codebook_size": store.codebook_size,
        "depth": store.depth,
        "layout": form.layout.name,
        "grids": [list(grid) for grid in form.grids],
        "picture_attention": form.picture_attention,
        "vocabulary": form.vocabulary.to_json(),
        "texts": f"{len(texts)} texts, {_digest(texts)}",
        "documents": f"{len(written)} documents, {_digest([repr(each) for each in written])}",
    }
    if not store.in_memory:
        told["order"] = "shards, 1"
    return json.loads(json.dumps(told))  # as it will be read back: tuples become lists


def _digest(texts: Sequence[str]) -> str:
    told = hashlib.sha256()
    for text in texts:
        told.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return told.hexdigest()[:16]


def read_pairs(
    store: CodeStore | Rows, split: str, encode_text: Encode, longest_caption: int | None = LONGEST_CAPTION
) -> Pairs:
    """One split of a store, or of some rows of it, in its order. It may be empty. longest_caption: ids; null: no limit.

    No caption is refused: each is repaired (`lm.texts.repair`), cut if it is too long, and counted.
    """
    counts: Counter[str] = Counter()
    captions, texts = [], []
    for caption in store.captions(split):
        text, ids, found = read_caption(caption, encode_text, longest_caption)
        captions.append(ids)
        texts.append(text)
        counts.update(found)
    return Pairs(
        captions, store.stored_codes(split), texts, store.ids(split), store.concepts(split), dict(counts)
    )


class PairsInParts:
    """One split of a store of any size: nothing of it is held but a number a shard. See `lm.parts.PartedBatches`.

    longest_caption: ids. ConfigError if it is null: the longest caption is not known before all have been read.
    """

    def __init__(
        self,
        store: CodeStore,
        split: str,
        encode_text: Encode,
        longest_caption: int | None = LONGEST_CAPTION,
    ):
        if longest_caption is None:
            raise ConfigError(
                f"mixture.longest_caption=null: the store {store.folder} is read in parts, and how long a row must be "
                "has to be known before its captions are; give a number"
            )
        self.store, self.split, self.encode_text = store, split, encode_text
        self.longest_caption, self.counts = longest_caption, store.counts(split)

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def grids(self) -> tuple[Grid, ...]:
        """All that occur."""
        return self.store.grids

    def part(self, number: int) -> Pairs:
        """The pairs of a shard, read now and checked; a caption becomes ids each time that it is asked for.

        ConfigError if the shard is not what the manifest says.
        """
        rows = self.store.part(number)
        texts = rows.captions(self.split)
        captions = Captions(texts, self.encode_text, self.longest_caption)
        return Pairs(
            captions, rows.stored_codes(self.split), texts, rows.ids(self.split), rows.concepts(self.split)
        )

    def report(self) -> str:
        """One line, as `Pairs.report`."""
        return f"{len(self):,} pairs, read in {np.count_nonzero(self.counts):,} parts"


class Captions(Sequence[tuple[int, ...]]):
    """Captions as ids (`read_caption`), each when it is drawn; the last is kept, for it is asked for twice."""

    def __init__(self, texts: Sequence[str], encode_text: Encode, longest: int):
        self.texts, self.encode_text, self.longest = texts, encode_text, longest
        self._last: tuple[str | None, tuple[int, ...]] = None, ()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        text: Any = self.texts[index]
        if text != self._last[0]:
            self._last = text, read_caption(text, self.encode_text, self.longest)[1]
        return self._last[1]


def read_caption(
    caption: str, encode_text: Encode, longest: int | None = LONGEST_CAPTION
) -> tuple[str, tuple[int, ...], set[str]]:
    """A caption as it is used, its ids, and what was found in it.

    Found may be: "empty", "cut", "repaired" (undecodable or control characters), "with names of special tokens" such as
    <|image_5|>, which stay the text that they are.
    """
    text, wrong = repair(caption)
    found = {"repaired"} if wrong else set()
    text = " ".join(text.split())
    if re.search(r"<\|[^|<>\s]{1,64}\|>", text):
        found.add("with names of special tokens")
    if longest is None:
        ids = tuple(encode_text(text)) if text else ()
    else:
        whole = text
        text, ids = shorten(text, longest, encode_text)
        if text != whole:
            found.add("cut")
    if not ids:
        found.add("empty")
    return text, ids, found


def shorten(text: str, longest: int, encode_text: Encode) -> tuple[str, tuple[int, ...]]:
    """The longest beginning of a text that has at most `longest` ids and ends with a word, and its ids.

    A first word that is too long by itself is cut within.
    """
    if not text:
        return "", ()
    if len(text) > longest * LONGEST_ID:  # so that what is far too long is not tokenised as a whole
        text = text[: longest * LONGEST_ID + 1].rpartition(" ")[0] or text[: longest * LONGEST_ID]
    ids = encode_text(text)
    if len(ids) > longest:
        words = [match.end() for match in re.finditer(r"\S+", text)]
        ends = words if len(encode_text(text[: words[0]])) <= longest else list(range(1, words[0] + 1))
        fitting = bisect_right(ends, longest, key=lambda end: len(encode_text(text[:end])))
        text = text[: ends[fitting - 1]] if fitting else ""
        ids = encode_text(text) if text else []
    return text, tuple(ids)


class Encoded(Sequence[Sequence[int]]):
    """Texts that are tokenised when they are drawn: most of a large corpus never is."""

    def __init__(self, texts: Sequence[str], encode_text: Encode):
        self.texts, self.encode_text = texts, encode_text

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        text: Any = self.texts[index]
        return self.encode_text(text)


@dataclass(frozen=True)
class Part:
    """A part of a written document: ids of a text, or the index of a picture in its split."""

    content: tuple[int, ...] | int
    given: bool = False


Written = tuple[Part, ...]


def read_documents(path: str | Path, store: CodeStore, split: str, encode_text: Encode) -> list[Written]:
    """Documents of a JSONL file that belong to a split, in its order.

        {"parts": [{"text": "a fox,"}, {"image": "1F98A"}, {"text": "red", "given": true}], "split": "train"}

    image: an id of the store; given: read and not learnt; split: "train" if it is not there. Empty lines are passed
    over. ConfigError names the line of anything else, of an id that the store does not have, and of a picture that is
    in another split than its document: what is held out must not be trained on.
    """
    if not Path(path).is_file():
        raise ConfigError(f"mixture.documents={path}: there is no such file")
    places = {each: {id_: i for i, id_ in enumerate(store.ids(each))} for each in SPLITS}
    found = []
    for number, line in enumerate(lines(Path(path)), start=1):
        if not line.strip():
            continue
        try:
            theirs, parts = _written(line, places, encode_text)
        except _Wrong as error:
            raise ConfigError(f"{path}, line {number} {error}") from error
        if theirs == split:
            found.append(parts)
    return found


class _Wrong(Exception):
    """What is wrong with a line."""


def _written(
    line: str | bytes, places: dict[str, dict[str, int]], encode_text: Encode
) -> tuple[str, Written]:
    if isinstance(line, bytes):
        raise _Wrong("is not UTF-8")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"is not JSON ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get("parts"), list) or not value["parts"]:
        raise _Wrong('needs "parts", a list of {"text": …} and {"image": id}')
    if unknown := sorted(value.keys() - {"parts", "split"}):
        raise _Wrong(f"has an unknown key {unknown[0]!r}{nearest(unknown[0], ('parts', 'split'))}")
    split = value.get("split", "train")
    if split not in SPLITS:
        raise _Wrong(f"has split {split!r}; expected {' or '.join(SPLITS)}{nearest(str(split), SPLITS)}")
    return split, tuple(_part(part, split, places, encode_text) for part in value["parts"])


def _part(part: Any, split: str, places: dict[str, dict[str, int]], encode_text: Encode) -> Part:
    keys = set(part) - {"given"} if isinstance(part, dict) else set()
    if len(keys) != 1 or not keys <= {"text", "image"} or not isinstance(part.get("given", False), bool):
        raise _Wrong(
            f'holds {json.dumps(part)[:80]}; a part is {{"text": …}} or {{"image": id}}, maybe with "given"'
        )
    (kind,) = keys
    content, given = part[kind], part.get("given", False)
    if not isinstance(content, str):
        raise _Wrong(f"holds {kind} {json.dumps(content)[:80]}, which is no text")
    if kind == "text":
        text = repair(content)[0]
        if not text.strip():
            raise _Wrong("holds an empty text")
        return Part(tuple(encode_text(text)), given)
    if content in places[split]:
        return Part(places[split][content], given)
    for other, ids in places.items():
        if content in ids:
            raise _Wrong(
                f"is a {split} document, but its picture {content!r} is in the store's {other} split"
            )
    raise _Wrong(f"names picture {content!r}, which is not in the store{nearest(content, places[split])}")
