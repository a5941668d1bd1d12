"""A finished store, opened: a sequence of pictures' codes with their captions. It changes nothing.

Shapes: h w grid, Q codes per cell (depth), K codes in the book, N pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from vq.store.manifest import (
    MANIFEST,
    REJECTS,
    TOKENIZER,
    Tokenizer,
    again,
    hashes_of,
    only_grid,
    read_manifest,
)
from vq.store.shard import SPLITS, TEXT_COLUMNS, Damaged, Shard, offsets_of, read_shard
from vqlm.errors import ConfigError, nearest
from vqlm.places import Place, place

ALWAYS_VERIFIED_BYTES = 2**30  # hashing this takes about a second; larger stores are hashed when asked


@dataclass(frozen=True)
class StoredPicture:
    """A row of the store. codes_hwQ: int64 in [0, K)."""

    id: str
    caption: str
    concept: str
    split: str
    codes_hwQ: Tensor


class CodeStore:
    """A finished store, read-only: a sequence of StoredPicture, with bulk access by split ("train" or "heldout").

    Codes are kept in memory as they are stored (uint16 or uint32) once they are first needed.
    """

    def __init__(self, where: Place, manifest: dict[str, Any]):
        self.place, self.manifest = where, manifest

    @classmethod
    def open(cls, folder: str | Path, verify: bool | None = None) -> CodeStore:
        """Open a store. ConfigError names what is wrong: no such folder (with the nearest name), not finished,
        another format version, or a file missing, of another size or (with `verify`) with another content.

        `verify` compares every file with its SHA-256 and reads all codes; by default so for stores under 1 GiB.
        Where it is off, codes are still checked against [0, K) and their own hash when they are first read.
        """
        where = place(folder)
        store = cls(where, read_manifest(where))
        for each in store.manifest["shards"]:
            store._check_cheaply(each)
        size = sum(each["bytes"] for each in store.manifest["shards"])
        if verify or (verify is None and size < ALWAYS_VERIFIED_BYTES):
            store.verify()
        return store

    def verify(self) -> None:
        """Compare every file with the manifest and read all codes. ConfigError names the first file that differs."""
        for name, expected in hashes_of(self.manifest).items():
            try:
                with self.place.open(name) as file:
                    found = hashlib.sha256(file.read()).hexdigest()
            except FileNotFoundError:
                raise ConfigError(f"{self.place}/{name} is missing; {again(self.place)}") from None
            if found != expected:
                told = f"{self.place}/{name} was changed after it was written (SHA-256)"
                raise ConfigError(f"{told}; {again(self.place)}")
        _ = self._rows

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
        counts = Counter(zip(self._rows.heights.tolist(), self._rows.widths.tolist(), strict=True))
        return tuple(sorted(counts, key=lambda grid: (-counts[grid], grid)))

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
        rows = self._rows
        shape = int(rows.heights[i]), int(rows.widths[i]), self.depth
        codes = rows.codes[self._offsets[i] : self._offsets[i + 1]]
        text = {name: rows.text[name][i] for name in TEXT_COLUMNS}
        return StoredPicture(**text, codes_hwQ=torch.from_numpy(codes.astype(np.int64)).reshape(shape))

    def __iter__(self) -> Iterator[StoredPicture]:
        return (self[i] for i in range(len(self)))

    def codes_NhwQ(self, split: str | None = None) -> Tensor:
        """All codes of a split (None: of the store), int64 (N, h, w, Q), in the order of `ids`.

        ValueError if grids differ: read such a store picture by picture.
        """
        if self.grid is None:
            raise ValueError(f"the pictures of {self.place} have different grids; read them one by one")
        codes_NhwQ = self._rows.codes.reshape(len(self), *self.grid, self.depth)
        return torch.from_numpy(codes_NhwQ[self.indices(split)].astype(np.int64))

    def codes_list(self, split: str | None = None) -> list[Tensor]:
        """The codes of each picture of a split, int64 (h, w, Q), whatever their grids, in the order of `ids`."""
        return [self[i].codes_hwQ for i in self.indices(split)]

    def ids(self, split: str | None = None) -> list[str]:
        return self._column("id", split)

    def captions(self, split: str | None = None) -> list[str]:
        return self._column("caption", split)

    def concepts(self, split: str | None = None) -> list[str]:
        return self._column("concept", split)

    def indices(self, split: str | None = None) -> list[int]:
        """Positions of a split's pictures in the store. ValueError, with the nearest name, on an unknown split."""
        if split is None:
            return list(range(len(self)))
        if split not in SPLITS:
            raise ValueError(
                f"no split {split!r}; a store has {' and '.join(SPLITS)}{nearest(split, SPLITS)}"
            )
        return [i for i, each in enumerate(self._rows.text["split"]) if each == split]

    def _column(self, name: str, split: str | None) -> list[str]:
        column = self._rows.text[name]
        return [column[i] for i in self.indices(split)]

    @cached_property
    def _rows(self) -> Shard:
        """All shards as one."""
        shards = [self._shard(each) for each in self.manifest["shards"]]
        rows = Shard(
            text={name: [text for s in shards for text in s.text[name]] for name in TEXT_COLUMNS},
            heights=np.concatenate([s.heights for s in shards]),
            widths=np.concatenate([s.widths for s in shards]),
            codes=np.concatenate([s.codes for s in shards]),
        )
        if only_grid(zip(rows.heights.tolist(), rows.widths.tolist(), strict=True)) != self.manifest["grid"]:
            raise ConfigError(
                f"{self.place}/{MANIFEST} gives another grid than the shards; {again(self.place)}"
            )
        return rows

    @cached_property
    def _offsets(self) -> np.ndarray:
        return offsets_of(self._rows, self.depth)

    def _shard(self, each: dict[str, Any]) -> Shard:
        """One shard, as the manifest lists it, read and checked."""
        name = each["name"]
        try:
            with self.place.open(name) as file:
                shard = read_shard(file.read(), self.manifest["job"])
        except (Damaged, FileNotFoundError) as error:
            why = error if isinstance(error, Damaged) else "is missing"
            raise ConfigError(f"{self.place}/{name}: {why}; {again(self.place)}") from error
        if len(shard) != each["rows"]:
            raise ConfigError(f"{self.place}/{name} has {len(shard)} rows, not {each['rows']}")
        return shard

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
