"""What does a picture cost on its way into a store: to decode, to encode, to keep, to read back?

    python benchmarks/encoding.py [--pictures N] [--device cpu|cuda] [--out [FILE]]

Pictures are JPEG files of 512x384 px with noise, in tars of 100. One CPU thread; CPU seconds of the process, so that
other programs on the machine do not count (on a GPU the clock's seconds count for "encode"). Weights are random: what
is computed does not depend on them, though how well codes compress does, and random pictures make codes that hardly do.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import record
import torch
from PIL import Image
from record import Table

from vq.archives import Tars
from vq.backbones.conv import ConvDecoder, ConvEncoder
from vq.backbones.vqgan import VqganDecoder, VqganEncoder
from vq.data import ImageData
from vq.pieces import pieces_of
from vq.quantizers.residual import ResidualQuantizer
from vq.store.shard import Shard, job_sha256, read_shard, to_bytes
from vq.store.writer import StoreWriter
from vq.tokenizer import ImageTokenizer

ROUNDS, A_TAR = 3, 100
SIZES: dict[str, tuple[int, str, dict[str, Any], tuple[int, int]]] = {
    # name: px, backbone, its arguments, (codes in the book, depth)
    "32 px, default": (
        32,
        "conv",
        {"channels": [96, 256], "latent_dim": 8, "blocks": 1, "patch": 4},
        (512, 4),
    ),
    "256 px, VQ-16 of half width": (
        256,
        "vqgan",
        {"channels": [64, 64, 128, 128, 256], "latent_dim": 8, "blocks": 2, "attention": [4]},
        (16384, 1),
    ),
}


def make(size: str) -> ImageTokenizer:
    torch.manual_seed(0)
    side, backbone, parts, (codebook, depth) = SIZES[size]
    encoder, decoder = {"conv": (ConvEncoder, ConvDecoder), "vqgan": (VqganEncoder, VqganDecoder)}[backbone]
    quantizer = ResidualQuantizer(parts["latent_dim"], codebook, depth)
    return ImageTokenizer(encoder(**parts), quantizer, decoder(**parts), side).eval()


def write_tars(folder: Path, pictures: int) -> int:
    """Returns the bytes of all pictures."""
    random, size = np.random.default_rng(0), 0
    for start in range(0, pictures, A_TAR):
        with tarfile.open(folder / f"{start // A_TAR:05d}.tar", "w") as tar:
            for n in range(start, min(start + A_TAR, pictures)):
                small = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(small).resize((512, 384), Image.Resampling.BICUBIC).save(
                    file, "jpeg", quality=90
                )
                caption = (
                    f"a made picture, number {n}, with a caption of about as many words as they have".encode()
                )
                for name, data in ((f"{n:08d}.jpg", file.getvalue()), (f"{n:08d}.txt", caption)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                size += len(file.getvalue())
    return size


def rate(count: int, work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """`count` over the median seconds of some rounds."""
    seconds = []
    for _ in range(ROUNDS):
        start = clock()
        work()
        seconds.append(clock() - start)
    return count / median(seconds)


def measure(size: str, tars: Path, pictures: int, device: str) -> list[str]:
    tokenizer = make(size).to(device)
    images = ImageData(Tars(str(tars)), tokenizer.image_size)
    images.multiple = tokenizer.downsample
    found = list(images.source.read("00000.tar"))  # type: ignore[attr-defined]
    decoded = rate(len(found), lambda: [images.decode(each) for each in found])
    x_BCHW = torch.rand(16, 3, tokenizer.image_size, tokenizer.image_size, device=device) * 2 - 1

    def encode() -> None:
        tokenizer.encode(x_BCHW)
        if device == "cuda":
            torch.cuda.synchronize()

    encode()
    encoded = rate(16, encode, time.perf_counter if device == "cuda" else time.process_time)
    with tempfile.TemporaryDirectory() as folder:
        writer = StoreWriter(folder, tokenizer, pieces_of(images, 1024), {"name": "bench"})
        writer.begin()
        start = time.process_time()
        for index in range(writer.shards):
            writer.write_shard(index)
        whole = pictures / (time.process_time() - start)
        start = time.process_time()
        manifest = writer.finish()
        finished = pictures / (time.process_time() - start)
    kept = sum(each["bytes"] for each in manifest["shards"]) / pictures
    h, w = manifest["grid"]
    codes = f"{h}x{w}x{tokenizer.depth} of {tokenizer.codebook_size}"
    return [
        size,
        codes,
        *(f"{each:,.1f}" for each in (decoded, encoded, whole)),
        f"{finished:,.0f}",
        f"{kept:,.0f}",
    ]


def large_shard(rows: int = 10_000, cells: int = 256, codebook: int = 16_384) -> Table:
    """A large shard of random codes: its bytes, and how fast it is written and read back with every check."""
    random = np.random.default_rng(0)
    job: dict[str, Any] = {"codebook_size": codebook, "depth": 1, "digest": ""}
    job["sha256"] = job_sha256(job)
    words = [
        f"a made picture, number {n}, with a caption of about as many words as they have" for n in range(rows)
    ]
    ids = [f"00000.tar/{n:08d}" for n in range(rows)]
    side = np.full(rows, int(cells**0.5), np.int16)
    codes = random.integers(0, codebook, rows * cells).astype(np.uint16)
    text = {"id": ids, "caption": words, "concept": words, "split": ["train"] * rows}
    shard = Shard(text, side, side, codes, {"job": job, "index": 0, "rejects": []})
    data = to_bytes(shard)
    written = rate(rows, lambda: to_bytes(shard))
    read = rate(rows, lambda: read_shard(data, job))
    title = f"a shard of {rows:,} rows of {cells} random codes of {codebook:,}, every check included"
    found = [f"{len(data) / rows:.0f}", f"{written:,.0f}", f"{read:,.0f}"]
    return Table(title, ["", "bytes a row", "rows a second written", "read back"], [["shard", *found]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    record.add_out(parser, __file__)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if asked.device == "cuda" else "cpu"
    about = record.machine(1, "pyarrow", "pillow", device=device)
    print(record.told(about), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        size = write_tars(Path(folder), asked.pictures)
        title = f"pictures a second of one core: {asked.pictures} JPEG files of {size / asked.pictures / 1024:.0f} KB"
        rows = [measure(each, Path(folder), asked.pictures, asked.device) for each in SIZES]
    columns = ["tokenizer", "codes", "decode", "encode", "tar to shard", "read back", "bytes a picture"]
    tables = [Table(title, columns, rows), large_shard()]
    sides = [dict(zip(columns, row, strict=True)) for row in rows]
    rates = [
        f"{each['tar to shard']} of {each['tokenizer']} ({each['encode']} encoder alone)" for each in sides
    ]
    found = f"from tar to shard, pictures a second of one core: {'; '.join(rates)}"
    print(*tables, found, sep="\n\n")
    record.keep(asked.out, __doc__, about, found, tables)


if __name__ == "__main__":
    main()
