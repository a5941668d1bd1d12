"""What a store is made of (the job) and what it holds (the manifest). Knows no codes.

A job is everything that the bytes of a store depend on: two equal jobs may share a folder, and any process that knows
the job can write any shard of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from vq.store.shard import SPLITS, Damaged, canonical, job_sha256, read_about
from vq.store.work import Pieces
from vqlm.errors import ConfigError, nearest
from vqlm.places import LocalPlace, Place

FORMAT = "vqlm codes"
VERSION = 1
MANIFEST, REJECTS, TOKENIZER = "manifest.json", "rejects.jsonl", "tokenizer"


class Tokenizer(Protocol):
    """What the store asks of an image tokenizer. `vq.tokenizer.ImageTokenizer` is one."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def codebook_size(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def downsample(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    def encode(self, x_BCHW: Tensor) -> Tensor: ...
    def save_pretrained(self, folder: Path) -> Any: ...


def make_job(tokenizer: Tokenizer, pieces: Pieces, source: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON data, and the hash of it. ConfigError if `source` is not plain."""
    job = {
        "version": VERSION,
        "fingerprint": str(tokenizer.fingerprint),
        "codebook_size": int(tokenizer.codebook_size),
        "depth": int(tokenizer.depth),
        "downsample": int(tokenizer.downsample),
        "image_size": tokenizer.image_size,
        "source": dict(source),
        **pieces.described(),
    }
    try:
        job = json.loads(canonical(job))  # as it will be read back: tuples become lists
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the source of a store must be plain JSON data: {error}") from error
    return {**job, "sha256": job_sha256(job)}


def make_manifest(
    job: dict[str, Any],
    shards: list[dict[str, Any]],
    splits: Counter[str],
    grids: Iterable[tuple[int, int]],
    reasons: Counter[str],
    files: dict[str, str],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "job": job,
        "grid": only_grid(grids),
        "pictures": splits.total(),
        "splits": {split: splits[split] for split in SPLITS},
        "rejects": {"total": reasons.total(), "reasons": dict(sorted(reasons.items()))},
        "shards": shards,
        "files": files,
    }


def read_manifest(place: Place) -> dict[str, Any]:
    """The manifest, checked as far as the other files here rely on it; else ConfigError."""
    path = f"{place}/{MANIFEST}"
    try:
        with place.open(MANIFEST) as file:
            manifest = json.loads(file.read().decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(_why_no_manifest(place)) from None
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; {again(place)}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConfigError(f"{path} is not the manifest of a code store")
    if manifest.get("version") != VERSION:
        found = manifest.get("version")
        raise ConfigError(
            f"{place} is a store of format version {found!r}; this version of vqlm reads {VERSION}"
        )
    if not _well_formed(manifest):
        raise ConfigError(f"{path} is damaged; {again(place)}")
    return manifest


def _well_formed(manifest: dict[str, Any]) -> bool:
    try:
        job, shards, grid = manifest["job"], manifest["shards"], manifest["grid"]
        return (
            job["sha256"] == job_sha256(job)
            and [each["name"] for each in shards] == [shard_name(i) for i in range(shard_count(job))]
            and sum(each["rows"] for each in shards) == manifest["pictures"] > 0
            and all(isinstance(each["bytes"], int) and isinstance(each["sha256"], str) for each in shards)
            and (grid is None or (len(grid) == 2 and all(isinstance(side, int) for side in grid)))
            and {"rejects.jsonl", "tokenizer/config.json"} <= manifest["files"].keys()
            and all(
                ".." not in Path(name).parts and not Path(name).is_absolute() for name in manifest["files"]
            )
        )
    except (KeyError, TypeError, AttributeError):
        return False


def hashes_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each file beside the manifest, by its path in the store."""
    return {each["name"]: each["sha256"] for each in manifest["shards"]} | manifest["files"]


def _why_no_manifest(place: Place) -> str:
    shards = [name for name in place.names("shard-") if name.endswith(".parquet")]
    if shards:
        return f"the store {place} is unfinished: {_progress(place, shards)}, no {MANIFEST}; {again(place)}"
    if not isinstance(place, LocalPlace):
        return f"there is no store at {place}"
    siblings = [path.parent.name for path in place.folder.parent.glob(f"*/{MANIFEST}")]
    hint = nearest(place.folder.name, siblings)
    if place.folder.is_dir():
        return f"{place} is not a store: it has no {MANIFEST}{hint}"
    return f"there is no store at {place}{hint}"


def _progress(place: Place, shards: list[str]) -> str:
    """How many shards are there, and of how many, if any of them can tell."""
    for name in shards:
        try:
            with place.open(name) as file:
                return f"{len(shards)} of {shard_count(read_about(file)['job'])} shards"
        except Damaged:
            continue
    return f"{len(shards)} shards"


def again(place: Place) -> str:
    return f"to finish or repair it, run the same vq-encode again with out={place}: what is sound is kept"


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.parquet"


def shard_count(job: Mapping[str, Any]) -> int:
    return job["pieces"] if "pieces" in job else -(-job["candidates"] // job["shard_size"])


def only_grid(sizes: Iterable[tuple[int, int]]) -> list[int] | None:
    """[h, w] if all sizes agree, else None."""
    different = set(sizes)
    return list(different.pop()) if len(different) == 1 else None
