"""Every configuration that ships, with every choice of every group, fits the signatures that it names.

Nothing is built. The commands are those that pyproject.toml lists; a YAML file that no command reaches fails too.
"""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf

from vqlm import schema
from vqlm.command import CONF, Command

ROOT = Path(__file__).parents[1]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def load(script: str) -> Command:
    """The command behind a console script."""
    module, _, name = SCRIPTS[script].partition(":")
    main = getattr(import_module(module), name)
    assert isinstance(main, Command), f"{SCRIPTS[script]} is not made by vqlm.command.command"
    return main


# What takes a second and more to import, and what may bring such things.
HEAVY = ("torch", "transformers", "lightning", "datasets", "pyarrow", "matplotlib", "scipy", "fastapi", "ray")

# In a fresh process: every command says what it can do, then refuses a key that is none.
STARTS = """
import importlib, sys
for script in sys.argv[1:]:
    module, _, name = script.partition(":")
    for words, code in (["--help"], 0), (["outt=x"], 2):
        sys.argv = [script, *words]
        try:
            getattr(importlib.import_module(module), name)()
            ended = 0
        except SystemExit as stop:
            ended = stop.code
        assert ended == code, (script, words, ended)
print("imported:", *sys.modules)
"""

COMPOSED: dict[str, dict[tuple[str, ...], Any]] = {}  # by command, then by overrides


class Composer:
    """Composes one command's configuration, and remembers which files took part."""

    def __init__(self, main: Command) -> None:
        self.name = main.config_name
        self.composed = COMPOSED.setdefault(self.name, {})
        defaults = OmegaConf.load(CONF / f"{self.name}.yaml").get("defaults", [])
        groups = [item for each in defaults if OmegaConf.is_dict(each) for item in each.items()]
        self.lists = {str(group): str(chosen[0]) for group, chosen in groups if OmegaConf.is_list(chosen)}

    def __enter__(self) -> "Composer":
        self.context = hydra.initialize_config_dir(str(CONF), version_base="1.3")
        self.context.__enter__()
        self.loader = GlobalHydra.instance().config_loader()
        return self

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)

    def compose(self, *overrides: str) -> tuple[dict[str, Any], dict[str, str | None]]:
        """The plain configuration, and the choice made in each group of ours. Composed once: it takes a while."""
        if overrides not in self.composed:
            self.composed[overrides] = self._compose(overrides)
        return self.composed[overrides]

    def _compose(self, overrides: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str | None]]:
        config = hydra.compose(self.name, list(overrides), return_hydra_config=True)
        choices = {
            key: each for key, each in config.hydra.runtime.choices.items() if not key.startswith("hydra/")
        }
        # hydra does not report a group that takes a list; a single choice stands for it here
        given = dict(each.split("=") for each in overrides)
        choices |= {group: given.get(group, first) for group, first in self.lists.items()}
        OmegaConf.set_struct(config, False)
        plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        return OmegaConf.to_container(plain, resolve=True, throw_on_missing=False), choices  # type: ignore

    def options(self, group: str) -> list[str]:
        return self.loader.get_group_options(group.partition("@")[0], results_filter=ObjectType.CONFIG)

    def variants(self) -> list[tuple[str, ...]]:
        """The defaults, then each other choice; groups that only a choice brings are gone through too."""
        found: list[tuple[str, ...]] = [()]
        usual = self.compose()[1]
        for overrides in found:  # grows while it is read
            for group in self.compose(*overrides)[1]:
                if any(each.startswith(f"{group}=") for each in overrides):
                    continue
                if overrides and group in usual:
                    continue
                found += [(*overrides, f"{group}={option}") for option in self.options(group)]
        return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_choice_fits_the_signatures(script):
    main = load(script)
    with Composer(main) as composer:
        variants = composer.variants()
        for overrides in variants:
            plain, _ = composer.compose(*overrides)
            try:
                schema.check(plain, main.function, main.packages, complete=False)
            except ValueError as error:
                pytest.fail(f"{script} {' '.join(overrides)}: {error}")
    assert variants


@pytest.mark.parametrize("script", SCRIPTS)
def test_root_keys_are_the_parameters(script):
    """Each parameter can be given by the name that --help prints, and none is hidden in a Python default."""
    main = load(script)
    with Composer(main) as composer:
        plain, _ = composer.compose()
    assert set(plain) == set(schema.parameters(main.function))


def test_every_file_is_reached():
    reached = set()
    for script in SCRIPTS:
        main = load(script)
        reached.add(CONF / f"{main.config_name}.yaml")
        with Composer(main) as composer:
            for overrides in composer.variants():
                for group, choice in composer.compose(*overrides)[1].items():
                    reached.add(CONF / group.partition("@")[0] / f"{choice}.yaml")
    assert sorted(str(each.relative_to(CONF)) for each in set(CONF.rglob("*.yaml")) - reached) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_and_file_have_one_name(script):
    assert load(script).prog == script


def test_no_command_imports_what_is_heavy_before_it_is_known_to_run():
    words = [sys.executable, "-c", STARTS, *SCRIPTS.values()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = done.stdout.rpartition("imported: ")[2].split()
    assert "vq.train" in imported
    assert sorted(set(HEAVY) & set(imported)) == []
