"""What a benchmark found, said once: as text, as benchmarks/results/NAME.json, and read again for the READMEs.

A result is a question, what was found in one sentence, and tables whose cells are text, so that whoever prints them
knows no benchmark. This file knows none either, and it does not import torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vqlm.files import read_json, write_json
from vqlm.machine import machine as machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Table:
    """columns: names; the first column names the rows. rows: a cell of text for each column.

    Raises:
        ValueError: a row is not as long as there are columns.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]

    def __post_init__(self) -> None:
        if wrong := [row for row in self.rows if len(row) != len(self.columns)]:
            raise ValueError(f"table {self.title!r}: {len(self.columns)} columns, but a row is {wrong[0]}")

    def __str__(self) -> str:
        """The first column to the left, the others to the right."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [
            "  ".join(
                f"{cell:{'<' if n == 0 else '>'}{width}}"
                for n, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in [self.columns, *self.rows]
        ]
        return "\n".join([self.title, *lines] if self.title else lines)


@dataclass(frozen=True)
class Result:
    """One run of a benchmark. command: as it was typed; date: ISO, UTC; machine: see `vqlm.machine`."""

    question: str
    found: str
    command: str
    date: str
    machine: dict[str, Any]
    tables: list[Table]

    @classmethod
    def read(cls, path: str | Path) -> Result:
        """Raises ValueError, which names the file, where it does not hold a result."""
        try:
            told = read_json(path)
            return cls(**{**told, "tables": [Table(**each) for each in told["tables"]]})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: not a result of a benchmark: {type(error).__name__}: {error}"
            ) from error


def told(facts: dict[str, Any]) -> str:
    """Facts as one line; facts within facts follow, and what is not known is left out."""
    plain = [f"{key} {value}" for key, value in facts.items() if not isinstance(value, dict | None)]
    return ", ".join(plain + [told(value) for value in facts.values() if isinstance(value, dict) and value])


def add_out(parser: argparse.ArgumentParser, script: str) -> None:
    """`--out [FILE]`: where `keep` writes; nothing is written without it."""
    default = RESULTS / f"{Path(script).stem}.json"
    parser.add_argument(
        "--out",
        type=Path,
        nargs="?",
        const=default,
        help=f"also write JSON (results/{default.name} if not named)",
    )


def keep(
    out: Path | None, doc: str | None, about: dict[str, Any], found: str, tables: Iterable[Table]
) -> None:
    """Write a result, if it is asked for. doc: the script's docstring, whose first line is the question."""
    if out is not None:
        question = (doc or "").partition("\n")[0]
        date = datetime.now(UTC).date().isoformat()
        write_json(out, asdict(Result(question, found, typed(sys.argv), date, about, list(tables))))


def typed(words: Sequence[str]) -> str:
    """The command that runs a script with these words, without what belongs to this machine: folders outside ROOT."""
    return " ".join(["python", f"benchmarks/{Path(words[0]).name}", *(map(_portable, words[1:]))])


def _portable(word: str) -> str:
    path = Path(word)
    if path.is_absolute():
        word = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return json.dumps(word) if " " in word else word
