"""Text alone: a corpus for documents without pictures, and for measuring what a language model has kept.

    WordNet | TextFiles | HubTexts --texts()--> repaired, each once, cut --hash of the text--> train(), heldout()

A text is held out by its own hash: texts that are added later never move the others, and no text is in both parts.
What cannot be used is counted and said. Also here: what makes any text fit to be tokenised (`repair`).
Knows nothing of token ids, pictures or models.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from vqlm.errors import ConfigError, nearest
from vqlm.fetch import debian_package, user_cache

UNDECODABLE = re.compile(
    "[\ud800-\udfff\ufffd]"
)  # halves of a pair, and what a decoder put in a bad byte's place
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")  # all of C0 and C1 but tab, line and page breaks


def repair(text: str) -> tuple[str, set[str]]:
    """A text without what no tokenizer should see, and what was wrong: "undecodable", "control".

    Lone surrogates and replacement characters are left out (they say that something was lost, not what); control
    characters become blanks. A text without them comes back as it is.
    """
    wrong = set()
    if UNDECODABLE.search(text):
        text = UNDECODABLE.sub("", text)
        wrong.add("undecodable")
    if CONTROL.search(text):
        text = CONTROL.sub(" ", text)
        wrong.add("control")
    return text, wrong


class Texts(Protocol):
    """Where texts come from. Its constructor reads no data."""

    @property
    def name(self) -> str: ...
    def train(self) -> list[str]: ...
    def heldout(self) -> list[str]: ...
    def report(self) -> str:
        """One line: how many texts there are in each part, and what could not be used."""
        ...


class NoTexts:
    """No text at all."""

    name = "none"

    def train(self) -> list[str]:
        return []

    def heldout(self) -> list[str]:
        return []

    def report(self) -> str:
        return "no texts"


class Corpus:
    """Texts of any source, repaired, each once, split and cut. A subclass gives `name` and `texts`.

    holdout: share of the texts that is held out: those whose first 64 bits of sha256, as a fraction of 2^64, lie
    below it. most_heldout: of these, the ones with the smallest hashes are kept; the others are in neither part, so
    that a limit that is raised later never holds out what was trained on. longest: characters; a longer text becomes
    several, cut at blanks, all of one part.

    Attributes:
        counts: after `train()` or `heldout()`: how many lines were empty, repeated, not UTF-8, …
    """

    def __init__(self, holdout: float = 0.02, most_heldout: int = 1000, longest: int = 2000):
        if not 0 <= holdout < 1 or most_heldout < 0 or longest < 1:
            raise ValueError(
                f"holdout={holdout} must lie in [0, 1), most_heldout={most_heldout} not be negative, "
                f"longest={longest} at least 1"
            )
        self.holdout, self.most_heldout, self.longest = holdout, most_heldout, longest
        self.counts: Counter[str] = Counter()

    @property
    def name(self) -> str:
        raise NotImplementedError

    def texts(self) -> Iterable[str | bytes]:
        """Raw texts in an order that does not change; bytes where something is not UTF-8."""
        raise NotImplementedError

    def train(self) -> list[str]:
        """ConfigError if there is nothing to read."""
        return self._parts[0]

    def heldout(self) -> list[str]:
        """ConfigError if there is nothing to read."""
        return self._parts[1]

    def report(self) -> str:
        train, heldout = self._parts
        told = "".join(f", {count:,} {what}" for what, count in sorted(self.counts.items()))
        return f"{self.name}: {len(train):,} training texts, {len(heldout):,} held out{told}"

    @cached_property
    def _parts(self) -> tuple[list[str], list[str]]:
        train: list[str] = []
        heldout: list[tuple[float, str]] = []
        for text in self._usable():
            place = share(text)
            if place < self.holdout:
                heldout.append((place, text))
            else:
                train += self._cut(text)
        kept = sorted(heldout)[: self.most_heldout]
        self._count("held out beyond most_heldout, unused", len(heldout) - len(kept))
        if not train:
            told = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items())) or "no lines"
            raise ConfigError(f"{self.name} holds no text to train on: {told}, {len(heldout)} held out")
        return train, [part for _, text in kept for part in self._cut(text)]

    def _usable(self) -> Iterator[str]:
        seen: set[bytes] = set()
        for raw in self.texts():
            if isinstance(raw, bytes):
                self._count("not UTF-8, left out")
                continue
            text, wrong = repair(raw)
            for each in wrong:
                self._count(f"{each} characters, repaired")
            text = text.strip()
            key = hashlib.sha256(text.encode()).digest()
            if not text:
                self._count("empty")
            elif key in seen:
                self._count("repeated")
            else:
                seen.add(key)
                yield text

    def _cut(self, text: str) -> list[str]:
        pieces = cut(text, self.longest)
        self._count("cut", len(pieces) > 1)
        return pieces

    def _count(self, what: str, number: int = 1) -> None:
        if number:
            self.counts[what] += number


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def cut(text: str, longest: int) -> list[str]:
    """Pieces of at most `longest` characters; between words, where a word is not longer than that."""
    pieces = []
    while len(text) > longest:
        end = max((text.rfind(blank, 0, longest + 1) for blank in (" ", "\n", "\t")), default=0)
        end = end if end > 0 else longest
        pieces.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [piece for piece in (*pieces, text) if piece]


# --------------------------------------------------------------------------- WordNet

PACKAGE, INSIDE = "wordnet-base", Path("usr/share/wordnet")
SYSTEM = Path("/", INSIDE)
INSTEAD = "name a folder that holds data.noun …: texts.folder=DIR, or give texts of your own: texts=file"
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")


class WordNet(Corpus):
    """The 117,659 glosses of WordNet 3.0, with their examples: "a domestic cat; …", some 15 words each.

    folder: where data.noun, data.verb, data.adj and data.adv lie. None: the system's own, or else the Debian package
    wordnet-base (6.5 MB), fetched once into `cache` and unpacked there; nothing is installed. cache: None: the user's
    cache folder. Licence: WordNet 3.0, permissive.

    ConfigError, when texts are read: no such files, or the package cannot be had.
    """

    def __init__(
        self,
        folder: str | None = None,
        cache: str | None = None,
        holdout: float = 0.02,
        most_heldout: int = 1000,
        longest: int = 2000,
    ):
        super().__init__(holdout, most_heldout, longest)
        if folder is not None and not Path(folder).expanduser().is_dir():
            raise ValueError(f"folder={folder} is not a folder; null fetches the package {PACKAGE}")
        self.folder, self.cache = folder, cache

    @property
    def name(self) -> str:
        return "wordnet"

    def texts(self) -> Iterator[str | bytes]:
        folder = self._find()
        for part in PARTS_OF_SPEECH:
            for line in lines(folder / f"data.{part}"):
                if isinstance(line, bytes):
                    yield line
                elif not line.startswith(" "):  # the licence, at the top
                    yield line.partition("|")[2]

    def _find(self) -> Path:
        if self.folder is not None:
            folder = Path(self.folder).expanduser()
            folder = folder / INSIDE if (folder / INSIDE).is_dir() else folder
            if missing := [
                f"data.{part}" for part in PARTS_OF_SPEECH if not (folder / f"data.{part}").is_file()
            ]:
                raise ConfigError(f"texts.folder={self.folder} lacks {', '.join(missing)} of WordNet")
            return folder
        if (SYSTEM / "data.noun").is_file():
            return SYSTEM
        cache = Path(self.cache).expanduser() if self.cache else user_cache()
        return debian_package(PACKAGE, INSIDE, "6.5 MB", cache, INSTEAD)


# --------------------------------------------------------------------------- files

ENDINGS = (".txt", ".jsonl")


class TextFiles(Corpus):
    """A text file (each line a text), a JSONL file (each line an object, its `column` a text), or a folder of such.

    Lines that are not UTF-8, or not an object with that text, are counted and left out; the rest goes on.

    path: the file, or the folder: all .txt and .jsonl files below it, in the order of their names.
    column: key of the text in JSONL.

    ValueError if there is no such path; ConfigError, when texts are read, if it holds none.
    """

    def __init__(
        self,
        path: str,
        column: str = "text",
        holdout: float = 0.02,
        most_heldout: int = 1000,
        longest: int = 2000,
    ):
        super().__init__(holdout, most_heldout, longest)
        self.path, self.column = Path(path).expanduser(), column
        if not self.path.exists():
            beside = [str(each) for each in self.path.parent.iterdir()] if self.path.parent.is_dir() else []
            raise ValueError(f"path={path} does not exist{nearest(str(self.path), beside)}")
        if self.path.is_file() and self.path.suffix not in ENDINGS:
            raise ValueError(f"path={path}: a file must end in {' or '.join(ENDINGS)}")

    @property
    def name(self) -> str:
        return self.path.name

    def texts(self) -> Iterator[str | bytes]:
        for file in self._files():
            for line in lines(file):
                if isinstance(line, bytes) or file.suffix == ".txt" or not line.strip():
                    yield line
                elif (text := self._text(line)) is not None:
                    yield text

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        found = sorted(each for each in self.path.rglob("*") if each.suffix in ENDINGS and each.is_file())
        if not found:
            raise ConfigError(f"texts.path={self.path} holds no {' or '.join(ENDINGS)} file")
        return found

    def _text(self, line: str) -> str | None:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            self._count("not JSON, left out")
            return None
        text = value.get(self.column) if isinstance(value, dict) else None
        if not isinstance(text, str):
            self._count(f"without a text {self.column!r}, left out")
            return None
        return text


def lines(path: Path) -> Iterator[str | bytes]:
    """Lines without their ends; one that is not UTF-8 comes as bytes."""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            line = line.rstrip(b"\r\n")
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError:
                yield line


# --------------------------------------------------------------------------- a data set of the hub


class HubTexts(Corpus):
    """One split of a Hugging Face data set: a hub id, a folder that `datasets` understands, or one it saved itself.

    dataset: hub id ("user/name") or local folder. column: of text. split: "train", "train[:1000]", … config: the data
    set's own configuration name, where it has several. revision: branch, tag or commit on the hub.

    ConfigError, when texts are read: no such data set, split or column, or a column of another type.
    """

    def __init__(
        self,
        dataset: str,
        column: str = "text",
        split: str = "train",
        config: str | None = None,
        revision: str | None = None,
        holdout: float = 0.02,
        most_heldout: int = 1000,
        longest: int = 2000,
    ):
        super().__init__(holdout, most_heldout, longest)
        if not dataset or not column:
            raise ValueError("dataset and column must be named")
        self.dataset, self.column, self.split = dataset, column, split
        self.config, self.revision = config, revision

    @property
    def name(self) -> str:
        return self.dataset

    def texts(self) -> Iterator[str | bytes]:
        rows = self._open()
        if self.column not in rows.column_names:
            hint = nearest(self.column, rows.column_names)
            raise ConfigError(
                f"texts.column={self.column!r} is not a column; there are {rows.column_names}{hint}"
            )
        if getattr(rows.features[self.column], "dtype", None) not in ("string", "large_string"):
            raise ConfigError(f"texts.column={self.column!r} holds {rows.features[self.column]}, not text")
        for row in rows.select_columns([self.column]):
            yield row[self.column] or ""

    def _open(self) -> Any:
        import datasets

        local = Path(self.dataset).expanduser()
        try:
            if (local / "state.json").is_file():
                return datasets.load_from_disk(str(local))
            if (local / "dataset_dict.json").is_file():
                return datasets.load_from_disk(str(local))[self.split]
            name = str(local) if local.exists() else self.dataset
            return datasets.load_dataset(name, self.config, split=self.split, revision=self.revision)
        except Exception as error:  # the library raises a dozen kinds for a wrong name, split or revision
            what = f"texts.dataset={self.dataset!r} split={self.split!r}"
            raise ConfigError(f"{what} cannot be opened: {type(error).__name__}: {error}") from error
