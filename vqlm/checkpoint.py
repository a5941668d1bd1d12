"""Models as data: a folder holds `config.json` (declared types and plain numbers) and `model.safetensors`.

A class that wants to be saved is marked `@declared`; its constructor arguments are then remembered as plain JSON
values or as other declared objects. Rebuilding looks the type name up in the list of declared classes: nothing in
a folder can name code, and no pickle is read. This file knows neither pictures nor tokens.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vqlm.errors import ConfigError, nearest
from vqlm.files import new_folder, read_json, seal_is_broken, sealed, sha256, write_text

FORMAT = 1
T = TypeVar("T", bound=type)
_DECLARED: dict[str, type] = {}


def declared(cls: T) -> T:
    """Class decorator: remember the constructor's arguments, so that `describe` and `rebuild` are inverse.

    Arguments that a class names in `added_arguments` are left out while they have their defaults: a class may gain an
    option without a change to the description, and so to the fingerprint, of what was saved before.
    """
    original = cls.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if type(self) is cls:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            defaults = {k: signature.parameters[k].default for k in getattr(cls, "added_arguments", ())}
            self.declared_arguments = {
                k: v
                for k, v in bound.arguments.items()
                if k != "self" and not (k in defaults and v == defaults[k])
            }

    cls.__init__ = __init__
    _DECLARED[cls.__name__] = cls
    return cls


def describe(value: Any) -> Any:
    """Declared object (or plain value) → JSON-ready data."""
    if type(value).__name__ in _DECLARED and hasattr(value, "declared_arguments"):
        arguments = {k: describe(v) for k, v in value.declared_arguments.items()}
        return {"type": type(value).__name__, **arguments}
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot be saved as data: {value!r} ({type(value).__name__}); mark its class @declared")


def rebuild(data: Any) -> Any:
    """JSON data → declared object. Raises ConfigError on a type that is not declared or arguments that do not fit."""
    if isinstance(data, list):
        return [rebuild(v) for v in data]
    if not isinstance(data, dict):
        return data
    arguments = {k: rebuild(v) for k, v in data.items() if k != "type"}
    if "type" not in data:
        return arguments
    name = data["type"]
    if name not in _DECLARED:
        allowed = sorted(_DECLARED)
        raise ConfigError(
            f"unknown type {name!r} in a saved model; known: {allowed}{nearest(str(name), allowed)}"
        )
    try:
        return _DECLARED[name](**arguments)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"saved {name} does not fit this version of vqlm: {error}") from error


def save_module(folder: str | Path, module: nn.Module) -> Path:
    """Write a declared module as a folder, atomically: a reader sees the old folder or the new one."""
    config = {"format": FORMAT, "model": describe(module)}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
    with new_folder(folder) as part:
        save_file(tensors, str(part / "model.safetensors"), metadata={"format": "pt"})
        config = sealed({**config, "sha256": sha256(part / "model.safetensors")})
        write_text(part / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Path(folder)


def load_module(folder: str | Path, kind: type) -> nn.Module:
    """Folder → module of class `kind`, in eval mode on the CPU. ConfigError names the file and what is wrong."""
    folder = Path(folder)
    config = read_config(folder)
    if config.get("format") != FORMAT:
        raise ConfigError(
            f"{folder}/config.json has format {config.get('format')!r}; this version reads {FORMAT}"
        )
    try:
        module = rebuild(config.get("model"))
    except ConfigError as error:
        raise ConfigError(f"{folder}/config.json: {error}") from error
    if not isinstance(module, kind):
        raise ConfigError(f"{folder}/config.json holds a {type(module).__name__}, not a {kind.__name__}")
    load_tensors(module, folder / "model.safetensors")
    saved = config.get("sha256")  # older folders have none
    if seal_is_broken(config) or (saved and saved != sha256(folder / "model.safetensors")):
        raise ConfigError(
            f"{folder} is damaged: config.json or model.safetensors is not what was saved. Copy the folder anew; "
            "if a change is meant, take seal and sha256 out of config.json"
        )
    return module.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a saved folder as a dict; ConfigError if it is missing or not JSON."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        if (Path(folder) / "tokenizer" / "config.json").is_file():
            raise ConfigError(
                f"no saved model at {folder}: it is a run's folder, whose tokenizer is {Path(folder) / 'tokenizer'}"
            )
        siblings = [p.name for p in Path(folder).parent.glob("*") if (p / "config.json").is_file()]
        raise ConfigError(
            f"no saved model at {folder}: {path.name} is missing{nearest(Path(folder).name, siblings)}"
        )
    try:
        config = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} should hold a JSON object, found {type(config).__name__}")
    return config


def load_tensors(module: nn.Module, path: Path) -> None:
    """safetensors file → module, every name and shape checked."""
    try:
        tensors = load_file(str(path))
    except Exception as error:  # the library raises its own and OS errors; all mean an unusable file
        raise ConfigError(f"cannot read {path}: {error}") from error
    expected = module.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    wrong = sorted(k for k in expected.keys() & tensors.keys() if expected[k].shape != tensors[k].shape)
    if missing or unknown or wrong:
        raise ConfigError(
            f"{path} does not fit its config: missing {missing}, unknown {unknown}, other shape {wrong}"
        )
    module.load_state_dict(tensors)


def fingerprint(module: nn.Module) -> str:
    """sha256 over the declared configuration and every tensor; 16 hex digits. Same codes need the same fingerprint."""
    digest = hashlib.sha256(json.dumps(describe(module), sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
