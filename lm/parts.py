"""Pairs that are read shard by shard → training batches: for stores that memory does not hold.

    PairsInParts, texts --PartedBatches--> documents --lm.packing--> Batch

As lm/mixture.py, with three differences. Pictures come in the order of `vqlm.batches.ShardOrder`. Each document has
random numbers of its own, so that a process need not read the shards of another one's documents. And what a document
takes beside its own pair (an edit's source, pictures between pictures) comes from the same shard.

Legend: S positions of all documents laid end to end, W columns.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from lm.data import PairsInParts
from lm.mixture import Document, Documents, Mixture, check_ranks, fitting_rows, longest_document
from lm.packing import Batch, arrange, disturb, pack
from lm.sequence import SequenceFormat, Text
from vqlm.batches import ShardOrder
from vqlm.errors import ConfigError


class PartedBatches(Dataset):
    """Item n is the n-th batch of a run: a function of (seed, n), however many processes and workers share it.

    As `lm.mixture.DocumentBatches`, whose parameters it has; row_length=None takes captions to be as long as they may.
    Held are the shards that the documents at hand come from, as many as `order.open_shards` says.

    A task for which a document's shard has nothing gives way to text → image there, or to a picture without a caption;
    the first time is told on stderr, by each process. Whether the whole store has something is not known before all of
    it has been read, so this decides: if none of the shards that the first batch looks into has it, ConfigError.

    ConfigError also if the mixture asks for what is not there, for written documents, which may name any picture, or if
    the longest document does not fit into a row; and if a shard that is read is damaged.
    """

    def __init__(
        self,
        pairs: PairsInParts,
        form: SequenceFormat,
        mixture: Mixture,
        documents: int,
        row_length: int | None,
        seed: int,
        total: int,
        texts: Sequence[Sequence[int]] = (),
        rank: int = 0,
        ranks: int = 1,
    ):
        check_ranks(rank, ranks, documents)
        self.pairs, self.form, self.mixture, self.seed, self.total = pairs, form, mixture, seed, total
        self.texts = texts
        self._check()
        self.order = ShardOrder(pairs.counts, documents, seed)
        self.places = range(rank, documents, ranks)  # of each batch, those that this process makes
        tasks = [task for task, weight in mixture.weights.items() if weight]
        self.longest = max(longest_document(task, mixture, pairs.longest_caption, form) for task in tasks)
        self.row_length = fitting_rows(row_length, self.longest)
        self._held: OrderedDict[int, Documents] = OrderedDict()
        self._told: set[str] = set()
        self._check_first()

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, n: int) -> Batch:
        samples = self.order.samples(n, self.places)
        randoms = [np.random.default_rng([self.seed, n, 4, place]) for place in self.places]
        documents = [self._document(*sample, random) for sample, random in zip(samples, randoms, strict=True)]
        laid = [self.form.lay(each.segments, each.end) for each in documents]
        batch = pack(laid, self.form, self.row_length)
        if self.mixture.noise:
            self._disturb(batch, [len(each) for each in laid], randoms)
        return batch

    def _document(self, shard: int, index: int, random: np.random.Generator) -> Document:
        """The document of a pair; of the pair alone, where its shard has nothing that the task could add."""
        material = self._material(shard)
        task, dropped = self.mixture.draw(random)
        if not _has(material, task):
            self._tell(task, shard)
            task = "image" if task == "image_to_text" else "text_to_image"
        made = material.document(index, task, dropped, random)
        if task != "text":
            self._check_captions(made, material.pairs.ids[index])
        return made

    def _material(self, shard: int) -> Documents:
        if shard not in self._held:
            while len(self._held) >= self.order.open_shards(self.places):
                self._held.popitem(last=False)
            self._held[shard] = self._read(shard)
        self._held.move_to_end(shard)
        return self._held[shard]

    def _read(self, shard: int) -> Documents:
        return Documents(self.pairs.part(shard), self.form, self.mixture, self.texts)

    def _tell(self, task: str, shard: int) -> None:
        if task not in self._told:
            self._told.add(task)
            drawn = "pictures alone" if task == "image_to_text" else "text_to_image"
            print(
                f"mixture.{task}: {self._names([shard])} has no {NEEDED[task]}; its documents of this task are {drawn} "
                "instead, as in other such shards",
                file=sys.stderr,
            )

    def _names(self, shards: Sequence[int]) -> str:
        known = self.pairs.store.manifest["shards"]
        return ", ".join(known[shard]["name"] for shard in shards[:3]) + (" …" if len(shards) > 3 else "")

    def _disturb(self, batch: Batch, lengths: list[int], randoms: list[np.random.Generator]) -> None:
        """Noise in place, of each document its own."""
        W, codes = batch.ids_BTW.shape[2], self.form.vocabulary.codebook_size
        drawn = [
            (random.random(length) < self.mixture.noise, random.integers(0, codes, (length, W)))
            for random, length in zip(randoms, lengths, strict=True)
        ]
        chosen_S, drawn_SW = (torch.from_numpy(np.concatenate(each)) for each in zip(*drawn, strict=True))
        places_S = arrange(tuple(lengths), self.row_length).places(range(len(lengths)))
        flat_SW = batch.ids_BTW.view(-1, W)
        flat_SW[places_S] = disturb(flat_SW[places_S], self.form, chosen_S, drawn_SW)

    def _check(self) -> None:
        """What must hold before training."""
        mixture, folder = self.mixture, self.pairs.store.folder
        if not len(self.pairs):
            raise ConfigError(f"the store {folder} has no picture to train on: all of it is held out")
        if unknown := [grid for grid in self.pairs.grids if grid not in self.form.grids]:
            raise ConfigError(
                f"the store {folder} has pictures of {unknown[0]} cells, the language model knows {self.form.grids}"
            )
        if mixture.text and not len(self.texts):
            raise ConfigError(
                f"mixture.text={mixture.text}, but there are 0 texts: choose some, as texts=wordnet"
            )
        check_not_written(mixture, folder)

    def _check_first(self) -> None:
        """ConfigError on a task that no shard of the first batch has anything for; every process finds the same."""
        wanted = {task for task in NEEDED if self.mixture.weights[task]}
        shards = sorted({shard for shard, _ in self.order.samples(0, range(self.order.batch_size))})
        for shard in shards:  # in most stores the first one has all
            if not wanted:
                return
            material = self._read(shard)
            wanted = {task for task in wanted if not _has(material, task)}
        if wanted:
            task = min(wanted)
            raise ConfigError(
                f"mixture.{task}={self.mixture.weights[task]}, but the store {self.pairs.store.folder} is read in "
                f"parts, and none of the {len(shards)} shards of the first batch ({self._names(shards)}) has "
                f"{NEEDED[task]}: leave the task out, or encode so that what belongs together lies in one shard"
            )

    def _check_captions(self, made: Document, id_: str) -> None:
        vocabulary = self.form.vocabulary
        specials = set(vocabulary.specials)
        for ids in (each.ids for each in made.segments if isinstance(each, Text) and each.ids):
            if max(ids) >= vocabulary.image_offset or not specials.isdisjoint(ids):
                raise ConfigError(
                    f"the caption of {id_!r} holds ids of special tokens; encode it as plain text"
                )


NEEDED = {
    "edit": "two pictures of one concept with unlike captions",
    "interleaved": "captions",
    "image_to_text": "captions",
}


def _has(material: Documents, task: str) -> bool:
    """Whether a shard has what a task takes."""
    if task == "edit":
        return bool(material.edited)
    if task == "interleaved":
        return bool(len(material.captioned))
    # the other captions of a shard are not tokenised for this
    return task != "image_to_text" or any(text.strip() for text in material.pairs.texts)


def check_not_written(mixture: Mixture, folder: str) -> None:
    """ConfigError if documents of a file, which name pictures by id, are to be made of a store in parts."""
    if mixture.written:
        raise ConfigError(
            f"mixture.written={mixture.written}: documents of a file name any picture of the store, but {folder} "
            "is too large to be held in memory and is read in parts; leave them out, or take a smaller store"
        )
