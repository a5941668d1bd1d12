"""docs/doors.md: every block of Python runs, in its order, on stand-ins of the folders that it names."""

import re
from pathlib import Path

import pytest
from tiny import make_model, make_tokenizer

from lm import Pipeline

PAGE = Path(__file__).parents[2] / "docs" / "doors.md"


class NoHub:
    """Takes uploads and keeps nothing."""

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, *, private, exist_ok):
        assert private

    def upload_folder(self, *, repo_id, **more):
        return f"https://hub/{repo_id}"


@pytest.mark.skipif(not PAGE.is_file(), reason="the page lies in the repository alone")
def test_the_page_runs(tmp_path, monkeypatch):
    model, tokenizer = make_model("linear", "flat")
    Pipeline(model, tokenizer, make_tokenizer()).save_pretrained(tmp_path / "runs/lm/model")
    make_tokenizer().save_pretrained(tmp_path / "runs/vq/tokenizer")
    (tmp_path / "runs/vq/metrics.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vqlm.hub.HfApi", NoHub)

    def ask(ids, sampling):
        return sampling["allowed_token_ids"][: sampling["max_tokens"]]

    names = {"ask": ask}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 6 and isinstance(names["words"], str) and names["apple"].size == (16, 16)
    assert names["inputs"]["input_ids"].shape[0] == 1 and names["picture"].size == (16, 16)
