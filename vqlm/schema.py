"""The signature is the schema: a configuration checked against, and built by, the classes that it names.

A *node* is a mapping with `_target_`, the dotted name of a class; its other keys are that class's arguments.
`_partial_: true` leaves arguments open for the caller. Only classes of the packages in PACKAGES may be named: a
configuration from a stranger must not be able to run anything else. (Hydra's own instantiation keeps a list of
what is forbidden, which is never complete; this is a list of what is allowed.)

It does not know hydra, files or commands: it reads plain dicts, lists and numbers.
"""

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from vqlm.errors import ConfigError, nearest

OWN = ("vq", "lm", "vqlm")
PACKAGES = (*OWN, "torch.optim", "torch.nn")
MISSING = "???"
RESERVED = ("_target_", "_partial_")

# What a constructor raises when it does not like its arguments. Anything else is a fault of ours: a traceback.
REFUSALS = (ValueError, TypeError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


# --- what may be named --------------------------------------------------------------------------------------


def locate(target: Any, key: str = "", packages: Iterable[str] = PACKAGES) -> type:
    """The class that `target` names.

    Args:
        target: a dotted name, such as "vq.data.ImageData".
        key: where it stands in the configuration, for the message.
        packages: the packages that may be named.

    Raises:
        ConfigError: it is outside `packages`, does not exist, or is not a class. Nothing outside was imported.
    """
    packages = tuple(packages)
    where = f"{_join(key, '_target_')}={target}"
    if not isinstance(target, str) or not _inside(target, packages):
        raise ConfigError(f"{where}: only classes of {', '.join(packages)} may be named here")
    found = _find(target, where)
    # `vq.data.os.system` starts with an allowed name too: what counts is where the thing found was defined.
    if not inspect.isclass(found) or not _inside(f"{found.__module__}.{found.__qualname__}", packages):
        raise ConfigError(f"{where}: not a class of {', '.join(packages)}")
    return found


def _find(target: str, where: str) -> Any:
    found: Any = None
    seen = ""
    for part in target.split("."):
        if part.startswith("_") or not part.isidentifier():
            raise ConfigError(f"{where}: not a public name")
        parent, seen = found, f"{seen}.{part}".lstrip(".")
        found = getattr(parent, part, None)
        if found is None and (parent is None or inspect.ismodule(parent)):
            found = _import(seen)
        if found is None:
            names = [each for each in dir(parent) if not each.startswith("_")]
            raise ConfigError(f"{where}: there is no {seen}{nearest(part, names)}")
        if inspect.ismodule(found) and found.__name__ != seen:
            raise ConfigError(f"{where}: {seen} is another module's name")
    return found


def _import(name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        raise


def _inside(name: str, packages: Iterable[str]) -> bool:
    return any(name.startswith(f"{package}.") for package in packages)


# --- check --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rules:
    packages: tuple[str, ...]
    complete: bool  # every key has a value: "???" is an error


def check(
    config: Mapping[str, Any],
    function: Callable[..., Any],
    packages: Iterable[str] = PACKAGES,
    complete: bool = True,
) -> None:
    """Bind a command's whole configuration to the signature of its function, without building anything.

    Args:
        config: plain, interpolations resolved; its root keys are the parameters of `function`.
        function: the command's function.
        packages: the packages whose classes may be named.
        complete: refuse values that are still to be given ("???"). False for a configuration as shipped.

    Raises:
        ConfigError: an unknown, missing or empty key, a value of the wrong type, a `_target_` that may not be
            named. The message holds the full key, the value, what is allowed and the nearest valid name.
    """
    _bind(config, function, "", False, _Rules(tuple(packages), complete))


def _bind(
    arguments: Mapping[str, Any], function: Callable[..., Any], key: str, partial: bool, rules: _Rules
) -> None:
    given = {str(name): value for name, value in arguments.items() if name not in RESERVED}
    named = parameters(function)
    for name in given:
        if name not in named and not _open_ended(function):
            hint = nearest(_join(key, name), [_join(key, each) for each in named])
            owned = f"it has: {', '.join(named) or 'none'}"
            raise ConfigError(f"{_join(key, name)}: {_owner(function)} has no such setting{hint} ({owned})")
    for name, parameter in named.items():
        if name not in given and parameter.default is parameter.empty and not partial:
            raise ConfigError(
                f"{_join(key, name)}: {_owner(function)} needs this setting, and it is not there"
            )
    hints = _hints(function)
    for name, value in given.items():
        _check_value(value, hints.get(name, Any), _join(key, name), rules)


def _check_value(value: Any, hint: Any, key: str, rules: _Rules) -> None:
    """Raise ConfigError unless `value` is what `hint` says, all the way down."""
    if isinstance(value, str) and value == MISSING:
        if rules.complete:
            raise ConfigError(f"{key} has no value: give it on the command line, as {key}=VALUE")
        return
    if is_node(value):
        _check_node(value, hint, key, rules)
        return
    if not _accepts(hint, value):
        raise ConfigError(f"{key}={show(value)}: must be {describe(hint)}{_nearest_literal(hint, value)}")
    for part, below in _children(value):
        _check_value(below, _child_hint(hint, value, part), _join(key, str(part)), rules)


def _check_node(node: Mapping[str, Any], hint: Any, key: str, rules: _Rules) -> None:
    found = locate(node["_target_"], key, rules.packages)
    partial = node.get("_partial_", False)
    if not isinstance(partial, bool):
        raise ConfigError(f"{_join(key, '_partial_')}={show(partial)}: must be true or false")
    if not _accepts_class(hint, found, partial):
        what = f"an unfinished {found.__name__} (_partial_: true)" if partial else f"a {found.__name__}"
        raise ConfigError(f"{key}: is {what}, must be {describe(hint)}")
    _bind(node, found, key, partial, rules)


def is_node(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value of a configuration asks for something to be built."""
    return isinstance(value, Mapping) and "_target_" in value


# --- build --------------------------------------------------------------------------------------------------


def build(value: Any, key: str = "", packages: Iterable[str] = PACKAGES) -> Any:
    """Build every node in `value`, innermost first; everything else stays as it is.

    Raises:
        ConfigError: a `_target_` that may not be named, or a constructor that refuses its arguments; with the key.
    """
    packages = tuple(packages)
    below = {part: build(each, _join(key, str(part)), packages) for part, each in _children(value)}
    if isinstance(value, list):
        return list(below.values())
    if not isinstance(value, Mapping):
        return value
    if not is_node(value):
        return below
    found = locate(value["_target_"], key, packages)
    arguments = convert({name: each for name, each in below.items() if name not in RESERVED}, found)
    if value.get("_partial_", False):
        return functools.partial(_construct, found, key, **arguments)
    return _construct(found, key, **arguments)


def _construct(found: type, key: str, /, *given: Any, **arguments: Any) -> Any:
    """Call a constructor; what it refuses is a ConfigError with the key. A `_partial_` node does this when called."""
    try:
        return found(*given, **arguments)
    except (ConfigError, *REFUSALS) as error:
        raise ConfigError(_told(error, key, found, arguments)) from error


def _told(error: Exception, key: str, found: type, arguments: Mapping[str, Any]) -> str:
    """What a constructor says: of an argument ("decay=2: ..."), with the whole key, as one types it."""
    if str(error).partition("=")[0] in arguments:
        return _join(key, str(error))
    if isinstance(error, ConfigError):
        return f"{key}: {error}" if key else str(error)
    return f"{_join(key, found.__name__)}: {error}"


def convert(arguments: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """YAML knows neither paths nor tuples: make them where the signature of `function` asks for them."""
    hints = _hints(function)
    return {name: _convert(value, hints.get(name, Any)) for name, value in arguments.items()}


def _convert(value: Any, hint: Any) -> Any:
    options = _options(hint)
    if isinstance(value, str) and Path in options and str not in options:
        return Path(value)
    if isinstance(value, list) and any(get_origin(each) is tuple or each is tuple for each in options):
        return tuple(value)
    return value


# --- types --------------------------------------------------------------------------------------------------


def describe(hint: Any) -> str:
    """A type, in the words of a message."""
    options = _options(hint)
    if len(options) != 1:
        return " or ".join(describe(each) for each in options)
    hint = options[0]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(show(each) for each in get_args(hint))
    plain = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", Path: "a path"}
    if hint is None or hint is type(None):
        return "null"
    if _is_callable(hint):
        return "something to call (a node with _partial_: true)"
    if get_origin(hint) is not None:
        inner = [describe(each) for each in get_args(hint) if each is not ...]
        return f"a {get_origin(hint).__name__} of {', '.join(inner)}"
    return plain.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a plain value (no node) fits the outermost layer of `hint`; `_check_value` goes on to the inner ones."""
    return any(_accepts_option(each, value) for each in _options(hint))


def _accepts_option(hint: Any, value: Any) -> bool:
    origin = get_origin(hint) or hint
    if hint in (Any, inspect.Parameter.empty, object) or isinstance(hint, TypeVar):
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in get_args(hint))
    if _is_callable(hint) or not inspect.isclass(origin):
        return False
    if origin is bool or isinstance(value, bool):
        return origin is bool and isinstance(value, bool)
    if origin is float:
        return isinstance(value, int | float)
    if origin is Path:
        return isinstance(value, str)
    if isinstance(value, list):
        return _accepts_list(hint, origin, value)
    # Sequence and Iterable take a text too, as far as Python goes; in a configuration that is a slip.
    return isinstance(value, origin) and not (isinstance(value, str) and origin is not str)


def _accepts_list(hint: Any, origin: type, value: list) -> bool:
    if origin is tuple:
        inner = get_args(hint)
        return not inner or inner[-1] is ... or len(inner) == len(value)
    return issubclass(list, origin)


def _accepts_class(hint: Any, found: type, partial: bool) -> bool:
    return any(_accepts_class_option(each, found, partial) for each in _options(hint))


def _accepts_class_option(hint: Any, found: type, partial: bool) -> bool:
    origin = get_origin(hint) or hint
    if hint in (Any, inspect.Parameter.empty, object) or isinstance(hint, TypeVar):
        return True
    if _is_callable(hint):
        return partial or any("__call__" in vars(each) for each in found.__mro__)
    if partial or not inspect.isclass(origin):
        return False
    # A protocol says what a thing can do, not what it is: left to the type checker.
    return getattr(origin, "_is_protocol", False) or issubclass(found, origin)


def _options(hint: Any) -> list[Any]:
    """The members of a union; of anything else, itself. `Annotated` and aliases are looked through."""
    if get_origin(hint) is Annotated:
        return _options(get_args(hint)[0])
    if hasattr(hint, "__supertype__"):
        return _options(hint.__supertype__)
    if get_origin(hint) in (Union, types.UnionType):
        return [option for each in get_args(hint) for option in _options(each)]
    return [hint]


def _is_callable(hint: Any) -> bool:
    return (get_origin(hint) or hint) is Callable


def _child_hint(hint: Any, value: Any, part: Any) -> Any:
    """The type of one member of a list or dict that `hint` accepts."""
    for each in _options(hint):
        inner = get_args(each)
        if not inner or not _accepts_option(each, value):
            continue
        if isinstance(value, Mapping):
            return inner[1] if len(inner) > 1 else Any
        if get_origin(each) is tuple and inner[-1] is not ...:
            return inner[part]
        return inner[0]
    return Any


def _nearest_literal(hint: Any, value: Any) -> str:
    allowed = [
        each for option in _options(hint) if get_origin(option) is Literal for each in get_args(option)
    ]
    return nearest(str(value), [str(each) for each in allowed])


def _children(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return enumerate(value)
    return ()


# --- signatures ---------------------------------------------------------------------------------------------


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function or constructor that can be given by name."""
    every = inspect.signature(function).parameters
    return {
        key: each
        for key, each in every.items()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }


def _open_ended(function: Callable[..., Any]) -> bool:
    """Whether names beyond its parameters are welcome (**kwargs)."""
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values())


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's, or a class's constructor's, parameters."""
    if not inspect.isclass(function):
        known = getattr(function, "__globals__", {})
        return get_type_hints(function, localns={name: _Later(name) for name in OWN if name not in known})
    if "__init__" in vars(function) or not hasattr(function, "__dataclass_fields__"):
        return get_type_hints(function.__init__)
    return get_type_hints(function)


class _Later:
    """A package of ours as annotations name it, `vq.data.ImageData`: its modules are imported when they are looked up.

    So a command's file need not import what its parameters are made of, seconds of it, before it is known that the
    command is going to run (`--help`, a mistyped key).
    """

    def __init__(self, package: str):
        self.package = package

    def __getattr__(self, name: str) -> types.ModuleType:
        return importlib.import_module(f"{self.package}.{name}")


def _owner(function: Callable[..., Any]) -> str:
    return function.__name__ if inspect.isclass(function) else "this command"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def show(value: Any) -> str:
    """A value as one writes it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
