"""What every test runs under, and the fixtures that rooms share; the tiny things themselves are in tiny.py."""

import os

# Before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
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
