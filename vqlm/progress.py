"""Progress bars: what is happening and how long it will take. On a file or pipe, a line now and then instead."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 20


def bar(total: int | None, what: str, unit: str, hidden: bool = False) -> Any:
    """A tqdm bar to `update`, on stderr. total: None where nobody knows. unit: what is counted, in the plural."""
    return tqdm(
        total=total, desc=what, unit=f" {unit}", disable=hidden, **_lines(", {n_fmt}/{total_fmt}{unit}")
    )


def percent(what: str) -> Any:
    """A bar from 0 to 100, whose postfix says more."""
    drawn: dict[str, Any] = {
        "bar_format": "{desc} {percentage:3.0f}%|{bar:24}| {elapsed}<{remaining} {postfix}"
    }
    return tqdm(total=100.0, desc=what, **{**drawn, **_lines("{postfix}")})


def _lines(more: str) -> dict[str, Any]:
    """What makes a bar print lines, where nobody watches it being redrawn."""
    if sys.stderr.isatty():
        return {}
    form = "{desc}: {percentage:3.0f}%, {elapsed} gone, {remaining} to go" + more + "\n"
    return {"bar_format": form, "mininterval": SECONDS_BETWEEN_LINES}
