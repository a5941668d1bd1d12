"""What every model card has: front matter, tables, and strings of strangers made harmless. It knows no models."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData

from vqlm.errors import ConfigError

LONGEST = 500  # characters of a given string in a card
# On one line: a line of dashes would end the front matter.
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,99}")
MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-.!|~$>:@])")


def front_matter(license: str | None, tags: Sequence[str], pipeline_tag: str | None) -> str:
    """The YAML block that the hub reads, between its lines of dashes. No license key where none was given."""
    if license is not None and not (isinstance(license, str) and LICENCE.fullmatch(license)):
        raise ConfigError(f"license={license!r}: a licence as the hub names it, such as apache-2.0, or None")
    data = ModelCardData(
        license=license, library_name="vqlm", tags=list(tags), pipeline_tag=pipeline_tag
    ).to_yaml()
    return f"---\n{data}\n---\n"


def plain(text: Any) -> str:
    """A given string → Markdown that shows it as it is, on one line: no markup, no HTML, no link."""
    words = " ".join(str(text).split())[:LONGEST]
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return MARKUP.sub(r"\\\1", words)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already; empty without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(found: Any, *names: str, form: str = ".3f") -> str:
    """A number deep in measured values, formatted; "–" where there is none."""
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return "–"
    return format(found, form)


def licence_line(license: str | None) -> str:
    """What a card says of a licence at its end."""
    if license is None:
        return "None was given: ask whoever uploaded this before you use it."
    return f"{plain(license)}, as given by whoever uploaded this. Training data may have terms of its own."
