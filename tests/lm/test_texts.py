"""Text corpora: what is read, what is counted, and that no text is in both parts."""

import json
import subprocess

import pytest

from lm import texts as texts_module
from lm.texts import HubTexts, NoTexts, TextFiles, WordNet, cut, repair, share
from vqlm import fetch
from vqlm.errors import ConfigError

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"
SYNSET = "0{} 03 n 01 thing 0 001 ~ 00001930 n 0000 | {}  \n"


def glosses(folder, count=40):
    """A folder as WordNet's: ten glosses in each of four files, the licence on top."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, name in enumerate(("noun", "verb", "adj", "adv")):
        body = "".join(
            SYNSET.format(i, f'a {name} of kind {i}; "one | two"') for i in range(part, count + part, 4)
        )
        (folder / f"data.{name}").write_text(LICENCE + body)
    return folder


@pytest.mark.parametrize(
    ("text", "clean", "wrong"),
    [
        ("a fox 🦊, naïve\tand\nplain", "a fox 🦊, naïve\tand\nplain", set()),
        ("a \ud800fox", "a fox", {"undecodable"}),
        ("a fox\ufffd", "a fox", {"undecodable"}),
        ("a\0fox\x85\x1b", "a fox  ", {"control"}),
        ("\ud83e\x07", " ", {"undecodable", "control"}),
        ("👩\u200d🚀 <|image_5|>", "👩\u200d🚀 <|image_5|>", set()),  # joiners and names are text
    ],
)
def test_repair(text, clean, wrong):
    assert repair(text) == (clean, wrong)
    repair(text)[0].encode("utf-8")


def test_glosses_follow_the_bar_and_the_licence_is_skipped(tmp_path):
    corpus = WordNet(str(glosses(tmp_path / "usr/share/wordnet")), holdout=0.0)
    assert corpus.train()[0] == 'a noun of kind 0; "one | two"'
    assert len(corpus.train()) == 40
    assert corpus.heldout() == []
    # a package's tree does as well as the folder in it
    assert WordNet(str(tmp_path), holdout=0.0).train() == corpus.train()


def test_a_folder_without_wordnet_is_refused_with_what_it_lacks(tmp_path):
    (glosses(tmp_path) / "data.verb").unlink()
    with pytest.raises(ConfigError, match=r"lacks data\.verb"):
        WordNet(str(tmp_path)).train()
    with pytest.raises(ValueError, match="not a folder"):
        WordNet(str(tmp_path / "nothing"))


def test_the_package_is_fetched_once_and_what_fails_is_said(tmp_path, monkeypatch):
    ran = []

    def run(words, cwd, **_):
        ran.append(words[0])
        if words[0] == "apt-get":
            (texts_module.Path(cwd) / "wordnet-base_1.deb").touch()
        else:
            glosses(texts_module.Path(cwd, "unpacked", texts_module.INSIDE))
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(texts_module, "SYSTEM", tmp_path / "nowhere")
    monkeypatch.setattr(fetch.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(fetch.subprocess, "run", run)
    for _ in range(2):
        assert len(WordNet(cache=str(tmp_path / "cache"), holdout=0.0).train()) == 40
    assert ran == ["apt-get", "dpkg-deb"]
    assert [each.name for each in (tmp_path / "cache").iterdir()] == ["wordnet-base"]

    failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ConfigError, match=r"Unable to locate package.*texts\.folder"):
        WordNet(cache=str(tmp_path / "other")).train()
    monkeypatch.setattr(fetch.shutil, "which", lambda tool: None)
    with pytest.raises(ConfigError, match="apt-get and dpkg-deb not found"):
        WordNet(cache=str(tmp_path / "other")).train()


def test_bad_lines_are_counted_and_the_rest_is_read(tmp_path):
    good = b"one line\nanother line\n"
    bad = b"\n   \n\xff\xfe broken\none line\nwith \x00 a nul\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + good + bad)
    rows = [{"text": "a third"}, {"title": "x"}, {"text": 3}, ["a"], {"text": "half \ud800"}, {"text": ""}]
    jsonl = "\n".join(json.dumps(row) for row in rows) + "\n{broken\n"
    (tmp_path / "b.jsonl").write_text(jsonl)
    (tmp_path / "c.md").write_text("not read")
    corpus = TextFiles(str(tmp_path), holdout=0.0)
    assert corpus.train() == ["one line", "another line", "with   a nul", "a third", "half"]
    assert corpus.counts == {
        "empty": 3,
        "not UTF-8, left out": 1,
        "repeated": 1,
        "control characters, repaired": 1,
        "undecodable characters, repaired": 1,
        "without a text 'text', left out": 3,
        "not JSON, left out": 1,
    }
    assert "5 training texts, 0 held out" in corpus.report() and "1 repeated" in corpus.report()


def test_no_text_is_in_both_parts_and_later_texts_move_none(tmp_path):
    texts = [f"text number {i}" for i in range(4000)]
    (tmp_path / "few.txt").write_text("\n".join(texts[:2000] * 2))
    (tmp_path / "all.txt").write_text("\n".join(reversed(texts)))
    few, all_ = (TextFiles(str(tmp_path / name), holdout=0.1) for name in ("few.txt", "all.txt"))
    for corpus, count in ((few, 2000), (all_, 4000)):
        assert set(corpus.train()).isdisjoint(corpus.heldout())
        assert sorted(corpus.train() + corpus.heldout()) == sorted(set(texts[:count]))
        # binomial: six standard deviations
        assert abs(len(corpus.heldout()) - 0.1 * count) < 6 * (0.09 * count) ** 0.5
    assert set(few.heldout()) <= set(all_.heldout())
    assert few.counts["repeated"] == 2000


def test_what_is_held_out_beyond_the_limit_is_not_trained_on_either(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"text number {i}" for i in range(500)))
    whole, capped = (TextFiles(str(tmp_path / "a.txt"), holdout=0.2, most_heldout=n) for n in (10**6, 7))
    assert capped.train() == whole.train()
    assert capped.heldout() == whole.heldout()[:7]
    assert capped.counts["held out beyond most_heldout, unused"] == len(whole.heldout()) - 7


def test_long_texts_become_several_of_one_part(tmp_path):
    words = " ".join(f"word{i}" for i in range(400))
    pieces = cut(words, 100)
    assert " ".join(pieces) == words and max(map(len, pieces)) <= 100
    assert cut("x" * 250, 100) == ["x" * 100, "x" * 100, "x" * 50]
    (tmp_path / "a.txt").write_text("\n".join(f"{i} {words}" for i in range(60)))
    corpus = TextFiles(str(tmp_path / "a.txt"), holdout=0.3, longest=100)
    starts = [sum(text.startswith(f"{i} ") for text in corpus.train()) for i in range(60)]
    held = [sum(text.startswith(f"{i} ") for text in corpus.heldout()) for i in range(60)]
    assert sorted(a + b for a, b in zip(starts, held, strict=True)) == [1] * 60
    assert len(corpus.heldout()) == sum(held) * len(cut(f"0 {words}", 100))
    assert corpus.counts["cut"] == 60


def test_hub_data_sets_are_opened_and_wrong_names_are_said(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["a", None, "b"], "label": [1, 2, 3]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    corpus = HubTexts(str(tmp_path / "saved"), holdout=0.0)
    assert corpus.train() == ["a", "b"] and corpus.counts["empty"] == 1
    with pytest.raises(ConfigError, match=r"'txt' is not a column.*did you mean 'text'"):
        HubTexts(str(tmp_path / "saved"), "txt").train()
    with pytest.raises(ConfigError, match="not text"):
        HubTexts(str(tmp_path / "saved"), "label").train()
    with pytest.raises(ConfigError, match="cannot be opened"):
        HubTexts(str(tmp_path / "nothing")).train()


def test_wrong_values_are_refused_at_once(tmp_path):
    (tmp_path / "a.csv").touch()
    for make, told in (
        (lambda: TextFiles(str(tmp_path / "a.tx")), "does not exist"),
        (lambda: TextFiles(str(tmp_path / "a.csv")), "must end in"),
        (lambda: TextFiles(str(tmp_path), holdout=1.0), "holdout=1.0"),
        (lambda: WordNet(longest=0), "longest=0"),
        (lambda: HubTexts(""), "must be named"),
    ):
        with pytest.raises(ValueError, match=told):
            make()
    with pytest.raises(ConfigError, match=r"no \.txt or \.jsonl"):
        TextFiles(str(tmp_path)).train()
    (tmp_path / "b.txt").write_text("\n\n")
    with pytest.raises(ConfigError, match="no text to train on: 2 empty"):
        TextFiles(str(tmp_path)).train()


def test_no_texts():
    assert (NoTexts().train(), NoTexts().heldout()) == ([], [])
    assert 0 <= share("a") < 1
