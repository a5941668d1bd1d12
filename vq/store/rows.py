"""Rows of a store that are in memory: pictures' codes with their captions. It knows no file.

Shapes: h w grid, Q codes per cell (depth), K codes in the book, N rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vq.store.shard import SPLITS, TEXT_COLUMNS, Shard, offsets_of
from vqlm.errors import nearest


@dataclass(frozen=True)
class StoredPicture:
    """A row of the store. codes_hwQ: int64 in [0, K)."""

    id: str
    caption: str
    concept: str
    split: str
    codes_hwQ: Tensor


class Rows:
    """A sequence of StoredPicture with bulk access by split ("train" or "heldout").

    Codes are kept as they are stored (uint16 or uint32). name: of what holds the rows, for errors.
    """

    def __init__(self, shard: Shard, depth: int, name: str):
        self.shard, self.depth, self.name = shard, depth, name

    @classmethod
    def joined(cls, parts: Sequence[Rows], name: str) -> Rows:
        """Rows of several shards below each other."""
        shards = [part.shard for part in parts]
        whole = Shard(
            text={column: [text for s in shards for text in s.text[column]] for column in TEXT_COLUMNS},
            heights=np.concatenate([s.heights for s in shards]),
            widths=np.concatenate([s.widths for s in shards]),
            codes=np.concatenate([s.codes for s in shards]),
        )
        return cls(whole, parts[0].depth, name)

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, i: int) -> StoredPicture:
        if not -len(self) <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        i %= len(self)
        text = {column: self.shard.text[column][i] for column in TEXT_COLUMNS}
        return StoredPicture(**text, codes_hwQ=torch.from_numpy(self._codes(i).astype(np.int64)))

    def __iter__(self) -> Iterator[StoredPicture]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Every (h, w) that occurs, the most frequent one first."""
        return by_frequency(grid_counts(self.shard.heights, self.shard.widths))

    def codes_NhwQ(self, split: str | None = None) -> Tensor:
        """All codes of a split (None: of all), int64 (N, h, w, Q), in the order of `ids`.

        ValueError if grids differ: read such rows picture by picture.
        """
        if len(self.grids) > 1:
            raise ValueError(f"the pictures of {self.name} have different grids; read them one by one")
        return torch.from_numpy(self._codes_NhwQ(split).astype(np.int64))

    def stored_codes(self, split: str | None = None) -> Tensor | list[Tensor]:
        """All codes of a split as they are stored (uint16 or uint32): (N, h, w, Q); a list of (h, w, Q) where grids
        differ.
        """
        if len(self.grids) == 1:
            return torch.from_numpy(self._codes_NhwQ(split))
        return [torch.from_numpy(self._codes(i).copy()) for i in self.indices(split)]

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
        """Positions of a split's pictures. ValueError, with the nearest name, on an unknown split."""
        if split is None:
            return list(range(len(self)))
        check_split(split)
        return [i for i, each in enumerate(self.shard.text["split"]) if each == split]

    def _column(self, name: str, split: str | None) -> list[str]:
        column = self.shard.text[name]
        return [column[i] for i in self.indices(split)]

    def _codes(self, i: int) -> np.ndarray:  # (h,w,Q)
        shape = int(self.shard.heights[i]), int(self.shard.widths[i]), self.depth
        return self.shard.codes[self._offsets[i] : self._offsets[i + 1]].reshape(shape)

    def _codes_NhwQ(self, split: str | None) -> np.ndarray:
        return self.shard.codes.reshape(len(self), *self.grids[0], self.depth)[self.indices(split)]

    @cached_property
    def _offsets(self) -> np.ndarray:
        return offsets_of(self.shard, self.depth)


def check_split(split: str) -> None:
    """ValueError, with the nearest name, on an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; a store has {' and '.join(SPLITS)}{nearest(split, SPLITS)}")


def grid_counts(heights_N: np.ndarray, widths_N: np.ndarray) -> Counter[tuple[int, int]]:
    return Counter(zip(heights_N.tolist(), widths_N.tolist(), strict=True))


def by_frequency(counts: Counter[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(counts, key=lambda grid: (-counts[grid], grid)))
