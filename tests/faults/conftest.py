"""Faults and their figures: each test of this folder reports one line, and `make faults` keeps all of them.

FAULTS=full raises the counts of every test to those that docs/reliability.md tells, and writes what was found to
figures.json, beside this file, from which that page's table is made (report.py). Without it the counts are small and
nothing is written. Knows no fault.
"""

import os

import pytest
from faults.report import Figure, keep

FULL = os.environ.get("FAULTS") == "full"
FOUND: list[Figure] = []


@pytest.fixture(scope="session")
def count():
    """count(fast, full): how many trials this run makes."""
    return lambda fast, full: full if FULL else fast


@pytest.fixture
def figure(request):
    """figure("C.1", "kill -9 while saving", "what we do", "50/50 resume", {"torch.save": "3/50"}): reports a line."""

    def report(fault, name, does, ours, stock=None):
        FOUND.append(Figure(fault, name, does, ours, stock or {}, request.node.nodeid))

    return report


def pytest_terminal_summary(terminalreporter):
    if FOUND:
        terminalreporter.section(f"faults, {'full' if FULL else 'fast'} counts")
        for each in sorted(FOUND):
            terminalreporter.write_line(each.line())


def pytest_sessionfinish(exitstatus):
    if FULL and FOUND:
        keep(FOUND)
