"""Stored codes, captions and texts → training batches of the language model: documents, mixture, condition dropout.

    store, texts, JSONL --read_…--> Pairs, texts, written documents --Mixture--> documents --lm.packing--> Batch

A document is one sequence of one task. The n-th batch is a function of (seed, n), however many processes share it.

Legend: N pictures, h w grid of cells, Q depth, K codes in the book, S positions of all documents laid end to end.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lm.packing import Batch, arrange, disturb, pack
from lm.sequence import Grid, Image, Segment, SequenceFormat, Text
from lm.texts import lines, repair
from vq.store import SPLITS, CodeStore
from vqlm.batches import Order
from vqlm.errors import ConfigError, nearest

SHORTEST_ROW = 64  # positions: several short documents share a row
LONGEST_CAPTION = 256  # ids
LONGEST_ID = 32  # characters: what is read of a long caption for each id that it may have
ENDS = 2  # <bos> and <eos>

Encode = Callable[[str], list[int]]


# --- the mixture ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Shares of the tasks; their sum is taken as 1.

    text_to_image: caption, picture. image_to_text: picture, caption. image: a picture alone. text: a text alone.
    edit: a picture, the caption of another picture of its concept, and that picture; only the last is learnt.
    interleaved: 2 to `pictures` captions with their pictures, the captions first or the pictures first.
    written: documents of the file `documents` (see `read_documents`).

    drop_condition: share of the text → image documents (and edits) whose text is left out, so that guidance has an
    unconditional branch (Ho & Salimans 2022, §3.2). noise: share of picture positions that are read as random codes,
    while what follows them stays to be predicted: a model that has only ever read true codes comes to tell the picture
    by its first codes instead of its caption, and is lost after the first code that it draws wrongly.
    longest_caption: ids; a longer caption is cut at a word; null: never. longest_text: ids of a text document; of a
    longer text a window is read.
    """

    text_to_image: float = 0.85
    image_to_text: float = 0.15
    image: float = 0.0
    text: float = 0.0
    edit: float = 0.0
    interleaved: float = 0.0
    written: float = 0.0
    drop_condition: float = 0.1
    noise: float = 0.01
    pictures: int = 3
    longest_caption: int | None = LONGEST_CAPTION
    longest_text: int = 128
    documents: str | None = None

    def __post_init__(self) -> None:
        told = ", ".join(f"{task}={weight}" for task, weight in self.weights.items())
        if min(self.weights.values()) < 0 or not 0 < sum(self.weights.values()) < float("inf"):
            raise ValueError(f"{told}: must not be negative and not all 0")
        if not 0 <= self.drop_condition <= 1 or not 0 <= self.noise < 1:
            raise ValueError(
                f"drop_condition={self.drop_condition} must lie in [0, 1], noise={self.noise} in [0, 1)"
            )
        shortest = 1 if self.longest_caption is None else self.longest_caption
        if self.pictures < 2 or self.longest_text < 1 or shortest < 1:
            raise ValueError(
                f"pictures={self.pictures} must be at least 2, longest_text={self.longest_text} and "
                f"longest_caption={self.longest_caption} at least 1 (or longest_caption null)"
            )
        if self.written and self.documents is None:
            raise ValueError(f"written={self.written} must come with a file: documents=FILE.jsonl")

    @property
    def weights(self) -> dict[str, float]:
        """By task."""
        return {task: getattr(self, task) for task in TASKS}

    @cached_property
    def _edges(self) -> list[float]:
        """The upper edge of each task's share of [0, 1)."""
        total = sum(self.weights.values())
        edges = [edge / total for edge in accumulate(self.weights.values())]
        return [edge if edge < edges[-1] else 1.0 for edge in edges]  # the sum may end a hair below 1

    def draw(self, random: np.random.Generator) -> tuple[str, bool]:
        """One of the tasks, and whether its condition is dropped. Two random numbers at most."""
        task = TASKS[bisect_right(self._edges, random.random())]
        return task, task in CONDITIONED and random.random() < self.drop_condition


TASKS = ("text_to_image", "image_to_text", "image", "text", "edit", "interleaved", "written")
CONDITIONED = ("text_to_image", "edit")


# --- what documents are made of -------------------------------------------------------------------------------


@dataclass
class Pairs:
    """Captions as ids, and their pictures' codes, of one split of a store."""

    captions: list[tuple[int, ...]]  # () where there is none
    codes: Tensor | list[Tensor]  # (N,h,w,Q); a list of (h,w,Q) where grids differ
    texts: list[str]  # the captions
    ids: list[str]
    concepts: list[str]
    counts: dict[str, int] = field(default_factory=dict)  # of captions that were empty, cut, repaired, …

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def codes_NhwQ(self) -> Tensor:
        """All codes. ValueError where grids differ."""
        if not isinstance(self.codes, Tensor):
            raise ValueError("pictures of several grids have no codes_NhwQ; take `codes`, one by one")
        return self.codes

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
    """JSON that says what a language model is trained on and how it is written: a resumed run must have the same."""
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
    return json.loads(json.dumps(told))  # as it will be read back: tuples become lists


def _digest(texts: Sequence[str]) -> str:
    told = hashlib.sha256()
    for text in texts:
        told.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return told.hexdigest()[:16]


def read_pairs(
    store: CodeStore, split: str, encode_text: Encode, longest_caption: int | None = LONGEST_CAPTION
) -> Pairs:
    """One split of a store, in its order. It may be empty. longest_caption: ids; null: no limit.

    No caption is refused: each is repaired (`lm.texts.repair`), cut if it is too long, and counted.
    """
    counts: Counter[str] = Counter()
    captions, texts = [], []
    for caption in store.captions(split):
        text, ids, found = read_caption(caption, encode_text, longest_caption)
        captions.append(ids)
        texts.append(text)
        counts.update(found)
    codes = store.codes_list(split) if store.grid is None else store.codes_NhwQ(split)
    return Pairs(captions, codes, texts, store.ids(split), store.concepts(split), dict(counts))


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


# --- batches --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """Segments, and whether <eos> follows them."""

    segments: list[Segment]
    end: bool = True

    def length(self, form: SequenceFormat) -> int:
        """Positions, without laying it."""
        parts = (
            len(each.ids) if isinstance(each, Text) else form.marked_length(each.grid)
            for each in self.segments
        )
        return 1 + sum(parts) + self.end


class DocumentBatches(Dataset):
    """Item n is the n-th batch of a run: `documents` documents, each of a drawn task, packed into rows.

    Of an epoch's pairs each stands for one document; a task that does not take a single pair draws its material at
    random instead. A pair without a caption is a picture alone, whatever its task: it must not teach that captions are
    empty. For the same reason no <eos> follows a picture whose caption was left out.

    row_length: positions of a row; None: as many as the longest possible document needs, at least `SHORTEST_ROW`.
    texts: ids of each text. written: documents of a file. rank, ranks: of `ranks` processes, number `rank` gets every
    `ranks`-th document of the same batch, from its own number on: together they see what one process sees.

    Attributes:
        longest: positions of the longest document that can occur; a model must have so many.

    ConfigError if the mixture asks for what is not there, or the longest document does not fit into a row.
    """

    def __init__(
        self,
        pairs: Pairs,
        form: SequenceFormat,
        mixture: Mixture,
        documents: int,
        row_length: int | None,
        seed: int,
        total: int,
        texts: Sequence[Sequence[int]] = (),
        written: Sequence[Written] = (),
        rank: int = 0,
        ranks: int = 1,
    ):
        if not 0 <= rank < ranks <= documents:
            raise ConfigError(
                f"rank={rank} of ranks={ranks} with documents={documents}: each rank needs at least one document"
            )
        self.pairs, self.form, self.mixture, self.seed, self.total = pairs, form, mixture, seed, total
        self.texts, self.written, self.rank, self.ranks = texts, written, rank, ranks
        self.captioned = np.array([i for i, caption in enumerate(pairs.captions) if caption], np.int64)
        self.kin = related(pairs) if mixture.edit else {}
        self.edited = list(self.kin)
        self._check_pairs()
        self._check_tasks()
        self.order = Order(len(pairs), documents, seed)
        self.longest = max(self._longest(task) for task, weight in mixture.weights.items() if weight)
        self.row_length = max(SHORTEST_ROW, self.longest) if row_length is None else row_length
        if self.longest > self.row_length:
            raise ConfigError(
                f"row_length={row_length}: the longest document has {self.longest} positions; give that, or null"
            )

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, n: int) -> Batch:
        random = np.random.default_rng([self.seed, n, 2])
        drawn = [self.mixture.draw(random) for _ in range(self.order.batch_size)]
        chosen = self.order.indices(n).tolist()
        documents = [self.document(i, *task, random) for i, task in zip(chosen, drawn, strict=True)]
        mine = range(self.rank, len(documents), self.ranks)
        batch = pack(
            [self.form.lay(documents[i].segments, documents[i].end) for i in mine], self.form, self.row_length
        )
        if self.mixture.noise:
            self._disturb(batch, [each.length(self.form) for each in documents], mine, random)
        return batch

    def _disturb(self, batch: Batch, lengths: list[int], mine: range, random: np.random.Generator) -> None:
        """Noise in place. It is drawn for the whole batch as one process packs it, and each rank takes its part."""
        whole = arrange(tuple(lengths), self.row_length)
        own = arrange(tuple(lengths[i] for i in mine), self.row_length)
        W = batch.ids_BTW.shape[2]
        chosen = torch.from_numpy(random.random(whole.shape) < self.mixture.noise).flatten()
        drawn = torch.from_numpy(random.integers(0, self.form.vocabulary.codebook_size, (*whole.shape, W)))
        theirs, ours = whole.places(mine), own.places(range(len(mine)))
        flat_SW = batch.ids_BTW.view(-1, W)
        flat_SW[ours] = disturb(flat_SW[ours], self.form, chosen[theirs], drawn.view(-1, W)[theirs])

    # documents -------------------------------------------------------------------------------------------------

    def document(self, index: int, task: str, dropped: bool, random: np.random.Generator) -> Document:
        """A document of a task. index: the pair whose turn it is."""
        if task == "text":
            return self._text(random)
        if task == "edit":
            return self._edit(dropped, random)
        if task == "interleaved":
            return self._interleaved(random)
        if task == "written":
            return self._written(int(random.integers(len(self.written))))
        if task == "image" or dropped or not self.pairs.captions[index]:
            return Document([self.pairs.image(index)], end=False)
        # what is read in both directions cannot be predicted from what came before
        given = task == "image_to_text" and self.form.picture_attention == "bidirectional"
        return Document(self.pairs.document(index, task, given))

    def _text(self, random: np.random.Generator) -> Document:
        ids = self.texts[int(random.integers(len(self.texts)))]
        longest = self.mixture.longest_text
        start = int(random.integers(len(ids) - longest + 1)) if len(ids) > longest else 0
        part = ids[start : start + longest]
        return Document([Text(tuple(part))], end=start + len(part) == len(ids))

    def _edit(self, dropped: bool, random: np.random.Generator) -> Document:
        target = self.edited[int(random.integers(len(self.edited)))]
        group, caption = self.kin[target], self.pairs.captions[target]
        others = [i for i in group if self.pairs.captions[i] != caption]
        source = self.pairs.image(others[int(random.integers(len(others)))], given=True)
        # the instruction is given: after a picture it must not be learnt as that picture's caption
        told: list[Segment] = [] if dropped else [self.pairs.text(target, given=True)]
        return Document([source, *told, self.pairs.image(target)], end=not dropped)

    def _interleaved(self, random: np.random.Generator) -> Document:
        count = int(random.integers(2, self.mixture.pictures + 1))
        chosen = random.choice(self.captioned, count, replace=count > len(self.captioned)).tolist()
        task = "text_to_image" if random.random() < 0.5 else "image_to_text"
        return Document([segment for i in chosen for segment in self.pairs.document(i, task)])

    def _written(self, number: int) -> Document:
        return Document(
            [
                self.pairs.image(part.content, part.given)
                if isinstance(part.content, int)
                else Text(part.content, part.given)
                for part in self.written[number]
            ]
        )

    # what must hold before training ----------------------------------------------------------------------------

    def _check_pairs(self) -> None:
        if not len(self.pairs):
            raise ConfigError("the store has no picture to train on: all of it is held out")
        vocabulary = self.form.vocabulary
        specials = set(vocabulary.specials)
        for id_, grid, caption in zip(self.pairs.ids, self.pairs.grids, self.pairs.captions, strict=True):
            if grid not in self.form.grids:
                raise ConfigError(
                    f"picture {id_!r} has {grid} cells, the language model knows {self.form.grids}"
                )
            if caption and (max(caption) >= vocabulary.image_offset or not specials.isdisjoint(caption)):
                raise ConfigError(
                    f"the caption of {id_!r} holds ids of special tokens; encode it as plain text"
                )

    def _check_tasks(self) -> None:
        """ConfigError on a task that has a share and nothing to make it of."""
        mixture, total = self.mixture, len(self.pairs)
        if mixture.text and not len(self.texts):
            raise ConfigError(
                f"mixture.text={mixture.text}, but there are 0 texts: choose some, as texts=wordnet"
            )
        if mixture.written and not self.written:
            raise ConfigError(
                f"mixture.written={mixture.written}, but {mixture.documents} has 0 training documents"
            )
        if mixture.edit and not self.edited:
            raise ConfigError(
                f"mixture.edit={mixture.edit}, but of {total} pictures of {len(set(self.pairs.concepts))} concepts "
                "0 have another one of their concept with another caption"
            )
        if (mixture.interleaved or mixture.image_to_text) and not len(self.captioned):
            raise ConfigError(
                f"mixture.image_to_text={mixture.image_to_text}, interleaved={mixture.interleaved}, "
                f"but 0 of {total} pictures have a caption"
            )

    def _longest(self, task: str) -> int:
        """Positions of the longest document of a task."""
        caption = max(len(c) for c in self.pairs.captions)
        picture = self.form.longest_marked
        if task == "written":
            return max(self._written(i).length(self.form) for i in range(len(self.written)))
        count = self.mixture.pictures
        parts = {"text": self.mixture.longest_text, "edit": caption + 2 * picture}
        parts["interleaved"] = count * (caption + picture)
        return parts.get(task, caption + picture) + ENDS


def related(pairs: Pairs) -> dict[int, list[int]]:
    """For each captioned picture that has kin, the captioned pictures of its concept.

    Kin: another picture of the same concept, with another caption.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, (concept, caption) in enumerate(zip(pairs.concepts, pairs.captions, strict=True)):
        if concept and caption:
            groups[concept].append(i)
    several = [group for group in groups.values() if len({pairs.captions[i] for i in group}) > 1]
    return dict(sorted((i, group) for group in several for i in group))
