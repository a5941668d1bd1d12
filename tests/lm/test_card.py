"""Cards and uploads: what is said was measured or given, what is sent is the bundle, strangers' words stay words."""

import json
import re
from pathlib import Path

import pytest
import yaml
from tiny import make_model, make_tokenizer

from lm import Pipeline
from vq import ImageTokenizer
from vqlm.card import plain
from vqlm.errors import ConfigError
from vqlm.hub import local_folder

METRICS = {
    "run": {"batches": 700, "documents": 12345, "parameters": 1},
    "sampling": {"guidance": 1.2, "temperature": 0.3, "top_k": 0, "top_p": 1.0, "seed": 0},
    "train": {
        "image_bits": 4.125,
        "text_bits": float("nan"),
        "drawing": {"captions": 1200, "among_ten_nearest": 0.875, "chance": 0.0025},
        "captioning": {"word_f1": 0.51},
    },
    "text": {"before": {"perplexity": 20.0}, "after": {"perplexity": 21.5}},
}


class FakeHub:
    """Notes what is asked, and what lies in the folder at that moment."""

    def __init__(self):
        self.made, self.sent, self.texts = [], [], {}

    def create_repo(self, repo_id, *, private, exist_ok):
        self.made.append((repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        from huggingface_hub.utils import filter_repo_objects

        there = [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()]
        self.sent = sorted(filter_repo_objects(there, allow_patterns=allow_patterns))
        self.left = sorted(set(there) - set(self.sent))
        self.texts = {n: Path(folder_path, n).read_text() for n in self.sent if n.endswith((".md", ".json"))}
        return f"https://hub/{repo_id}"


def pipeline(head="layered", layout="stacked", metrics=METRICS):
    model, tokenizer = make_model(head, layout)
    return Pipeline(model, tokenizer, make_tokenizer(), metrics=dict(metrics))


def front(card):
    _, block, _ = card.split("---\n", 2)
    return yaml.safe_load(block)


@pytest.fixture
def finite():
    """Metrics that JSON can hold."""
    return {**METRICS, "train": {**METRICS["train"], "text_bits": None}}


@pytest.mark.parametrize(("head", "layout"), [("depth_transformer", "stacked"), ("linear", "flat")])
def test_what_is_uploaded_is_the_bundle(head, layout, finite, tmp_path):
    pipe, hub = pipeline(head, layout, finite), FakeHub()
    assert pipe.push_to_hub("someone/drawer", license="cc-by-4.0", hub=hub) == "https://hub/someone/drawer"
    assert hub.made == [("someone/drawer", True, True)]
    own = ["processor_config.json"] if layout == "flat" else ["head.safetensors"]
    always = ["README.md", "config.json", "generation_config.json", "metrics.json", "model.safetensors"]
    always += [
        "multimodal.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vq/config.json",
        "vq/model.safetensors",
    ]
    assert hub.sent == sorted(always + own) and not hub.left
    assert json.loads(hub.texts["metrics.json"]) == finite
    assert front(hub.texts["README.md"])["license"] == "cc-by-4.0"
    assert "'someone/drawer'" in hub.texts["README.md"]
    pipe.push_to_hub("someone/drawer", private=False, hub=hub)
    assert hub.made[1] == ("someone/drawer", False, True)


def test_numbers_travel_with_the_bundle_and_nothing_else_does(finite, tmp_path):
    """Saved, loaded, uploaded: the numbers are there; what somebody laid into the folder is not."""
    pipeline(metrics=finite).save_pretrained(tmp_path / "model")
    for name in ("checkpoints/last.ckpt", "optimizer.pt", "evil.py", "notes.txt", "vq/secret.json"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("x")
    pipe, hub = Pipeline.from_pretrained(tmp_path / "model"), FakeHub()
    assert pipe.metrics == finite
    pipe.push_to_hub("a/b", hub=hub)
    assert not [n for n in hub.sent if "ckpt" in n or n.endswith((".pt", ".py", ".txt")) or "secret" in n]
    assert "87.5%" in hub.texts["README.md"]
    for text in ("[1]", "{", "[" * 100_000):
        (tmp_path / "model" / "metrics.json").write_text(text)
        with pytest.raises(ConfigError, match=r"metrics\.json is damaged"):
            Pipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("repo_id", ["drawer", "", "a/b/c", "../b", "a/b c", "-/x", None, "a/" + "b" * 200])
def test_a_name_that_is_none_is_refused_before_anything_is_sent(repo_id):
    for part in (pipeline(), make_tokenizer()):
        hub = FakeHub()
        with pytest.raises(ValueError, match="repo_id"):
            part.push_to_hub(repo_id, hub=hub)
        assert not hub.made and not hub.sent


def test_a_folder_that_is_no_bundle_cannot_be_pushed(tmp_path):
    """A run folder holds a bundle, and is none."""
    pipeline(metrics={}).save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="no model at"):
        Pipeline.from_pretrained(tmp_path / "run").push_to_hub("a/b", hub=FakeHub())


def test_the_card_says_what_was_measured_and_no_more():
    from lm.card import card

    text = card(pipeline(), "someone/drawer")
    told = front(text)
    assert told["library_name"] == "vqlm" and told["pipeline_tag"] == "any-to-any" and "license" not in told
    row = next(line for line in text.splitlines() if line.startswith("| pictures of the training set"))
    assert row == "| pictures of the training set | 1,200 | 87.5% | 0.25% | 4.125 | – | 0.51 |"
    assert "concepts that were held out" not in text  # they were not measured
    assert "21.50; the model that it began from had 20.00" in text
    assert "Drawn with guidance 1.2, temperature 0.3." in text
    assert "12,345 documents were read in 700 batches" in text
    assert "16×16 pixels" in text and "2×2 cells of 2 codes, 16 values each" in text
    assert "None was given" in text and "is not said here" in text
    nothing = card(pipeline(metrics={}))
    assert "Nothing yet" in nothing and "%" not in nothing
    strange = {"train": {"image_bits": "4 <b>", "drawing": [1]}, "text": 3, "sampling": None, "heldout": 7}
    assert "<b>" not in card(pipeline(metrics=strange))


def test_the_card_shows_transformers_only_where_the_plain_model_is_whole():
    from lm.card import card

    assert "VqlmProcessor" in card(pipeline("linear", "flat"))
    other = card(pipeline())
    assert "VqlmProcessor" not in other and "for text" in other


def test_the_code_in_the_card_runs(tmp_path, monkeypatch):
    """Both blocks, on the folder that they name."""
    from lm.card import card

    pipe = pipeline("linear", "flat", {})
    pipe.save_pretrained(tmp_path / "someone" / "drawer")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", card(pipe, "someone/drawer"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names = {}
        exec(block, names)
        assert names["picture"].size == (16, 16)


HOSTILE = (
    "x](javascript:1)\n---\nlicense: mit\n# head\n<script>alert(1)</script> ![i](http://e) `c` | a | @me"
)


def test_given_words_stay_words():
    from lm.card import card as bundle_card
    from vq.card import card as tokenizer_card

    cards = [
        bundle_card(pipeline(), "a/b", license="mit", trained_on=HOSTILE),
        tokenizer_card(make_tokenizer(), {}, "a/b", "mit", HOSTILE),
        tokenizer_card(make_tokenizer(), {"data": {"source": HOSTILE}}),
    ]
    for text in cards:
        assert "<script" not in text and "](" not in text and "\n# head" not in text
        assert "\nlicense: mit\n# head" not in text
    assert len(plain("a " * 10_000)) <= 500
    for wrong in ("", "  ", "x" * 101, 3, "mit\n---\n# mine", "mit # c"):
        with pytest.raises(ConfigError, match="license"):
            bundle_card(pipeline(), license=wrong)


def test_words_read_back_as_they_were_given():
    """By an independent reader of Markdown: the text of the paragraph is what was given, on one line."""
    reader = pytest.importorskip("markdown_it")
    from html import unescape

    for words in (
        HOSTILE,
        "plain words, 5 % & more",
        "1. one 2) two",
        "a_b*c*  d~e~ \\n &lt; $x$",
        "- item",
        "> q",
    ):
        html = reader.MarkdownIt("commonmark").render(plain(words))
        assert unescape(re.fullmatch(r"<p>(.*)</p>\n", html)[1]) == " ".join(words.split())


def test_a_tokenizer_is_uploaded_with_its_numbers(tmp_path):
    tokenizer, hub = make_tokenizer(), FakeHub()
    metrics = {
        "fingerprint": tokenizer.fingerprint,
        "data": {"source": "shapes", "size": 16, "pictures": {"train": 1240, "heldout": 12}},
        "heldout": {
            "pictures": 12,
            "psnr": 15.321,
            "ssim": 0.596,
            "ms_ssim": None,
            "fwd": 1.6,
            "bits": 192.0,
        },
    }
    tokenizer.push_to_hub("a/eyes", metrics, license="mit", hub=hub)
    assert hub.sent == ["README.md", "config.json", "model.safetensors"] and hub.made == [
        ("a/eyes", True, True)
    ]
    text = hub.texts["README.md"]
    assert "| pictures that were held out | 12 | 15.32 | 0.596 | – | 1.600 | 192 |" in text
    assert "1,240 pictures of the source shapes at 16 pixels; 12 were held out" in text
    assert front(text)["license"] == "mit" and tokenizer.fingerprint in text
    with pytest.raises(ValueError, match="metrics are of tokenizer"):
        make_tokenizer(3).push_to_hub("a/eyes", metrics, hub=hub)


def test_a_hub_id_is_fetched_once_and_only_data_of_it(tmp_path, monkeypatch):
    asked = []

    def fetch(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        return str(tmp_path / "cached")

    monkeypatch.setattr("vqlm.hub.snapshot_download", fetch)
    make_tokenizer().save_pretrained(tmp_path / "cached")
    assert ImageTokenizer.from_pretrained("someone/eyes").fingerprint == make_tokenizer().fingerprint
    ((repo_id, revision, patterns),) = asked
    assert (repo_id, revision) == ("someone/eyes", None) and not {"*", "*.py", "*.bin", "*.pt"} & set(
        patterns
    )
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("runs/modle", "model", "a/b/c", "/a/b", Path("someone/eyes"), "./x"):
        assert local_folder(name) == Path(name)  # a path that is not there is no hub id
    assert len(asked) == 1
