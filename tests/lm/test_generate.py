"""`lm-generate`'s files: named by prompt and seed, saying how they were drawn, never over pictures drawn otherwise."""

import json
import shutil
import struct
import zlib

import pytest
from PIL import Image
from tiny import make_model, make_tokenizer

from lm import Pipeline
from lm.generate import generate

SETTINGS = dict.fromkeys(
    ("temperature", "top_k", "top_p", "min_p", "deeper", "parallel", "norm", "ramp", "size")
)
SETTINGS |= {"prompt": "A red apple!", "n": 2, "guidance": None, "best_of": 1, "seed": 7, "device": "cpu"}


def save_model(folder, seed=0):
    model, tokenizer = make_model(seed=seed)
    Pipeline(model, tokenizer, make_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """draw(folder, guidance=3.0): what is in the folder afterwards, name → bytes."""
    bundle = save_model(tmp_path_factory.mktemp("model") / "model")

    def run(folder, model=bundle, **changes):
        generate(**{"model": model, **SETTINGS, "out": str(folder), **changes})
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


def bomb():
    """A PNG whose header promises 1.6 gigapixels."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize("end", ["sheet", "000"])
@pytest.mark.parametrize("there", [b"", b"no picture", bomb()], ids=["empty", "text", "bomb"])
def test_a_file_of_somebody_else_is_kept(draw, tmp_path, there, end):
    (tmp_path / f"a-red-apple-7-{end}.png").write_bytes(there)
    assert "a-red-apple-7-2-sheet.png" in draw(tmp_path)
    assert (tmp_path / f"a-red-apple-7-{end}.png").read_bytes() == there


def test_pictures_of_a_model_that_was_trained_again_are_kept(draw, tmp_path):
    before = draw(tmp_path / "out", bundle := save_model(tmp_path / "model", seed=0))
    shutil.rmtree(bundle)
    after = draw(tmp_path / "out", save_model(tmp_path / "model", seed=1))
    assert before.items() <= after.items() and len(after) == 2 * len(before)


def test_a_file_says_how_it_was_drawn(draw, tmp_path):
    draw(tmp_path, prompt="été", guidance=2.0)
    with Image.open(tmp_path / "t-7-000.png") as picture:
        told = json.loads(picture.info["vqlm"])
    assert (told["prompt"], told["guidance"], told["temperature"], told["seed"]) == ("été", 2.0, 1.0, 7)
