"""Pairs, texts and written documents → training batches: the task of each document, and what it leaves out.

    Pairs, texts, written documents --Mixture--> documents --lm.packing--> Batch

A document is one sequence of one task. The n-th batch is a function of (seed, n), however many processes share it.

Legend: S positions of all documents laid end to end, W columns.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch.utils.data import Dataset

from lm.data import LONGEST_CAPTION, Pairs, Written
from lm.packing import Batch, arrange, disturb, pack
from lm.sequence import Segment, SequenceFormat, Text
from vqlm.batches import Order
from vqlm.errors import ConfigError

SHORTEST_ROW = 64  # positions: several short documents share a row
ENDS = 2  # <bos> and <eos>


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


class Documents:
    """Documents of each task, made of some pairs.

    Of an epoch's pairs each stands for one document; a task that does not take a single pair draws its material at
    random instead. A pair without a caption is a picture alone, whatever its task: it must not teach that captions are
    empty. For the same reason no <eos> follows a picture whose caption was left out.
    """

    def __init__(
        self,
        pairs: Pairs,
        form: SequenceFormat,
        mixture: Mixture,
        texts: Sequence[Sequence[int]] = (),
        written: Sequence[Written] = (),
    ):
        self.pairs, self.form, self.mixture, self.texts, self.written = pairs, form, mixture, texts, written

    @cached_property
    def captioned(self) -> np.ndarray:
        """int64: the pairs that have a caption."""
        return np.array([i for i, caption in enumerate(self.pairs.captions) if caption], np.int64)

    @cached_property
    def kin(self) -> dict[int, list[int]]:
        return related(self.pairs) if self.mixture.edit else {}

    @cached_property
    def edited(self) -> list[int]:
        return list(self.kin)

    def document(self, index: int, task: str, dropped: bool, random: np.random.Generator) -> Document:
        """A document of a task. index: the pair whose turn it is."""
        if task == "text":
            return self._text(random)
        if task == "edit":
            return self._edit(dropped, random)
        if task == "interleaved":
            return self._interleaved(random)
        if task == "written":
            return self.of_file(int(random.integers(len(self.written))))
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

    def of_file(self, number: int) -> Document:
        return Document(
            [
                self.pairs.image(part.content, part.given)
                if isinstance(part.content, int)
                else Text(part.content, part.given)
                for part in self.written[number]
            ]
        )


class DocumentBatches(Dataset):
    """Item n is the n-th batch of a run: `documents` documents (`Documents`), each of a drawn task, packed into rows.

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
        check_ranks(rank, ranks, documents)
        self.pairs, self.form, self.mixture, self.seed, self.total = pairs, form, mixture, seed, total
        self.rank, self.ranks = rank, ranks
        self.material = Documents(pairs, form, mixture, texts, written)
        self._check_pairs()
        self._check_tasks()
        self.order = Order(len(pairs), documents, seed)
        self.longest = max(self._longest(task) for task, weight in mixture.weights.items() if weight)
        self.row_length = fitting_rows(row_length, self.longest)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, n: int) -> Batch:
        random = np.random.default_rng([self.seed, n, 2])
        drawn = [self.mixture.draw(random) for _ in range(self.order.batch_size)]
        chosen = self.order.indices(n).tolist()
        documents = [self.material.document(i, *task, random) for i, task in zip(chosen, drawn, strict=True)]
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
        mixture, material, total = self.mixture, self.material, len(self.pairs)
        if mixture.text and not len(material.texts):
            raise ConfigError(
                f"mixture.text={mixture.text}, but there are 0 texts: choose some, as texts=wordnet"
            )
        if mixture.written and not material.written:
            raise ConfigError(
                f"mixture.written={mixture.written}, but {mixture.documents} has 0 training documents"
            )
        if mixture.edit and not material.edited:
            raise ConfigError(
                f"mixture.edit={mixture.edit}, but of {total} pictures of {len(set(self.pairs.concepts))} concepts "
                "0 have another one of their concept with another caption"
            )
        if (mixture.interleaved or mixture.image_to_text) and not len(material.captioned):
            raise ConfigError(
                f"mixture.image_to_text={mixture.image_to_text}, interleaved={mixture.interleaved}, "
                f"but 0 of {total} pictures have a caption"
            )

    def _longest(self, task: str) -> int:
        """Positions of the longest document of a task."""
        if task == "written":
            written = range(len(self.material.written))
            return max(self.material.of_file(i).length(self.form) for i in written)
        return longest_document(task, self.mixture, max(len(c) for c in self.pairs.captions), self.form)


def check_ranks(rank: int, ranks: int, documents: int) -> None:
    if not 0 <= rank < ranks <= documents:
        raise ConfigError(
            f"rank={rank} of ranks={ranks} with documents={documents}: each rank needs at least one document"
        )


def longest_document(task: str, mixture: Mixture, caption: int, form: SequenceFormat) -> int:
    """Positions of the longest document of a task but "written". caption: ids of the longest one."""
    picture, count = form.longest_marked, mixture.pictures
    parts = {"text": mixture.longest_text, "edit": caption + 2 * picture}
    parts["interleaved"] = count * (caption + picture)
    return parts.get(task, caption + picture) + ENDS


def fitting_rows(row_length: int | None, longest: int) -> int:
    """Positions of a row. ConfigError if the longest document does not fit."""
    if row_length is None:
        return max(SHORTEST_ROW, longest)
    if longest > row_length:
        raise ConfigError(
            f"row_length={row_length}: the longest document has {longest} positions; give that, or null"
        )
    return row_length


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
