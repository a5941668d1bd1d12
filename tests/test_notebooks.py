"""The notebooks run from top to bottom on tiny models, show pictures, and say the same in both of their forms."""

import os
import sys
from pathlib import Path

import jupytext
import nbclient
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from tiny import make_model, make_tokenizer

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = ["tokenizer", "generation"]


class ThisPython(AsyncKernelManager):
    """A kernel of the interpreter that runs the tests, whatever kernels are installed on the machine."""

    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel_spec = KernelSpec(argv=argv, display_name="tests", language="python")


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory):
    """A bundle with random weights; its vq/ is an image tokenizer."""
    from lm.pipeline import Pipeline

    folder = tmp_path_factory.mktemp("bundle") / "model"
    model, tokenizer = make_model()
    Pipeline(model, tokenizer, make_tokenizer()).save_pretrained(folder)
    return folder


def run(name, bundle, folder):
    """Execute the .ipynb in an empty folder; returns it with its outputs. An error in a cell raises."""
    notebook = jupytext.read(FOLDER / f"{name}.ipynb")
    environment = {
        **os.environ,
        "VQLM_MODEL": str(bundle),
        "VQLM_TOKENIZER": str(bundle / "vq"),
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(folder / "ipython"),
    }
    client = nbclient.NotebookClient(
        notebook, timeout=120, km=ThisPython(), resources={"metadata": {"path": str(folder)}}
    )
    return client.execute(env=environment)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_and_shows_pictures(name, tiny_bundle, tmp_path):
    done = run(name, tiny_bundle, tmp_path)
    code = [cell for cell in done.cells if cell.cell_type == "code" and cell.source.strip()]
    assert all(cell.execution_count for cell in code)
    shown = [o for o in outputs(done) if "image/png" in o.get("data", {})]
    assert len(shown) >= 3
    assert not [o for o in outputs(done) if o.output_type == "error"]
    assert {path.name for path in tmp_path.iterdir()} <= {"ipython"}  # it leaves nothing where it is run


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_of_a_notebook_hold_the_same_cells(name):
    script, notebook = (jupytext.read(FOLDER / f"{name}.{end}") for end in ("py", "ipynb"))
    cells = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (script, notebook)]
    assert cells[0] == cells[1], f"make them again: jupytext --to ipynb notebooks/{name}.py"


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_kept_small(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 500_000


def test_every_notebook_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(NAMES)
