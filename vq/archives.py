"""Pictures that come in large files: tars, Parquet, streamed data sets. One file is one piece of work.

    Tars | ParquetFiles | StreamedHub --files()--> names --read(name)--> Picture ...

A name is enough to read a file, on any machine, without the others having been looked at, so that many processes can
share them out. Paths may be URLs that fsspec opens, such as s3://bucket/folder; what it opens them with stands in the
environment (vqlm/places.py). Files are read from front to back and never kept; where a set is small enough to train
on, `pictures()` reads all of it, as files on disk would be.

It does not know how a picture is decoded (vq/images.py) or what becomes of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

from PIL import Image

from vq.data import HubSplit, Picture, label_name
from vq.images import EXTENSIONS, Reject, open_image
from vqlm.errors import ConfigError, nearest
from vqlm.places import checked_url, is_url

LARGEST_PICTURE = 2**28  # bytes of one compressed picture; more is taken for a mistake, or an attack
LARGEST_TEXT = 2**20  # bytes of one caption or of one .json
LARGEST_HEADER = 2**16  # bytes of a tar's long name or pax records, which `tarfile` reads whole


class Archives:
    """What these sources share: files in the order of their names, each naming its pictures "file/key".

    `read` gives the same pictures in the same order each time. `content` names what a file holds without decoding it;
    None: that takes decoding.
    """

    @property
    def name(self) -> str:
        raise NotImplementedError

    def files(self) -> list[str]:
        """The same list on every machine. ConfigError if there is none. Reads no file."""
        raise NotImplementedError

    def read(self, name: str) -> Iterator[Picture]:
        raise NotImplementedError

    def content(self, name: str) -> str | None:
        raise NotImplementedError

    def pictures(self, size: int = 64) -> list[Picture]:
        """All of them, their compressed bytes in memory: for sets that are small enough to train on."""
        return [picture for name in self.files() for picture in self.read(name)]


class _Files(Archives):
    """Files below a folder, by a pattern."""

    ending = ""

    def __init__(self, path: str) -> None:
        if not path:
            raise ConfigError("images.source.path must not be empty")
        if is_url(path):
            path = checked_url(path)
        self.path = path
        # what is below the last part without a wildcard names a file
        parts = path.split("/")
        fixed = next((n for n, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
        if fixed == len(parts) and path.endswith(self.ending):
            fixed -= 1  # one file
        self.root = "/".join(parts[:fixed]).rstrip("/")
        self._held: tuple[str, tempfile.TemporaryDirectory[str]] | None = None

    @property
    def name(self) -> str:
        return posixpath.basename(self.root.rstrip("/")) or self.path

    def files(self) -> list[str]:
        system, root, pattern = self._system()
        found = system.glob(pattern, detail=True) if pattern != root else system.find(root, detail=True)
        ours = {each: info for each, info in found.items() if each.endswith(self.ending) and each != root}
        names = sorted(
            each.removeprefix(root).lstrip("/") for each, info in ours.items() if not _is_folder(system, info)
        )
        if not names:
            folder = next((f"; {each} is a folder, which is named with a / at its end" for each in ours), "")
            raise ConfigError(f"images.source.path={self.path}: no file there ends in {self.ending}{folder}")
        return names

    def content(self, name: str) -> str:
        """SHA-256 of the file's bytes: where it lies does not matter."""
        with self._open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _system(self) -> tuple[Any, str, str]:
        """The file system, the root's path in it, and the pattern's."""
        from fsspec.core import url_to_fs

        where = self.path if is_url(self.path) else str(Path(self.path).expanduser().absolute())
        root = self.root if is_url(self.path) else str(Path(self.root or ".").expanduser().absolute())
        system, pattern = url_to_fs(where)
        return system, url_to_fs(root)[1].rstrip("/"), pattern.rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}  # another process fetches its own

    @contextmanager
    def _open(self, name: str) -> Iterator[BufferedReader]:
        system, root, _ = self._system()
        path = self._fetched(system, f"{root}/{name}") if is_url(self.path) else f"{root}/{name}"
        with open(path, "rb") as file:
            yield file

    def _fetched(self, system: Any, path: str) -> str:
        """A file that is far away, copied here: it is hashed, then read, and one crossing is enough for both.

        One at a time is kept; whoever still has the last one open reads it to its end.
        """
        if self._held is None or self._held[0] != path:
            self._held = None
            folder = tempfile.TemporaryDirectory(prefix="vqlm-")
            with system.open(path, "rb") as source, open(f"{folder.name}/file", "wb") as copy:
                shutil.copyfileobj(source, copy, 2**20)
            self._held = path, folder
        return f"{self._held[1].name}/file"


def _is_folder(system: Any, info: dict[str, Any]) -> bool:
    """Whether an entry of a listing is a folder, or a link to one."""
    return info["type"] == "directory" or bool(info.get("islink") and system.isdir(info["name"]))


@contextmanager
def _damage(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """What a damaged file makes a library raise, the library's own `kinds` among it, becomes a "damaged-file" reject.

    Only calls of that library belong inside. Memory that is short, and an OSError with a number, which is of the disk
    or of the network, say nothing about the file and pass.
    """
    wrong = (EOFError, LookupError, OSError, OverflowError, RecursionError, ValueError)
    try:
        yield
    except (*kinds, *wrong) as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise Reject("damaged-file", f"{name}: {error}") from error


class Tars(_Files):
    """Tars in the manner of webdataset: files that share all but what follows the first dot belong together.

        000012.jpg  000012.txt  000012.json

    A picture's caption is its .txt, or the key `caption_key` of its .json; its concept is `concept_key` of that, or
    the caption in lower case, or its id. What belongs together stands together, as webdataset wants it.

    https://github.com/webdataset/webdataset

    Args:
        path: a folder of tars, a pattern ("s3://bucket/cc12m-*.tar"), or one tar.
        caption_key, concept_key: of the .json, where there is one; null: do not look there.

    Raises:
        ConfigError: an empty path, or a URL that nothing here opens.
    """

    ending = ".tar"

    def __init__(
        self, path: str, caption_key: str | None = "caption", concept_key: str | None = None
    ) -> None:
        super().__init__(path)
        self.caption_key, self.concept_key = caption_key, concept_key

    def read(self, name: str) -> Iterator[Picture]:
        """In their order in the tar. A tar that is cut or damaged ends with a reject, "damaged-file".

        Where a name comes twice, the second id ends in "#2", or in the next number that is free.
        """
        times: Counter[str] = Counter()
        for picture in self._samples(name):
            id_ = picture.id
            while id_ in times:
                times[picture.id] += 1
                id_ = f"{picture.id}#{times[picture.id]}"
            times[id_] = 1
            yield replace(picture, id=id_)

    def _samples(self, name: str) -> Iterator[Picture]:
        """An ending that the sample has already begins another one."""
        key, parts, damage = None, {}, None
        with self._open(name) as file:
            try:
                for path, data in _members(name, file):
                    stem, ending = _stem(path)
                    if parts and (stem != key or ending in parts):
                        yield from self._sample(name, key, parts)
                        parts = {}
                    key, parts[ending] = stem, data
            except Reject as reject:
                damage = reject
        if parts:
            yield from self._sample(name, key, parts)
        if damage:
            yield _refused(f"{name}/{key or ''}#", damage)

    def _sample(self, name: str, key: str | None, parts: dict[str, bytes | Reject]) -> Iterator[Picture]:
        """The pictures of one sample: mostly one. None where there is only text."""
        pictures = [each for each in parts if f".{each.rpartition('.')[2]}" in EXTENSIONS]
        facts = _facts(parts.get("json"))
        caption = _words(parts.get("txt")) or _words(facts.get(self.caption_key or ""))
        for each in pictures:
            id_ = f"{name}/{key}" if len(pictures) == 1 else f"{name}/{key}.{each}"
            concept = _words(facts.get(self.concept_key or "")) or caption.lower() or id_
            yield Picture(id_, caption, concept, partial(_load, parts[each]))


_READ_WHOLE = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _Header(tarfile.TarInfo):
    """One block of a tar's headers. ReadError if what follows it would be read whole and is too long.

    A length below zero would read all of the file, or lead back to what was read before.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _READ_WHOLE and header.size > LARGEST_HEADER):
            raise tarfile.ReadError(f"a header that names {header.size} bytes")
        return header


def _members(name: str, file: BufferedReader) -> Iterator[tuple[str, bytes | Reject]]:
    """Paths and bytes of the files in a tar, in their order. Reject, "damaged-file", where it is cut or damaged.

    Links and devices are passed over: they lead elsewhere.
    """
    size = os.fstat(file.fileno()).st_size
    with _damage(name, tarfile.TarError):
        tar = tarfile.TarFile(fileobj=file, tarinfo=_Header)
    while True:
        with _damage(name, tarfile.TarError):
            if (member := tar.next()) is None:
                return _check_end(file, tar.offset)
            # where the next one begins: after this one; the last may lack what fills its block
            if not member.offset_data <= tar.offset < size + tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"{member.name!r} does not lie inside the file's {size} bytes")
            data = _member(tar, member) if member.isreg() else None
        if data is not None:
            yield member.name, data


def _check_end(file: BufferedReader, offset: int) -> None:
    """ReadError unless nothing but zeros is left: `tarfile` takes every broken header but the first for the end."""
    file.seek(offset)
    while block := file.read(2**20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"no member begins at byte {offset}, and it is not the end")


def _stem(path: str) -> tuple[str, str]:
    """ "a/12.seg.PNG" → ("a/12", "seg.png")."""
    folder, _, base = path.removeprefix("./").rpartition("/")
    stem, _, ending = base.partition(".")
    return _valid(f"{folder}/{stem}" if folder else stem), ending.lower()


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Reject:
    """A file's bytes. Those of no use here, and those that are too long, are passed over."""
    _, ending = _stem(member.name)
    is_picture = f".{ending.rpartition('.')[2]}" in EXTENSIONS
    if not is_picture and ending not in ("txt", "json"):
        return b""
    if member.issparse():
        return Reject("damaged-file", "a sparse member: its map may name any size, and no picture has holes")
    limit = LARGEST_PICTURE if is_picture else LARGEST_TEXT
    if member.size > limit:
        return Reject("too-large", f"{member.size} bytes, at most {limit} are read")
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _facts(data: bytes | Reject | None) -> dict[str, Any]:
    """A sample's .json; one that cannot be read says nothing."""
    if not isinstance(data, bytes):
        return {}
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _words(value: Any) -> str:
    """Text with its blanks tidied; "" for what is none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return " ".join(_valid(value).split()) if isinstance(value, str) else ""


def _valid(text: str) -> str:
    """Text that can be written anywhere: names and .json may hold lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _load(data: bytes | Reject) -> Image.Image:
    if isinstance(data, Reject):
        raise data
    return open_image(data)


def _refused(id_: str, reject: Reject) -> Picture:
    return Picture(id_, "", id_, partial(_load, reject))


class ParquetFiles(_Files):
    """Parquet files with pictures in a column: bytes, or a struct with `bytes`, as `datasets` writes them.

    Args:
        path: a folder of Parquet files, a pattern, or one file.
        image_column, text_column, concept_column: null: no captions; the caption in lower case, or the id.

    Raises:
        ConfigError: an empty path or column, or a URL that nothing here opens.
    """

    ending = ".parquet"
    rows_at_once = 16  # read ahead of the encoder: rows of pictures are long

    def __init__(
        self,
        path: str,
        image_column: str = "image",
        text_column: str | None = "text",
        concept_column: str | None = None,
    ) -> None:
        super().__init__(path)
        if not image_column:
            raise ConfigError("images.source.image_column must be named")
        self.image_column, self.text_column, self.concept_column = image_column, text_column, concept_column

    def files(self) -> list[str]:
        """ConfigError also if the first one lacks a column: a wrong name is told before anything is read or written."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = super().files()
        system, root, _ = self._system()
        columns = self._columns  # also of a damaged file: it becomes a reject where it is read whole
        with (
            suppress(Reject),
            _damage(names[0], pa.ArrowException),
            system.open(f"{root}/{names[0]}") as file,
        ):
            columns = pq.read_schema(file).names  # the footer alone
        self._check_columns(names[0], columns)
        return names

    def read(self, name: str) -> Iterator[Picture]:
        """Rows in their order; ids are the file's name and the row's number.

        A file that is cut or damaged, or is none, ends with a reject, "damaged-file".

        Raises:
            ConfigError: it lacks a column.
        """
        number = 0
        with self._open(name) as file:
            try:
                for row in self._rows(name, file):
                    yield self._picture(f"{name}/{number}", row)
                    number += 1
            except Reject as damage:
                yield _refused(f"{name}/{number}", damage)

    def _rows(self, name: str, opened: BufferedReader) -> Iterator[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _damage(name, pa.ArrowException):
            file = pq.ParquetFile(opened)
            columns = file.schema_arrow.names
        self._check_columns(name, columns)
        batches, found = file.iter_batches(self.rows_at_once, columns=self._columns), 0
        while True:
            with _damage(name, pa.ArrowException):
                if (batch := next(batches, None)) is None:
                    break
                rows = batch.to_pylist()
            found += len(rows)
            yield from rows
        if found != file.metadata.num_rows:
            raise Reject("damaged-file", f"{name}: {found} rows of {file.metadata.num_rows} are there")

    @property
    def _columns(self) -> list[str]:
        return [each for each in (self.image_column, self.text_column, self.concept_column) if each]

    def _check_columns(self, name: str, there: list[str]) -> None:
        for key in ("image_column", "text_column", "concept_column"):
            if (each := getattr(self, key)) and each not in there:
                known = f"there are {', '.join(there)}{nearest(each, there)}"
                raise ConfigError(f"images.source.{key}={each}: {name} has no such column; {known}")

    def _picture(self, id_: str, row: dict[str, Any]) -> Picture:
        caption = _words(row.get(self.text_column or ""))
        concept = _words(row.get(self.concept_column or "")) or caption.lower() or id_
        return Picture(id_, caption, concept, partial(_load, _stored(row[self.image_column])))


def _stored(value: Any) -> bytes | Reject:
    """A picture's bytes from a row: plain, or in a struct as `datasets` writes them."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value
    return Reject("missing", "the row holds no picture's bytes")


class StreamedHub(HubSplit, Archives):
    """One split of a data set that `datasets` streams: nothing is copied to this machine. Its own files are the pieces.

    Args:
        dataset: hub id ("user/name") or local folder.
        image_column, text_column, concept_column: null: no captions; the caption in lower case, or the id. Class
            labels give their names.
        split: "train", "test" …
        config: the data set's own configuration name, where it has several.
        revision: branch, tag or commit on the hub; name a commit, so that every machine reads the same.

    Raises:
        ConfigError: an empty name.
    """

    _opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # another process opens its own

    def files(self) -> list[str]:
        """Numbers: which files they are is the library's own affair."""
        return [f"{n:05d}" for n in range(self._rows().num_shards)]

    def content(self, name: str) -> None:
        return None

    def read(self, name: str) -> Iterator[Picture]:
        rows = self._rows()
        part = rows.shard(num_shards=rows.num_shards, index=int(name))
        for number, row in enumerate(part):
            id_ = f"{name}/{number}"
            caption = self._text(row, self.text_column)
            concept = self._text(row, self.concept_column) or caption.lower() or id_
            yield Picture(id_, caption, concept, partial(_load, _stored(row[self.image_column])))

    def _text(self, row: dict[str, Any], column: str | None) -> str:
        if column is None or row[column] is None:
            return ""
        names = getattr(self._rows().features[column], "names", None)
        return _words(row[column] if names is None else label_name(names, row[column]))

    def _rows(self) -> Any:
        """The data set, opened once. ConfigError if it, its split or a column is not there."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> Any:
        import datasets

        with self._opening():
            rows = datasets.load_dataset(
                self.dataset, self.config, split=self.split, revision=self.revision, streaming=True
            )
            rows = rows if rows.features else rows._resolve_features()
        columns = list(rows.features or ())
        for each in (self.image_column, self.text_column, self.concept_column):
            if each and each not in columns:
                hint = nearest(each, columns)
                raise ConfigError(f"column {each!r} is not there; there are {columns}{hint}")
        return rows.cast_column(self.image_column, datasets.Image(decode=False))
