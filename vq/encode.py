"""Command `vq-encode`: pictures + a tokenizer → a store of codes and captions.

    vq-encode tokenizer=runs/tokenizer/tokenizer images=folder images.source.path=DIR out=runs/store

Leaves Parquet shards, manifest.json, rejects.jsonl and a copy of the tokenizer in `out`. Run again, it encodes only
what is missing, or was made of pictures that have changed since. Pictures are decoded batch by batch, ahead of the
encoder and beside it: a set need not fit into memory.

Codes are computed in fp32 and in torch's default layout, so that they are those of `ImageTokenizer.encode` whatever the
batch size. channels_last would be faster on a CPU, but torch's GroupNorm sums carelessly there: errors 300 times larger
than fp32's changed one or two codes in a thousand (benchmarks/tokenizer.py counts them), and bf16 changes many.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch

from vq.data import THREADS, ImageData
from vq.evaluate import settle_size
from vq.images import Reject
from vq.store import Loaded, Record, write_store
from vq.tokenizer import ImageTokenizer
from vqlm.command import command
from vqlm.errors import ConfigError
from vqlm.hardware import Device, detect


def encode(
    tokenizer: str,
    images: ImageData,
    out: str,
    batch_size: int,
    shard_size: int,
    device: Device,
    resume: Literal["auto", "never"],
) -> None:
    """Encode every picture once; both splits go into one store, each row says which it belongs to."""
    if batch_size < 1 or shard_size < 1:
        raise ConfigError(f"batch_size={batch_size}, shard_size={shard_size}: both must be at least 1")
    model = ImageTokenizer.from_pretrained(tokenizer).to(detect(device, "fp32").device)
    if not model.depth:
        raise ConfigError(
            f"tokenizer={tokenizer} is continuous (quantizer=none), it has no codes to store: train one with codes"
        )
    settle_size(images, model)
    source = {name: getattr(images, name) for name in ("size", "aspects", "fit", "holdout", "seed")}
    source |= {"shapes": images.shapes, "source": images.source.name}
    pictures = StreamedPictures(images)
    print(pictures.report())
    summary = write_store(out, model, pictures, source=source, shard_size=shard_size, batch_size=batch_size)
    done = f"{summary['encoded']} shards encoded, {summary['kept']} kept, {summary['redone']} redone"
    print(f"store: {out}   {summary['pictures']} pictures, {summary['rejects']} rejects; {done}")
    for damage in summary["damage"]:
        print(f"redone: {damage}")


class StreamedPictures:
    """`vq.store.Pictures` from a source, decoded when they are asked for: what trains, then what is held out.

    ConfigError once more than `images.max_bad_fraction` of all were rejected.
    """

    def __init__(self, images: ImageData):
        self.images = images
        train, heldout = images.candidates()
        self.candidates = [(each, "train") for each in train] + [(each, "heldout") for each in heldout]
        self.counts = len(train), len(heldout)
        self.rejects: dict[str, str] = {}
        self.threads = ThreadPoolExecutor(THREADS)

    def __len__(self) -> int:
        return len(self.candidates)

    def load(self, start: int, stop: int) -> Loaded:
        chosen = self.candidates[start:stop]
        decoded = list(self.threads.map(lambda each: self.images.decode(each[0]), chosen))
        records, x_BCHW, rejects = [], [], []
        for (picture, split), result in zip(chosen, decoded, strict=True):
            if isinstance(result, Reject):
                rejects.append({"id": picture.id, "reason": result.reason, "detail": result.detail})
            else:
                records.append(Record(picture.id, picture.caption, picture.concept, split))
                x_BCHW.append(result)
        self._count(rejects)
        one_shape = x_BCHW and len(self.images.shapes) == 1
        return Loaded(records, torch.stack(x_BCHW) if one_shape else x_BCHW, rejects)

    def _count(self, rejects: list[dict[str, str]]) -> None:
        self.rejects |= {each["id"]: each["reason"] for each in rejects}
        self.images.check_rejects(Counter(self.rejects.values()), len(self))

    def report(self) -> str:
        train, heldout = self.counts
        return f"{self.images.source.name}: {train:,} training and {heldout:,} held-out pictures to encode"


main = command("vq_encode", encode, free=("device", "batch_size"))

if __name__ == "__main__":
    main()
