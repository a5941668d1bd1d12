"""What the site makes of the code when it is built: the pages on commands and choices, and readable docstrings.

A page that holds `<!-- made: commands -->` or `<!-- made: choices -->` gets the text there, from pyproject.toml, the
commands' docstrings and the YAML files in conf/; nothing is written down twice. Docstrings are written for people who
read the code: `name` for code, indented lines as they stand. Sphinx reads reStructuredText, where these mean other
things. Knows nothing of what the commands do.
"""

import ast
import inspect
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
# Links to LOG.md, SECURITY.md and their like, which are no pages of the site.
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[A-Z]+\.md)\)")
MADE = re.compile(r"<!-- made: (\w+) -->")
SECTION = re.compile(r"(Args|Arguments|Attributes|Returns|Raises|Yields|Note|Notes|Example|Examples):$")
LITERAL = re.compile(r"(`[^`]+`)")


def setup(app):
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", rewrite, priority=400)  # before napoleon's 500
    return {"parallel_read_safe": True}


def fill(app, name, source):
    """Put what is made in its places; files of the repository's root, no pages of the site, are offered as files."""
    source[0] = OUTSIDE.sub(
        lambda link: f"{{download}}`{link[1].replace('`', '')} <{link[2]}>`", filled(source[0])
    )


def filled(text: str) -> str:
    """A page with what is made at build time."""
    return MADE.sub(lambda place: {"commands": commands, "choices": choices}[place[1]](), text)


# --- pages ------------------------------------------------------------------------------------------------------


def commands() -> str:
    """A section for each command: the docstring of its file, and the YAML that holds its settings."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    return "\n".join(command(name, target.partition(":")[0]) for name, target in scripts.items())


def command(name: str, module: str) -> str:
    path = CONF / f"{name.replace('-', '_')}.yaml"
    settings = path.read_text(encoding="utf-8").strip()
    return f"## {name}\n\n{docstring(module)}\n\n```yaml\n{settings}\n```\n"


def docstring(module: str) -> str:
    """Of a module's file, which is not imported."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return told.replace("<", "&lt;")


def choices() -> str:
    """A section for each group of conf/: its members, and what their files say of themselves."""
    groups = sorted({path.parent for path in CONF.rglob("*.yaml") if path.parent != CONF})
    return "\n".join(group(folder) for folder in groups)


def group(folder: Path) -> str:
    rows = [
        f"| `{path.stem}` | {heading(path).replace('|', chr(92) + '|')} |"
        for path in sorted(folder.glob("*.yaml"))
    ]
    name = folder.relative_to(CONF).as_posix()
    return "\n".join([f"## {name}", "", f"| `{name}=` | |", "|---|---|", *rows, ""])


def heading(path: Path) -> str:
    """The comment at the top of a YAML file."""
    told = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            told.append(line.lstrip("# "))
    return " ".join(told).replace("<", "&lt;")


# --- docstrings -------------------------------------------------------------------------------------------------


def rewrite(app, what, name, thing, options, lines):
    """A docstring as it is written here → reStructuredText. Lists of Args and their like are left to napoleon."""
    lines[:] = [*restructured(inspect.cleandoc("\n".join(lines)).splitlines()), ""]
    if what in ("attribute", "data", "property"):
        lines[:0] = [
            "..",
            "",
        ]  # an empty comment: napoleon would take "K: codes in the book" for a type and its text


def restructured(lines: list[str]) -> list[str]:
    made: list[str] = []
    in_section = False
    for block in blocks(lines):
        in_section = bool(SECTION.match(block[0])) or (in_section and block[0].startswith(" "))
        if in_section or block[0].startswith(("- ", "* ")) or even(block):
            made += [escaped(line) for line in block]
        else:
            made += ["::", "", *(f"    {line}" for line in block)]
        made.append("")
    return made


def blocks(lines: list[str]) -> list[list[str]]:
    """Runs of lines without an empty one. A section or a list begins a run of its own."""
    found: list[list[str]] = [[]]
    for line in lines:
        starts = SECTION.match(line) or line.startswith("- ")
        if starts and found[-1] and not found[-1][0].startswith("- "):
            found.append([])
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [block for block in found if block]


def even(block: list[str]) -> bool:
    """Plain prose: no line of it is indented."""
    return not any(line.startswith(" ") for line in block)


def escaped(line: str) -> str:
    """Nothing but `code` has a meaning."""
    parts = LITERAL.split(line)
    plain = [re.sub(r"([\\*|`]|_(?!\w))", r"\\\1", part) for part in parts[::2]]
    code = [f"``{part[1:-1]}``" for part in parts[1::2]]
    return "".join(
        before + (after and around(after, before, plain[n + 1]))
        for n, (before, after) in enumerate(zip(plain, [*code, ""], strict=True))
    )


def around(code: str, before: str, after: str) -> str:
    """Marks of code must not touch a letter."""
    left = "\\ " if before and not before[-1].isspace() and before[-1] not in "([{'\"-/:<" else ""
    right = "\\ " if after and not after[0].isspace() and after[0] not in ")]}'\"-/:.,;!?>" else ""
    return left + code + right
