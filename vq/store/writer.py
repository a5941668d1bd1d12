"""Pieces of work → shards, and a folder of shards → a finished store.

`encode_shard` does the work: pure in what it leaves, and idempotent, so that any number of processes on any machines
may share out the shards, repeat them, and die. `StoreWriter` is what stands around it: `begin` (is this folder ours?),
and `finish` (is all of it there? then the manifest). This file does not know who calls it how often (vq/drivers.py).

Shapes: B pictures, C channels, H W pixels, h w grid, Q codes per cell (depth), K codes in the book.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vq.images import from_bytes
from vq.store.manifest import (
    MANIFEST,
    REJECTS,
    TOKENIZER,
    Tokenizer,
    again,
    hashes_of,
    make_job,
    make_manifest,
    read_manifest,
    shard_count,
    shard_name,
)
from vq.store.shard import (
    LARGEST_SIDE,
    SPLITS,
    TEXT_COLUMNS,
    Damaged,
    Shard,
    dtype_of,
    read_about,
    read_shard,
    to_bytes,
)
from vq.store.work import Content, Pictures, Piece, Pieces, Ranges, Record, plain
from vqlm.errors import ConfigError
from vqlm.places import LocalPlace, Place, place
from vqlm.progress import bar

Encode = Callable[[Tensor], Tensor]


def _nobody(pictures: int) -> None:
    """Progress that is not shown."""


# --- one shard ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a shard. why: what was wrong with the one that was there, of a "redone" one."""

    state: Literal["kept", "encoded", "redone"]
    why: str = ""


def encode_shard(
    source: Piece,
    target: Place,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 64,
    encode: Encode | None = None,
    expected: str | None = None,
    advance: Callable[[int], Any] = _nobody,
) -> Outcome:
    """One piece of pictures → one file in `target`, unless a sound one is there.

    The file's bytes depend on the piece and the tokenizer alone: not on who writes it, when, or how often. A finished
    store that gets a new shard is finished no more: its manifest goes first, and then a shard that is not sound, so
    that nobody takes the store for a whole one meanwhile.

    Args:
        encode: float x_BCHW in [-1, 1] → integer codes_BhwQ; by default `tokenizer.encode` on its own device.
        expected: SHA-256 that a finished store's manifest gives for this file.
        advance: called with the number of pictures done since its last call.

    Raises:
        ConfigError: a record that cannot be stored, or an id given twice.
        ValueError: codes are not what the tokenizer declares.
    """
    name, why = shard_name(source.index), ""
    try:
        shard, _ = _sound(target, source.job, source.index, expected)
        _check_content(source, shard, batch_size)
    except FileNotFoundError:
        pass
    except Damaged as damage:
        why = str(damage)
    else:
        advance(len(shard) + len(shard.about["rejects"]))
        return Outcome("kept")
    target.remove(MANIFEST)
    target.remove(name)
    target.write(name, to_bytes(_encoded(source, tokenizer, batch_size, encode or tokenizer.encode, advance)))
    return Outcome("redone", f"{name}: {why}") if why else Outcome("encoded")


def _sound(
    target: Place, job: Mapping[str, Any], index: int, expected: str | None
) -> tuple[Shard, dict[str, Any]]:
    """The shard of a file that is the one it should be, and what the manifest says of the file; else Damaged.

    FileNotFoundError if there is none.
    """
    name = shard_name(index)
    with target.open(name) as file:
        data = file.read()
    shard = read_shard(data, job)
    if shard.about["index"] != index:
        raise Damaged(f"holds shard {shard.about['index']}")
    digest = hashlib.sha256(data).hexdigest()
    if expected not in (None, digest):
        raise Damaged("is not the file that manifest.json lists")
    return shard, {"name": name, "rows": len(shard), "bytes": len(data), "sha256": digest}


def _check_content(source: Piece, shard: Shard, batch_size: int) -> None:
    """Damaged if a sound shard was made of other pictures than are given now."""
    if "content" not in shard.about:
        return  # the job's digest speaks for all
    if (told := source.told) is None:
        content = Content()
        for loaded in source.load(batch_size):
            content.add(loaded)
        told = content.digest()
    if told != shard.about["content"]:
        raise Damaged("was made of other pictures: they have changed since")


def _encoded(
    source: Piece, tokenizer: Tokenizer, batch_size: int, encode: Encode, advance: Callable[[int], Any]
) -> Shard:
    told = source.told  # before the pictures are read: should they change meanwhile, the next run sees it
    device, job = _device(tokenizer), source.job
    records: list[Record] = []
    rejects: list[dict[str, str]] = []
    codes, sizes, content = [], [], Content()
    for loaded in source.load(batch_size):
        if told is None and not job["digest"]:
            content.add(loaded)
        for x_BCHW in _batches(loaded.x_BCHW, batch_size):
            codes_BhwQ = _checked(encode(_pixels(x_BCHW, device)), len(x_BCHW), job)
            codes.append(codes_BhwQ.reshape(-1))
            sizes += [codes_BhwQ.shape[1:3]] * len(codes_BhwQ)
            advance(len(codes_BhwQ))
        if loaded.rejects:
            advance(len(loaded.rejects))
        records += loaded.records
        rejects += plain(loaded.rejects)
    check_unique(record.id for record in records)
    about = {**source.about(), "rejects": rejects}
    if not job["digest"]:
        about["content"] = content.digest() if told is None else told
    return Shard(
        text={name: [_text(r, name) for r in records] for name in TEXT_COLUMNS},
        heights=np.array([h for h, _ in sizes], np.int16),
        widths=np.array([w for _, w in sizes], np.int16),
        codes=np.concatenate(codes) if codes else np.zeros(0, dtype_of(job)),
        about=about,
    )


def _pixels(x_BCHW: Tensor, device: torch.device | None) -> Tensor:
    """Float in [-1, 1] where the encoder is. Bytes are moved before they are made numbers of four bytes each."""
    x_BCHW = x_BCHW if device is None else x_BCHW.to(device)
    return from_bytes(x_BCHW) if x_BCHW.dtype == torch.uint8 else x_BCHW


def _checked(codes_BhwQ: Tensor, pictures: int, job: Mapping[str, Any]) -> np.ndarray:
    """Codes as they are stored; ValueError if a tokenizer gave something else than it declares."""
    depth, size = job["depth"], job["codebook_size"]
    shape = tuple(codes_BhwQ.shape)
    fits = len(shape) == 4 and shape[0] == pictures and shape[3] == depth and max(shape[1:3]) <= LARGEST_SIDE
    if not fits or codes_BhwQ.is_floating_point():
        expected = f"integers ({pictures}, h, w, {depth})"
        raise ValueError(f"the tokenizer gave codes {shape} of {codes_BhwQ.dtype}, expected {expected}")
    codes = codes_BhwQ.detach().cpu().numpy()
    if codes.size and not (codes.min() >= 0 and codes.max() < size):
        raise ValueError(f"the tokenizer gave codes from {codes.min()} to {codes.max()}, outside [0, {size})")
    return codes.astype(dtype_of(job))


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


def check_unique(ids: Iterable[str]) -> None:
    seen: set[str] = set()
    for each in ids:
        if each in seen:
            raise ConfigError(f"picture id {each!r} occurs twice")
        seen.add(each)


# --- a whole store --------------------------------------------------------------------------------------------


class Unfinished(ConfigError):
    """A store of which something is missing, or is not sound."""


@dataclass(frozen=True)
class Work:
    """All that any process needs to write any shard of a store, but for the tokenizer. It survives pickling."""

    pieces: Pieces
    job: Mapping[str, Any]
    target: Place
    batch_size: int
    hashes: Mapping[str, str] = field(default_factory=dict)  # of a finished store: what each file should be

    def write(
        self,
        index: int,
        tokenizer: Tokenizer,
        encode: Encode | None = None,
        advance: Callable[[int], Any] = _nobody,
    ) -> Outcome:
        return encode_shard(
            Piece(self.pieces, self.job, index),
            self.target,
            tokenizer,
            batch_size=self.batch_size,
            encode=encode,
            expected=self.hashes.get(shard_name(index)),
            advance=advance,
        )


class StoreWriter:
    """One job: these pieces through this tokenizer into this folder. `begin`, each `write_shard`, `finish`.

    Several writers of the same job may work at once, each on shards of its own; the one that comes last finishes, and
    if two take themselves for the last one, they write the same.

    Args:
        target: a folder, or a URL that fsspec opens.
        source: JSON description of what is encoded and how it was prepared; another one is another job.
        batch_size: not part of the job: it may be lowered to finish on a smaller machine.
        alone: no other process writes to the folder: what killed ones left may be removed at the beginning.

    Raises:
        ConfigError: nothing to encode, or numbers below 1.
    """

    def __init__(
        self,
        target: str | Path,
        tokenizer: Tokenizer,
        pieces: Pieces,
        source: Mapping[str, Any],
        batch_size: int = 64,
        encode: Encode | None = None,
        alone: bool = True,
    ):
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if not len(pieces):
            raise ConfigError("there are no pictures to encode")
        self.target, self.tokenizer, self.alone = place(target), tokenizer, alone
        self.encode = encode
        self.work = Work(pieces, make_job(tokenizer, pieces, source), self.target, batch_size)

    @property
    def shards(self) -> int:
        return shard_count(self.work.job)

    def begin(self) -> None:
        """Refuse a folder that holds another job; clear what a killed run left; put the tokenizer's copy in place."""
        if isinstance(self.target, LocalPlace):
            if self.target.folder.exists() and not self.target.folder.is_dir():
                raise ConfigError(f"the store's folder {self.target} is a file")
            self.target.folder.mkdir(parents=True, exist_ok=True)
        if self.alone:
            self.target.clean()
        self._refuse_another_job()
        self._place_tokenizer()

    def write_shard(self, index: int, advance: Callable[[int], Any] = _nobody) -> Outcome:
        """`encode_shard` of this job."""
        return self.work.write(index, self.tokenizer, self.encode, advance)

    def missing(self) -> list[int]:
        """The shards that are not there."""
        there = set(self.target.names("shard-"))
        return [index for index in range(self.shards) if shard_name(index) not in there]

    def finish(self) -> dict[str, Any]:
        """Read every shard back, one after another, write the rejects and then the manifest, which is returned.

        Unfinished, naming the file, if one is missing or not sound; ConfigError if nothing could be encoded, too much
        was rejected, or an id occurs twice.
        """
        self.target.clean()  # every shard is there, so nobody is writing one
        shards: list[dict[str, Any]] = []
        rejects: list[dict[str, str]] = []
        splits: Counter[str] = Counter()
        grids: set[tuple[int, int]] = set()
        ids: list[str] = []
        listed = self._listed()
        for index in range(self.shards):
            shard, entry = self._read_back(index, listed)
            shards.append(entry)
            splits.update(shard.text["split"])
            grids.update(zip(shard.heights.tolist(), shard.widths.tolist(), strict=True))
            rejects += shard.about["rejects"]
            if "pieces" not in self.work.job:
                ids += shard.text[
                    "id"
                ]  # of pieces with names, ids begin with them, and each shard has been checked
        check_unique(ids)
        reasons = Counter(reject["reason"] for reject in rejects)
        if not splits.total():
            raise ConfigError(
                f"none of {len(rejects)} pictures could be encoded: {dict(sorted(reasons.items()))}"
            )
        self.work.pieces.accept(reasons, splits.total() + len(rejects))
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejects)
        self.target.write(REJECTS, lines.encode("utf-8"))
        manifest = make_manifest(dict(self.work.job), shards, splits, grids, reasons, self._other_files())
        told = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        self.target.write(MANIFEST, told.encode("utf-8"))
        return manifest

    def _listed(self) -> Mapping[str, str]:
        """What each file should be, as long as no writer has taken the manifest away."""
        try:
            return hashes_of(read_manifest(self.target))
        except ConfigError:
            return {}

    def _read_back(self, index: int, listed: Mapping[str, str]) -> tuple[Shard, dict[str, Any]]:
        name = shard_name(index)
        try:
            return _sound(self.target, self.work.job, index, listed.get(name))
        except (Damaged, FileNotFoundError) as error:
            why = "is missing" if isinstance(error, FileNotFoundError) else error
            raise Unfinished(f"{self.target}/{name}: {why}; {again(self.target)}") from error

    def _refuse_another_job(self) -> None:
        """ConfigError that lists what differs, from the manifest or from the first shard that can be read."""
        try:
            manifest = read_manifest(self.target)
        except ConfigError:
            pass  # none, or a damaged one: the shards say whose they are, and a new one is written
        else:
            self._compare(manifest["job"])
            self.work = replace(self.work, hashes=hashes_of(manifest))
        for name in self.target.names("shard-"):
            try:
                with self.target.open(name) as file:
                    return self._compare(read_about(file)["job"])
            except (Damaged, FileNotFoundError):
                continue

    def _compare(self, theirs: dict[str, Any]) -> None:
        ours = self.work.job
        keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if keys:
            lines = "".join(f"\n  {k}: {_short(theirs.get(k))} → {_short(ours.get(k))}" for k in keys)
            told = f"the store {self.target} was begun with other settings (it has → you give):{lines}"
            raise ConfigError(f"{told}\nchoose another folder, or delete this one")

    def _place_tokenizer(self) -> None:
        """A copy that is the same already stays as it is: other processes may be reading it."""
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(Path(folder))
            wanted = _hashes(place(folder), "")
        if self._tokenizer_there(wanted):
            return
        self.target.remove(MANIFEST)
        try:
            self.target.write_folder(TOKENIZER, self.tokenizer.save_pretrained)
        except OSError:
            if not self._tokenizer_there(wanted):  # another process may have been faster
                raise

    def _tokenizer_there(self, wanted: Mapping[str, str]) -> bool:
        return _hashes(self.target, f"{TOKENIZER}/") == {
            f"{TOKENIZER}/{name}": h for name, h in wanted.items()
        }

    def _other_files(self) -> dict[str, str]:
        return _hashes(self.target, REJECTS) | _hashes(self.target, f"{TOKENIZER}/")


def _hashes(target: Place, start: str) -> dict[str, str]:
    """SHA-256 of each file whose name begins so; without those that another process removes meanwhile."""
    found = {}
    for name in target.names(start):
        with suppress(FileNotFoundError), target.open(name) as file:
            found[name] = hashlib.sha256(file.read()).hexdigest()
    return found


def write_store(
    folder: str | Path,
    tokenizer: Tokenizer,
    pictures: Pictures,
    *,
    source: Mapping[str, Any],
    shard_size: int = 1024,
    batch_size: int = 64,
    encode: Encode | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Encode `pictures` into a store in this process, or finish one that was begun. What is sound is kept.

    `source`, `batch_size`, `encode`: see `StoreWriter`.

    Returns the numbers of pictures, rejects, shards, and of shards kept, encoded and (damaged, so) redone; `damage`
    says what was wrong with the last. ConfigError if the folder holds another job, an id occurs twice, or nothing
    could be encoded; ValueError if codes or records are not what they should be.
    """
    writer = StoreWriter(folder, tokenizer, Ranges(pictures, shard_size), source, batch_size, encode)
    writer.begin()
    with bar(len(pictures), "encoding", "pictures", hidden=not progress) as shown:
        outcomes = [writer.write_shard(index, shown.update) for index in range(writer.shards)]
    return summary(writer.finish(), outcomes)


def summary(manifest: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    states = Counter(each.state for each in outcomes)
    counts = {
        "kept": states["kept"],
        "encoded": states["encoded"] + states["redone"],
        "redone": states["redone"],
    }
    totals = {"pictures": manifest["pictures"], "rejects": manifest["rejects"]["total"]}
    return {
        **totals,
        "shards": len(manifest["shards"]),
        **counts,
        "damage": [each.why for each in outcomes if each.why],
    }


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= 200 else f"{text[:200]}…"
