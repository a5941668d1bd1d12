"""Stored codes and captions → training batches of the language model: documents, mixture, dropout, packing.

A document is one sequence of one task: text → image, or image → text. The n-th batch is a function of (seed, n).
Documents are packed into rows; a position looks only into its own document, and no label crosses a document.

Legend: B rows, T positions, W columns, N documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lm.grammar import Grammar
from lm.sequence import NONE, Image, Segment, SequenceFormat, Text
from vq.store import CodeStore
from vqlm.batches import Order
from vqlm.errors import ConfigError

SHORTEST_ROW = 64  # positions: several short documents share a row


@dataclass
class Batch:
    """Packed documents."""

    ids_BTW: Tensor  # int64; <pad> after the last document of a row
    next_BTW: (
        Tensor  # what follows each position; NONE at ends of documents and where nothing is to be predicted
    )
    document_BT: Tensor  # number of the document within its row, NONE for padding
    positions_BT: Tensor  # position within the document
    samples: int  # documents

    @property
    def mask(self) -> Tensor:
        """(B,1,T,T) bool: causal, within the document. A padding position sees itself, so that no row is empty."""
        same = self.document_BT[:, :, None] == self.document_BT[:, None, :]
        causal = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril()
        return (same & causal)[:, None]

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.ids_BTW.to(device),
            self.next_BTW.to(device),
            self.document_BT.to(device),
            self.positions_BT.to(device),
            self.samples,
        )


@dataclass(frozen=True)
class Mixture:
    """Shares of the tasks. text_to_image + image_to_text is normalised to 1.

    drop_condition: share of text → image documents whose caption is left out, so that guidance has an unconditional
    branch (Ho & Salimans 2022, §3.2). noise: share of picture positions that are read as random codes, while what
    follows them stays to be predicted: a model that has only ever read true codes comes to tell the picture by its
    first codes instead of its caption, and is lost after the first code that it draws wrongly.
    """

    text_to_image: float = 0.85
    image_to_text: float = 0.15
    drop_condition: float = 0.1
    noise: float = 0.01

    def __post_init__(self) -> None:
        if self.text_to_image < 0 or self.image_to_text < 0 or self.text_to_image + self.image_to_text <= 0:
            raise ValueError(
                f"text_to_image={self.text_to_image}, image_to_text={self.image_to_text}: "
                "must not be negative and not both 0"
            )
        if not 0 <= self.drop_condition <= 1 or not 0 <= self.noise < 1:
            raise ValueError(
                f"drop_condition={self.drop_condition} must lie in [0, 1], noise={self.noise} in [0, 1)"
            )

    def draw(self, random: np.random.Generator) -> str:
        """One of the tasks: "text_to_image", "unconditional", "image_to_text"."""
        share = self.text_to_image / (self.text_to_image + self.image_to_text)
        if random.random() >= share:
            return "image_to_text"
        return "unconditional" if random.random() < self.drop_condition else "text_to_image"


@dataclass
class Pairs:
    """Captions as ids, and their pictures' codes, of one split of a store."""

    captions: list[tuple[int, ...]]
    codes_NhwQ: Tensor
    texts: list[str]
    ids: list[str]
    concepts: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def document(self, index: int, task: str) -> list[Segment]:
        image, text = Image(self.codes_NhwQ[index]), Text(self.captions[index])
        return {"text_to_image": [text, image], "unconditional": [image], "image_to_text": [image, text]}[
            task
        ]


def open_store(folder: str) -> CodeStore:
    """A finished store whose pictures have one grid; ConfigError otherwise."""
    store = CodeStore.open(folder)
    if store.grid is None:
        raise ConfigError(f"the store at {folder} holds pictures of several grids; a language model has one")
    return store


def read_pairs(store: CodeStore, split: str, encode_text: Callable[[str], list[int]]) -> Pairs:
    """One split of a store, in its order. It may be empty."""
    captions = [tuple(encode_text(caption)) for caption in store.captions(split)]
    codes_NhwQ = store.codes_NhwQ(split).long()
    return Pairs(captions, codes_NhwQ, store.captions(split), store.ids(split), store.concepts(split))


class DocumentBatches(Dataset):
    """Item n is the n-th batch of a run: `documents` documents, each of a drawn task, packed into rows.

    row_length: positions of a row; None: as many as the longest document needs, at least `SHORTEST_ROW`.
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
    ):
        self.pairs, self.form, self.mixture, self.seed, self.total = pairs, form, mixture, seed, total
        self.order = Order(len(pairs), documents, seed)
        longest = (
            max(len(c) for c in pairs.captions) + form.image_length + 4
        )  # <bos>, two marks of the picture, <eos>
        self.row_length = max(SHORTEST_ROW, longest) if row_length is None else row_length
        if longest > self.row_length:
            raise ConfigError(
                f"row_length={row_length}: the longest document has {longest} positions; give that, or null"
            )

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, n: int) -> Batch:
        random = np.random.default_rng([self.seed, n, 2])
        tasks = [self.mixture.draw(random) for _ in range(self.order.batch_size)]
        chosen = self.order.indices(n).tolist()
        documents = [
            # a picture without its caption does not teach that captions are empty: such a document stays open
            self.form.build(self.pairs.document(i, task), end=task != "unconditional")
            for i, task in zip(chosen, tasks, strict=True)
        ]
        batch = pack(documents, self.form, self.row_length)
        batch.ids_BTW = disturb(batch.ids_BTW, self.form, self.mixture.noise, random)
        return batch


def disturb(ids_BTW: Tensor, form: SequenceFormat, share: float, random: np.random.Generator) -> Tensor:
    """Replace all ids of a share of the picture positions by random ones of the same depths."""
    chosen_BT = (ids_BTW[..., 0] >= form.vocabulary.image_offset) & torch.from_numpy(
        random.random(ids_BTW.shape[:2]) < share
    )
    size = form.vocabulary.codebook_size
    codes_BTW = (ids_BTW - form.vocabulary.image_offset) % size
    drawn_BTW = torch.from_numpy(random.integers(0, size, ids_BTW.shape))
    return torch.where(chosen_BT[..., None], ids_BTW - codes_BTW + drawn_BTW, ids_BTW)


def pack(documents: list[Tensor], form: SequenceFormat, row_length: int) -> Batch:
    """Documents (T_i, W) → rows of at most `row_length` positions, the longest first into the first row with room."""
    rows: list[list[Tensor]] = []
    room: list[int] = []
    for document in sorted(documents, key=len, reverse=True):
        if len(document) > row_length:
            raise ValueError(f"a document of {len(document)} positions does not fit row_length={row_length}")
        row = next((i for i, free in enumerate(room) if free >= len(document)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_length)
        rows[row].append(document)
        room[row] -= len(document)
    return _lay(rows, form, row_length - min(room))


def _lay(rows: list[list[Tensor]], form: SequenceFormat, length: int) -> Batch:
    grammar = Grammar(form)
    ids_BTW = torch.full((len(rows), length, form.width), NONE)
    ids_BTW[..., 0] = form.vocabulary.pad
    next_BTW = torch.full_like(ids_BTW, NONE)
    document_BT, positions_BT = (
        torch.full((len(rows), length), NONE),
        torch.zeros(len(rows), length, dtype=torch.int64),
    )
    for b, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row):
            end = start + len(document)
            ids_BTW[b, start:end] = document
            labels = torch.where(
                grammar.label_depths(document) == NONE, torch.full_like(document, NONE), document
            )
            next_BTW[b, start : end - 1] = labels[1:]
            document_BT[b, start:end] = number
            positions_BT[b, start:end] = torch.arange(len(document))
            start = end
    return Batch(ids_BTW, next_BTW, document_BT, positions_BT, sum(len(row) for row in rows))
