"""An experiment as data: cells × seeds, each a few commands, and figures from what they leave.

    steps:   tokenizer: [vq-train, images=openmoji, "seed={seed}"]
             store: [vq-encode, images=openmoji, "tokenizer={tokenizer}/tokenizer"]
    cells:   "Q = 8": {tokenizer: [quantizer.depth=8]}
    figures: PSNR dB: tokenizer:heldout.psnr

A run's folder is named by a digest of its command and words, and of the runs that it reads: what several cells, seeds
or experiments have in common is run once, and a finished run is not made again. What a command does, and what is
concluded from the figures, is not known here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from vqlm.errors import ConfigError, nearest
from vqlm.files import read_json, write_json
from vqlm.processes import COMMANDS, run

PLACEHOLDER = re.compile(r"\{(\w+)\}")
Words = list[str]


@dataclass(frozen=True)
class Run:
    """One command with all its words but out=. `reads` are the runs whose folders it is given."""

    step: str
    command: str
    words: tuple[str, ...]  # with placeholders
    seed: int
    reads: Mapping[str, Run] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of what is run, whatever the folder it is run in."""
        words = [
            self._filled(word, {name: each.digest for name, each in self.reads.items()})
            for word in self.words
        ]
        return hashlib.sha256(json.dumps([self.command, *words]).encode()).hexdigest()[:12]

    def folder(self, runs: Path) -> Path:
        return runs / f"{self.step}-{self.digest}"

    def told(self, runs: Path) -> Words:
        """The words as they are typed."""
        folders = {name: each.folder(runs).as_posix() for name, each in self.reads.items()}
        return [self._filled(word, folders) for word in self.words]

    def _filled(self, word: str, names: Mapping[str, str]) -> str:
        known = {"seed": str(self.seed), **names}
        return PLACEHOLDER.sub(lambda found: known[found[1]], word)

    def make(self, runs: Path, title: str, config: str | None = None) -> float:
        """Run it, unless that was done. Returns the minutes that it took, then or now (of a run that was stopped and
        gone on with, those of the last piece).

        config: a digest of the whole configuration, which the words leave to defaults; None: not known. Another process
        that makes the same run at this moment is waited for.

        Raises:
            ConfigError: the run was made when defaults were others.
        """
        folder, done = self.folder(runs), runs / f"{self.step}-{self.digest}.json"
        runs.mkdir(parents=True, exist_ok=True)
        with _alone(done.with_suffix(".lock"), title):
            before = _marker(done)
            if before and folder.is_dir():
                if config and before.get("config") not in (None, config):
                    raise ConfigError(
                        f"{folder} was made when the defaults of {self.command} were others: remove it, or name "
                        "another folder: runs=DIR"
                    )
                return float(before["minutes"])
            started, words = time.monotonic(), self.told(runs)
            run(title, self.command, [*words, f"out={folder.as_posix()}"])
            # A finished run is not gone on with, and checkpoints are three times as large as what they lead to.
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            minutes = (time.monotonic() - started) / 60
            write_json(done, {"command": self.command, "words": words, "minutes": minutes, "config": config})
        return minutes


@contextmanager
def _alone(lock_file: Path, title: str) -> Iterator[None]:
    """Until no other process is within; says so if there is one."""
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"\n=== {title}: another process makes this run; waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _marker(done: Path) -> dict[str, Any] | None:
    """What a finished run left beside its folder; None if it is not finished, or that cannot be read."""
    try:
        found = read_json(done)
        return found if isinstance(found["minutes"], int | float) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Experiment:
    """See the head of this file. more: the words of a size, which are added to those of every cell.

    Raises:
        ConfigError: a step, cell or placeholder that does not exist, or a command that is none.
    """

    steps: Mapping[str, Words]
    cells: Mapping[str, Mapping[str, Words | None]]
    figures: Mapping[str, str]  # name → "step:key.key" in its metrics.json
    pictures: str | None = None  # "step:FILE"
    more: Mapping[str, Words] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for step, words in self.steps.items():
            if not words or words[0] not in COMMANDS:
                raise ConfigError(
                    f"steps.{step}={words}: must begin with a command{nearest(str(words[:1]), COMMANDS)} "
                    f"(there are: {', '.join(COMMANDS)})"
                )
        for where, told in [
            *((f"cells.{name}", own) for name, own in self.cells.items()),
            ("sizes", self.more),
        ]:
            for step in told:
                self._known(step, f"{where}.{step}")
        for name, place in [*self.figures.items(), *([("pictures", self.pictures)] if self.pictures else [])]:
            if ":" not in place:
                raise ConfigError(f"{name}: {place}: must be STEP:PLACE, such as tokenizer:heldout.psnr")
            self._known(place.partition(":")[0], f"{name}: {place}")
        for cell in self.cells:
            self.runs_of(cell, 0)

    def _known(self, step: str, where: str) -> None:
        if step not in self.steps:
            raise ConfigError(
                f"{where}: there is no step {step}{nearest(step, self.steps)} (there are: {', '.join(self.steps)})"
            )

    def runs_of(self, cell: str, seed: int) -> dict[str, Run]:
        """The runs of a cell in order, those alone that a figure or picture needs, by step."""
        made: dict[str, Run] = {}
        for step, (command, *words) in self.steps.items():
            own = self.cells[cell].get(step, [])
            if own is None:
                continue
            words = merged([*words, *own, *self.more.get(step, [])])
            asked = {name for word in words for name in PLACEHOLDER.findall(word)} - {"seed"}
            if unknown := sorted(asked - set(made)):
                raise ConfigError(
                    f"step {step} of cell {cell} reads {{{unknown[0]}}}: no step before it is called so"
                    f"{nearest(unknown[0], made)}"
                )
            made[step] = Run(step, command, tuple(words), seed, {name: made[name] for name in sorted(asked)})
        needed = {place.partition(":")[0] for place in [*self.figures.values(), self.pictures or ""]}
        for step in reversed(made):
            needed |= set(made[step].reads) if step in needed else set()
        return {step: run for step, run in made.items() if step in needed}

    def all_runs(self, seeds: Sequence[int]) -> Iterator[tuple[int, str, Run]]:
        """(seed, cell, run), each run once, all cells of a seed before the next seed."""
        seen: set[str] = set()
        for seed in seeds:
            for cell in self.cells:
                for each in self.runs_of(cell, seed).values():
                    if each.digest not in seen:
                        seen.add(each.digest)
                        yield seed, cell, each

    def make(
        self, runs: Path, seeds: Sequence[int], after: Callable[[list[int]], Any], configs: Mapping[str, str]
    ) -> float:
        """Make all runs; `after` is called with the seeds that are whole, whenever one is. Returns minutes in all.

        configs: see `Run.make`, by the digest of the run.

        Raises:
            ConfigError: a figure is not in what the first run of its step left: not after hours, when all are made.
        """
        every = list(self.all_runs(seeds))
        minutes, looked = 0.0, set()
        for number, (seed, cell, each) in enumerate(every, 1):
            title = f"[{number}/{len(every)}] {each.step} of {cell!r}, seed {seed}"
            minutes += each.make(runs, title, configs.get(each.digest))
            if each.step not in looked:
                looked.add(each.step)
                self._look(each, runs)
            if number == len(every) or every[number][0] != seed:
                after(list(seeds[: list(seeds).index(seed) + 1]))
        return minutes

    def _look(self, made: Run, runs: Path) -> None:
        for name, place in self.figures.items():
            step, _, keys = place.partition(":")
            if step == made.step:
                figure_at(name, made.folder(runs) / "metrics.json", keys)

    def read(self, runs: Path, seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
        """figure → cell → a number for each seed. A cell without the step of a figure is left out there.

        Raises:
            ConfigError: the place is not in what the run left; the message says what is.
        """
        found: dict[str, dict[str, list[float]]] = {name: {} for name in self.figures}
        for name, place in self.figures.items():
            step, _, keys = place.partition(":")
            for cell in self.cells:
                made = [self.runs_of(cell, seed).get(step) for seed in seeds]
                if all(made):
                    files = [each.folder(runs) / "metrics.json" for each in made if each]
                    found[name][cell] = [figure_at(name, file, keys) for file in files]
        return found

    def picture_files(self, runs: Path, seed: int) -> dict[str, Path]:
        """cell → the file of its picture, where there is one."""
        if self.pictures is None:
            return {}
        step, _, name = self.pictures.partition(":")
        made = {cell: self.runs_of(cell, seed).get(step) for cell in self.cells}
        files = {cell: each.folder(runs) / name for cell, each in made.items() if each}
        return {cell: file for cell, file in files.items() if file.is_file()}


def merged(words: Sequence[str]) -> Words:
    """Of several words for one key the last one counts (hydra takes a second choice of a group for a mistake)."""
    return list({word.partition("=")[0]: word for word in words}.values())


def figure_at(name: str, file: Path, keys: str) -> float:
    """`number_at`, whose errors name the figure."""
    try:
        return number_at(file, keys)
    except ConfigError as error:
        raise ConfigError(f"figures.{name}: {error}") from error


def number_at(file: Path, keys: str) -> float:
    """The number at a dotted place of a file of JSON; of a list of numbers, the mean.

    Raises:
        ConfigError: the file cannot be read, the place is not there, or no finite number is.
    """
    try:
        value: Any = read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}): remove its folder, and the run is made again"
        ) from error
    for key in keys.split("."):
        below = (
            value[int(key)] if isinstance(value, list) and key.isdigit() and int(key) < len(value) else None
        )
        below = value.get(key) if isinstance(value, dict) else below
        if below is None:
            there = list(value) if isinstance(value, dict) else type(value).__name__
            raise ConfigError(f"{file}: there is no {keys} ({key} is missing; there: {there})")
        value = below
    if isinstance(value, list) and value and all(isinstance(each, int | float) for each in value):
        value = fmean(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{file}: {keys} is {value!r}, not a number")
    return float(value)
