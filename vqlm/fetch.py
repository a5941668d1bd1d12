"""What comes from outside: packages of Debian, unpacked below the user's cache and never installed.

It does not know what is in them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from vqlm.errors import ConfigError


def user_cache() -> Path:
    """The folder for what can be made or fetched again: $XDG_CACHE_HOME/vqlm, or ~/.cache/vqlm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vqlm")


def debian_package(name: str, inside: Path, size: str, cache: Path, instead: str) -> Path:
    """The folder `inside` of a Debian package, fetched below `cache` once. Needs no root: nothing is installed.

    size: as it is told to who waits. instead: what to do where the package cannot be had, for the error.

    ConfigError: no apt-get or dpkg-deb, they fail, or the package has no such folder.
    """
    unpacked = cache / name
    if (unpacked / inside).is_dir():
        return unpacked / inside
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)]:
        raise ConfigError(f"{' and '.join(missing)} not found: {name} is a package of Debian; {instead}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        print(f"fetching {name} ({size}) into {cache}", file=sys.stderr)
        _run(["apt-get", "download", "--quiet", name], scratch, instead)
        found = list(Path(scratch).glob("*.deb"))
        if not found:
            raise ConfigError(f"apt-get brought no {name}; {instead}")
        _run(["dpkg-deb", "-x", found[0].name, "unpacked"], scratch, instead)
        if not (Path(scratch, "unpacked") / inside).is_dir():
            raise ConfigError(f"{found[0].name} holds no {inside}; {instead}")
        # another process may have been faster: then it is there, and the same
        with contextlib.suppress(OSError):
            os.replace(Path(scratch, "unpacked"), unpacked)
        if not (unpacked / inside).is_dir():
            raise ConfigError(f"{unpacked}: it is there, but holds no {inside}; remove it, or {instead}")
    return unpacked / inside


def _run(words: list[str], folder: str, instead: str) -> None:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        told = " ".join((done.stderr or done.stdout).split())[-400:]
        raise ConfigError(
            f"{' '.join(words)} failed: {told}. `apt-get update` may help (as root), or {instead}"
        )
