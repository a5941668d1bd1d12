"""Command `vq-encode`: pictures + a tokenizer → a store of codes and captions.

    vq-encode tokenizer=runs/tokenizer/tokenizer images=folder images.source.path=DIR out=runs/store

Leaves Parquet shards, manifest.json, rejects.jsonl and a copy of the tokenizer in `out`. Run again, it encodes only
what is missing. Codes are computed in fp32, so that they are those of `ImageTokenizer.encode`.
"""

from __future__ import annotations

from typing import Literal

from vq.data import ImageData
from vq.evaluate import settle_size
from vq.store import SplitPictures, write_store
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
    settle_size(images, model)
    images.setup()
    print(images.report())
    pictures = SplitPictures(images.train, images.heldout, images.rejects)
    source = {name: getattr(images, name) for name in ("size", "fit", "holdout", "seed")}
    source["source"] = images.source.name
    summary = write_store(out, model, pictures, source=source, shard_size=shard_size, batch_size=batch_size)
    done = f"{summary['encoded']} shards encoded, {summary['kept']} kept, {summary['redone']} redone"
    print(f"store: {out}   {summary['pictures']} pictures, {summary['rejects']} rejects; {done}")


main = command("vq_encode", encode, free=("device", "batch_size"))

if __name__ == "__main__":
    main()
