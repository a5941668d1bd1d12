"""What every test runs under, and the fixtures that rooms share; the tiny things themselves are in tiny.py.

Tests may run in several processes (`make test`), each file in one of them. Then this file is read in the process that
hands them out too, the one that sees every report; conftest files further down are not.
"""

import os

# Before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
from faults.report import FULL, Figure, keep
from tiny import make_model, make_tokenizer, write_pictures


@pytest.fixture
def tiny_tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """48 captioned drawings in the imagefolder convention: "a red circle, inset 1"."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def bundle(tmp_path):
    """A folder that Pipeline.from_pretrained loads: random weights, 16 px pictures."""
    from lm.pipeline import Pipeline

    model, tokenizer = make_model()
    Pipeline(model, tokenizer, make_tokenizer()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --- order ----------------------------------------------------------------------------------------------------

# Where files are handed out one after the other, the longest go first, so that no process is left with one at the end.
LONGEST = (
    "tests/test_journey.py",
    "tests/test_notebooks.py",
)


def pytest_collection_modifyitems(items):
    """Longest files first; all else, and the tests within a file, in the order in which they were found."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


# --- figures of faults (tests/faults) ---------------------------------------------------------------------------

FOUND: list[Figure] = []


def pytest_runtest_logreport(report):
    """A report carries its test's figures from the process that ran it to the one that prints and keeps them."""
    if report.when == "call":
        FOUND.extend(Figure(**told) for name, told in report.user_properties if name == "figure")


def pytest_terminal_summary(terminalreporter):
    if FOUND:
        terminalreporter.section(f"faults, {'full' if FULL else 'fast'} counts")
        for each in sorted(FOUND):
            terminalreporter.write_line(each.line())


def pytest_sessionfinish(session):
    hands_out = not hasattr(session.config, "workerinput")
    if FULL and FOUND and hands_out:
        keep(FOUND)
