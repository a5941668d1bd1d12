"""A folder of files, here or far away: the few things that a resumable job asks of one.

    place("runs/store") → LocalPlace        place("s3://bucket/store") → RemotePlace, through fsspec

What both promise: a file is there whole or not at all. On a disk `vqlm.files` sees to that; an object store takes a
file as a whole by itself. Names are relative, with "/" between parts. It does not know what the bytes mean.

Who may read and write a bucket, and where it is, stands in the environment as its own tools want it (for S3:
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL …), never in a configuration.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from vqlm import files
from vqlm.errors import ConfigError


class Place(Protocol):
    def __str__(self) -> str: ...

    def open(self, name: str) -> IO[bytes]:
        """FileNotFoundError where there is no such file."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Replace the content of a file at once."""
        ...

    def write_folder(self, name: str, fill: Callable[[Path], Any]) -> None:
        """Put what `fill` leaves in an empty local folder under `name`, in place of what is there."""
        ...

    def local_folder(self, name: str) -> Path:
        """The folder `name`, or a copy of it on this machine, which is there until this process ends."""
        ...

    def names(self, start: str = "") -> list[str]:
        """Every file whose name begins with `start`, sorted; [] where there is no such place."""
        ...

    def size(self, name: str) -> int:
        """Bytes. FileNotFoundError where there is no such file."""
        ...

    def remove(self, name: str) -> None:
        """It need not be there."""
        ...

    def clean(self) -> None:
        """Remove what killed writers left. Only while no other process writes."""
        ...


def place(where: str | Path) -> Place:
    """Raises ConfigError where the package for a URL's protocol is missing. Nothing is read."""
    if not is_url(where):
        return LocalPlace(Path(where))
    return RemotePlace(checked_url(str(where)).rstrip("/"))


def is_url(where: str | Path) -> bool:
    return "://" in str(where)


def checked_url(url: str) -> str:
    """The URL as fsspec wants it, its scheme in lower case. ConfigError if nothing here can open URLs of this kind."""
    import fsspec

    scheme, mark, rest = url.partition("://")
    protocol = scheme.lower()
    try:
        fsspec.get_filesystem_class(protocol.split("::")[-1])
    except (ImportError, ValueError) as error:
        hint = 'pip install "vqlm[scale]" brings S3' if protocol == "s3" else "see fsspec's list of protocols"
        raise ConfigError(f"{url} cannot be opened: {error}; {hint}") from error
    return f"{protocol}{mark}{rest}"


@dataclass(frozen=True)
class LocalPlace:
    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def open(self, name: str) -> IO[bytes]:
        return open(self.folder / name, "rb")

    def write(self, name: str, data: bytes) -> None:
        files.write_bytes(self.folder / name, data)

    def write_folder(self, name: str, fill: Callable[[Path], Any]) -> None:
        with files.new_folder(self.folder / name) as part:
            fill(part)

    def local_folder(self, name: str) -> Path:
        return self.folder / name

    def names(self, start: str = "") -> list[str]:
        # os.walk passes over folders that another process renames or removes meanwhile; rglob raises
        found = (Path(at, file) for at, _, files in os.walk(self.folder) for file in files)
        return sorted(
            n for n in (p.relative_to(self.folder).as_posix() for p in found) if n.startswith(start)
        )

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def clean(self) -> None:
        files.clean(self.folder)


@dataclass(frozen=True)
class RemotePlace:
    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def _at(self) -> tuple[Any, str]:
        """The file system, which fsspec keeps, and the folder's path in it."""
        from fsspec.core import url_to_fs

        return url_to_fs(self.url)

    def open(self, name: str) -> IO[bytes]:
        system, root = self._at
        return system.open(f"{root}/{name}", "rb")

    def write(self, name: str, data: bytes) -> None:
        system, root = self._at
        path = f"{root}/{name}"
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        system.pipe_file(path, data)

    def write_folder(self, name: str, fill: Callable[[Path], Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            fill(Path(folder))
            made = {
                path.relative_to(folder).as_posix(): path
                for path in Path(folder).rglob("*")
                if path.is_file()
            }
            for old in set(self.names(f"{name}/")) - {f"{name}/{each}" for each in made}:
                self.remove(old)
            for each, path in sorted(made.items()):
                self.write(f"{name}/{each}", path.read_bytes())

    def local_folder(self, name: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="vqlm-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for each in self.names(f"{name}/"):
            if ".." in each.split("/"):
                raise ConfigError(f"{self.url}/{each} leads out of its folder; it is not copied")
            target = folder / each
            target.parent.mkdir(parents=True, exist_ok=True)
            with self.open(each) as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy)
        return folder / name

    def names(self, start: str = "") -> list[str]:
        system, root = self._at
        system.invalidate_cache()  # other processes write here too
        below = [each.removeprefix(root).lstrip("/") for each in system.find(root)]
        return sorted(each for each in below if each.startswith(start))

    def size(self, name: str) -> int:
        system, root = self._at
        system.invalidate_cache()
        return system.info(f"{root}/{name}")["size"]

    def remove(self, name: str) -> None:
        system, root = self._at
        with suppress(FileNotFoundError):
            system.rm_file(f"{root}/{name}")

    def clean(self) -> None:
        """A file that was not written to its end was never there."""
