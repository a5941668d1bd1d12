"""Files and folders that are either the old one or the new one, never half of each.

Everything is written beside its target (so on the same file system), forced to disk, and renamed into place.
A kill, a full disk or an exception leaves what was there before. It does not know what the bytes mean.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# `.NAME.<8 hex>.part` is being written, `.NAME.<8 hex>.old` is about to be removed. One pattern, so that
# `clean` can tell them from a user's own files.
LEFTOVER = re.compile(r"^\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>part|old)$")
LARGEST_JSON = 2**27  # bytes; the text tokenizers of today's largest vocabularies have a quarter of it


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; what was written there becomes `path` when the block ends well.

    For libraries that want to open the file themselves. Missing parent folders are made.

    Raises:
        OSError: the disk is full or read-only; the old file is intact. Whatever the block raises passes through.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path, "part")
    try:
        yield part
        _sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace the content of `path` at once. Raises OSError and then leaves the old content."""
    with new_file(path) as part:
        part.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Replace the content of `path` at once, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Replace the content of `path` at once by indented JSON.

    Raises:
        ValueError, TypeError: `value` holds what JSON cannot say, NaN and infinity included; nothing is written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """What a file of JSON says. ValueError on other content, and on a file that is too long; OSError as for `open`."""
    check_length(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_length(path: str | Path) -> None:
    """ValueError unless a file of JSON is short enough to be read: reading takes many times its length in memory."""
    length = os.path.getsize(path)
    if length > LARGEST_JSON:
        raise ValueError(f"it has {length:,} bytes, at most {LARGEST_JSON:,} are read")


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """JSON data with a digest of all of it under "seal": a bit that flips on a disk is seen by `seal_is_broken`."""
    return {**data, "seal": _digest(data)}


def seal_is_broken(data: dict[str, Any]) -> bool:
    """Whether sealed data has been changed. What never had a seal has none that is broken."""
    return "seal" in data and data["seal"] != _digest({k: v for k, v in data.items() if k != "seal"})


def _digest(data: dict[str, Any]) -> str:
    # read back once: JSON has no tuples, and no keys but strings
    plain = json.loads(json.dumps(data, allow_nan=False))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder; it becomes `path` when the block ends well, in place of an old `path`.

    A folder cannot be swapped in one step everywhere: between two renames `path` is absent for a moment.
    A process killed right there leaves the old folder under its `.old` name, and `clean` puts it back.

    Raises:
        OSError: as for `new_file`. Whatever the block raises passes through; the old folder is intact.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path, "part")
    part.mkdir()
    try:
        yield part
        _open_to_readers(part)
        _sync_tree(part)
        _swap(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def clean(folder: str | Path) -> None:
    """Remove what killed writers left anywhere under `folder`, and put back a folder whose swap was cut short.

    Only for a folder that no other process is writing to.
    """
    for at, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            leftover = LEFTOVER.match(name)
            if leftover is None:
                continue
            found = Path(at, name)
            target = Path(at, leftover["name"])
            if leftover["kind"] == "old" and not target.exists():
                os.rename(found, target)
            elif found.is_dir():
                shutil.rmtree(found)
            else:
                found.unlink()


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def _open_to_readers(folder: Path) -> None:
    """Give files the rights that the folder was made with: safetensors writes its own for the owner alone."""
    rights = folder.stat().st_mode & 0o666
    for at, _, files in os.walk(folder):
        for name in files:
            os.chmod(Path(at, name), rights)


def _swap(part: Path, path: Path) -> None:
    """Put `part` where `path` is, and go back if the second rename fails."""
    if not path.exists():
        os.rename(part, path)
        _sync(path.parent)
        return
    old = _beside(path, "old")
    os.rename(path, old)
    try:
        os.rename(part, path)
    except BaseException:
        os.rename(old, path)
        raise
    _sync(path.parent)
    shutil.rmtree(old)


def _sync_tree(folder: Path) -> None:
    for at, _, files in os.walk(folder):
        for name in files:
            _sync(Path(at, name))
        _sync(Path(at))


def _sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
