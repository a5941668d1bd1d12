"""The notebooks run from top to bottom, show pictures, hold their outputs, and say the same in both of their forms.

    python tests/test_notebooks.py [NAME …]     # make .ipynb of .py again, with outputs: minutes

Here they run with tiny models where they ask for one, and train for a fifth of their batches; what is committed comes
from a run as it is.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = ["tokenizer", "training", "generation", "interleaved", "own_llm"]
LARGEST = 600_000  # bytes
MACHINE = re.compile(r"/(home|root|tmp|work|Users)/|site-packages")  # what only one machine has
BATCHES = re.compile(r"(?<=Budget\(batches=)\d+|(?<=STEPS := )\d+")  # of what a notebook trains
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")


class ThisPython(AsyncKernelManager):
    """A kernel of the interpreter that runs the tests, whatever kernels are installed on the machine."""

    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel_spec = KernelSpec(argv=argv, display_name="tests", language="python")


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory):
    """A bundle with random weights; its vq/ is an image tokenizer."""
    from tiny import make_model, make_tokenizer

    from lm.pipeline import Pipeline

    folder = tmp_path_factory.mktemp("bundle") / "model"
    model, tokenizer = make_model()
    Pipeline(model, tokenizer, make_tokenizer()).save_pretrained(folder)
    return folder


def run(notebook, folder, **environment):
    """Execute a notebook in an empty folder; returns it with its outputs. An error in a cell raises."""
    client = nbclient.NotebookClient(
        notebook, timeout=240, km=ThisPython(), resources={"metadata": {"path": str(folder)}}
    )
    told = {"IPYTHONDIR": str(folder / "ipython"), "PYTHONWARNINGS": "ignore:IProgress not found"}
    return client.execute(env={**os.environ, **told, **environment})


def shortened(notebook):
    """The notebook with a fifth of its training: what is drawn then is worse, and drawn by the same cells."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = BATCHES.sub(lambda number: str(int(number[0]) // 5), cell.source)
    return notebook


def write(name):
    """The .ipynb of a .py, run as it is."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    notebook.metadata["jupytext"] = {"formats": "ipynb,py:percent"}
    with tempfile.TemporaryDirectory() as folder:
        run(notebook, Path(folder))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    for output in outputs(notebook):
        if "image/png" in output.get("data", {}):
            output.data.pop("image/jpeg", None)  # Pillow offers both
    jupytext.write(notebook, FOLDER / f"{name}.ipynb")


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def check(notebook):
    """All of it ran, it shows pictures, and nothing went wrong."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert all(cell.execution_count for cell in code)
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) >= 3
    assert not [output for output in outputs(notebook) if output.output_type == "error"]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_and_shows_pictures(name, tiny_bundle, tmp_path):
    tiny = {"VQLM_MODEL": str(tiny_bundle), "VQLM_TOKENIZER": str(tiny_bundle / "vq"), "OMP_NUM_THREADS": "1"}
    check(run(shortened(jupytext.read(FOLDER / f"{name}.ipynb")), tmp_path, **tiny))
    assert {path.name for path in tmp_path.iterdir()} <= {"ipython"}  # it leaves nothing where it is run


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_committed_and_clean(name):
    notebook = jupytext.read(FOLDER / f"{name}.ipynb")
    check(notebook)
    noise = [o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stderr"]
    assert not noise
    told = [str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs(notebook)]
    assert not [each for each in told if MACHINE.search(each)]
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_of_a_notebook_hold_the_same_cells(name):
    script, notebook = (jupytext.read(FOLDER / f"{name}.{end}") for end in ("py", "ipynb"))
    cells = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (script, notebook)]
    assert cells[0] == cells[1], f"make it again: python tests/test_notebooks.py {name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_ends_with_what_to_try_next_and_its_links_lead_somewhere(name):
    notebook = jupytext.read(FOLDER / f"{name}.py")
    assert notebook.cells[-1].source.startswith("## What to try next")
    links = [
        link for cell in notebook.cells if cell.cell_type == "markdown" for link in LINK.findall(cell.source)
    ]
    assert links
    assert not [link for link in links if not (FOLDER / link).exists()]


@pytest.mark.parametrize(("name", "budgets"), [("training", 2), ("own_llm", 3), ("interleaved", 2)])
def test_what_trains_is_shortened(name, budgets):
    """A budget in other words would be trained in full, minutes of it."""
    cells = [cell.source for cell in jupytext.read(FOLDER / f"{name}.py").cells]
    assert sum(len(BATCHES.findall(cell)) for cell in cells) == budgets
    assert sum(cell.count("Budget(") + cell.count("STEPS :=") for cell in cells) == budgets


def test_every_notebook_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(NAMES)


if __name__ == "__main__":
    for each in sys.argv[1:] or NAMES:
        write(each)
