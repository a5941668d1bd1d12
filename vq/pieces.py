"""A source's pictures as pieces of work for the store: decoded range by range, or file by file.

It knows sources (vq/data.py, vq/archives.py) and what the store asks for (vq/store/work.py), and neither codes nor
who encodes. Other processes import it: it must not be slow to import.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch

from vq.archives import Archives
from vq.data import THREADS, ImageData, Picture
from vq.images import Reject
from vq.store.work import Loaded, Pieces, Ranges, Record


def pieces_of(images: ImageData, shard_size: int) -> Pieces:
    """Files of many pictures are pieces as they are; a list of pictures is cut into pieces of shard_size."""
    if isinstance(images.source, Archives):
        files = Files(images, images.source)
        print(f"{images.source.name}: {len(files):,} files of pictures to encode")
        return files
    pictures = StreamedPictures(images)
    print(pictures.report())
    return Ranges(pictures, shard_size)


class StreamedPictures:
    """`vq.store.Pictures` from a list, decoded when they are asked for: what trains, then what is held out.

    ConfigError once more than `images.max_bad_fraction` of all were rejected.
    """

    def __init__(self, images: ImageData):
        self.images = images
        train, heldout = images.candidates()
        self.candidates = [(each, "train") for each in train] + [(each, "heldout") for each in heldout]
        self.counts = len(train), len(heldout)
        self.rejects: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.candidates)

    def load(self, start: int, stop: int) -> Loaded:
        chosen = self.candidates[start:stop]
        loaded = _decoded(self.images, chosen)
        self.rejects |= {each["id"]: each["reason"] for each in loaded.rejects}
        self.images.check_rejects(Counter(self.rejects.values()), len(self))
        return loaded

    def report(self) -> str:
        train, heldout = self.counts
        return f"{self.images.source.name}: {train:,} training and {heldout:,} held-out pictures to encode"


FEW = 1000  # pictures are too few to end a long job for their rejects


class Files:
    """`vq.store.Pieces` from files of many pictures: each becomes a shard. Ids begin with the file's name.

    ConfigError once more than `images.max_bad_fraction` of what this process has seen were rejected, FEW pictures at
    least; and at the end, of all.
    """

    def __init__(self, images: ImageData, source: Archives):
        self.images, self.source = images, source
        self.names = source.files()
        self.seen, self.reasons = 0, Counter[str]()

    def __len__(self) -> int:
        return len(self.names)

    def described(self) -> dict[str, Any]:
        listing = hashlib.sha256("\n".join(self.names).encode()).hexdigest()
        return {"digest": "", "pieces": len(self.names), "listing": listing}

    def about(self, index: int) -> dict[str, Any]:
        return {"piece": self.names[index]}

    def content(self, index: int) -> str | None:
        return self.source.content(self.names[index])

    def load(self, index: int, batch_size: int) -> Iterator[Loaded]:
        name = self.names[index]
        found = ((picture, self.images.split_of(picture)) for picture in self.source.read(name))
        for chosen in _batched(found, batch_size):
            loaded = _decoded(self.images, chosen)
            self.seen += len(chosen)
            self.reasons.update(each["reason"] for each in loaded.rejects)
            self.accept(self.reasons, max(FEW, self.seen))
            yield loaded

    def accept(self, reasons: Counter[str], total: int) -> None:
        self.images.check_rejects(reasons, total)


def _decoded(images: ImageData, chosen: Sequence[tuple[Picture, str]]) -> Loaded:
    """Some pictures with their splits, each decoded or rejected, in their order."""
    with ThreadPoolExecutor(THREADS) as threads:
        results = list(threads.map(lambda each: images.decode(each[0]), chosen))
    records, x_BCHW, rejects = [], [], []
    for (picture, split), result in zip(chosen, results, strict=True):
        if isinstance(result, Reject):
            rejects.append({"id": picture.id, "reason": result.reason, "detail": result.detail})
        else:
            records.append(Record(picture.id, picture.caption, picture.concept, split))
            x_BCHW.append(result)
    one_shape = x_BCHW and len(images.shapes) == 1
    return Loaded(records, torch.stack(x_BCHW) if one_shape else x_BCHW, rejects)


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """`itertools.batched`, which Python 3.11 does not have."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
