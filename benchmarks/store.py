"""What does it cost to open a store, and to read its rows in shuffled order?

    python benchmarks/store.py [--rows N] [--shards N] [--folder DIR] [--contestants NAME …] [--out [FILE]]

A row is a caption of about 70 characters and 256 codes out of 16,384. Each contestant is a process of its own, with one
thread. Rates are of CPU seconds, so that other programs on the machine do not count. Memory is what is resident, files
that are mapped included, above what the process had once its libraries were imported.

    ours, in parts    `CodeStore.part` in the order of `vqlm.batches.ShardOrder`: what lm-train does above 1 GiB
    ours, in memory   all rows held, in the order of `vqlm.batches.Order`: what it does below
    pyarrow, whole    one table of all files, rows taken at random
    datasets, mapped  load_dataset("parquet"), which writes an uncompressed copy, rows taken at random
    datasets, streamed  the same with streaming=True and a shuffle buffer of 10,000: no exact resumption
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from record import Table

SPLIT, BATCH, CODES, GRID = "train", 64, 16_384, (16, 16)


class Made:
    """Pictures without pixels, and a tokenizer whose codes are drawn."""

    image_size, downsample, depth, codebook_size = 256, 16, 1, CODES
    fingerprint = digest = "made"

    def __init__(self, rows: int):
        self.rows, self.random = rows, np.random.default_rng(0)

    def __len__(self) -> int:
        return self.rows

    def load(self, start: int, stop: int) -> Any:
        from vq.store import Loaded, Record

        told = "a made picture with number {} and a caption of about as many words as they have"
        records = [
            Record(f"p{i:08d}", told.format(i), f"concept {i // 4}", SPLIT) for i in range(start, stop)
        ]
        return Loaded(records, torch.zeros(stop - start, 3, 1, 1, dtype=torch.uint8))

    def encode(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.random.integers(0, CODES, (len(x_BCHW), *GRID, self.depth)))

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")


def write(folder: Path, rows: int, shards: int) -> None:
    from vq.store import write_store

    made: Any = Made(rows)
    write_store(folder, made, made, source={}, shard_size=-(-rows // shards), batch_size=1024, progress=False)


# --- contestants: folder → a function that yields rows (caption, codes) in shuffled order ------------------------


def in_parts(folder: str) -> Callable[[], Iterator[Any]]:
    from vq.store import CodeStore, reader
    from vqlm.batches import ShardOrder

    reader.IN_MEMORY = 0
    store = CodeStore.open(folder)
    order = ShardOrder(store.counts(SPLIT), BATCH, 0)
    part = lru_cache(order.open_shards(range(BATCH)))(lambda number: _columns(store.part(number)))

    def rows() -> Iterator[Any]:
        for n in range(order.count // BATCH):
            for shard, row in order.samples(n, range(BATCH)):
                captions, codes_NhwQ = part(shard)
                yield captions[row], codes_NhwQ[row].long()

    return rows


def in_memory(folder: str) -> Callable[[], Iterator[Any]]:
    from vq.store import CodeStore
    from vqlm.batches import Order

    store = CodeStore.open(folder)
    captions, codes_NhwQ = _columns(store)
    order = Order(len(captions), BATCH, 0)

    def rows() -> Iterator[Any]:
        for n in range(order.count // BATCH):
            for i in order.indices(n).tolist():
                yield captions[i], codes_NhwQ[i].long()

    return rows


def _columns(rows: Any) -> Any:
    return rows.captions(SPLIT), rows.stored_codes(SPLIT)


def whole_table(folder: str) -> Callable[[], Iterator[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(Path(folder).glob("*.parquet"))
    table = pa.concat_tables(
        [pq.read_table(file, columns=["caption", "codes"]) for file in files]
    ).combine_chunks()

    def rows() -> Iterator[Any]:
        captions, codes = table["caption"].chunk(0), table["codes"].chunk(0)
        for i in np.random.default_rng(0).permutation(len(table)).tolist():
            yield captions[i].as_py(), torch.from_numpy(codes[i].values.to_numpy().astype(np.int64))

    return rows


def mapped(folder: str) -> Callable[[], Iterator[Any]]:
    from datasets import load_dataset

    cache = str(Path(folder).with_name("cache"))
    found = load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", cache_dir=cache)
    found = found.select_columns(["caption", "codes"]).with_format("numpy")

    def rows() -> Iterator[Any]:
        for i in np.random.default_rng(0).permutation(len(found)).tolist():
            row = found[i]
            yield str(row["caption"]), torch.from_numpy(row["codes"].astype(np.int64))

    return rows


def streamed(folder: str) -> Callable[[], Iterator[Any]]:
    from datasets import load_dataset

    found = load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", streaming=True)
    found = (
        found.select_columns(["caption", "codes"]).with_format("numpy").shuffle(seed=0, buffer_size=10_000)
    )

    def rows() -> Iterator[Any]:
        for row in found:
            yield str(row["caption"]), torch.from_numpy(row["codes"].astype(np.int64))

    return rows


CONTESTANTS = {
    "ours, in parts": in_parts,
    "ours, in memory": in_memory,
    "pyarrow, whole": whole_table,
    "datasets, mapped": mapped,
    "datasets, streamed": streamed,
}


# --- measuring --------------------------------------------------------------------------------------------------------


def resident() -> float:
    """MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(name: str, folder: str) -> dict[str, float]:
    import datasets
    import pyarrow.parquet  # noqa: F401 - what is imported is not what is measured

    import vq.store  # noqa: F401
    import vqlm.batches  # noqa: F401

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    before, start, clock = resident(), time.process_time(), time.perf_counter()
    rows = CONTESTANTS[name](folder)
    opened, waited, after = time.process_time() - start, time.perf_counter() - clock, resident() - before
    count, words, highest, handles = 0, 0, 0.0, 0
    start = time.process_time()
    for caption, codes in rows():
        count, words = count + 1, words + len(caption) + len(codes)
        if count % 4096 == 0:
            highest = max(highest, resident() - before)
            handles = max(handles, len(os.listdir("/proc/self/fd")))
    seconds = time.process_time() - start
    return {
        "rows": count,
        "open_cpu": opened,
        "open_clock": waited,
        "after_open": after,
        "highest": highest,
        "rate": count / seconds,
        "handles": handles,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument(
        "--folder", help="where the store is made, or lies already; default: a temporary folder"
    )
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    record.add_out(parser, __file__)
    asked = parser.parse_args()
    if asked.contestant:
        print(json.dumps(measure(asked.contestant, asked.folder)))
        return
    about = record.machine(1, "pyarrow", "datasets")
    print(record.told(about), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(asked.folder or temporary) / "store"
        if not (folder / "manifest.json").is_file():
            write(folder, asked.rows, asked.shards)
        size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
        title = f"{asked.rows:,} rows in {asked.shards} shards, {size / 1e6:,.0f} MB"
        found = {name: apart(name, folder) for name in asked.contestants}
    made = table(title, found)
    print(made)
    record.keep(asked.out, __doc__, about, verdict(found), [made])


def apart(name: str, folder: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--contestant", name, "--folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_THREADS": "1"}
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(told.splitlines()[-1])


def table(title: str, found: dict[str, dict[str, float]]) -> Table:
    columns = ["", "open, CPU s", "MB after", "MB highest", "rows/CPU s", "open files"]
    formats = {"open_cpu": ".1f", "after_open": ".0f", "highest": ".0f", "rate": ",.0f", "handles": ".0f"}
    rows = [[name, *(f"{m[key]:{form}}" for key, form in formats.items())] for name, m in found.items()]
    return Table(title, columns, rows)


def verdict(found: dict[str, dict[str, float]]) -> str:
    return "rows a CPU second, shuffled: " + "; ".join(
        f"{name} {m['rate']:,.0f}" for name, m in found.items()
    )


if __name__ == "__main__":
    main()
