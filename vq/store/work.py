"""What is to be encoded, cut into pieces: one piece of work makes one shard. Knows neither codes nor files.

`Pieces` is what a writer asks for. Where there is one long list of pictures (a folder), `Ranges` cuts it; where
pictures come in files of many (tars, Parquet), each file is a piece (vq/archives.py).

Shapes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vq.store.shard import canonical
from vqlm.errors import ConfigError


@dataclass(frozen=True)
class Record:
    """What is stored beside the codes of a picture. `id` is unique in a store, `split` is "train" or "heldout"."""

    id: str
    caption: str
    concept: str
    split: str


@dataclass(frozen=True)
class Loaded:
    """Some candidates: each is either a record with pixels or a reject."""

    records: Sequence[Record]
    x_BCHW: Tensor | Sequence[Tensor]  # uint8, or float in [-1, 1]; a list of x_CHW where sizes differ
    rejects: Sequence[Mapping[str, str]] = ()  # id, reason, detail


class Pieces(Protocol):
    """Pictures in pieces, in an order that does not change. The same piece gives the same content each time.

    To be encoded in other processes than the one that made it, it must survive pickling.
    """

    def __len__(self) -> int: ...

    def described(self) -> dict[str, Any]:
        """Plain JSON data that goes into the job: another description is another job.

        `digest`: names all of the content where not empty, and no shard needs to remember its own. Then either
        `candidates` and `shard_size`, or `pieces`, the number of them.
        """
        ...

    def about(self, index: int) -> dict[str, Any]:
        """Plain JSON data that a shard says of its piece."""
        ...

    def content(self, index: int) -> str | None:
        """What names the content of a piece without its pictures being decoded. None: they have to be."""
        ...

    def load(self, index: int, batch_size: int) -> Iterator[Loaded]:
        """A piece's candidates in their order, about batch_size at a time."""
        ...

    def accept(self, reasons: Counter[str], total: int) -> None:
        """ConfigError if so many rejects of so many candidates are too many for a store."""
        ...


class Pictures(Protocol):
    """Pictures in one long list: a fixed sequence of candidates, loaded range by range.

    The same range must give the same content each time. An optional attribute `digest: str` names all of that content
    (a hash of it, say): a store begun with another digest is then refused. Without one, each shard remembers a hash of
    what it was made of; a run that finds it finished loads its pictures again and redoes it where they changed.
    """

    def __len__(self) -> int: ...
    def load(self, start: int, stop: int) -> Loaded: ...


class Ranges:
    """`Pieces` of one long list: shard_size candidates each, the last one what is left."""

    def __init__(self, pictures: Pictures, shard_size: int):
        if shard_size < 1:
            raise ConfigError(f"shard_size must be at least 1, got {shard_size}")
        self.pictures, self.shard_size = pictures, int(shard_size)

    def __len__(self) -> int:
        return -(-len(self.pictures) // self.shard_size)

    def described(self) -> dict[str, Any]:
        digest = str(getattr(self.pictures, "digest", ""))
        return {"digest": digest, "candidates": len(self.pictures), "shard_size": self.shard_size}

    def about(self, index: int) -> dict[str, Any]:
        return {"range": list(self._range(index))}

    def content(self, index: int) -> None:
        return None

    def load(self, index: int, batch_size: int) -> Iterator[Loaded]:
        start, stop = self._range(index)
        for first in range(start, stop, batch_size):
            last = min(first + batch_size, stop)
            loaded = self.pictures.load(first, last)
            counts = len(loaded.records), len(loaded.rejects)
            if sum(counts) != last - first:
                raise ValueError(
                    f"candidates {first} to {last} gave {counts[0]} records, {len(loaded.x_BCHW)} pictures, "
                    f"{counts[1]} rejects: each must be either a reject or a record"
                )
            yield loaded

    def accept(self, reasons: Counter[str], total: int) -> None:
        """Whoever made the list has counted."""

    def _range(self, index: int) -> tuple[int, int]:
        start = index * self.shard_size
        return start, min(start + self.shard_size, len(self.pictures))


@dataclass(frozen=True)
class Piece:
    """Piece `index` of a job: what `encode_shard` turns into a shard."""

    pieces: Pieces
    job: Mapping[str, Any]  # vq.store.manifest.make_job
    index: int

    def load(self, batch_size: int) -> Iterator[Loaded]:
        """The next batch is loaded while the caller works on this one."""
        coming = self.pieces.load(self.index, batch_size)
        with ThreadPoolExecutor(1, "load") as reader:
            following = reader.submit(next, coming, None)
            while (loaded := following.result()) is not None:
                following = reader.submit(next, coming, None)
                yield _checked(loaded)

    def about(self) -> dict[str, Any]:
        """What the shard says of itself, its rejects and its content aside."""
        return {"job": dict(self.job), "index": self.index, **self.pieces.about(self.index)}

    @property
    def told(self) -> str | None:
        """The content's name, where nothing has to be decoded for it."""
        return self.pieces.content(self.index)


class Content:
    """Running hashes of what is loaded: records with their pixels, and rejects. How it is cut does not matter."""

    def __init__(self) -> None:
        self.records, self.rejects = hashlib.sha256(), hashlib.sha256()

    def add(self, loaded: Loaded) -> None:
        for record, x_CHW in zip(loaded.records, loaded.x_BCHW, strict=True):
            self.records.update(canonical([asdict(record), list(x_CHW.shape), str(x_CHW.dtype)]))
            self.records.update(x_CHW.cpu().contiguous().view(torch.uint8).numpy().data)
        for reject in plain(loaded.rejects):
            self.rejects.update(canonical(reject))

    def digest(self) -> str:
        return f"{self.records.hexdigest()} {self.rejects.hexdigest()}"


def plain(rejects: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    return [{key: str(each[key]) for key in ("id", "reason", "detail")} for each in rejects]


def _checked(loaded: Loaded) -> Loaded:
    if len(loaded.records) != len(loaded.x_BCHW):
        raise ValueError(f"{len(loaded.records)} records came with {len(loaded.x_BCHW)} pictures")
    return loaded
