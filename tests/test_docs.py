"""What the pages say is true: links lead somewhere, commands bind to their signatures, Python runs, the site is built.

Pages are all Markdown of docs/, README, SECURITY, CONTRIBUTING and benchmarks/README. Python blocks are run in order,
page by page, on tiny random models that lie where the page says that they lie; a block after `<!-- not run: REASON -->`
is compiled and its calls are bound. No generator is needed but for the last test.
"""

import ast
import builtins
import importlib
import importlib.util
import inspect
import re
import shlex
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from vqlm.command import TEXT, Command, compose
from vqlm.errors import ConfigError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {name: target.partition(":")[0] for name, target in PROJECT["scripts"].items()}

NOT_RUN = re.compile(r"<!-- not run: [^>]+ -->")
PLACES = re.compile(r'"(runs/[\w./-]+)"')
# What a shell block may call that is not ours; what is given to it is not looked at.
FOREIGN = {"apt-get", "cd", "curl", "export", "git", "hf", "sbatch", "source", "tar"}


# --- pages ------------------------------------------------------------------------------------------------------


def module_of(path: Path):
    """A Python file outside of every package, imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site = module_of(DOCS / "extension.py")


@dataclass(frozen=True)
class Block:
    """A fenced block. before: the line of HTML above it, if any."""

    page: Path
    line: int
    language: str
    text: str
    before: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Page:
    """A Markdown file, as the site shows it."""

    def __init__(self, path: Path):
        self.path = path
        text = path.read_text(encoding="utf-8")
        self.tokens = (
            MarkdownIt("commonmark")
            .enable("table")
            .parse(site.filled(text) if DOCS in path.parents else text)
        )

    @property
    def links(self) -> list[str]:
        inside = [child for token in self.tokens for child in token.children or []]
        found = [each.attrs.get("href") or each.attrs.get("src") for each in inside]
        return [str(each) for each in found if each]

    @property
    def anchors(self) -> set[str]:
        """Names of headings as code hosts give them; a name that comes again is numbered."""
        found: set[str] = set()
        for opened, token in zip(self.tokens, self.tokens[1:], strict=False):
            if opened.type == "heading_open":
                words = "".join(each.content for each in token.children or [])
                name = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
                again = sum(
                    each == name or re.fullmatch(rf"{re.escape(name)}-\d+", each) is not None
                    for each in found
                )
                found.add(f"{name}-{again}" if again else name)
        return found

    def blocks(self, *languages: str) -> list[Block]:
        found, before = [], ""
        for token in self.tokens:
            if token.type == "fence" and token.info.partition(" ")[0] in languages:
                line = token.map[0] + 1 if token.map else 0
                found.append(Block(self.path, line, token.info, token.content, before))
            before = token.content.strip() if token.type == "html_block" else ""
        return found


@cache
def page(path: Path) -> Page:
    return Page(path)


SITE = sorted(DOCS.rglob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES = [*SITE, *OTHERS]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


# --- links ------------------------------------------------------------------------------------------------------


def leads_to(path: Path, link: str) -> str:
    """What is wrong with a link of a page, or ""."""
    if re.match(r"https?://|mailto:", link):
        return ""
    name, _, anchor = link.partition("#")
    target = (path.parent / name).resolve() if name else path
    if not target.exists():
        return f"{link}: there is no such file"
    if target != ROOT and ROOT not in target.parents:
        return f"{link}: leads out of the project"
    if anchor and anchor not in page(target).anchors:
        return (
            f"{link}: {target.name} has no such heading (it has: {', '.join(sorted(page(target).anchors))})"
        )
    return ""


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links_lead_somewhere(path):
    assert [wrong for link in page(path).links if (wrong := leads_to(path, link))] == []


def test_every_page_is_reached_from_the_first_one():
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        path = waiting.pop()
        if path in reached or path not in SITE:
            continue
        reached.add(path)
        waiting += [(path.parent / link.partition("#")[0]).resolve() for link in page(path).links]
    assert sorted(str(path.relative_to(DOCS)) for path in set(SITE) - reached) == []


def test_every_page_is_in_the_tables_of_contents():
    told = [
        block.page.parent / f"{line}.md"
        for path in SITE
        for block in page(path).blocks("{toctree}")
        for line in block.text.splitlines()
        if line and not line.startswith(":")
    ]
    assert sorted(told) == sorted(set(SITE) - {DOCS / "index.md"})


# --- shell ------------------------------------------------------------------------------------------------------


def calls(text: str) -> list[list[str]]:
    """The simple commands of a shell block, as words; assignments before a command are left out."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        found.append([])
        for word in shlex.split(line, comments=True):
            if word in ("&&", "|", ";"):
                found.append([])
            elif found[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
                found[-1].append(word)
    return [words for words in found if words]


def check_call(words: list[str]) -> None:
    """AssertionError or ConfigError where one of the project's commands would not take these words."""
    name, *rest = words
    name = name.removeprefix(".venv/bin/")
    if name in MODULES:
        check_command(MODULES[name], rest)
    elif name == "torchrun":
        at = rest.index("-m")
        check_command(rest[at + 1], rest[at + 2 :])
    elif name == "python":
        check_python(rest)
    elif name == "make":
        check_make(rest)
    elif name == "pip":
        extras = [each for word in rest for each in re.findall(r"^vqlm\[(.+)\]$", word)]
        assert set(extras) <= set(PROJECT["optional-dependencies"]), f"no extra {extras}"
    else:
        assert name in FOREIGN, f"{name}: no command of this project, nor one of {sorted(FOREIGN)}"


@cache
def command_of(module: str) -> Command:
    assert module in MODULES.values(), f"-m {module}: no command"
    return importlib.import_module(module).main


@cache
def check_words(module: str, words: tuple[str, ...]) -> None:
    """Composed and bound as for a run, up to the first path that is looked at."""
    compose(command_of(module), words)


def check_command(module: str, words: list[str]) -> None:
    if words[:2] == ["--config-dir", "mine"]:  # test_the_claim_that_a_page_writes_is_one
        return
    parameters = inspect.signature(command_of(module).function).parameters
    texts = {name for name, each in parameters.items() if each.annotation in TEXT}
    # Any words will do for text, so what differs in text alone is composed once.
    plain = [f"{key}=x" if (key := word.partition("=")[0]) in texts else word for word in words]
    check_words(module, tuple(sorted(plain)))


def check_python(words: list[str]) -> None:
    """A script or module of ours exists, and has the options that it is given."""
    if words[0] == "-m":
        file = ROOT.joinpath(*words[1].split(".")).with_suffix(".py")
        words = words[1:]
    else:
        file = ROOT / words[0]
    assert file.is_file(), f"{file}: there is no such file"
    source = file.read_text(encoding="utf-8")
    missing = [each for each in words[1:] if each.startswith("--") and f'"{each}"' not in source]
    assert not missing, f"{words[0]} has no {missing}"


def check_make(words: list[str]) -> None:
    told = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", told, re.MULTILINE))
    for word in words:
        variable, given, _ = word.partition("=")
        if given:
            assert f"{variable}=" in told, f"make {word}: the Makefile does not say what that is"
        else:
            assert word in targets, f"make {word}: no such target"


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_commands_would_be_taken(path):
    for block in page(path).blocks("sh"):
        for words in calls(block.text):
            try:
                check_call(words)
            except (AssertionError, ConfigError) as error:
                pytest.fail(f"{block.place}: {shlex.join(words)}: {error}")


@pytest.mark.parametrize(
    "line",
    [
        "vq-train quantiser=fsq",
        "vq-encode images=folder tokenizer=x",
        "lm-train store=x sampling.guidance=much",
        "vqlm-claim --config-dir yours experiment/claims=wider",
        "make tests",
        "make demo WHEELS=x",
        ".venv/bin/python benchmarks/generate.py --colour",
        "python -m lm.with_vlm x",
        "torchrun -m lm.trains store=x",
        'pip install "vqlm[server]"',
        "X=1 lm-sing model=x",
        "make smoke && vq-train outt=x",
    ],
)
def test_a_wrong_command_is_found(line):
    with pytest.raises((AssertionError, ConfigError)):
        for words in calls(line):
            check_call(words)


def test_the_claim_that_a_page_writes_is_one(tmp_path):
    from vqlm.claim import check_words, comparison
    from vqlm.experiment import Experiment

    (block,) = page(DOCS / "how-to/test_a_belief.md").blocks("yaml")
    told = yaml.safe_load(block.text)
    experiment = Experiment(told["steps"], told["cells"], told["figures"], told["pictures"], {})
    check_words(experiment, told["seeds"], tmp_path)
    assert [comparison(each, "holds", experiment).least for each in told["holds"]] == [0.0]
    claim = command_of("vqlm.claim")
    assert set(told) <= set(inspect.signature(claim.function).parameters)


# --- Python -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Name → folder: a flat bundle with the linear head, which every door opens; its tokenizer; a scorer; a store."""
    from tiny import make_model, make_tokenizer, write_made_store

    from lm.pipeline import Pipeline
    from vq.losses.semantic import Captioning, save_scorer

    folder = tmp_path_factory.mktemp("things")
    model, tokenizer = make_model("linear", "flat", grid=(2, 2))
    marks = model.form.vocabulary
    model.lm.generation_config.update(  # as a trained bundle has it
        bos_token_id=marks.bos, eos_token_id=marks.eos, pad_token_id=marks.pad
    )
    images = make_tokenizer()
    Pipeline(model, tokenizer, images).save_pretrained(folder / "model")
    save_scorer({"captioning": Captioning(dim=4)}, images, folder / "scorer")
    write_made_store(folder / "store", 12, 8)
    return {"model": folder / "model", "tokenizer": folder / "model/vq", "store": folder / "store"} | {
        "captioning": folder / "scorer/captioning"
    }


def prelude(things) -> dict[str, object]:
    """What pages use without making it."""
    import torch
    from PIL import Image

    from lm import Pipeline
    from vq import ImageTokenizer

    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    picture = Image.new("RGB", (16, 16), "red")
    tok = ImageTokenizer.from_pretrained(things["tokenizer"])
    return {
        "pixels": pixels,
        "codes": tok.encode(pixels),
        "picture": picture,
        "pictures": [picture, picture],
        "mask": Image.new("L", (16, 16), "white"),
        "pipe": Pipeline.from_pretrained(things["model"]),
    }


def put_in_place(text: str, things: dict[str, Path], folder: Path) -> None:
    """Folders of a run that a block opens."""
    for place in PLACES.findall(text):
        if (folder / place).exists():
            continue
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        if Path(place).name in things:
            (folder / place).symlink_to(things[Path(place).name], target_is_directory=True)


PYTHON = [path for path in PAGES if page(path).blocks("python")]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_runs(path, things, tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.chdir(tmp_path)
    names = prelude(things)
    for block in page(path).blocks("python"):
        if NOT_RUN.fullmatch(block.before):
            check_unrun(block, names)
            continue
        put_in_place(block.text, things, tmp_path)
        torch.manual_seed(0)  # for what draws with torch's own numbers
        try:
            exec(compile(block.text, block.place, "exec"), names)
        except Exception as error:
            pytest.fail(f"{block.place}: {type(error).__name__}: {error}")


def check_unrun(block: Block, names: dict[str, object]) -> None:
    """Its imports and names exist, and calls of what is known bind. What it makes is known to the blocks after it."""
    tree = ast.parse(block.text, block.place)
    imports: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), block.place, "exec"), names)
    made = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - made
    known = {*names, *dir(builtins), *re.findall(r"`(\w+)`", block.before)}
    assert used <= known, f"{block.place}: {used - known} not there"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            check_binding(node, names, block.place)
    names.update({name: None for name in made if name not in names})


def check_binding(call: ast.Call, names: dict[str, Any], place: str) -> None:
    """AssertionError where a function, or a method of an object at hand, does not exist or take these arguments."""
    words = ast.unparse(call.func)
    first, *attributes = words.split(".") if re.fullmatch(r"\w+(\.\w+)*", words) else [""]
    found = names.get(first)
    if found is None or any(isinstance(each, ast.Starred) for each in call.args):
        return
    for attribute in attributes:
        assert hasattr(found, attribute), f"{place}: {words}: no {attribute}"
        found = getattr(found, attribute)
    given = {each.arg: None for each in call.keywords if each.arg}
    try:
        inspect.signature(found).bind(*call.args, **given)
    except TypeError as error:
        pytest.fail(f"{place}: {words}: {error}")
    except ValueError:
        pass  # built in, without a signature


@pytest.mark.parametrize(
    "text",
    ["import vq.metricks", "pipe.draw('a')", "pipe.rank('a', image=picture)", "nothing('a')", "a = = b"],
)
def test_wrong_python_is_found(text, things):
    block = Block(DOCS / "index.md", 1, "python", text, "<!-- not run: wrong -->")
    with pytest.raises((AssertionError, ImportError, SyntaxError, pytest.fail.Exception)):
        check_unrun(block, prelude(things))


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_json_is_json(path):
    import json

    for block in page(path).blocks("json"):
        for line in block.text.splitlines():
            assert isinstance(json.loads(line), dict), block.place


# --- the site ---------------------------------------------------------------------------------------------------


def test_choices_and_commands_are_all_told():
    told = site.filled("<!-- made: choices --> <!-- made: commands -->")
    assert [name for name in MODULES if f"## {name}\n" not in told] == []
    groups = {path.parent for path in (ROOT / "conf").rglob("*.yaml")} - {ROOT / "conf"}
    assert len(groups) > 20
    assert [each for each in groups if f"## {each.relative_to(ROOT / 'conf').as_posix()}\n" not in told] == []
    assert "| `fsq` |" in told


def test_every_module_of_the_reference_is_there():
    told = [
        line.removeprefix(".. automodule:: ")
        for path in sorted((DOCS / "reference").glob("*.md"))
        for block in page(path).blocks("{eval-rst}")
        for line in block.text.splitlines()
    ]
    assert len(told) > 50
    assert [
        name
        for name in told
        if not ROOT.joinpath(*name.split(".")).with_suffix(".py").is_file()
        and not ROOT.joinpath(*name.split("."), "__init__.py").is_file()
    ] == []


def test_docstrings_of_this_project_are_readable():
    told = """One line with `code`s, a*b and x_BCHW_ in it.

        two   columns
        of    text

    Args:
        x: what `n` says,
            and more.

    - a point
      of two lines"""
    lines = told.splitlines()
    site.rewrite(None, "function", "name", None, {}, lines)
    assert lines == [
        "One line with ``code``\\ s, a\\*b and x_BCHW\\_ in it.",
        "",
        "::",
        "",
        "        two   columns",
        "        of    text",
        "",
        "Args:",
        "    x: what ``n`` says,",
        "        and more.",
        "",
        "- a point",
        "  of two lines",
        "",
        "",
    ]
    lines = ["K: codes in the book."]
    site.rewrite(None, "property", "name", None, {}, lines)
    assert lines[:3] == ["..", "", "K: codes in the book."]


@pytest.mark.filterwarnings(
    "ignore::PendingDeprecationWarning"
)  # what MyST and Sphinx will settle between them
def test_the_site_is_built_without_warnings(tmp_path):
    """All pages but what autodoc would say: importing and printing every module is left to `make docs`."""
    pytest.importorskip("sphinx", reason="the site's generator is not installed: make docs")
    pytest.importorskip("myst_parser", reason="the site's generator is not installed: make docs")
    from docutils.parsers.rst import Directive
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    class Nothing(Directive):
        required_arguments = 1

        def run(self):
            return []

    settings = {"extensions": ["myst_parser", "extension"], "html_theme": "basic"}
    with docutils_namespace():
        made = Sphinx(
            DOCS, DOCS, tmp_path, tmp_path / "trees", "dummy", settings, status=None, warningiserror=True
        )
        made.add_directive("automodule", Nothing, override=True)
        made.build()
    assert made.statuscode == 0
