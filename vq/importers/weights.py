"""Files of weights → tensors by name, with the config.json beside them. Nothing is unpickled, nothing is run.

Reads safetensors and torch files (weights only), alone, in a folder, or in shards with an index. Does not know whose
weights they are.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqlm.errors import ConfigError, nearest
from vqlm.files import read_json

SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEX = (".safetensors.index.json", ".bin.index.json")
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# Where training scripts put the tensors inside a file, the averaged ones first.
INSIDE = ("ema", "model", "state_dict")

Load = Callable[[Iterable[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class Weights:
    """What a file or folder holds; tensors are read when asked for."""

    origin: str  # for messages
    names: tuple[str, ...]
    config: dict[str, Any]  # of config.json; empty where there is none
    load: Load  # names → tensors on the CPU, as stored
    inside: str = ""  # the entry of a torch file that they were under


def read_weights(path: str) -> Weights:
    """Open a file of weights, an index of shards, or a folder with one of them. ConfigError says what is wrong."""
    found = _find(Path(path))
    config = _config(found.parent / "config.json")
    if found.name.endswith(INDEX):
        return _sharded(found, config)
    if found.suffix == ".safetensors":
        names, load = _open_safetensors(found)
        return Weights(str(found), names, config, load)
    tensors, inside = _read_torch(found)
    return Weights(str(found), tuple(tensors), config, lambda names: {n: tensors[n] for n in names}, inside)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        siblings = [each.name for each in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ConfigError(f"path={path}: there is no such file or folder{nearest(path.name, siblings)}")
    files = sorted(each for each in path.iterdir() if each.is_file())
    for indexed in [each for each in files if each.name.endswith(INDEX)]:
        return indexed
    for name in SINGLE:
        if path / name in files:
            return path / name
    weights = [each for each in files if each.suffix in SUFFIXES]
    if len(weights) != 1:
        listed = ", ".join(each.name for each in weights) or "none"
        raise ConfigError(
            f"path={path}: the folder should hold one file of weights ({', '.join(SUFFIXES)}); found: {listed}. "
            "Name the file itself"
        )
    return weights[0]


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    config = _json(path)
    if not isinstance(config, dict):
        raise ConfigError(f"{path} should hold a JSON object, found {type(config).__name__}")
    return config


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error


def _sharded(index: Path, config: dict[str, Any]) -> Weights:
    read = _json(index)
    where = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(where, dict) or not all(isinstance(each, str) for each in where.values()):
        raise ConfigError(f"{index}: no weight_map from names to files")
    shards = {name: index.parent / Path(name).name for name in set(where.values())}
    missing = sorted(str(each) for each in shards.values() if not each.is_file())
    if missing:
        raise ConfigError(f"{index} names files that are not there: {', '.join(missing)}")

    def load(names: Iterable[str]) -> dict[str, Tensor]:
        tensors, wanted = {}, list(names)
        for shard in sorted({where[name] for name in wanted}):
            part = [name for name in wanted if where[name] == shard]
            there, read_part = _open(shards[shard])
            absent = sorted(set(part) - set(there))
            if absent:
                raise ConfigError(f"{index}: {shards[shard]} should hold {', '.join(absent)}, and does not")
            tensors |= read_part(part)
        return tensors

    return Weights(str(index), tuple(where), config, load)


def _open(file: Path) -> tuple[tuple[str, ...], Load]:
    if file.suffix == ".safetensors":
        return _open_safetensors(file)
    tensors, _ = _read_torch(file)
    return tuple(tensors), lambda names: {name: tensors[name] for name in names}


def _open_safetensors(file: Path) -> tuple[tuple[str, ...], Load]:
    def load(names: Iterable[str]) -> dict[str, Tensor]:
        with safe_open(str(file), "pt") as opened:
            return {name: opened.get_tensor(name) for name in names}

    try:
        with safe_open(str(file), "pt") as opened:
            return tuple(opened.keys()), load
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error


def _read_torch(file: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of a torch file, and the entry that they were under."""
    held, inside = _load_torch(file), ""
    for key in INSIDE:
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held, inside = held[key], key
            break
    if not isinstance(held, dict) or not any(isinstance(each, Tensor) for each in held.values()):
        raise ConfigError(f"{file}: no tensors by name, neither at its top nor under {', '.join(INSIDE)}")
    return {str(name): each for name, each in held.items() if isinstance(each, Tensor)}, inside


def _load_torch(file: Path) -> Any:
    with suppress(
        Exception
    ):  # files older than torch 1.6 cannot be mapped into memory; the rest is told below
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{file} holds Python objects beside tensors, and reading those would run code from the file ({reason}). "
            "If you trust it, write its tensors to a safetensors file once, and import that:\n"
            f'  python -c "import torch; from safetensors.torch import save_file; '
            f"held = torch.load('{file}', map_location='cpu', weights_only=False); "
            "save_file({k: v.contiguous().clone() for k, v in held.get('state_dict', held).items() "
            "if torch.is_tensor(v)}, "
            f"'{file.with_suffix('.safetensors')}')\""
        ) from error
    except Exception as error:  # the library raises many kinds; all mean an unusable file
        raise ConfigError(f"cannot read {file}: {error}") from error
