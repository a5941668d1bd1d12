"""A shard: rows of codes with their captions ↔ the bytes of a Parquet file. Knows no folder and no other shard.

The same rows give the same bytes. A shard carries its job, its number, its rejects and a hash of all of that, so that
damage is told from another job, and either from a sound file, without a manifest.

Shapes: h w grid, Q codes per cell (depth), K codes in the book, N rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("train", "heldout")
ABOUT = b"vqlm"  # key of our JSON in a shard's schema metadata
TEXT_COLUMNS = ("id", "caption", "concept", "split")
LARGEST_SIDE = 2**15 - 1  # of a grid: height and width are int16 columns


class Damaged(Exception):
    """A file is not a sound shard; the text says why."""


@dataclass
class Shard:
    text: dict[str, list[str]]  # the columns of TEXT_COLUMNS
    heights: np.ndarray  # int16 (N,), of the grids
    widths: np.ndarray  # int16 (N,)
    codes: np.ndarray  # every row's (h, w, Q) laid end to end
    # job, index, rejects, what the piece says of itself; content, if the job has no digest
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.heights)

    def digest(self) -> str:
        columns = [self.text[name] for name in TEXT_COLUMNS] + [self.heights.tolist(), self.widths.tolist()]
        told = hashlib.sha256(canonical([columns, self.about]))
        told.update(self.codes.astype("<u4").tobytes())
        return told.hexdigest()


def to_bytes(shard: Shard) -> bytes:
    """Shard → Parquet file. The same rows give the same bytes."""
    schema = _schema(shard.about["job"])
    offsets = pa.array(offsets_of(shard, shard.about["job"]["depth"]), pa.int32())
    codes = pa.array(shard.codes, schema.field("codes").type.value_type)
    columns = [pa.array(shard.text[name], pa.string()) for name in TEXT_COLUMNS]
    columns += [pa.array(shard.heights, pa.int16()), pa.array(shard.widths, pa.int16())]
    columns.append(pa.ListArray.from_arrays(offsets, codes))
    about = canonical({**shard.about, "sha256": shard.digest()})
    sink = pa.BufferOutputStream()
    # Arrow would put metadata of its own schema into the file twice: Parquet's own field is enough.
    with pq.ParquetWriter(
        sink, schema, compression="zstd", write_page_checksum=True, store_schema=False
    ) as file:
        file.write_table(pa.Table.from_arrays(columns, schema=schema))
        file.add_key_value_metadata({ABOUT: about})
    return sink.getvalue().to_pybytes()


def read_shard(data: bytes, job: Mapping[str, Any]) -> Shard:
    """Parquet file → shard of this job, every row and code checked, and its own hash; else Damaged."""
    shard = parse_shard(data, job)
    if shard.digest() != read_about(pa.BufferReader(data))["sha256"]:
        raise Damaged("its content was changed after it was written (SHA-256)")
    return shard


def parse_shard(data: bytes, job: Mapping[str, Any]) -> Shard:
    """As `read_shard`, for bytes whose own hash has been compared already: the shard's is not computed again."""
    about = read_about(pa.BufferReader(data))
    if about["job"] != job:
        raise Damaged("belongs to another job")
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            table = file.read()
    except Exception as error:  # a damaged file makes the library raise many kinds; all mean the same
        raise Damaged(f"cannot be read ({error})") from error
    if table.schema.names != _schema(job).names or table.schema.types != _schema(job).types:
        raise Damaged("has other columns than a store's")
    lists = pa.concat_arrays([pa.array([], table["codes"].type), *table["codes"].chunks])
    codes = lists.flatten()
    if codes.null_count or any(column.null_count for column in table.columns):
        raise Damaged("has empty fields")
    shard = Shard(
        text={name: table[name].to_pylist() for name in TEXT_COLUMNS},
        heights=table["height"].to_numpy(),
        widths=table["width"].to_numpy(),
        codes=codes.to_numpy(zero_copy_only=False),
        about={key: value for key, value in about.items() if key != "sha256"},
    )
    _check_rows(shard, lists.value_lengths().to_numpy(zero_copy_only=False))
    return shard


def _check_rows(shard: Shard, lengths: np.ndarray) -> None:
    """Damaged, naming the row, where a grid and its codes disagree or a code lies outside the codebook."""
    job = shard.about["job"]
    sizes = shard.heights.astype(np.int64) * shard.widths * job["depth"]
    wrong = np.flatnonzero((shard.heights < 0) | (shard.widths < 0) | (sizes != lengths))
    if wrong.size:
        row = int(wrong[0])
        raise Damaged(
            f"row {row} ({shard.text['id'][row]!r}) has {lengths[row]} codes, its grid needs {sizes[row]}"
        )
    outside = np.flatnonzero(shard.codes >= job["codebook_size"])  # unsigned: never below 0
    if outside.size:
        row = int(np.searchsorted(np.cumsum(lengths), outside[0], side="right"))
        code, limit = int(shard.codes[outside[0]]), job["codebook_size"]
        raise Damaged(
            f"row {row} ({shard.text['id'][row]!r}) has code {code}, outside the codebook [0, {limit})"
        )


def read_about(file: IO[bytes] | pa.BufferReader) -> dict[str, Any]:
    """A shard's own description, from the end of its file; Damaged if there is none."""
    try:
        about = json.loads((pq.read_metadata(file).metadata or {})[ABOUT])
        intact = {"index", "rejects", "sha256"} <= about.keys()
        # A flipped bit in the job must look like damage, not like another job.
        intact = intact and about["job"]["sha256"] == job_sha256(about["job"])
    except Exception as error:  # as above
        raise Damaged(f"cannot be read ({error})") from error
    if not intact:
        raise Damaged("its description was changed after it was written")
    return about


def _schema(job: Mapping[str, Any]) -> pa.Schema:
    text = [pa.field(name, pa.string(), nullable=False) for name in TEXT_COLUMNS]
    sides = [pa.field(name, pa.int16(), nullable=False) for name in ("height", "width")]
    codes = pa.field("codes", pa.list_(pa.from_numpy_dtype(dtype_of(job))), nullable=False)
    return pa.schema([*text, *sides, codes])


def dtype_of(job: Mapping[str, Any]) -> type[np.unsignedinteger]:
    return np.uint16 if job["codebook_size"] <= 2**16 else np.uint32


def offsets_of(shard: Shard, depth: int) -> np.ndarray:
    """int64 (N + 1,): row i's codes are codes[offsets[i] : offsets[i + 1]]."""
    return np.concatenate([[0], np.cumsum(shard.heights.astype(np.int64) * shard.widths * depth)])


def job_sha256(job: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({k: v for k, v in job.items() if k != "sha256"})).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON with one spelling: equal values, equal bytes. TypeError or ValueError on what JSON cannot say."""
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode("ascii")
