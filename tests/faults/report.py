"""Figures of faults ↔ figures.json → the table of docs/reliability.md. `python tests/faults/report.py` rebuilds it.

No number of that page is typed by hand; test_report.py compares the page with the file. Knows no fault.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from vqlm.files import write_json, write_text

FULL = os.environ.get("FAULTS") == "full"
FIGURES = Path(__file__).with_name("figures.json")
PAGE = Path(__file__).resolve().parents[2] / "docs/reliability.md"
BEGIN, END = "<!-- made by tests/faults/report.py: begin -->", "<!-- end -->"
LIBRARIES = ("torch", "lightning", "transformers", "datasets", "vector-quantize-pytorch", "hydra-core")


@dataclass(frozen=True)
class Figure:
    """fault: its number, such as "C.1". stock: library → its figure, measured in the same run. test: node id."""

    fault: str
    name: str
    does: str
    ours: str
    stock: dict[str, str]
    test: str

    def __lt__(self, other: Figure) -> bool:
        return self.place < other.place

    @property
    def place(self) -> tuple[int, str]:
        return int(self.fault.removeprefix("C.")), self.name

    def line(self) -> str:
        stock = ", ".join(f"{name} {told}" for name, told in self.stock.items())
        return f"{self.fault} {self.name}: {self.ours}" + (f" ({stock})" if stock else "")

    def row(self) -> str:
        stock = "<br>".join(f"{name}: {told}" for name, told in self.stock.items()) or "–"
        cells = (self.fault, self.name, self.does, self.ours, stock)
        return "| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |"


def keep(found: list[Figure]) -> None:
    """Put new figures beside those of other tests, and rebuild the page."""
    renewed = {each.test for each in found}
    figures = sorted([each for each in load() if each.test not in renewed] + found)
    libraries = {name: version(name) for name in LIBRARIES}
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    about = {"python": platform.python_version(), "machine": machine, **libraries}
    write_json(FIGURES, {"measured_with": about, "figures": [asdict(each) for each in figures]})
    write_text(PAGE, page())


def load() -> list[Figure]:
    if not FIGURES.exists():
        return []
    return [Figure(**each) for each in json.loads(FIGURES.read_text(encoding="utf-8"))["figures"]]


def page() -> str:
    """The page with its table as the figures say."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    about = json.loads(FIGURES.read_text(encoding="utf-8"))["measured_with"]
    machine = ", ".join([about.pop("machine"), *(f"{name} {number}" for name, number in about.items())])
    head = "| | fault | what is done | figure | the stock library, same run |\n|---|---|---|---|---|"
    rows = "\n".join(each.row() for each in load())
    return f"{before}{BEGIN}\n{head}\n{rows}\n\nMeasured on {machine}.\n{END}{after}"


if __name__ == "__main__":
    write_text(PAGE, page())
