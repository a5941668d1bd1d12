"""Command `vq-encode`: pictures + a tokenizer → a store of codes and captions.

    vq-encode tokenizer=runs/tokenizer/tokenizer images=folder images.source.path=DIR out=runs/store

Leaves Parquet shards, manifest.json, rejects.jsonl and a copy of the tokenizer in `out`, a folder or a URL. Run again,
it encodes only what is missing, or was made of pictures that have changed since. Pictures are decoded batch by batch,
ahead of the encoder and beside it: a set need not fit into memory.

Many processes may encode one store, on one machine or on many (docs/scale.md): with `encode.processes=N`, under
torchrun, as `rank=0 ranks=N`, `rank=1 ranks=N` … of any scheduler, or with `encode=ray`. Rank r takes the shards r,
r + ranks, r + 2·ranks …, and whoever finds every shard in place finishes the store: they need not know of each other.

Codes are computed in fp32 and in torch's default layout, so that they are those of `ImageTokenizer.encode` whatever the
batch size. channels_last would be faster on a CPU, but torch's GroupNorm sums carelessly there: errors 300 times larger
than fp32's changed one or two codes in a thousand (benchmarks/tokenizer.py counts them), and bf16 changes many.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vqlm.command import command
from vqlm.errors import ConfigError
from vqlm.progress import bar

# torch and what stands on it: seconds, which `--help` and a mistyped key do not wait for. Functions import them.
if TYPE_CHECKING:
    import torch

    import vq.data
    import vq.drivers
    import vq.store.writer
    import vqlm.hardware


def encode(
    tokenizer: str,
    images: vq.data.ImageData,
    out: str,
    batch_size: int,
    shard_size: int,
    device: vqlm.hardware.Device,
    resume: Literal["auto", "never"],
    rank: int | None,
    ranks: int | None,
    encode: vq.drivers.Driver,
) -> None:
    """Encode every picture once; both splits go into one store, each row says which it belongs to."""
    from vq.drivers import share_of
    from vq.evaluate import settle_size
    from vq.pieces import pieces_of
    from vq.store.work import Ranges
    from vq.store.writer import StoreWriter
    from vq.tokenizer import ImageTokenizer

    if batch_size < 1 or shard_size < 1:
        raise ConfigError(f"batch_size={batch_size}, shard_size={shard_size}: both must be at least 1")
    number, count = share_of(rank, ranks)
    model = ImageTokenizer.from_pretrained(tokenizer).to(_own_device(device))
    if not model.depth:
        raise ConfigError(
            f"tokenizer={tokenizer} is continuous (quantizer=none), it has no codes to store: train one with codes"
        )
    settle_size(images, model)
    source = {name: getattr(images, name) for name in ("size", "aspects", "fit", "holdout", "seed")}
    source |= {"shapes": images.shapes, "source": images.source.name}
    pieces = pieces_of(images, shard_size)
    writer = StoreWriter(out, model, pieces, source, batch_size, alone=count == 1)
    writer.begin()
    own = range(number, writer.shards, count)
    if count > 1:
        print(f"rank {number} of {count}: {len(own):,} of {writer.shards:,} shards")
    # how many pictures there are is known where they are listed, not where whole files of them are
    total = len(pieces.pictures) if isinstance(pieces, Ranges) and count == 1 else None
    with bar(total, "encoding", "pictures") as shown:
        outcomes = list(encode.run(writer, own, Path(tokenizer), shown.update))
    _finish(writer, outcomes, out, count)


def _finish(
    writer: vq.store.writer.StoreWriter, outcomes: Sequence[vq.store.writer.Outcome], out: str, count: int
) -> None:
    """The manifest, if every shard is there; of several processes, the one that comes last gets here."""
    from vq.store.writer import Unfinished, summary

    if count > 1 and (missing := writer.missing()):
        there = writer.shards - len(missing)
        print(
            f"own shards done; {there:,} of {writer.shards:,} are there: the rank that comes last finishes {out}"
        )
        return
    try:
        totals = summary(writer.finish(), outcomes)
    except Unfinished as error:
        if count == 1:
            raise
        print(f"own shards done; not finished yet: {error}")  # another rank is about to mend it, and finishes
        return
    done = f"{totals['encoded']} shards encoded, {totals['kept']} kept, {totals['redone']} redone"
    print(f"store: {out}   {totals['pictures']} pictures, {totals['rejects']} rejects; {done}")
    for damage in totals["damage"]:
        print(f"redone: {damage}")


def _own_device(device: vqlm.hardware.Device) -> torch.device:
    """Of several GPUs, the one that torchrun means for this process."""
    import torch

    from vqlm.hardware import detect

    found = detect(device, "fp32").device
    if found.type != "cuda":
        return found
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


main = command("vq_encode", encode, free=("device", "batch_size", "encode"), places=("rank", "ranks"))

if __name__ == "__main__":
    main()
