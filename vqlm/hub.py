"""The Hugging Face hub: a folder up to it, and down from it. The only place that talks to it of itself.

What a folder is, and which of its files are meant for others, its owner says (`lm.card`, `vq.card`). Nothing but data
travels in either direction: no Python files, no pickles, no checkpoints of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vqlm.errors import ConfigError
from vqlm.files import check_length, read_json

DATA = ("*.json", "*.safetensors", "*.md", "*.txt", "*.jinja", "*.model")  # kinds of files that are fetched


ATTENTION = ("attn_implementation", "experts_implementation")  # of config.json, public or private


class Hub(Protocol):
    """The part of `huggingface_hub.HfApi` that is used."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...
    def upload_folder(
        self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str
    ) -> Any: ...


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """A folder as it is; a hub id (`owner/name`) as the folder that its files were fetched to.

    A path that is not there stays what it is, and whoever opens it says what is missing: a name counts as a hub id only
    where its first part is no folder here. ConfigError where the hub does not give it.
    """
    path = Path(name)
    if path.exists() or isinstance(name, Path) or not is_hub_id(name) or path.parent.is_dir():
        return path
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(DATA)))
    except Exception as error:  # the hub's own, and those of the network
        raise ConfigError(f"{name} is neither a folder nor a hub id at hand: {error}") from error


def check_model_folder(folder: str | Path) -> None:
    """ConfigError where a local folder of transformers' files asks for more than reading the data in it.

    For whoever hands it to transformers, which would follow: code of the hub named as an attention, weights by a path
    that leads elsewhere, an adapter, whose weights are added without a word, and JSON of any length. Code beside a
    model is another matter: it is not run with trust_remote_code=False.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{folder}/adapter_config.json: this is an adapter, or holds one; merge it into its model first (peft's "
            "merge_and_unload), or remove the file"
        )
    for path in sorted(folder.glob("*.json")):
        try:
            check_length(path)
            told = read_json(path) if path.name == "config.json" or path.name.endswith(".index.json") else {}
        except (ValueError, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        _check_description(path, told if isinstance(told, dict) else {})


def _check_description(path: Path, told: dict[str, Any]) -> None:
    for key, value in told.items():
        if key.removeprefix("_").removesuffix("_internal") in ATTENTION and "/" in str(value):
            raise ConfigError(f"{path}: {key}={value!r} names code of the hub, which is not run here")
    where = told.get("weight_map", {})
    names = set(map(str, where.values())) if isinstance(where, dict) else set()
    if elsewhere := sorted(name for name in names if Path(name).name != name):
        raise ConfigError(f"{path} names files outside its folder: {', '.join(elsewhere[:4])}")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def check_repo_id(repo_id: str) -> None:
    """ValueError unless it has the form `owner/name`."""
    if not isinstance(repo_id, str) or not is_hub_id(repo_id):
        raise ValueError(f"repo_id={repo_id!r}: expected owner/name, letters, digits, '-', '_', '.'")


def upload(
    folder: Path,
    repo_id: str,
    files: Sequence[str],
    private: bool = True,
    message: str = "Upload with vqlm",
    token: str | None = None,
    hub: Hub | None = None,
) -> str:
    """Upload the files of a folder that these patterns name; returns the address of what was made.

    private: of a repository that is made; one that exists stays as visible as it is. token: None: that of `hf auth
    login`. ValueError on a repo_id that is none, or where no file matches.
    """
    check_repo_id(repo_id)
    if not matching(folder, files):
        raise ValueError(f"{folder} has none of the files {', '.join(files)}: nothing to upload")
    hub = HfApi(token=token) if hub is None else hub
    hub.create_repo(repo_id, private=private, exist_ok=True)
    made = hub.upload_folder(
        repo_id=repo_id, folder_path=str(folder), allow_patterns=list(files), commit_message=message
    )
    return str(made)


def matching(folder: Path, files: Sequence[str]) -> list[str]:
    """Names of the files of a folder that these patterns name, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in files))
