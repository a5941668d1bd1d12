"""The errors that decide a command's exit code, and the nearest-name hint that goes with them.

It does not know who raises them: no configuration, no files, no training.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """The user asked for something that cannot be: a wrong key, value, path or pair. A command exits with 2."""


class Interrupted(SystemExit):
    """SIGTERM came. A command exits with 143 (128 + 15), so that a scheduler sees that the work is not done.

    A SystemExit, so that neither `except Exception` nor a framework's own handler takes it for a fault.
    """

    def __init__(self) -> None:
        super().__init__(143)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The hint for a mistyped name.

    Dotted names are compared as a whole first, then by their last part: `size` finds `images.size`.

    Args:
        name: what was typed.
        allowed: the names that would have been right.

    Returns:
        "; did you mean 'x'?" or, where nothing is near, "".
    """
    names = [str(each) for each in allowed]
    found = get_close_matches(name, names, n=1, cutoff=0.6)
    if not found:
        by_last_part = {each.rpartition(".")[2]: each for each in reversed(names)}
        last_part = name.rpartition(".")[2]
        found = [by_last_part[each] for each in get_close_matches(last_part, by_last_part, n=1, cutoff=0.75)]
    return f"; did you mean {found[0]!r}?" if found else ""
