"""`lm-generate`'s files: named by prompt and seed, saying how they were drawn, never over pictures drawn otherwise."""

import json

import pytest
from PIL import Image
from tiny import make_model, make_tokenizer

from lm import Pipeline
from lm.generate import generate

SETTINGS = dict.fromkeys(
    ("temperature", "top_k", "top_p", "min_p", "deeper", "parallel", "norm", "ramp", "size")
)
SETTINGS |= {"prompt": "A red apple!", "n": 2, "guidance": None, "best_of": 1, "seed": 7, "device": "cpu"}


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """draw(folder, guidance=3.0): what is in the folder afterwards, name → bytes."""
    bundle = str(tmp_path_factory.mktemp("model"))
    model, tokenizer = make_model()
    Pipeline(model, tokenizer, make_tokenizer()).save_pretrained(bundle)

    def run(folder, **changes):
        generate(**{"model": bundle, **SETTINGS, "out": str(folder), **changes})
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return run


def test_pictures_that_were_drawn_otherwise_are_kept(draw, tmp_path):
    names = [f"a-red-apple-7-{end}.png" for end in ("000", "001", "sheet")]
    first = draw(tmp_path)
    assert sorted(first) == names
    assert draw(tmp_path) == first  # the same again
    assert sorted(draw(tmp_path, n=3)) == sorted([*names, "a-red-apple-7-002.png"])  # more of the same
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    after = draw(tmp_path, guidance=3.0, temperature=0.5)
    assert before.items() <= after.items()
    assert sorted(set(after) - set(before)) == [
        f"a-red-apple-7-2-{end}.png" for end in ("000", "001", "sheet")
    ]
    assert draw(tmp_path, guidance=3.0, temperature=0.5) == after


@pytest.mark.parametrize("there", [b"", b"no picture"])
def test_a_file_of_somebody_else_is_kept(draw, tmp_path, there):
    (tmp_path / "a-red-apple-7-sheet.png").write_bytes(there)
    assert "a-red-apple-7-2-sheet.png" in draw(tmp_path)
    assert (tmp_path / "a-red-apple-7-sheet.png").read_bytes() == there


def test_a_file_says_how_it_was_drawn(draw, tmp_path):
    draw(tmp_path, prompt="été", guidance=2.0)
    with Image.open(tmp_path / "t-7-000.png") as picture:
        told = json.loads(picture.info["vqlm"])
    assert (told["prompt"], told["guidance"], told["temperature"], told["seed"]) == ("été", 2.0, 1.0, 7)
