"""Faults and their figures: each test of this folder reports one line, and `make faults` keeps all of them.

FAULTS=full raises the counts of every test to those that docs/reliability.md tells, and writes what was found to
figures.json, beside this file, from which that page's table is made (report.py). Without it the counts are small and
nothing is written. Knows no fault; tests/conftest.py gathers the lines.
"""

from dataclasses import asdict

import pytest
from faults.report import FULL, Figure


@pytest.fixture(scope="session")
def count():
    """count(fast, full): how many trials this run makes."""
    return lambda fast, full: full if FULL else fast


@pytest.fixture
def figure(request):
    """figure("C.1", "kill -9 while saving", "what we do", "50/50 resume", {"torch.save": "3/50"}): reports a line."""

    def report(fault, name, does, ours, stock=None):
        found = Figure(fault, name, does, ours, stock or {}, request.node.nodeid)
        request.node.user_properties.append(("figure", asdict(found)))

    return report
