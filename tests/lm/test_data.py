"""Documents of every task, the mixture, and what is read from stores, captions and files."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_format

from lm.data import (
    Encoded,
    Pairs,
    Part,
    check_store,
    identity,
    open_store,
    read_caption,
    read_documents,
    read_pairs,
)
from lm.mixture import TASKS, DocumentBatches, Mixture
from lm.sequence import NONE, Image, SequenceFormat, Text
from lm.vocab import text_to_ids
from vq.store import Loaded, Record, write_store
from vqlm.errors import ConfigError
from vqlm.training import Checkpoints, Once

ONLY: dict[str, Any] = dict.fromkeys(TASKS, 0.0) | {"noise": 0.0}


@pytest.fixture(scope="module")
def made():
    return make_format()


@pytest.fixture(scope="module")
def form(made):
    return made[0]


def pairs(count=20, kin=1, bare=()):
    """Picture i has codes that tell i, a caption of its own (none where i is in `bare`), `kin` to a concept."""
    captions = [() if i in bare else tuple([i] * (1 + i % 4)) for i in range(count)]
    codes = torch.tensor([[[[i // 16, i % 16]] * 2] * 2 for i in range(count)])
    names = [str(i) for i in range(count)]
    return Pairs(captions, codes, names, names, [str(i // kin) for i in range(count)])


def number(image):
    return int(image.codes_hwQ[0, 0, 0]) * 16 + int(image.codes_hwQ[0, 0, 1])


def written(batch, form):
    """The documents of a batch, as segments, and the labels of each."""
    found = []
    for b, row in enumerate(batch.document_BT):
        for n in range(int(row.max()) + 1):
            at = row == n
            found.append((form.split(batch.ids_BTW[b, at]), batch.next_BTW[b, at]))
    return found


# --- the mixture ----------------------------------------------------------------------------------------------


def test_tasks_are_drawn_at_their_shares_and_conditions_dropped_at_theirs():
    weights = dict(zip(TASKS, (6.0, 3.0, 1.0, 2.0, 4.0, 2.5, 1.5), strict=True))
    mixture = Mixture(**weights, drop_condition=0.2, documents="a.jsonl")
    random = np.random.default_rng(0)
    drawn = [mixture.draw(random) for _ in range(20_000)]
    for task, weight in weights.items():
        p = weight / 20
        count = sum(each == task for each, _ in drawn)
        assert abs(count - p * 20_000) < 5 * (p * (1 - p) * 20_000) ** 0.5, task
    for task in TASKS:
        dropped = [drop for each, drop in drawn if each == task]
        p = 0.2 if task in ("text_to_image", "edit") else 0.0
        assert abs(sum(dropped) - p * len(dropped)) <= 5 * (p * (1 - p) * len(dropped)) ** 0.5, task


@pytest.mark.parametrize("p", [0.0, 0.1, 0.7, 1.0])
def test_the_share_of_documents_without_their_caption_is_p(form, p):
    # one peer inverted the mask, so that text was kept with the drop probability; 5 standard deviations
    data = batches(form, {"text_to_image": 1.0}, count=100, drop_condition=p)
    made = [data[n] for n in range(12)]
    first = torch.cat([batch.ids_BTW[batch.positions_BT == 1][:, 0] for batch in made])
    first = first[first != form.vocabulary.pad]
    assert len(first) == 1200
    bare = int((first == form.vocabulary.image_start).sum())
    assert abs(bare - 1200 * p) <= 5 * (1200 * p * (1 - p)) ** 0.5
    for segments, _ in written(made[0], form):
        assert isinstance(segments[-1], Image)  # the picture is there in any case
        assert len(segments) == 1 or segments[0] == Text(pairs().captions[number(segments[1])])


def test_a_seed_gives_the_tasks_that_it_always_gave():
    # numbers that were published hold for these draws
    random = np.random.default_rng([0, 3, 2])
    short = {("text_to_image", False): "T", ("text_to_image", True): "-", ("image_to_text", False): "I"}
    assert "".join(short[Mixture().draw(random)] for _ in range(40)) == GOLDEN


GOLDEN = "ITTTTTTTT-TITTTTITTTITTTTTTTTITTTT--TTTT"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"text_to_image": -1.0}, "text_to_image=-1.0"),
        (ONLY, "not all 0"),
        ({"text": float("nan")}, "text=nan"),
        ({"drop_condition": 1.5}, "drop_condition=1.5"),
        ({"noise": 1.0}, "noise=1.0"),
        ({"pictures": 1}, "pictures=1"),
        ({"longest_text": 0}, "longest_text=0"),
        ({"longest_caption": 0}, "longest_caption=0"),
        ({"written": 0.1}, "documents=FILE"),
    ],
)
def test_impossible_mixtures_are_refused(values: dict[str, Any], told):
    with pytest.raises(ValueError, match=told):
        Mixture(**values)


# --- documents of each task -----------------------------------------------------------------------------------


def batches(form, tasks, pairs_=None, count=8, row_length=None, seed=0, **more):
    settings = {
        k: more.pop(k)
        for k in ("drop_condition", "noise", "pictures", "longest_text", "documents")
        if k in more
    }
    mixture = Mixture(**ONLY | tasks | settings)
    return DocumentBatches(
        pairs() if pairs_ is None else pairs_, form, mixture, count, row_length, seed, 100, **more
    )


def test_a_dropped_caption_does_not_teach_that_captions_are_empty(form):
    # with an <eos> right after the picture, greedy captions of the trained model were empty
    def ends(**values):
        return int((batches(form, **values)[0].next_BTW == form.vocabulary.eos).sum())

    assert ends(tasks={"text_to_image": 1.0}, drop_condition=1.0) == 0
    assert ends(tasks={"image": 1.0}) == 0
    assert ends(tasks={"text_to_image": 1.0}, drop_condition=0.0) == 8
    assert ends(tasks={"image_to_text": 1.0}) == 8


def test_a_picture_without_a_caption_is_a_picture_alone_whatever_its_task(form):
    bare = pairs(bare=range(0, 20, 2))
    for task in ("text_to_image", "image_to_text"):
        batch = batches(form, {task: 1.0}, bare, 20, drop_condition=0.0)[0]
        alone = [number(s[0]) for s, _ in written(batch, form) if len(s) == 1]
        assert sorted(alone) == list(range(0, 20, 2))
        assert int((batch.next_BTW == form.vocabulary.eos).sum()) == 10
    with_kin = pairs(kin=4, bare=range(0, 20, 2))
    for task in ("edit", "interleaved"):
        for segments, _ in written(batches(form, {task: 1.0}, with_kin, 64, drop_condition=0.0)[0], form):
            assert all(number(s) % 2 for s in segments if isinstance(s, Image))


def test_text_documents(form):
    texts = [list(range(10)), list(range(100, 250))]
    data = batches(form, {"text": 1.0}, count=64, texts=texts, longest_text=20)
    whole, windows = 0, set()
    for segments, next_TW in written(data[0], form):
        (text,) = segments
        ids = list(text.ids)
        closed = bool((next_TW == form.vocabulary.eos).any())
        if ids == texts[0]:
            whole += 1
            assert closed
        else:
            assert len(ids) == 20 and ids == list(range(ids[0], ids[0] + 20)) and 100 <= ids[0] <= 230
            assert closed == (ids[-1] == 249)
            windows.add(ids[0])
    assert whole > 10 and len(windows) > 10


def test_a_long_text_is_read_to_its_end(form):
    data = batches(form, {"text": 1.0}, count=32, texts=[list(range(21))], longest_text=20)
    assert {segments[0].ids[0] for segments, _ in written(data[0], form)} == {0, 1}


def test_edits_read_a_picture_and_an_instruction_and_learn_the_other_picture(form):
    made = pairs(kin=4)
    made.captions[1] = made.captions[0]  # the same caption is no edit
    for drop in (0.0, 1.0):
        sources = set()
        for segments, next_TW in written(
            batches(form, {"edit": 1.0}, made, 200, drop_condition=drop)[0], form
        ):
            source, target = segments[0], segments[-1]
            assert isinstance(source, Image) and isinstance(target, Image)
            a, b = number(source), number(target)
            assert a // 4 == b // 4 and made.captions[a] != made.captions[b]
            sources.add((a, b))
            assert segments[1:-1] == ([] if drop else [Text(made.captions[b])])
            learnt = next_TW[(next_TW != NONE).any(1)]
            expected = form.build([target], end=not drop)[1:]
            assert torch.equal(learnt, expected[expected[:, 0] != form.vocabulary.image_end])
        assert len(sources) > 30


def test_interleaved_documents_keep_captions_with_their_pictures(form):
    counts, orders = [], []
    for segments, _ in written(batches(form, {"interleaved": 1.0}, pairs(), 200, pictures=4)[0], form):
        captions, images = segments[0::2], segments[1::2]
        orders.append(isinstance(segments[0], Text))
        if not orders[-1]:
            captions, images = images, captions
        assert [Text(pairs().captions[number(image)]) for image in images] == captions
        counts.append(len(images))
        assert len({number(image) for image in images}) == len(images)
    assert set(counts) == {2, 3, 4} and 60 < sum(orders) < 140


def test_written_documents(form):
    documents = [(Part((5, 6), given=True), Part(3), Part((7,))), (Part(4),)]
    found = written(batches(form, {"written": 1.0}, documents="a", written=documents)[0], form)
    long = [each for each in found if len(each[0]) == 3]
    assert 0 < len(long) < len(found) == 8
    for (first, image, last), next_TW in long:
        assert (first, number(image), last) == (Text((5, 6)), 3, Text((7,)))
        assert not torch.isin(next_TW, torch.tensor([5, 6])).any() and (next_TW == 7).sum() == 1


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_picture_to_be_described_is_read_in_both_directions_where_the_form_says_so(form, attention):
    form = SequenceFormat(form.vocabulary, form.layout, form.grids, attention)
    batch = batches(form, {"image_to_text": 1.0})[0]
    both = attention == "bidirectional"
    assert bool((batch.picture_BT != NONE).any()) == both
    predicted = batch.next_BTW >= form.vocabulary.image_offset
    assert bool(predicted.any()) != both
    # what is drawn stays causal
    assert bool((batches(form, {"text_to_image": 1.0})[0].picture_BT == NONE).all())


@pytest.mark.parametrize("layout", ["stacked", "flat", "delayed"])
def test_lengths_are_known_without_laying_and_none_exceeds_the_bound(layout):
    form = make_format(layout, more_grids=((1, 3),), row_ends=layout != "delayed")[0]
    made = pairs(kin=4)
    made.codes = [
        codes if i % 3 else codes.reshape(-1, 2)[None, :3] for i, codes in enumerate(made.codes_NhwQ)
    ]
    tasks = dict.fromkeys(TASKS, 1.0)
    documents = [tuple(Part(i) for i in range(5))]
    data = batches(form, tasks, made, 64, documents="a", written=documents, texts=[list(range(50))])
    random = np.random.default_rng(0)
    for task in TASKS:
        for i in range(20):
            document = data.material.document(i, task, False, random)
            length = len(form.lay(document.segments, document.end))
            assert document.length(form) == length <= data._longest(task) <= data.longest
    assert {
        segment.grid for s, _ in written(data[0], form) for segment in s if isinstance(segment, Image)
    } == {
        (2, 2),
        (1, 3),
    }


# --- batches --------------------------------------------------------------------------------------------------


def everything(form, **more):
    return batches(
        form,
        {"text_to_image": 3.0, "image_to_text": 2.0, "text": 2.0, "edit": 1.0, "interleaved": 1.0},
        pairs(kin=4),
        texts=Encoded(["abc", "de"], lambda text: [ord(each) for each in text]),
        **{"count": 13, "noise": 0.2} | more,
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in ((a.ids_BTW, b.ids_BTW), (a.next_BTW, b.next_BTW)))


def test_batch_n_is_a_function_of_the_seed_and_n(form):
    first, again, other = everything(form), everything(form), everything(form, seed=1)
    _ = first[3]  # having read another one must not matter
    assert same(first[7], again[7])
    assert first[7].ids_BTW.shape != other[7].ids_BTW.shape or not same(first[7], other[7])
    # each batch draws tasks of its own: the number of pictures that are drawn from nothing differs
    data = batches(form, {"text_to_image": 1.0}, count=20, drop_condition=0.5)
    assert len({int((data[n].next_BTW == form.vocabulary.eos).sum()) for n in range(12)}) > 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_in_the_middle_of_an_epoch_sees_what_was_left(form, workers):
    data = everything(form)
    data.total = 6  # 13 documents of 20 pairs a batch: every batch but the first begins within an epoch
    resumed = list(Once(data, 3, workers))
    assert len(resumed) == 3
    assert all(same(data[n], batch) for n, batch in zip((3, 4, 5), resumed, strict=True))


def test_each_pair_comes_once_an_epoch(form):
    data = batches(form, {"text_to_image": 1.0, "image_to_text": 1.0}, pairs(16))
    seen = [number(s) for n in (0, 1) for d, _ in written(data[n], form) for s in d if isinstance(s, Image)]
    assert sorted(seen) == list(range(16))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("layout", ["stacked", "flat"])
def test_all_ranks_together_see_what_one_process_sees(layout, ranks):
    form = make_format(layout)[0]

    def documents(data, n):
        batch = data[n]
        return [
            torch.cat([batch.ids_BTW[b, at], batch.next_BTW[b, at]], 1).tolist()
            for b, row in enumerate(batch.document_BT)
            for at in (row == k for k in range(int(row.max()) + 1))
        ]

    for n in (0, 5):
        whole = documents(everything(form), n)
        parts = [documents(everything(form, rank=rank, ranks=ranks), n) for rank in range(ranks)]
        assert {len(part) for part in parts} <= {13 // ranks, -(-13 // ranks)}
        assert sorted(whole) == sorted(document for part in parts for document in part)


@pytest.mark.parametrize("layout", ["stacked", "flat", "delayed"])
def test_noise_replaces_codes_that_are_read_and_none_that_are_to_be_predicted(layout):
    form = make_format(layout)[0]
    made = pairs(64)
    clean, noisy = (batches(form, {"text_to_image": 1.0}, made, 64, noise=n)[4] for n in (0.0, 0.3))
    assert torch.equal(clean.next_BTW, noisy.next_BTW)
    picture = clean.ids_BTW >= form.vocabulary.image_offset
    assert torch.equal(clean.ids_BTW[~picture], noisy.ids_BTW[~picture])
    changed = (clean.ids_BTW != noisy.ids_BTW)[picture].float().mean()
    assert 0.2 < changed < 0.38  # 0.3, less the draws that hit the same code
    offset = form.vocabulary.image_offset
    assert torch.equal((clean.ids_BTW[picture] - offset) // 16, (noisy.ids_BTW[picture] - offset) // 16)


def test_what_a_mixture_asks_for_and_is_not_there_is_refused_with_numbers(form):
    for tasks, made, told in (
        ({"text": 0.2}, pairs(), "mixture.text=0.2, but there are 0 texts"),
        ({"edit": 0.3}, pairs(), "mixture.edit=0.3, but of 20 pictures of 20 concepts 0"),
        ({"interleaved": 0.3}, pairs(bare=range(20)), "0 of 20 pictures have a caption"),
        ({"image_to_text": 0.3}, pairs(bare=range(20)), "0 of 20 pictures have a caption"),
        ({"image": 0.3}, pairs(0), "no picture to train on"),
    ):
        with pytest.raises(ConfigError, match=told):
            batches(form, tasks, made)
    with pytest.raises(ConfigError, match=r"a\.jsonl has 0 training documents"):
        batches(form, {"written": 0.1}, documents="a.jsonl")
    for rank, ranks in ((0, 9), (2, 2), (-1, 2)):
        with pytest.raises(ConfigError, match=f"rank={rank} of ranks={ranks} with documents=8"):
            batches(form, {"image": 1.0}, rank=rank, ranks=ranks)


def test_a_row_that_is_too_short_is_refused_before_training(form):
    with pytest.raises(ConfigError, match="row_length=8: the longest document has 12 positions"):
        batches(form, {"text_to_image": 1.0}, row_length=8)
    with pytest.raises(ConfigError, match="has 22 positions"):
        batches(form, {"text_to_image": 1.0, "text": 0.1}, row_length=16, texts=[[1]], longest_text=20)
    assert batches(form, {"text_to_image": 1.0}, row_length=12).row_length == 12


def test_pairs_that_do_not_fit_the_form_are_refused_by_name(form):
    made = pairs()
    made.captions[3] = (form.vocabulary.image_start,)
    with pytest.raises(ConfigError, match="caption of '3' holds ids of special"):
        batches(form, {"text_to_image": 1.0}, made)
    made = pairs()
    made.codes = [torch.zeros(2, 2 + (i == 5), 2) for i in range(20)]
    with pytest.raises(ConfigError, match=r"picture '5' has \(2, 3\) cells"):
        batches(form, {"text_to_image": 1.0}, made)


# --- captions -------------------------------------------------------------------------------------------------


def test_bad_captions_are_repaired_cut_and_counted(made):
    form, tokenizer = made

    def encode(text):
        return text_to_ids(tokenizer, text)

    special = "a <|image_5|> <|end|> <|image_start|>"
    for caption, text, found in (
        ("a red circle, inset 1", "a red circle, inset 1", set()),
        ("  a\tred\n\ncircle ", "a red circle", set()),
        ("", "", {"empty"}),
        (" \n", "", {"empty"}),
        ("\ud800\0\ufffd", "", {"empty", "repaired"}),
        ("a r\ufffded\0circle", "a red circle", {"repaired"}),
        (special, special, {"with names of special tokens"}),
        ("a red circle " * 60, "cut below", {"cut"}),
    ):
        read, ids, told = read_caption(caption, encode, 60)
        assert told == found
        assert list(ids) == (encode(read) if read else [])
        assert len(ids) <= 60
        if "cut" in found:
            assert caption.startswith(read + " ") and len(encode(read + " circle a")) > 60
        else:
            assert read == text
        assert (
            not set(ids) & set(form.vocabulary.specials)
            and max(ids, default=0) < form.vocabulary.image_offset
        )


def test_captions_of_a_million_characters(made):
    _, tokenizer = made
    calls = []

    def encode(text):
        calls.append(len(text))
        return text_to_ids(tokenizer, text)

    for caption in ("a red circle " * 77_000, "x" * 1_000_000, "🦊" * 1_000_000):
        text, ids, found = read_caption(caption, encode, 50)
        assert found == {"cut"} and 45 <= len(ids) <= 50 and caption.startswith(text)
    assert max(calls) <= 50 * 32 and len(calls) < 60  # what is far too long is never tokenised
    assert read_caption("x" * 3000, encode, None)[0] == "x" * 3000


# --- stores ---------------------------------------------------------------------------------------------------


class Coder:
    """Codes of a picture: its first pixel, times two. 4 px cells."""

    image_size, downsample = 8, 4

    def __init__(self, fingerprint="aaaa", codebook_size=16, depth=2):
        self.fingerprint, self.codebook_size, self.depth = fingerprint, codebook_size, depth

    def encode(self, x_BCHW):
        level = ((x_BCHW[:, 0, ::4, ::4] + 1) * 127.5).round().long() % self.codebook_size
        return torch.stack([level] * self.depth, -1)

    def save_pretrained(self, folder):
        (folder / "config.json").write_text(json.dumps({"fingerprint": self.fingerprint}))


class Made:
    """Six pictures, the last one held out; every other one is wide where `wide` is set."""

    def __init__(self, captions=None, wide=False):
        self.captions, self.wide = captions or [f"a red circle, inset {i}" for i in range(6)], wide

    def __len__(self):
        return 6

    def load(self, start, stop):
        chosen = range(start, stop)
        records = [
            Record(f"p{i}", self.captions[i], f"c{i // 2}", "heldout" if i == 5 else "train") for i in chosen
        ]
        sizes = [(8, 12 if self.wide and i % 2 else 8) for i in chosen]
        return Loaded(
            records, [torch.full((3, *s), i, dtype=torch.uint8) for i, s in zip(chosen, sizes, strict=True)]
        )


def make_store(folder, pictures=None, coder=None):
    write_store(folder, coder or Coder(), pictures or Made(), source={"name": "made"}, progress=False)
    return open_store(folder)


def test_pairs_of_a_store_and_the_counts_of_its_captions(tmp_path, made):
    form, tokenizer = made
    captions = ["a red circle", "", "a\0blue square", "word " * 500, "<|image_1|>", "held out"]
    store = make_store(tmp_path / "s", Made(captions))
    read = read_pairs(store, "train", lambda text: text_to_ids(tokenizer, text), 64)
    assert read.counts == {"empty": 1, "repaired": 1, "cut": 1, "with names of special tokens": 1}
    assert read.texts[:3] == ["a red circle", "", "a blue square"] and read.captions[1] == ()
    assert [number for number, *_ in read.codes_NhwQ[:, 0, 0].tolist()] == [0, 1, 2, 3, 4]
    assert "5 pairs" in read.report() and "1 captions cut" in read.report()
    batch = DocumentBatches(read, form, Mixture(), 8, None, 0, 10)[0]
    assert batch.samples == 8


def test_a_store_of_several_grids_gives_pictures_one_by_one(tmp_path):
    store = make_store(tmp_path / "s", Made(wide=True))
    form, tokenizer = make_format(grid=store.grids[0], more_grids=store.grids[1:])
    read = read_pairs(store, "train", lambda text: text_to_ids(tokenizer, text))
    assert [image.codes_hwQ.tolist() for image in map(read.image, range(5))] == [
        [[[i, i]] * (3 if i % 2 else 2)] * 2 for i in range(5)
    ]
    with pytest.raises(ValueError, match="several grids"):
        _ = read.codes_NhwQ
    seen = {
        (int(s.codes_hwQ[0, 0, 0]), s.grid)
        for segments, _ in written(DocumentBatches(read, form, Mixture(noise=0.0), 5, None, 0, 10)[0], form)
        for s in segments
        if isinstance(s, Image)
    }
    assert seen == {(i, (2, 3 if i % 2 else 2)) for i in range(5)}


@pytest.mark.parametrize(
    ("coder", "wide", "told"),
    [
        (Coder(codebook_size=32), False, "codebook_size 32, the language model 16"),
        (Coder(depth=3), False, "depth 3, the language model 2"),
        (Coder(), True, r"pictures of \(2, 3\) cells, the language model knows \(2, 2\)"),
    ],
)
def test_a_store_of_another_make_is_refused_with_both_values(tmp_path, form, coder, wide, told):
    store = make_store(tmp_path / "s", Made(wide=wide), coder)
    with pytest.raises(ConfigError, match=told):
        check_store(store, form)
    with pytest.raises(ConfigError, match=told):
        open_store(tmp_path / "s", form)


def test_a_run_is_not_resumed_on_other_codes_layouts_or_texts(tmp_path, made):
    form, _ = made
    store, other = make_store(tmp_path / "a"), make_store(tmp_path / "b", coder=Coder("bbbb", 16, 2))
    check_store(store, form)
    ours = identity(store, form, ["a text"])
    flat = SequenceFormat(form.vocabulary, make_format("flat")[0].layout, form.grids)
    both = SequenceFormat(form.vocabulary, form.layout, form.grids, "bidirectional")
    for theirs, name, told in (
        (identity(other, form, ["a text"]), "tokenizer", "tokenizer bbbb, now it is aaaa"),
        (identity(store, flat, ["a text"]), "layout", "layout flat, now it is stacked"),
        (identity(store, both, ["a text"]), "picture_attention", "bidirectional, now it is causal"),
        (
            identity(store, SequenceFormat(replace(form.vocabulary, eos=3), form.layout, form.grids)),
            "vocabulary",
            "'eos': 3, .*, now it is ",
        ),
        (
            identity(store, SequenceFormat(form.vocabulary, form.layout, ((4, 1),))),
            "grids",
            r"grids \[\[4, 1\]\], now it is \[\[2, 2\]\]",
        ),
        (identity(store, form), "texts", "0 texts, .* now it is 1 texts, "),
        (identity(store, form, (), [(Part(1),)]), "documents", "1 documents, .* now it is 0 documents, "),
    ):
        different = {k: v for k, v in theirs.items() if k == name} | {
            k: v for k, v in ours.items() if k != name
        }
        with pytest.raises(ConfigError, match=told):
            Checkpoints(tmp_path, ours)._check(tmp_path, different)
    Checkpoints(tmp_path, ours)._check(tmp_path, json.loads(json.dumps(ours)))
    assert identity(store, form, ["ab", "c"])["texts"] != identity(store, form, ["a", "bc"])["texts"]


# --- written documents ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "s")


def encode_letters(text):
    return [ord(each) % 200 for each in text]


def test_documents_of_a_file(tmp_path, plain_store):
    rows = [
        {"parts": [{"text": "ab", "given": True}, {"image": "p3"}, {"text": "c\0d"}]},
        {"parts": [{"image": "p5"}], "split": "heldout"},
    ]
    (tmp_path / "d.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    train = read_documents(tmp_path / "d.jsonl", plain_store, "train", encode_letters)
    assert train == [(Part((97, 98), True), Part(3), Part((99, 32, 100)))]
    assert read_documents(tmp_path / "d.jsonl", plain_store, "heldout", encode_letters) == [(Part(0),)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            '{"parts": [{"image": "p33"}]}',
            "names picture 'p33', which is not in the store; did you mean 'p3'",
        ),
        (
            '{"parts": [{"image": "p5"}]}',
            "train document, but its picture 'p5' is in the store's heldout split",
        ),
        ('{"parts": [{"image": 3}]}', "holds image 3, which is no text"),
        ('{"parts": [{"text": " "}]}', "holds an empty text"),
        ('{"parts": [{"txt": "a"}]}', "a part is"),
        ('{"parts": [{"text": "a", "given": 1}]}', "a part is"),
        ('{"parts": []}', 'needs "parts"'),
        ('["a"]', 'needs "parts"'),
        ('{"parts": [{"text": "a"}], "spilt": "train"}', "unknown key 'spilt'; did you mean 'split'"),
        ('{"parts": [{"text": "a"}], "split": "test"}', "split 'test'; expected train or heldout"),
        ("{", "is not JSON"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_wrong_line_of_a_document_file_is_named(tmp_path, plain_store, line, told):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "d.jsonl").write_bytes(b'{"parts": [{"text": "a"}]}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=rf"d\.jsonl, line 2 .*{told}"):
        read_documents(tmp_path / "d.jsonl", plain_store, "train", encode_letters)


def test_a_missing_document_file_is_named(tmp_path, plain_store):
    with pytest.raises(ConfigError, match="no such file"):
        read_documents(tmp_path / "none.jsonl", plain_store, "train", encode_letters)
