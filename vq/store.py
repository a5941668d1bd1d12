"""The store: codes of pictures with their captions, and the tokenizer that made them, in one folder.

    shard-00000.parquet …   rows of codes; each file is written at once and is a finished piece of work
    tokenizer/              a copy of the tokenizer, so that the codes can always be decoded
    rejects.jsonl           one line for each picture that could not be encoded: id, reason, detail
    manifest.json           written last: totals, and the SHA-256 of every other file

`write_store` and `CodeStore.open` are the two directions. What is written depends on pictures and tokenizer alone (no
times, no paths), so a job that was killed and run again leaves the same bytes as one that was not. This file does not
know where pictures come from, how a tokenizer works, or what a language model makes of the codes: it holds image-local
codes in [0, K), never token ids.

Shapes: B pictures, C channels, H W pixels, h w grid, Q codes per cell (depth), K codes in the book, N rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from vq.images import from_bytes
from vqlm.errors import ConfigError, nearest
from vqlm.files import clean, new_folder, sha256, write_bytes, write_json, write_text
from vqlm.progress import bar

FORMAT = "vqlm codes"
VERSION = 1
SPLITS = ("train", "heldout")
MANIFEST, REJECTS, TOKENIZER = "manifest.json", "rejects.jsonl", "tokenizer"
ABOUT = b"vqlm"  # key of our JSON in a shard's schema metadata
ALWAYS_VERIFIED_BYTES = 2**30  # hashing this takes about a second; larger stores are hashed when asked
TEXT_COLUMNS = ("id", "caption", "concept", "split")
LARGEST_SIDE = 2**15 - 1  # of a grid: height and width are int16 columns


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


@dataclass(frozen=True)
class Record:
    """What is stored beside the codes of a picture. `id` is unique in a store, `split` is "train" or "heldout"."""

    id: str
    caption: str
    concept: str
    split: str


@dataclass(frozen=True)
class Loaded:
    """A range of candidates: each is either a record with pixels or a reject."""

    records: Sequence[Record]
    x_BCHW: Tensor | Sequence[Tensor]  # uint8, or float in [-1, 1]; a list of x_CHW where sizes differ
    rejects: Sequence[Mapping[str, str]] = ()  # id, reason, detail


class Pictures(Protocol):
    """Pictures to encode: a fixed sequence of candidates, loaded range by range, in a thread beside the encoder.

    The same range must give the same content each time. An optional attribute `digest: str` names all of that content
    (a hash of it, say): a store begun with another digest is then refused. Without one, each shard remembers a hash of
    what it was made of; a run that finds it finished loads its pictures again and redoes it where they changed.
    """

    def __len__(self) -> int: ...
    def load(self, start: int, stop: int) -> Loaded: ...


class PictureSetLike(Protocol):
    """The part of `vq.data.PictureSet` that is read here."""

    @property
    def x_NCHW(self) -> Tensor: ...  # uint8
    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def captions(self) -> Sequence[str]: ...
    @property
    def concepts(self) -> Sequence[str]: ...


class SplitPictures:
    """`Pictures` in memory: the training set, the held-out set, then what was rejected while they were decoded.

    ValueError if an id occurs twice.
    """

    def __init__(
        self,
        train: PictureSetLike,
        heldout: PictureSetLike,
        rejects: Sequence[Mapping[str, str]] = (),
    ):
        self.sets = {"train": train, "heldout": heldout}
        self.rejects = list(rejects)
        self.records = [
            Record(*columns, split)
            for split, each in self.sets.items()
            for columns in zip(each.ids, each.captions, each.concepts, strict=True)
        ]
        _check_unique(record.id for record in self.records)

    def __len__(self) -> int:
        return len(self.records) + len(self.rejects)

    def load(self, start: int, stop: int) -> Loaded:
        border, end = len(self.sets["train"].ids), len(self.records)
        parts = [
            self.sets["train"].x_NCHW[min(start, border) : min(stop, border)],
            self.sets["heldout"].x_NCHW[max(start - border, 0) : max(stop - border, 0)],
        ]
        filled = [part for part in parts if len(part)]  # an empty set may have no size to concatenate
        x_BCHW = torch.cat(filled) if filled else ()
        rejects = self.rejects[max(start - end, 0) : max(stop - end, 0)]
        return Loaded(self.records[start:stop], x_BCHW, rejects)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every record, reject and pixel."""
        rows = [asdict(record) for record in self.records]
        told = hashlib.sha256(_canonical([rows, [dict(reject) for reject in self.rejects]]))
        for each in self.sets.values():
            told.update(str((tuple(each.x_NCHW.shape), each.x_NCHW.dtype)).encode())
            for x_BCHW in each.x_NCHW.split(1024):
                told.update(x_BCHW.cpu().contiguous().view(torch.uint8).numpy().data)
        return told.hexdigest()


# --- writing --------------------------------------------------------------------------------------------------


def write_store(
    folder: str | Path,
    tokenizer: Tokenizer,
    pictures: Pictures,
    *,
    source: Mapping[str, Any],
    shard_size: int = 1024,
    batch_size: int = 64,
    encode: Callable[[Tensor], Tensor] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Encode `pictures` into a store, or finish one that was begun. What is already there and sound is kept.

    `source`: JSON description of what is encoded and how it was prepared; another one is another job.
    `encode`: float x_BCHW in [-1, 1] → integer codes_BhwQ; by default `tokenizer.encode` on the tokenizer's device.
    `batch_size` is not part of the job: it may be lowered to finish on a smaller machine.

    Returns the numbers of pictures, rejects, shards, and of shards kept, encoded and (damaged, so) redone; `damage`
    says what was wrong with the last. ConfigError if the folder holds another job, an id occurs twice, or nothing
    could be encoded; ValueError if codes or records are not what they should be.
    """
    writer = StoreWriter(folder, tokenizer, pictures, source, shard_size, batch_size, encode)
    writer.begin()
    with bar(len(pictures), "encoding", "pictures", hidden=not progress) as shown:
        for index in range(writer.shards):
            writer.write_shard(index, shown.update)
    manifest = writer.finish()
    counts = {"kept": writer.kept, "encoded": writer.encoded, "redone": len(writer.damage)}
    totals = {"pictures": manifest["pictures"], "rejects": manifest["rejects"]["total"]}
    return {**totals, "shards": writer.shards, **counts, "damage": writer.damage}


class StoreWriter:
    """One job: these pictures through this tokenizer into this folder. `begin`, each `write_shard`, `finish`.

    `write_shard` is idempotent and shards do not know each other, so other drivers than `write_store` can share
    them out; `begin` before and `finish` after belong to one process.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        pictures: Pictures,
        source: Mapping[str, Any],
        shard_size: int = 1024,
        batch_size: int = 64,
        encode: Callable[[Tensor], Tensor] | None = None,
    ):
        if shard_size < 1 or batch_size < 1:
            raise ConfigError(
                f"shard_size and batch_size must be at least 1, got {shard_size} and {batch_size}"
            )
        if not len(pictures):
            raise ConfigError("there are no pictures to encode")
        self.folder, self.tokenizer, self.pictures = Path(folder), tokenizer, pictures
        self.batch_size = batch_size
        self.encode, self.device = encode or tokenizer.encode, _device(tokenizer)
        self.job = _job(tokenizer, pictures, source, shard_size)
        self.shards = _shard_count(self.job)
        self.kept = self.encoded = 0
        self.damage: list[str] = []
        self._hashes: dict[str, str] = {}  # of a finished store: what each file should be

    def begin(self) -> None:
        """Refuse a folder that holds another job; clear what a killed run left; put the tokenizer's copy in place."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"the store's folder {self.folder} is a file")
        self.folder.mkdir(parents=True, exist_ok=True)
        clean(self.folder)
        self._refuse_another_job()
        names = [name for name in self._hashes if name.startswith(f"{TOKENIZER}/")]
        if not names or not all(self._as_finished(self.folder / name) for name in names):
            self._unfinish(*names)
            with new_folder(self.folder / TOKENIZER) as part:
                self.tokenizer.save_pretrained(part)

    def write_shard(self, index: int, advance: Callable[[int], Any] = lambda pictures: None) -> None:
        """Encode one range of candidates into its file, unless a sound one is there.

        `advance` is called with the number of pictures done since its last call.
        """
        start, stop = _range(self.job, index)
        path = self.folder / _shard_name(index)
        if path.exists():
            try:
                self._check_content(self._check_shard(path, index))
            except _Damaged as damage:
                self.damage.append(f"{path.name}: {damage}")
            else:
                self.kept += 1
                advance(stop - start)
                return
        self._unfinish(path.name)
        write_bytes(path, _to_bytes(self._encoded(index, advance)))
        self.encoded += 1

    def finish(self) -> dict[str, Any]:
        """Read every shard back, write the rejects and then the manifest, which is returned."""
        shards, rows, rejects, ids = [], [], [], []
        for index in range(self.shards):
            path = self.folder / _shard_name(index)
            try:
                shard = self._check_shard(path, index)
            except _Damaged as damage:
                raise ConfigError(f"{path}: {damage}; {_again(self.folder)}") from damage
            size, digest = path.stat().st_size, sha256(path)
            shards.append({"name": path.name, "rows": len(shard), "bytes": size, "sha256": digest})
            rows += zip(shard.text["split"], shard.heights.tolist(), shard.widths.tolist(), strict=True)
            rejects += shard.about["rejects"]
            ids += shard.text["id"]
        _check_unique(ids)
        if not ids:
            raise ConfigError(f"none of {len(rejects)} pictures could be encoded: {_reasons(rejects)}")
        write_text(self.folder / REJECTS, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejects))
        manifest = _manifest(self.job, shards, rows, rejects, self._other_files())
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    def _refuse_another_job(self) -> None:
        """ConfigError that lists what differs, from the manifest or from any shard that can be read."""
        if (self.folder / MANIFEST).exists():
            try:
                manifest = _read_manifest(self.folder)
            except ConfigError:
                pass  # damaged: the shards say whose they are, and a new one is written
            else:
                self._compare(manifest["job"])
                self._hashes = _hashes(manifest)
        for path in sorted(self.folder.glob("shard-*.parquet")):
            try:
                self._compare(_read_about(path)["job"])
            except _Damaged:
                continue

    def _compare(self, theirs: dict[str, Any]) -> None:
        keys = [key for key in {**theirs, **self.job} if theirs.get(key) != self.job.get(key)]
        if keys:
            lines = "".join(f"\n  {k}: {_short(theirs.get(k))} → {_short(self.job.get(k))}" for k in keys)
            told = f"the store {self.folder} was begun with other settings (it has → you give):{lines}"
            raise ConfigError(f"{told}\nchoose another folder, or delete this one")

    def _check_shard(self, path: Path, index: int) -> _Shard:
        """The shard of a file that is sound and is the one it should be; else _Damaged."""
        shard = _read_shard(path, self.job)
        if shard.about["index"] != index:
            raise _Damaged(f"holds shard {shard.about['index']}")
        if not self._as_finished(path):
            raise _Damaged("is not the file that manifest.json lists")
        return shard

    def _as_finished(self, path: Path) -> bool:
        """Whether a file is the one that the manifest lists, where it lists one."""
        expected = self._hashes.get(path.relative_to(self.folder).as_posix())
        return expected is None or (path.is_file() and sha256(path) == expected)

    def _unfinish(self, *names: str) -> None:
        """These files are about to change, so the store is not finished any more: the manifest goes first."""
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for name in names:
            self._hashes.pop(name, None)

    def _encoded(self, index: int, advance: Callable[[int], Any]) -> _Shard:
        start, stop = _range(self.job, index)
        records: list[Record] = []
        rejects: list[dict[str, str]] = []
        codes, sizes, content = [], [], _Content()
        for loaded in self._loaded(start, stop):
            content.add(loaded)
            for x_BCHW in _batches(loaded.x_BCHW, self.batch_size):
                codes_BhwQ = self._checked(self.encode(self._pixels(x_BCHW)), len(x_BCHW))
                codes.append(codes_BhwQ.reshape(-1))
                sizes += [codes_BhwQ.shape[1:3]] * len(codes_BhwQ)
                advance(len(codes_BhwQ))
            if loaded.rejects:
                advance(len(loaded.rejects))
            records += loaded.records
            rejects += _plain(loaded.rejects)
        about = {"job": self.job, "index": index, "range": [start, stop], "rejects": rejects}
        if not self.job["digest"]:
            about["content"] = content.digest()
        return _Shard(
            text={name: [_text(r, name) for r in records] for name in TEXT_COLUMNS},
            heights=np.array([h for h, _ in sizes], np.int16),
            widths=np.array([w for _, w in sizes], np.int16),
            codes=np.concatenate(codes) if codes else np.zeros(0, _dtype(self.job)),
            about=about,
        )

    def _loaded(self, start: int, stop: int) -> Iterator[Loaded]:
        """A range in pieces of batch_size candidates; the next piece is loaded while the caller works on this one."""
        edges = [*range(start, stop, self.batch_size), stop]
        with ThreadPoolExecutor(1, "load") as reader:
            coming = reader.submit(self.pictures.load, *edges[:2])
            for n in range(1, len(edges)):
                loaded = coming.result()
                if n + 1 < len(edges):
                    coming = reader.submit(self.pictures.load, *edges[n : n + 2])
                counts = len(loaded.records), len(loaded.x_BCHW), len(loaded.rejects)
                if counts[0] != counts[1] or counts[0] + counts[2] != edges[n] - edges[n - 1]:
                    told = f"{counts[0]} records, {counts[1]} pictures, {counts[2]} rejects"
                    raise ValueError(
                        f"candidates {edges[n - 1]} to {edges[n]} gave {told}: each must be either a reject or a record"
                    )
                yield loaded

    def _pixels(self, x_BCHW: Tensor) -> Tensor:
        """Float in [-1, 1] where the encoder is. Bytes are moved before they are made numbers of four bytes each."""
        x_BCHW = x_BCHW if self.device is None else x_BCHW.to(self.device)
        return from_bytes(x_BCHW) if x_BCHW.dtype == torch.uint8 else x_BCHW

    def _check_content(self, shard: _Shard) -> None:
        """_Damaged if a sound shard was made of other pictures than are given now."""
        if "content" not in shard.about:
            return  # the job's digest speaks for all
        content = _Content()
        for loaded in self._loaded(*shard.about["range"]):
            content.add(loaded)
        if content.digest() != shard.about["content"]:
            raise _Damaged("was made of other pictures: they have changed since")

    def _checked(self, codes_BhwQ: Tensor, pictures: int) -> np.ndarray:
        """Codes as they are stored; ValueError if a tokenizer gave something else than it declares."""
        depth, size = self.job["depth"], self.job["codebook_size"]
        shape = tuple(codes_BhwQ.shape)
        fits = (
            len(shape) == 4 and shape[0] == pictures and shape[3] == depth and max(shape[1:3]) <= LARGEST_SIDE
        )
        if not fits or codes_BhwQ.is_floating_point():
            expected = f"integers ({pictures}, h, w, {depth})"
            raise ValueError(f"the tokenizer gave codes {shape} of {codes_BhwQ.dtype}, expected {expected}")
        codes = codes_BhwQ.detach().cpu().numpy()
        if codes.size and not (codes.min() >= 0 and codes.max() < size):
            raise ValueError(
                f"the tokenizer gave codes from {codes.min()} to {codes.max()}, outside [0, {size})"
            )
        return codes.astype(_dtype(self.job))

    def _other_files(self) -> dict[str, str]:
        paths = [self.folder / REJECTS, *sorted((self.folder / TOKENIZER).rglob("*"))]
        return {p.relative_to(self.folder).as_posix(): sha256(p) for p in paths if p.is_file()}


# --- reading --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredPicture:
    """A row of the store. codes_hwQ: int64 in [0, K)."""

    id: str
    caption: str
    concept: str
    split: str
    codes_hwQ: Tensor


class CodeStore:
    """A finished store, read-only: a sequence of StoredPicture, with bulk access by split ("train" or "heldout").

    Codes are kept in memory as they are stored (uint16 or uint32) once they are first needed.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | Path, verify: bool | None = None) -> CodeStore:
        """Open a store. ConfigError names what is wrong: no such folder (with the nearest name), not finished,
        another format version, or a file missing, of another size or (with `verify`) with another content.

        `verify` compares every file with its SHA-256 and reads all codes; by default so for stores under 1 GiB.
        Where it is off, codes are still checked against [0, K) and their own hash when they are first read.
        """
        folder = Path(folder)
        store = cls(folder, _read_manifest(folder))
        for each in store.manifest["shards"]:
            store._check_cheaply(each)
        size = sum(each["bytes"] for each in store.manifest["shards"])
        if verify or (verify is None and size < ALWAYS_VERIFIED_BYTES):
            store.verify()
        return store

    def verify(self) -> None:
        """Compare every file with the manifest and read all codes. ConfigError names the first file that differs."""
        for name, expected in _hashes(self.manifest).items():
            path = self.folder / name
            if not path.is_file():
                raise ConfigError(f"{path} is missing; {_again(self.folder)}")
            if sha256(path) != expected:
                raise ConfigError(f"{path} was changed after it was written (SHA-256); {_again(self.folder)}")
        _ = self._rows

    def check(self, tokenizer: Tokenizer) -> None:
        """ConfigError (a ValueError), with both fingerprints, unless `tokenizer` is the one that made these codes."""
        theirs = str(tokenizer.fingerprint)
        if theirs != self.tokenizer_fingerprint:
            raise ConfigError(
                f"the store {self.folder} holds codes of tokenizer {self.tokenizer_fingerprint}, but the one given is "
                f"{theirs}; use {self.tokenizer_folder}, or encode the pictures again with the new one"
            )

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.manifest["job"]["fingerprint"]

    @property
    def digest(self) -> str:
        """16 hex digits of the manifest, which holds the hash of every file: another store has another one."""
        return sha256(self.folder / "manifest.json")[:16]

    @property
    def tokenizer_folder(self) -> Path:
        """The copy of the tokenizer inside the store."""
        return self.folder / TOKENIZER

    @property
    def codebook_size(self) -> int:
        """K: codes lie in [0, K)."""
        return self.manifest["job"]["codebook_size"]

    @property
    def depth(self) -> int:
        """Q: codes per cell."""
        return self.manifest["job"]["depth"]

    @property
    def downsample(self) -> int:
        """f: pixels per cell, along a side."""
        return self.manifest["job"]["downsample"]

    @property
    def image_size(self) -> int:
        """The tokenizer's own: side in pixels of the pictures that it was trained on."""
        return self.manifest["job"]["image_size"]

    @property
    def grid(self) -> tuple[int, int] | None:
        """(h, w) where all pictures share one grid, else None."""
        grid = self.manifest["grid"]
        return None if grid is None else (grid[0], grid[1])

    @cached_property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Every (h, w) that occurs, the most frequent one first."""
        counts = Counter(zip(self._rows.heights.tolist(), self._rows.widths.tolist(), strict=True))
        return tuple(sorted(counts, key=lambda grid: (-counts[grid], grid)))

    @property
    def rejects(self) -> list[dict[str, str]]:
        """What could not be encoded: dicts with id, reason, detail."""
        lines = (self.folder / REJECTS).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]

    def __len__(self) -> int:
        return self.manifest["pictures"]

    def __getitem__(self, i: int) -> StoredPicture:
        if not -len(self) <= i < len(self):
            raise IndexError(f"picture {i} of a store of {len(self)}")
        i %= len(self)
        rows = self._rows
        shape = int(rows.heights[i]), int(rows.widths[i]), self.depth
        codes = rows.codes[self._offsets[i] : self._offsets[i + 1]]
        text = {name: rows.text[name][i] for name in TEXT_COLUMNS}
        return StoredPicture(**text, codes_hwQ=torch.from_numpy(codes.astype(np.int64)).reshape(shape))

    def __iter__(self) -> Iterator[StoredPicture]:
        return (self[i] for i in range(len(self)))

    def codes_NhwQ(self, split: str | None = None) -> Tensor:
        """All codes of a split (None: of the store), int64 (N, h, w, Q), in the order of `ids`.

        ValueError if grids differ: read such a store picture by picture.
        """
        if self.grid is None:
            raise ValueError(f"the pictures of {self.folder} have different grids; read them one by one")
        codes_NhwQ = self._rows.codes.reshape(len(self), *self.grid, self.depth)
        return torch.from_numpy(codes_NhwQ[self.indices(split)].astype(np.int64))

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
        """Positions of a split's pictures in the store. ValueError, with the nearest name, on an unknown split."""
        if split is None:
            return list(range(len(self)))
        if split not in SPLITS:
            raise ValueError(
                f"no split {split!r}; a store has {' and '.join(SPLITS)}{nearest(split, SPLITS)}"
            )
        return [i for i, each in enumerate(self._rows.text["split"]) if each == split]

    def _column(self, name: str, split: str | None) -> list[str]:
        column = self._rows.text[name]
        return [column[i] for i in self.indices(split)]

    @cached_property
    def _rows(self) -> _Shard:
        """All shards as one."""
        shards = []
        for each in self.manifest["shards"]:
            try:
                shard = _read_shard(self.folder / each["name"], self.manifest["job"])
            except _Damaged as damage:
                raise ConfigError(
                    f"{self.folder / each['name']}: {damage}; {_again(self.folder)}"
                ) from damage
            if len(shard) != each["rows"]:
                raise ConfigError(f"{self.folder / each['name']} has {len(shard)} rows, not {each['rows']}")
            shards.append(shard)
        rows = _Shard(
            text={name: [text for s in shards for text in s.text[name]] for name in TEXT_COLUMNS},
            heights=np.concatenate([s.heights for s in shards]),
            widths=np.concatenate([s.widths for s in shards]),
            codes=np.concatenate([s.codes for s in shards]),
        )
        if _grid(zip(rows.heights.tolist(), rows.widths.tolist(), strict=True)) != self.manifest["grid"]:
            raise ConfigError(
                f"{self.folder / MANIFEST} gives another grid than the shards; {_again(self.folder)}"
            )
        return rows

    @cached_property
    def _offsets(self) -> np.ndarray:
        return _offsets(self._rows, self.depth)

    def _check_cheaply(self, each: dict[str, Any]) -> None:
        """A shard's presence, size and number of rows: one look at the file's end, whatever its length."""
        path = self.folder / each["name"]
        if not path.is_file():
            told = f"{path} is missing, one of {len(self.manifest['shards'])} shards"
            raise ConfigError(f"{told}; {_again(self.folder)}")
        size = path.stat().st_size
        if size != each["bytes"]:
            raise ConfigError(f"{path} has {size} bytes, not {each['bytes']}; {_again(self.folder)}")
        try:
            rows = pq.read_metadata(path).num_rows
        except Exception as error:  # a damaged file may raise anything in the reader
            raise ConfigError(f"{path} cannot be read: {error}; {_again(self.folder)}") from error
        if rows != each["rows"]:
            raise ConfigError(f"{path} has {rows} rows, not {each['rows']}; {_again(self.folder)}")


# --- a shard: rows ↔ bytes ------------------------------------------------------------------------------------


class _Damaged(Exception):
    """A file is not a sound shard; the text says why."""


@dataclass
class _Shard:
    text: dict[str, list[str]]  # the columns of TEXT_COLUMNS
    heights: np.ndarray  # int16 (N,), of the grids
    widths: np.ndarray  # int16 (N,)
    codes: np.ndarray  # every row's (h, w, Q) laid end to end
    about: dict[str, Any] = field(
        default_factory=dict
    )  # job, index, range, rejects; content, if the job has no digest

    def __len__(self) -> int:
        return len(self.heights)

    def digest(self) -> str:
        columns = [self.text[name] for name in TEXT_COLUMNS] + [self.heights.tolist(), self.widths.tolist()]
        told = hashlib.sha256(_canonical([columns, self.about]))
        told.update(self.codes.astype("<u4").tobytes())
        return told.hexdigest()


def _to_bytes(shard: _Shard) -> bytes:
    """Shard → Parquet file. The same rows give the same bytes."""
    schema = _schema(shard.about["job"])
    offsets = pa.array(_offsets(shard, shard.about["job"]["depth"]), pa.int32())
    codes = pa.array(shard.codes, schema.field("codes").type.value_type)
    columns = [pa.array(shard.text[name], pa.string()) for name in TEXT_COLUMNS]
    columns += [pa.array(shard.heights, pa.int16()), pa.array(shard.widths, pa.int16())]
    columns.append(pa.ListArray.from_arrays(offsets, codes))
    about = _canonical({**shard.about, "sha256": shard.digest()})
    sink = pa.BufferOutputStream()
    # Arrow would put metadata of its own schema into the file twice: Parquet's own field is enough.
    with pq.ParquetWriter(
        sink, schema, compression="zstd", write_page_checksum=True, store_schema=False
    ) as file:
        file.write_table(pa.Table.from_arrays(columns, schema=schema))
        file.add_key_value_metadata({ABOUT: about})
    return sink.getvalue().to_pybytes()


def _read_shard(path: Path, job: Mapping[str, Any]) -> _Shard:
    """Parquet file → shard of this job, every row and code checked; else _Damaged."""
    about = _read_about(path)
    if about["job"] != job:
        raise _Damaged("belongs to another job")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    except Exception as error:  # a damaged file makes the library raise many kinds; all mean the same
        raise _Damaged(f"cannot be read ({error})") from error
    if table.schema.names != _schema(job).names or table.schema.types != _schema(job).types:
        raise _Damaged("has other columns than a store's")
    lists = pa.concat_arrays([pa.array([], table["codes"].type), *table["codes"].chunks])
    codes = lists.flatten()
    if codes.null_count or any(column.null_count for column in table.columns):
        raise _Damaged("has empty fields")
    shard = _Shard(
        text={name: table[name].to_pylist() for name in TEXT_COLUMNS},
        heights=table["height"].to_numpy(),
        widths=table["width"].to_numpy(),
        codes=codes.to_numpy(zero_copy_only=False),
        about={key: about[key] for key in ("job", "index", "range", "rejects", "content") if key in about},
    )
    _check_rows(shard, lists.value_lengths().to_numpy(zero_copy_only=False))
    if shard.digest() != about["sha256"]:
        raise _Damaged("its content was changed after it was written (SHA-256)")
    return shard


def _check_rows(shard: _Shard, lengths: np.ndarray) -> None:
    """_Damaged, naming the row, where a grid and its codes disagree or a code lies outside the codebook."""
    job = shard.about["job"]
    sizes = shard.heights.astype(np.int64) * shard.widths * job["depth"]
    wrong = np.flatnonzero((shard.heights < 0) | (shard.widths < 0) | (sizes != lengths))
    if wrong.size:
        row = int(wrong[0])
        raise _Damaged(
            f"row {row} ({shard.text['id'][row]!r}) has {lengths[row]} codes, its grid needs {sizes[row]}"
        )
    outside = np.flatnonzero(shard.codes >= job["codebook_size"])  # unsigned: never below 0
    if outside.size:
        row = int(np.searchsorted(np.cumsum(lengths), outside[0], side="right"))
        code, limit = int(shard.codes[outside[0]]), job["codebook_size"]
        raise _Damaged(
            f"row {row} ({shard.text['id'][row]!r}) has code {code}, outside the codebook [0, {limit})"
        )


def _read_about(path: Path) -> dict[str, Any]:
    """A shard's own description, from the end of its file; _Damaged if there is none."""
    try:
        about = json.loads((pq.read_metadata(path).metadata or {})[ABOUT])
        intact = {"index", "range", "rejects", "sha256"} <= about.keys()
        # A flipped bit in the job must look like damage, not like another job.
        intact = intact and about["job"]["sha256"] == _job_sha256(about["job"])
    except Exception as error:  # as above
        raise _Damaged(f"cannot be read ({error})") from error
    if not intact:
        raise _Damaged("its description was changed after it was written")
    return about


def _schema(job: Mapping[str, Any]) -> pa.Schema:
    text = [pa.field(name, pa.string(), nullable=False) for name in TEXT_COLUMNS]
    sides = [pa.field(name, pa.int16(), nullable=False) for name in ("height", "width")]
    codes = pa.field("codes", pa.list_(pa.from_numpy_dtype(_dtype(job))), nullable=False)
    return pa.schema([*text, *sides, codes])


def _dtype(job: Mapping[str, Any]) -> type[np.unsignedinteger]:
    return np.uint16 if job["codebook_size"] <= 2**16 else np.uint32


def _offsets(shard: _Shard, depth: int) -> np.ndarray:
    """int64 (N + 1,): row i's codes are codes[offsets[i] : offsets[i + 1]]."""
    return np.concatenate([[0], np.cumsum(shard.heights.astype(np.int64) * shard.widths * depth)])


# --- a job and its manifest -----------------------------------------------------------------------------------


def _job(
    tokenizer: Tokenizer, pictures: Pictures, source: Mapping[str, Any], shard_size: int
) -> dict[str, Any]:
    """Everything that the bytes of a store depend on, and the hash of it. Two equal jobs may share a folder."""
    job = {
        "version": VERSION,
        "fingerprint": str(tokenizer.fingerprint),
        "codebook_size": int(tokenizer.codebook_size),
        "depth": int(tokenizer.depth),
        "downsample": int(tokenizer.downsample),
        "image_size": tokenizer.image_size,
        "source": dict(source),
        "digest": str(getattr(pictures, "digest", "")),
        "candidates": len(pictures),
        "shard_size": int(shard_size),
    }
    try:
        job = json.loads(_canonical(job))  # as it will be read back: tuples become lists
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the source of a store must be plain JSON data: {error}") from error
    return {**job, "sha256": _job_sha256(job)}


def _job_sha256(job: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({k: v for k, v in job.items() if k != "sha256"})).hexdigest()


def _manifest(
    job: dict[str, Any],
    shards: list[dict[str, Any]],
    rows: list[tuple[str, int, int]],
    rejects: list[dict[str, str]],
    files: dict[str, str],
) -> dict[str, Any]:
    """rows: (split, height, width) of each picture."""
    splits = [split for split, _, _ in rows]
    return {
        "format": FORMAT,
        "version": VERSION,
        "job": job,
        "grid": _grid((h, w) for _, h, w in rows),
        "pictures": len(rows),
        "splits": {split: splits.count(split) for split in SPLITS},
        "rejects": {"total": len(rejects), "reasons": _reasons(rejects)},
        "shards": shards,
        "files": files,
    }


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked as far as the rest of this file relies on it; else ConfigError."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ConfigError(_why_no_manifest(folder))
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; {_again(folder)}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConfigError(f"{path} is not the manifest of a code store")
    if manifest.get("version") != VERSION:
        found = manifest.get("version")
        raise ConfigError(
            f"{folder} is a store of format version {found!r}; this version of vqlm reads {VERSION}"
        )
    if not _well_formed(manifest):
        raise ConfigError(f"{path} is damaged; {_again(folder)}")
    return manifest


def _well_formed(manifest: dict[str, Any]) -> bool:
    try:
        job, shards, grid = manifest["job"], manifest["shards"], manifest["grid"]
        return (
            job["sha256"] == _job_sha256(job)
            and [each["name"] for each in shards] == [_shard_name(i) for i in range(_shard_count(job))]
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


def _hashes(manifest: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each file beside the manifest, by its path in the store."""
    return {each["name"]: each["sha256"] for each in manifest["shards"]} | manifest["files"]


def _why_no_manifest(folder: Path) -> str:
    if not folder.is_dir():
        siblings = [path.parent.name for path in folder.parent.glob(f"*/{MANIFEST}")]
        return f"there is no store at {folder}{nearest(folder.name, siblings)}"
    shards = sorted(folder.glob("shard-*.parquet"))
    if not shards:
        siblings = [path.parent.name for path in folder.parent.glob(f"*/{MANIFEST}")]
        return f"{folder} is not a store: it has no {MANIFEST}{nearest(folder.name, siblings)}"
    return f"the store {folder} is unfinished: {_progress(shards)}, no {MANIFEST}; {_again(folder)}"


def _progress(shards: list[Path]) -> str:
    """How many shards are there, and of how many, if any of them can tell."""
    for path in shards:
        try:
            return f"{len(shards)} of {_shard_count(_read_about(path)['job'])} shards"
        except _Damaged:
            continue
    return f"{len(shards)} shards"


def _again(folder: Path) -> str:
    return f"to finish or repair it, run the same vq-encode again with out={folder}: what is sound is kept"


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.parquet"


def _shard_count(job: Mapping[str, Any]) -> int:
    return -(-job["candidates"] // job["shard_size"])


def _range(job: Mapping[str, Any], index: int) -> tuple[int, int]:
    start = index * job["shard_size"]
    return start, min(start + job["shard_size"], job["candidates"])


def _grid(sizes: Any) -> list[int] | None:
    """[h, w] if all sizes agree, else None."""
    different = set(sizes)
    return list(different.pop()) if len(different) == 1 else None


def _reasons(rejects: Sequence[Mapping[str, str]]) -> dict[str, int]:
    reasons = [reject["reason"] for reject in rejects]
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


# --- small things ---------------------------------------------------------------------------------------------


class _Content:
    """Running hashes of what is loaded: records with their pixels, and rejects. How it is cut does not matter."""

    def __init__(self) -> None:
        self.records, self.rejects = hashlib.sha256(), hashlib.sha256()

    def add(self, loaded: Loaded) -> None:
        for record, x_CHW in zip(loaded.records, loaded.x_BCHW, strict=True):
            self.records.update(_canonical([asdict(record), list(x_CHW.shape), str(x_CHW.dtype)]))
            self.records.update(x_CHW.cpu().contiguous().view(torch.uint8).numpy().data)
        for reject in _plain(loaded.rejects):
            self.rejects.update(_canonical(reject))

    def digest(self) -> str:
        return f"{self.records.hexdigest()} {self.rejects.hexdigest()}"


def _plain(rejects: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    return [{key: str(each[key]) for key in ("id", "reason", "detail")} for each in rejects]


def _device(tokenizer: Tokenizer) -> torch.device | None:
    """Where the tokenizer's weights are; None where it has none."""
    weight = next(tokenizer.parameters(), None) if isinstance(tokenizer, torch.nn.Module) else None
    return None if weight is None else weight.device


def _batches(x_BCHW: Tensor | Sequence[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Consecutive pictures of one size, at most batch_size of them. The cuts depend on the pictures alone."""
    if isinstance(x_BCHW, Tensor):
        yield from x_BCHW.split(batch_size) if len(x_BCHW) else ()
        return
    batch: list[Tensor] = []
    for x_CHW in x_BCHW:
        if batch and (len(batch) == batch_size or batch[0].shape != x_CHW.shape):
            yield torch.stack(batch)
            batch = []
        batch.append(x_CHW)
    if batch:
        yield torch.stack(batch)


def _text(record: Record, name: str) -> str:
    """A field of a record that can be stored; ConfigError names the picture."""
    value = getattr(record, name)
    if name == "split" and value not in SPLITS:
        raise ConfigError(f"picture {record.id!r} has split {value!r}; expected {' or '.join(SPLITS)}")
    if not isinstance(value, str) or not (value or name == "caption" or name == "concept"):
        raise ConfigError(f"picture {record.id!r}: {name} must be text, got {value!r}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"picture {record.id!r}: {name} is not valid Unicode ({error})") from error
    return value


def _check_unique(ids: Any) -> None:
    seen: set[str] = set()
    for each in ids:
        if each in seen:
            raise ConfigError(f"picture id {each!r} occurs twice")
        seen.add(each)


def _canonical(value: Any) -> bytes:
    """JSON with one spelling: equal values, equal bytes. TypeError or ValueError on what JSON cannot say."""
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= 200 else f"{text[:200]}…"
