"""A finished store, opened: a sequence of pictures' codes with their captions. It changes nothing.

A store of at most IN_MEMORY bytes is read once and held. Of a larger one only numbers are held; its shards are read
when they are asked for (`part`), each compared with its SHA-256 before a row of it is used.

Shapes: h w grid, Q codes per cell (depth), K codes in the book, N pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from vq.store.manifest import (
    MANIFEST,
    REJECTS,
    TOKENIZER,
    Tokenizer,
    again,
    read_manifest,
)
from vq.store.rows import Rows, StoredPicture, by_frequency, check_split, grid_counts
from vq.store.shard import Damaged, parse_shard
from vqlm.errors import ConfigError
from vqlm.places import Place, place

IN_MEMORY = 2**30  # bytes of shards: such a store is held whole, and hashing it takes about a second


class CodeStore:
    """A finished store, read-only: a sequence of StoredPicture, with bulk access by split ("train" or "heldout").

    `captions`, `codes_NhwQ` and their like read all of the store, whatever it weighs; `part` and `sample` do not.
    """

    def __init__(self, where: Place, manifest: dict[str, Any]):
        self.place, self.manifest = where, manifest
        self._latest: tuple[int, Rows] | None = None  # the part that `store[i]` looked at last

    @classmethod
    def open(cls, folder: str | Path, verify: bool | None = None) -> CodeStore:
        """Open a store. ConfigError names what is wrong: no such folder (with the nearest name), not finished,
        another format version, or a file missing, of another size or (with `verify`) with another content.

        `verify` compares every file with its SHA-256 and reads all codes; by default so for stores that are held in
        memory. Where it is off, each shard is compared, and its codes checked against [0, K), when it is read.
        """
        where = place(folder)
        store = cls(where, read_manifest(where))
        for each in store.manifest["shards"]:
            store._check_cheaply(each)
        if store.in_memory if verify is None else verify:
            store.verify()
        return store

    @property
    def in_memory(self) -> bool:
        """Whether the store is small enough to be held whole."""
        return sum(each["bytes"] for each in self.manifest["shards"]) <= IN_MEMORY

    def verify(self) -> None:
        """Compare every file with the manifest and read all codes. ConfigError names the first file that differs."""
        for name, expected in self.manifest["files"].items():
            self._read(name, expected)
        if self.in_memory:
            _ = self._rows
        else:
            for number in range(self.parts):
                self.part(number)

    def check(self, tokenizer: Tokenizer) -> None:
        """ConfigError (a ValueError), with both fingerprints, unless `tokenizer` is the one that made these codes."""
        theirs = str(tokenizer.fingerprint)
        if theirs != self.tokenizer_fingerprint:
            raise ConfigError(
                f"the store {self.place} holds codes of tokenizer {self.tokenizer_fingerprint}, but the one given is "
                f"{theirs}; use {self.tokenizer_folder}, or encode the pictures again with the new one"
            )

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.manifest["job"]["fingerprint"]

    @property
    def digest(self) -> str:
        """16 hex digits of the manifest, which holds the hash of every file: another store has another one."""
        with self.place.open(MANIFEST) as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]

    @property
    def folder(self) -> str:
        """Where the store is: what `open` was given."""
        return str(self.place)

    @cached_property
    def tokenizer_folder(self) -> Path:
        """The copy of the tokenizer inside the store; of a store that is far away, a copy of that on this machine."""
        return self.place.local_folder(TOKENIZER)

    @property
    def codebook_size(self) -> int:
        """K: codes lie in [0, K)."""
        return self.manifest["job"]["codebook_size"]

    @property
    def depth(self) -> int:
        """Q: codes per cell."""
        return self.manifest["job"]["depth"]

    @property
    def downsample(self) -> int:
        """f: pixels per cell, along a side."""
        return self.manifest["job"]["downsample"]

    @property
    def image_size(self) -> int:
        """The tokenizer's own: side in pixels of the pictures that it was trained on."""
        return self.manifest["job"]["image_size"]

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) where all pictures share one grid, else None."""
        grid = self.manifest["grid"]
        return None if grid is None else (grid[0], grid[1])

    @cached_property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Every (h, w) that occurs, the most frequent one first."""
        if self.grid is not None:
            return (self.grid,)
        counts: Counter[tuple[int, int]] = Counter()
        for table in self._columns("height", "width"):
            counts += grid_counts(table["height"].to_numpy(), table["width"].to_numpy())
        return by_frequency(counts)

    @property
    def rejects(self) -> list[dict[str, str]]:
        """What could not be encoded: dicts with id, reason, detail."""
        with self.place.open(REJECTS) as file:
            lines = file.read().decode("utf-8").split("\n")
        return [json.loads(line) for line in lines if line]

    def __len__(self) -> int:
        return self.manifest["pictures"]

    def __getitem__(self, i: int) -> StoredPicture:
        if not -len(self) <= i < len(self):
            raise IndexError(f"picture {i} of a store of {len(self)}")
        i %= len(self)
        if self.in_memory:
            return self._rows[i]
        number = int(np.searchsorted(self._ends, i, side="right"))
        if self._latest is None or self._latest[0] != number:
            self._latest = number, self.part(number)
        return self._latest[1][i - int(self._ends[number])]

    def __iter__(self) -> Iterator[StoredPicture]:
        return (self[i] for i in range(len(self)))

    # all of it ---------------------------------------------------------------------------------------------------

    def codes_NhwQ(self, split: str | None = None) -> Tensor:
        """As `Rows.codes_NhwQ`: all codes of a split, int64 (N, h, w, Q). ValueError if grids differ."""
        return self._rows.codes_NhwQ(split)

    def stored_codes(self, split: str | None = None) -> Tensor | list[Tensor]:
        """As `Rows.stored_codes`: all codes of a split, as they are stored."""
        return self._rows.stored_codes(split)

    def codes_list(self, split: str | None = None) -> list[Tensor]:
        """The codes of each picture of a split, int64 (h, w, Q), whatever their grids, in the order of `ids`."""
        return self._rows.codes_list(split)

    def ids(self, split: str | None = None) -> list[str]:
        return self._rows.ids(split)

    def captions(self, split: str | None = None) -> list[str]:
        return self._rows.captions(split)

    def concepts(self, split: str | None = None) -> list[str]:
        return self._rows.concepts(split)

    def indices(self, split: str | None = None) -> list[int]:
        """Positions of a split's pictures in the store. ValueError, with the nearest name, on an unknown split."""
        return self._rows.indices(split)

    @cached_property
    def _rows(self) -> Rows:
        return Rows.joined([self.part(number) for number in range(self.parts)], str(self.place))

    # some of it --------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> int:
        """How many shards there are."""
        return len(self.manifest["shards"])

    def part(self, number: int) -> Rows:
        """The rows of one shard, read anew: each call costs what a file costs. ConfigError if it is not sound."""
        each = self.manifest["shards"][number]
        name = each["name"]
        try:
            shard = parse_shard(self._read(name, each["sha256"]), self.manifest["job"])
        except Damaged as error:
            raise ConfigError(f"{self.place}/{name}: {error}; {again(self.place)}") from error
        if len(shard) != each["rows"]:
            raise ConfigError(f"{self.place}/{name} has {len(shard)} rows, not {each['rows']}")
        rows = Rows(shard, self.depth, f"{self.place}/{name}")
        if self.grid is not None and set(rows.grids) - {self.grid}:
            raise ConfigError(
                f"{self.place}/{MANIFEST} gives another grid than the shards; {again(self.place)}"
            )
        return rows

    def sample(self, split: str, most: int) -> Rows:
        """All rows of a store that is held in memory; of a larger one whole shards, evenly over the store, until they
        have `most` rows of the split.
        """
        if self.in_memory:
            return self._rows
        counts, found = self.counts(split), []
        order = np.argsort(np.arange(self.parts) * 0.6180339887498949 % 1)  # any first few are spread evenly
        for number in order[counts[order] > 0].tolist():
            found.append(number)
            if counts[found].sum() >= most:
                break
        chosen = [self.part(number) for number in sorted(found or [0])]
        return Rows.joined(chosen, str(self.place))

    def known_concepts(self, split: str, among: set[str]) -> set[str]:
        """Those of some concepts that a split has pictures of. ValueError on an unknown split."""
        check_split(split)
        if self.in_memory:
            return among & set(self.concepts(split))
        found: set[str] = set()
        for table in self._columns("concept", "split"):
            rows = zip(table["concept"].to_pylist(), table["split"].to_pylist(), strict=True)
            found |= among & {concept for concept, theirs in rows if theirs == split}
        return found

    def counts(self, split: str) -> np.ndarray:
        """int64 (parts): how many rows of a split each shard has. ValueError on an unknown split."""
        check_split(split)
        return self._counts[split]

    @cached_property
    def _counts(self) -> dict[str, np.ndarray]:
        splits = self.manifest["splits"]
        found = {split: np.zeros(self.parts, np.int64) for split in splits}
        for number, table in enumerate(self._columns("split")):
            told = Counter(table["split"].to_pylist())
            for split in splits:
                found[split][number] = told[split]
        if wrong := [split for split in splits if found[split].sum() != splits[split]]:
            told = f"{self.place}/{MANIFEST} gives {splits[wrong[0]]} pictures of split {wrong[0]}"
            raise ConfigError(f"{told}, the shards have {found[wrong[0]].sum()}; {again(self.place)}")
        return found

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([each["rows"] for each in self.manifest["shards"]])

    def _columns(self, *names: str) -> Iterator[pa.Table]:
        """Some columns of each shard, one shard after another: of a long file the few bytes that they take."""
        for each in self.manifest["shards"]:
            path = f"{self.place}/{each['name']}"
            try:
                with self.place.open(each["name"]) as file:
                    yield pq.ParquetFile(file, page_checksum_verification=True).read(list(names))
            except Exception as error:  # a damaged file may raise anything in the reader
                raise ConfigError(f"{path} cannot be read: {error}; {again(self.place)}") from error

    def _read(self, name: str, expected: str) -> bytes:
        """A file's content. ConfigError if it is missing or has another SHA-256."""
        try:
            with self.place.open(name) as file:
                data = file.read()
        except FileNotFoundError:
            raise ConfigError(f"{self.place}/{name} is missing; {again(self.place)}") from None
        if hashlib.sha256(data).hexdigest() != expected:
            told = f"{self.place}/{name} was changed after it was written (SHA-256)"
            raise ConfigError(f"{told}; {again(self.place)}")
        return data

    def _check_cheaply(self, each: dict[str, Any]) -> None:
        """A shard's presence, size and number of rows: one look at the file's end, whatever its length."""
        path = f"{self.place}/{each['name']}"
        try:
            size = self.place.size(each["name"])
        except FileNotFoundError:
            told = f"{path} is missing, one of {len(self.manifest['shards'])} shards"
            raise ConfigError(f"{told}; {again(self.place)}") from None
        if size != each["bytes"]:
            raise ConfigError(f"{path} has {size} bytes, not {each['bytes']}; {again(self.place)}")
        try:
            with self.place.open(each["name"]) as file:
                rows = pq.read_metadata(file).num_rows
        except Exception as error:  # a damaged file may raise anything in the reader
            raise ConfigError(f"{path} cannot be read: {error}; {again(self.place)}") from error
        if rows != each["rows"]:
            raise ConfigError(f"{path} has {rows} rows, not {each['rows']}; {again(self.place)}")
