"""Emoji drawn in up to six styles: the same things as a line drawing, flat, in 3D …, the style named in the caption.

    npm packages, fetched once --EmojiStyles.pictures()--> Picture ... (vq/data.py)

Three families of drawings, so the pictures are no independent samples: OpenMoji's two styles share their outlines, and
so do the three of Fluent. Icons with short labels, they say nothing about photographs with sentences.

It does not know how files are decoded, nor how sets are split beyond what it marks as held out.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import ImageColor

from vq.data import SKIN_TONES, VARIATION, Picture, draw_svg, share
from vq.images import open_image
from vqlm.errors import ConfigError, nearest
from vqlm.fetch import user_cache


@dataclass(frozen=True)
class Package:
    """A package of the npm registry. sha256: of its archive. parts: the files and folders that are taken out of it."""

    name: str
    version: str
    sha256: str
    parts: tuple[str, ...]

    @property
    def folder(self) -> str:
        return f"{self.name.replace('/', '-').removeprefix('@')}-{self.version}"


OPENMOJI = Package(
    "openmoji",
    "17.0.0",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    ("LICENSE.txt", "data/openmoji.csv", "color/svg", "black/svg"),
)
FLUENT = Package(
    "fluentui-emoji",
    "1.3.0",
    "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5",
    ("LICENSE", "icons/flat", "icons/modern"),
)
FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ("package.json", "assets"),
)
NOTO = Package(
    "emoji-datasource-google",
    "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ("LICENSE", "img/google/64"),
)


@dataclass(frozen=True)
class Style:
    """One way of drawing: where its files lie, and what is said about them."""

    package: Package
    folder: str
    caption: str


STYLES = {
    "outlined": Style(OPENMOJI, "color/svg", "an outlined picture of {}"),
    "line": Style(OPENMOJI, "black/svg", "a line drawing of {}"),
    "flat": Style(FLUENT, "icons/flat", "a flat picture of {}"),
    "gradient": Style(FLUENT, "icons/modern", "a gradient picture of {}"),
    "3d": Style(FLUENT_3D, "assets", "a 3D picture of {}"),
    "shaded": Style(NOTO, "img/google/64", "a shaded picture of {}"),
}
LEFT_OUT = ("brand", "skin-tone")  # subgroups of OpenMoji's table: trademarks, and patches of colour
FLUENT_TONES = {
    "default": "",
    "light": "1F3FB",
    "medium-light": "1F3FC",
    "medium": "1F3FD",
    "medium-dark": "1F3FE",
    "dark": "1F3FF",
}


GROUPS = (
    "smileys-emotion",
    "people-body",
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
    "symbols",
    "flags",
    "extras-openmoji",
    "extras-unicode",
)


class Label(NamedTuple):
    """What OpenMoji's table says of an emoji: Unicode's name, words that go with it, and its group."""

    name: str
    tags: tuple[str, ...]
    group: str


class EmojiStyles:
    """Emoji in several styles, captioned "a 3D picture of red apple": by default 10,121 pictures of 2,396 concepts.

    Needs npm to fetch its packages, once, and the extra `demo` to render them. Id: style and code points, "3d/1F34E".
    Concept: the code points without skin tones, so that what is held out is held out in every style.

    Args:
        styles: which of outlined, line (OpenMoji), flat, gradient, 3d (Fluent) and shaded (Noto). By default all but
            gradient, whose pictures can hardly be told from those in 3D.
        groups: which of Unicode's groups of emoji (`GROUPS`); null: all.
        withheld: share of the emoji in several styles, in [0, 1), of which one style is held out while the others may
            be trained on: prompts that join a thing and a style known apart. By digest: another share moves none.
        tags: so many words that go with a name stand after it, "… of red apple (fruit, healthy)".
        skin_tones: also the variants in five skin tones.
        background: a colour's name or "#rrggbb"; the drawings are transparent.
        folder: where the packages lie, or are fetched to; null: the user's cache.

    Raises:
        ConfigError: an unknown style, a value out of range.
    """

    name = "emoji_styles"
    attribution = (
        "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0. "
        "Fluent Emoji by Microsoft: MIT License. Noto Emoji by Google: Apache License 2.0."
    )

    def __init__(
        self,
        styles: Sequence[str] = ("outlined", "line", "flat", "3d", "shaded"),
        groups: Sequence[str] | None = None,
        withheld: float = 0.05,
        tags: int = 0,
        skin_tones: bool = False,
        background: str = "white",
        folder: str | None = None,
    ) -> None:
        unknown = [each for each in styles if each not in STYLES]
        if unknown or not styles or len(set(styles)) < len(styles):
            hint = nearest(str(unknown[0]), STYLES) if unknown else ""
            raise ConfigError(f"styles={list(styles)}: different ones of {', '.join(STYLES)}{hint}")
        strange = [each for each in groups or () if each not in GROUPS]
        if strange or groups == []:
            hint = nearest(str(strange[0]), GROUPS) if strange else ""
            raise ConfigError(f"groups={groups}: null for all, or some of {', '.join(GROUPS)}{hint}")
        if not 0 <= withheld < 1 or tags < 0:
            raise ConfigError(f"withheld={withheld}: a share from 0 to below 1; tags={tags}: not negative")
        try:
            ImageColor.getrgb(background)
        except ValueError as error:
            raise ConfigError(f"background={background!r} is no colour: give a name or '#rrggbb'") from error
        self.styles, self.withheld, self.tags = list(styles), withheld, tags
        self.groups = None if groups is None else set(groups)
        self.skin_tones, self.background = skin_tones, background
        self.folder = Path(folder).expanduser() if folder else user_cache() / "npm"

    def pictures(self, size: int = 64) -> list[Picture]:
        """Style after style, each sorted by id. Rendered at `size`, at least 64.

        Raises:
            ConfigError: a package is neither there nor to be had, or resvg-py is not installed.
        """
        _check_renderer()
        labels = read_labels(self._package(OPENMOJI) / "data/openmoji.csv")
        drawn = {style: self._files(style, labels) for style in self.styles}
        held = self._withheld(drawn)
        return [
            self._picture(style, points, file, labels, size, held)
            for style, files in drawn.items()
            for points, file in sorted(files.items())
        ]

    def _files(self, style: str, labels: dict[str, Label]) -> dict[str, Path]:
        """Code points → file, of the emoji that are named in `labels`."""
        package = self._package(STYLES[style].package)
        folder = package / STYLES[style].folder
        if not folder.is_dir():
            raise ConfigError(f"{folder} is missing: remove {package}, and it is fetched again")
        slugs = {slug(label.name): points for points, label in reversed(labels.items())}
        wanted = {p for p, label in labels.items() if self.groups is None or label.group in self.groups}
        found: dict[str, Path] = {}
        for file in sorted(folder.iterdir()):
            points = points_of(file.stem) if style not in ("flat", "gradient") else named(file.stem, slugs)
            if bare(points) in wanted and (self.skin_tones or points == bare(points)):
                found.setdefault(points, file)
        return found

    def _withheld(self, drawn: dict[str, dict[str, Path]]) -> dict[str, str]:
        """Concept → the style that is held out of it."""
        having: dict[str, list[str]] = {}
        for style, files in drawn.items():
            for concept in {bare(points) for points in files}:
                having.setdefault(concept, []).append(style)
        return {
            concept: styles[int(share(1, concept) * len(styles))]
            for concept, styles in having.items()
            if len(styles) > 1 and share(0, f"withheld {concept}") < self.withheld
        }

    def _picture(
        self, style: str, points: str, file: Path, labels: dict[str, Label], size: int, held: dict[str, str]
    ) -> Picture:
        concept = bare(points)
        label = labels.get(points) or labels[concept]
        words = ", ".join(label.tags[: self.tags])
        caption = STYLES[style].caption.format(f"{label.name} ({words})" if words else label.name)
        if file.suffix == ".svg":
            load = partial(draw_svg, str(file), max(64, size), self.background)
        else:
            load = partial(open_image, file, background=self.background)
        return Picture(f"{style}/{points}", caption, concept, load, held.get(concept) == style)

    def _package(self, package: Package) -> Path:
        folder = self.folder / package.folder
        return folder if folder.is_dir() else fetch(package, self.folder)


# --- names --------------------------------------------------------------------------------------------------------


def read_labels(path: Path) -> dict[str, Label]:
    """OpenMoji's table → label of each emoji by its code points. Unicode's emoji come before OpenMoji's own."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        rows.sort(key=lambda row: row["group"].startswith("extras"))
        labels: dict[str, Label] = {}
        for row in rows:
            if row["subgroups"] not in LEFT_OUT:
                tags = tuple(tidy(tag) for tag in row["tags"].split(",") if tag.strip())
                name = tidy(row["annotation"])
                other = tuple(tag for tag in tags if tag not in name)
                labels[points_of(row["hexcode"])] = Label(name, other, row["group"])
        first = {label.name: points for points, label in reversed(labels.items())}
        # OpenMoji drew some things before Unicode had them: two concepts of one name could not be told apart
        return {points: label for points, label in labels.items() if first[label.name] == points}
    except (OSError, KeyError, AttributeError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is not OpenMoji's table: {error!r}") from error


def tidy(text: str) -> str:
    return " ".join(text.replace("’", "'").split())


def points_of(stem: str) -> str:
    """A file's name in code points, "2764-fe0f" or with "_", → "2764": as the Unicode sequence without FE0F."""
    points = [point.zfill(4) for point in re.split("[-_]", stem.upper())]
    return "-".join(point for point in points if point != VARIATION)


def bare(points: str) -> str:
    """The same without skin tones."""
    return "-".join(point for point in points.split("-") if point not in SKIN_TONES)


def slug(name: str) -> str:
    """ "woman’s hat" → "womans-hat", as the files of Fluent are called."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")


def named(stem: str, slugs: dict[str, str]) -> str:
    """A file's name in words → code points, with the skin tone that it ends in; "" where nothing has that name."""
    if stem in slugs:  # "police-car-light" is no light police car
        return slugs[stem]
    for tone, point in FLUENT_TONES.items():
        name = stem.removesuffix(f"-{tone}")
        points = slugs.get(name) or slugs.get(name.removeprefix("person-"))
        if name != stem and points:
            return toned(points, point)
    return slugs.get(stem.removeprefix("person-"), "")


def toned(points: str, tone: str) -> str:
    """The sequence with a skin tone after its first code point, as Unicode has it."""
    first, *rest = points.split("-")
    return "-".join([first, tone, *rest] if tone else [first, *rest])


# --- packages -----------------------------------------------------------------------------------------------------


def fetch(package: Package, folder: Path) -> Path:
    """Bring a package into `folder` with npm, of its pinned version and content, all at once. Returns its folder.

    ConfigError where npm is missing or fails, or the archive is another one.
    """
    npm = shutil.which("npm")
    what = f"{package.name}@{package.version}"
    if npm is None:
        raise ConfigError(
            f"npm is not installed, and {what} is not in {folder}: install npm (it comes with node), or copy that "
            "folder from a machine that has it and name it: images.source.folder=DIR"
        )
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {what} into {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        done = subprocess.run(
            [npm, "pack", "--silent", "--ignore-scripts", what, "--pack-destination", scratch],
            capture_output=True,
            text=True,
        )
        archive = next(Path(scratch).glob("*.tgz"), None)
        if done.returncode or archive is None:
            told = " ".join((done.stderr or done.stdout).split())[-400:]
            raise ConfigError(f"npm pack {what} failed: {told}")
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != package.sha256:
            raise ConfigError(f"{what} has the content {found}, expected {package.sha256}: it is not used")
        unpacked = Path(scratch, "unpacked")
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, members=_wanted(tar, package), filter="data")
        except tarfile.TarError as error:  # members that lead out of the folder too
            raise ConfigError(f"{what} cannot be unpacked: {error}") from error
        if not (unpacked / "package").is_dir():
            raise ConfigError(f"{what} holds none of {', '.join(package.parts)}")
        try:
            os.replace(unpacked / "package", folder / package.folder)
        except OSError:
            if not (folder / package.folder).is_dir():  # another process was faster otherwise
                raise
    return folder / package.folder


def _wanted(tar: tarfile.TarFile, package: Package) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        part = member.name.removeprefix("package/")
        if any(part == each or part.startswith(f"{each}/") for each in package.parts):
            yield member


def _check_renderer() -> None:
    try:
        import resvg_py  # noqa: F401 (found missing now, not at the first picture)
    except ImportError as error:
        raise ConfigError('drawings need the package "resvg_py": pip install "vqlm[demo]"') from error
