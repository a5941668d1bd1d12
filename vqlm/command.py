"""A function becomes a command: hydra reads the configuration, the function's signature decides what is right.

    main = command("vq_train", train)       # conf/vq_train.yaml holds the defaults of train's parameters

The one place, beside the commands, that knows hydra. It does not know what a command does.

Exit codes: 0 the work was done; 2 the configuration is wrong, said in one message before any data is read;
143 SIGTERM came; 1 anything else, with its traceback. HYDRA_FULL_ERROR=1 adds a traceback to a 2.
"""

import contextlib
import inspect
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import version
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from vqlm import files, schema
from vqlm.errors import ConfigError, Interrupted, nearest
from vqlm.places import is_url

# Beside this package in a clone and in site-packages alike. A path and not a package name, so that a folder
# called `conf` in the current directory cannot stand in for it.
CONF = Path(__file__).resolve().parents[1] / "conf"

# Run folders are ours: hydra writes nothing, and logs nothing, unless the user asks.
QUIET = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")

# Annotations of parameters that are text, as classes and as `from __future__ import annotations` leaves them.
TEXT = (str, "str", "str | None")

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)


class _Refused(BaseException):
    """Carries a ConfigError (its cause) past hydra, which would print a line of its own for an Exception."""


@dataclass(frozen=True)
class Command:
    """The console entry point of `function`; call it to run the command with the arguments in sys.argv.

    config_name: the file in conf/, without ".yaml". Its root keys are the parameters of `function`. A root key
        `out` is a run folder (see `check_run_folder`); a root key `seed` seeds Python, NumPy and torch before
        anything is built.
    function: does the work. It may raise ConfigError at any time: exit code 2.
    conf: the folder of configurations. packages: those whose classes a configuration may name.
    free: root keys that a resumed run may change, beside `out` and `resume`.
    places: root keys that say which of several processes of one job this is. They are not part of the job: a sweep
        over them shares one run folder, and `config.yaml` leaves them empty.
    """

    config_name: str
    function: Callable[..., None]
    conf: Path = CONF
    packages: tuple[str, ...] = schema.PACKAGES
    free: tuple[str, ...] = ()
    places: tuple[str, ...] = ()

    def __call__(self) -> None:
        _run_command(self, sys.argv[1:])

    @property
    def prog(self) -> str:
        """The name that a user types."""
        return self.config_name.replace("_", "-")


# `main = command("vq_train", train)` reads as what it is.
command = Command


def check(
    config: DictConfig | Mapping[str, Any],
    function: Callable[..., Any],
    packages: tuple[str, ...] = schema.PACKAGES,
) -> dict[str, Any]:
    """Resolve a composed configuration and bind it to the signature of `function`, building nothing.

    Returns:
        The configuration as plain dicts, lists and numbers.

    Raises:
        ConfigError: see `vqlm.schema.check`; also an interpolation that leads nowhere.
    """
    plain = _plain(config)
    schema.check(plain, function, packages)
    return plain


def build(node: DictConfig | Mapping[str, Any], packages: tuple[str, ...] = schema.PACKAGES) -> Any:
    """Build what a node names, if it is a class of `packages`. Raises ConfigError (see `vqlm.schema.build`)."""
    return schema.build(_plain(node), packages=packages)


# --- from arguments to exit code ----------------------------------------------------------------------------


def _run_command(made: Command, arguments: list[str]) -> None:
    traced = os.environ.get("HYDRA_FULL_ERROR") == "1"
    with _interruptible():
        try:
            _dispatch(made, arguments)
        except (ConfigError, _Refused) as error:
            if traced:
                traceback.print_exc()
            print(
                f"{made.prog}: {error.__cause__ if isinstance(error, _Refused) else error}", file=sys.stderr
            )
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print(f"{made.prog}: stopped", file=sys.stderr)
            raise SystemExit(130) from None


def _dispatch(made: Command, arguments: list[str]) -> None:
    """Let hydra run the command, so that sweepers, launchers and --cfg work as its users expect."""
    parsed = get_args_parser().parse_intermixed_args(arguments)
    arguments = [_quoted(each, made) if not parsed.multirun else each for each in arguments]
    overrides: list[str] = get_args_parser().parse_intermixed_args(arguments).overrides
    if parsed.config_dir and not Path(parsed.config_dir).is_dir():
        raise ConfigError(f"--config-dir {parsed.config_dir}: there is no such folder")
    if parsed.help:
        print(_help(made, parsed, overrides))
        return
    if parsed.multirun:
        _check_sweep(made, parsed, overrides)
    started: list[bool] = []

    def job(config: DictConfig) -> None:
        started.append(True)
        _run_job(made, config)

    flags = _without(arguments, overrides)
    with tempfile.TemporaryDirectory(prefix="sweep-") as scratch, _hydra_raises():
        # The sweeper insists on a folder for its multirun.yaml. What the user says comes later, and wins.
        ours = [
            *QUIET,
            f"hydra.job.name={made.config_name}",
            f"hydra.sweep.dir={scratch}",
            "hydra.sweep.subdir=.",
        ]
        sys.argv = [sys.argv[0], *flags, *ours, *overrides]
        try:
            hydra.main(config_path=str(made.conf), config_name=made.config_name, version_base="1.3")(job)()
        except COMPOSITION_ERRORS as error:
            if started:
                raise
            raise _explained(error, made, parsed, overrides) from error


def _quoted(argument: str, made: Command) -> str:
    """A value for a parameter that is text is taken as it is: commas, brackets, quotes and all."""
    key, equals, value = argument.partition("=")
    parameter = inspect.signature(made.function).parameters.get(key)
    if not equals or parameter is None or parameter.annotation not in TEXT or value in ("", "null", "???"):
        return argument
    if re.fullmatch(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"", value):
        return argument  # quoted already, for hydra
    value = value.replace("${", "\\${")  # text, not an interpolation
    value = re.sub(r"(\\*)('|$)", lambda at: 2 * at[1] + ("\\'" if at[2] else ""), value)
    return f"{key}='{value}'"


def _run_job(made: Command, config: DictConfig) -> None:
    """One job, of one or of many."""
    try:
        run(made, _numbered(_plain(config), made.places))
    except ConfigError as error:
        raise _Refused from error


def run(made: Command, config: dict[str, Any]) -> None:
    """Check, build, open the run folder, work: in this order, so that a wrong configuration leaves nothing."""
    schema.check(config, made.function, made.packages)
    out = _run_folder(config)
    saved = {**config, **dict.fromkeys(made.places)}
    if out is not None:
        check_run_folder(out, saved, made.free)
    if isinstance(config.get("seed"), int):
        _seed(config["seed"])
    built = schema.build(config, packages=made.packages)
    fresh = out is not None and not Path(out, "config.yaml").exists()
    alone = saved == config
    trains = alone and "resume" in config  # others may share a folder: many encode into one store
    with held(out) if out is not None and trains else contextlib.nullcontext():
        if out is not None:
            open_run_folder(out, saved, alone)
        try:
            made.function(**schema.convert(built, made.function))
        except Exception:
            if fresh and out is not None:
                _close_run_folder(Path(out))
            raise


def _run_folder(config: Mapping[str, Any]) -> str | None:
    """Of several processes that run one job together (vqlm.ranks) the first one alone has one; a URL is none."""
    out = config.get("out")
    return None if is_url(out or "") or os.environ.get("RANK", "0") != "0" else out


def _numbered(config: dict[str, Any], places: tuple[str, ...] = ()) -> dict[str, Any]:
    """Give each job of a sweep a run folder of its own, unless they are the processes of one job."""
    now = HydraConfig.get()
    if now.mode != RunMode.MULTIRUN:
        return config
    print(f"job {now.job.num}: {' '.join(now.overrides.task)}", file=sys.stderr)
    if config.get("out") is None or any(config.get(each) is not None for each in places):
        return config
    return {**config, "out": str(Path(config["out"], str(now.job.num)))}


def _seed(seed: int) -> None:
    """Seed what draws random numbers, so that weights drawn while building repeat too."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: must be from 0 to {2**32 - 1}")
    random.seed(seed)
    # Only what the check has already imported: a command that names no torch class need not wait for torch.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


# --- run folders --------------------------------------------------------------------------------------------


def check_run_folder(out: str, config: Mapping[str, Any], free: tuple[str, ...] = ()) -> None:
    """Refuse a run folder that this configuration would spoil. Reads its `config.yaml` alone, changes nothing.

    A command with a root key `resume` goes on with a run that has the same configuration, `out`, `resume` and
    `free` aside. A command without one (it draws, it measures) may be repeated into the same folder.

    Raises:
        ConfigError: `out` is no folder, holds other things, or a run with other values (each is listed).
    """
    folder = Path(out)
    if not out or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"out={out}: must be a folder, there already or not")
    saved = folder / "config.yaml"
    if saved.is_file() and not set(_read_config(saved)) <= set(config):  # an older version had fewer keys
        raise ConfigError(f"out={out}: the folder was left by another command; name another one")
    # what is being written, or was when a process was killed, does not count
    if not folder.exists() or all(files.LEFTOVER.match(each.name) for each in folder.iterdir()):
        return
    if not saved.exists():
        raise ConfigError(f"out={out}: the folder holds files but no run; name an empty or a new one")
    if "resume" not in config:
        return
    if config["resume"] == "never":
        raise ConfigError(
            f"out={out}: the folder holds a run, and resume=never; name another one, or resume=auto"
        )
    changes = _changes(_read_config(saved), config, {"out", "resume", *free})
    if changes:
        raise ConfigError(
            f"out={out}: the folder holds a run with other values:\n  "
            + "\n  ".join(changes)
            + "\nName another out=, or give the same values to go on with that run."
        )


@contextlib.contextmanager
def held(out: str) -> Iterator[None]:
    """For the length of the block no other process holds this folder: two would overwrite each other's checkpoints.

    The lock is the system's, so it ends with the process, however that ends. Where a system or a file system has none,
    and where there can be no folder, nothing is held.

    Raises:
        ConfigError: another process holds it.
    """
    folder = None
    try:
        with contextlib.suppress(OSError):
            Path(out).mkdir(parents=True, exist_ok=True)
            folder = os.open(out, os.O_RDONLY)
            _lock(folder, out)
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _lock(folder: int, out: str) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"out={out}: another run is writing there now; wait until it has ended, or name another folder"
        ) from error


def open_run_folder(out: str, config: Mapping[str, Any], alone: bool = True) -> None:
    """Make the folder if need be, save the configuration, and clear away what a killed run left half written.

    alone: no other process of the same job writes there; else nothing is cleared away.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        if alone:
            files.clean(out)
        files.write_text(
            Path(out, "config.yaml"), yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        )
    except OSError as error:
        raise ConfigError(f"out={out}: {error.strerror or error}") from error


def _close_run_folder(folder: Path) -> None:
    """Forget a run that ended before it left a result, so that the corrected call may use the same folder."""
    if {path.name for path in folder.rglob("*")} <= {
        "config.yaml",
        "rejects.json",
        "log.jsonl",
        "retention.jsonl",
        "checkpoints",
    }:
        shutil.rmtree(folder)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(read, dict):
            raise ValueError(f"it holds a {type(read).__name__}")
        return read
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); name another out=") from error


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], ignored: set[str]) -> list[str]:
    before = {key: value for key, value in _leaves(old) if key.split(".")[0] not in ignored}
    after = {key: value for key, value in _leaves(new) if key.split(".")[0] not in ignored}
    # an option that the run did not know yet, and that is off (not 0: a number), is what it did
    new_keys = [key for key in after if not (key in before or after[key] is None or after[key] is False)]
    keys = [*before, *new_keys]
    absent = "(not there)"
    return [
        f"{key}: {schema.show(before.get(key, absent))} → {schema.show(after.get(key, absent))}"
        for key in keys
        if before.get(key, absent) != after.get(key, absent)  # 1 and 1.0 are the same
    ]


# --- composing ----------------------------------------------------------------------------------------------


def compose(made: Command, words: Sequence[str]) -> dict[str, Any]:
    """The configuration of a command with these words, checked as for a run, running nothing.

    May be called within a job of another command.

    Raises:
        ConfigError: as the command itself would say it.
    """
    parsed = get_args_parser().parse_args([])
    quoted = [_quoted(each, made) for each in words]
    before = GlobalHydra.instance().hydra
    try:
        with _composer(made, parsed) as composed:
            return check(composed(quoted), made.function, made.packages)
    except ConfigError:
        raise
    except COMPOSITION_ERRORS as error:
        raise _explained(error, made, parsed, quoted) from error
    finally:
        GlobalHydra.instance().hydra = before


@contextlib.contextmanager
def _composer(made: Command, parsed: Any) -> Iterator[Callable[..., DictConfig]]:
    """Yield a function that composes the command's configuration from overrides, running nothing.

    Where `parsed` names other folders or files (--config-dir and its like), they count as they do for a run.
    """
    search_path = create_config_search_path(str(Path(parsed.config_path or made.conf).absolute()))
    if parsed.config_dir:
        last = SearchPathQuery(provider="schema")
        search_path.prepend("command-line", Path(parsed.config_dir).absolute().as_uri(), anchor=last)
    version.setbase("1.3")
    GlobalHydra.instance().clear()
    Hydra.create_main_hydra2(task_name=made.config_name, config_search_path=search_path)
    name = parsed.config_name or made.config_name
    try:
        yield lambda overrides=(), whole=False: hydra.compose(
            name, list(overrides), return_hydra_config=whole
        )
    finally:
        GlobalHydra.instance().clear()


def _check_sweep(made: Command, parsed: Any, overrides: list[str]) -> None:
    """Check every job of a sweep before the first one starts. Other sweepers choose values as they go: not here."""
    if any(each.startswith("hydra/sweeper=") for each in overrides):
        return
    try:
        with _composer(made, parsed) as compose:
            jobs = [job for batch in BasicSweeper.split_arguments(_parse(overrides), None) for job in batch]
            for job in jobs:
                check(compose(job), made.function, made.packages)
    except ConfigError:
        raise
    except COMPOSITION_ERRORS as error:
        raise _explained(error, made, parsed, overrides) from error


def _parse(overrides: list[str]) -> list[Override]:
    return OverridesParser.create(config_loader=_loader()).parse_overrides(overrides)


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()


def _plain(config: Any) -> Any:
    """Plain dicts, lists and numbers, interpolations resolved; values that are missing stay "???"."""
    if not OmegaConf.is_config(config):
        config = OmegaConf.create(config)
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except InterpolationToMissingValueError as error:
        key = _first_line(error).rpartition(" ")[2]
        raise ConfigError(f"{key} has no value: give it on the command line, as {key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{getattr(error, 'full_key', None) or 'configuration'}: {_first_line(error)}"
        ) from error


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key that holds a value and not more keys. Empty dicts and lists count as values."""
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            yield from _leaves(below, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


# --- explaining ---------------------------------------------------------------------------------------------


def _explained(error: Exception, made: Command, parsed: Any, overrides: list[str]) -> ConfigError:
    """Hydra's error in one message, with the nearest valid name if a key or an option was mistyped."""
    with contextlib.suppress(*COMPOSITION_ERRORS):
        with _composer(made, parsed) as compose:
            found = _mistyped_option(overrides) or _mistyped_key(overrides, compose)
            found = found or ("" if parsed.multirun else _unasked_sweep(overrides))
            if found:
                return ConfigError(found)
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override}: cannot be read; write key=value")
    if isinstance(error, yaml.MarkedYAMLError):
        return ConfigError(f"not YAML: {' '.join(str(error).split())}")
    cause = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
    return ConfigError(_first_line(error) + cause)


def _mistyped_option(overrides: list[str]) -> str:
    """What is wrong with the first choice of a group that the group does not offer, or ""."""
    for override in _parse(overrides):
        group = override.key_or_group
        options = _loader().get_group_options(group, results_filter=ObjectType.CONFIG) if group else []
        for choice in _choices(override) if options else ():
            if choice not in options:
                return f"{group}={choice}: no such choice{nearest(choice, options)} (there are: {', '.join(options)})"
    return ""


def _choices(override: Override) -> list[str]:
    if override.is_delete():
        return []
    values = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
    listed = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return [str(each).strip("'\"") for each in listed if each is not None]


def _mistyped_key(overrides: list[str], compose: Callable[..., DictConfig]) -> str:
    """What is wrong with the first override of a key that is not there, or "". Keys added with + may be new."""
    parsed = _parse(overrides)
    groups = [each.input_line for each in parsed if _loader().get_group_options(each.key_or_group)]
    chosen = [line for line in groups if line and not _parse([line])[0].is_sweep_override()]
    keys = _keys(OmegaConf.to_container(compose(chosen), resolve=False))
    for override in parsed:
        key = override.key_or_group
        if override.input_line in groups or override.is_add() or override.is_force_add():
            continue
        if key not in keys and not key.startswith("hydra"):
            allowed = [*keys, *_loader().list_groups("")]
            return f"{override.input_line}: there is no setting {key}{nearest(key, allowed)}"
    return ""


def _unasked_sweep(overrides: list[str]) -> str:
    sweeps = [each.input_line for each in _parse(overrides) if each.is_sweep_override()]
    return f"{sweeps[0]}: several values need -m, which makes one run for each" if sweeps else ""


def _keys(value: Any, key: str = "") -> list[str]:
    """Every dotted key, inner ones included."""
    found = [key] if key else []
    if isinstance(value, Mapping):
        for name, below in value.items():
            found += _keys(below, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            found += _keys(below, f"{key}.{index}")
    return found


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _help(made: Command, parsed: Any, overrides: list[str]) -> str:
    try:
        with _composer(made, parsed) as compose:
            whole = compose(overrides, True)
            choices = {
                key: value
                for key, value in whole.hydra.runtime.choices.items()
                if not key.startswith("hydra/")
            }
            options = {key: _loader().get_group_options(key.partition("@")[0]) for key in choices}
            config = OmegaConf.to_container(compose(overrides), resolve=False)
    except COMPOSITION_ERRORS as error:
        raise _explained(error, made, parsed, overrides) from error
    assert isinstance(config, dict)
    about = inspect.cleandoc(made.function.__doc__ or "")
    groups = [f"  {key}={value}  (of {', '.join(options[key])})" for key, value in choices.items()]
    plain = {str(key): value for key, value in config.items() if not isinstance(value, dict)}
    settings = [f"  {key}={schema.show(value)}" for key, value in plain.items()]
    nodes = [f"  {key}.*" for key, value in config.items() if isinstance(value, dict)]
    return "\n".join(
        [
            f"usage: {made.prog} [key=value ...]",
            "",
            about,
            *(["", "Choices:", *groups] if groups else []),
            "",
            "Settings (??? must be given):",
            *settings,
            *nodes,
            "",
            f"{made.prog} --cfg job      every setting with its value",
            f"{made.prog} -m key=1,2     one run for each value",
            f"{made.prog} --hydra-help   what hydra itself offers",
        ]
    )


# --- surroundings -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGTERM into Interrupted (exit 143), until training puts a handler in place that saves first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _hydra_raises() -> Iterator[None]:
    """Let hydra pass errors on; by itself it prints some of them and exits with 1. Arguments are put back too."""
    arguments = sys.argv
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = arguments
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _without(arguments: list[str], overrides: list[str]) -> list[str]:
    flags = list(arguments)
    for each in overrides:
        flags.remove(each)
    return flags
