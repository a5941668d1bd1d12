"""docs/reliability.md says what figures.json says."""

import pytest
from faults import report


def test_the_page_is_made_of_the_figures():
    if not report.FIGURES.exists():
        pytest.skip("no figures yet: make faults")
    assert report.PAGE.read_text(encoding="utf-8") == report.page(), "run python tests/faults/report.py"


def test_each_figure_comes_from_a_test_that_is_there():
    for each in report.load():
        file, _, name = each.test.partition("::")
        text = (report.PAGE.parents[1] / file).read_text(encoding="utf-8")
        assert f"def {name.partition('[')[0]}(" in text, each.test
