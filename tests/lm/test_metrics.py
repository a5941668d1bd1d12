"""Ranks, variants and overlaps on made cases whose answers are known; plain text against transformers' own loss."""

import json
import math

import pytest
import torch
from tiny import HEADS, make_format, make_head, make_model, make_plain_llama, make_tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.callbacks import LOG, Retention
from lm.data import Pairs
from lm.evaluate import in_parts, kept, select, table
from lm.learner import LMLearner
from lm.metrics import (
    Gallery,
    PlainText,
    base_size,
    colour_histograms,
    drawing,
    losses,
    ranks,
    spread,
    text_loss,
    variants_followed,
    windows,
    word_overlap,
)
from lm.model import MultimodalLM
from lm.objectives.next_token import NextToken
from lm.packing import pack
from lm.pipeline import Pipeline
from lm.rows import Statistics
from lm.sequence import Image, Text
from lm.source import HuggingFace, Pictures
from vqlm.errors import ConfigError
from vqlm.hardware import detect
from vqlm.training import Budget, fit


def flat(*colour):
    return torch.tensor(colour).reshape(3, 1, 1).expand(3, 4, 4)


def test_rank_counts_the_pictures_that_are_nearer():
    gallery = torch.stack([flat(v, v, v) for v in (-1.0, -0.5, 0.0, 0.5, 1.0)])
    drawn = torch.stack([flat(0.45, 0.45, 0.45), flat(-1.0, -1.0, -1.0)])
    assert ranks(drawn, gallery, [3, 4]).tolist() == [0, 4]
    assert ranks(drawn, gallery, [2, 0]).tolist() == [1, 0]


def test_variants_are_compared_by_colour_wherever_it_is():
    brown, pink, white = (0.2, -0.3, -0.6), (0.9, 0.5, 0.5), (1.0, 1.0, 1.0)

    def picture(colour, rows):
        x = flat(*white).clone()
        x[:, rows] = torch.tensor(colour)[:, None, None]
        return x

    gallery = torch.stack([picture(brown, slice(0, 2)), picture(pink, slice(0, 2)), flat(*white)])
    concepts = ["hand", "hand", "cloud"]
    elsewhere = torch.stack(
        [picture(brown, slice(2, 4)), picture(pink, slice(2, 4)), picture(pink, slice(0, 1))]
    )
    followed, chance = variants_followed(elsewhere, gallery, [0, 0, 2], concepts)
    assert followed == [True, False]  # the cloud has no variants
    assert chance == [0.5, 0.5]


def test_colour_histograms_are_shares():
    x = torch.rand(3, 3, 5, 5) * 2 - 1
    torch.testing.assert_close(colour_histograms(x).sum(1), torch.ones(3))
    assert colour_histograms(flat(1.0, -1.0, 1.0)[None])[0, 5 * 36 + 5] == 1


def test_losses_agree_between_batch_sizes():
    model, tokenizer = make_model()
    pipe = Pipeline(model, tokenizer, make_tokenizer())
    codes = torch.randint(0, 16, (7, 2, 2, 2), generator=torch.Generator().manual_seed(0))
    names = [f"a red circle {i}" for i in range(7)]
    pairs = Pairs([tuple(pipe.encode_text(n)) for n in names], codes, names, names, names)
    one, all_ = losses(model, pairs, documents=1), losses(model, pairs, documents=7)
    assert one == pytest.approx(all_, rel=1e-4)
    assert one["image_bits"] * 8 == pytest.approx(one["image_bits_per_picture"], rel=1e-5)


def test_word_overlap_and_spread():
    assert word_overlap("a red apple", "a red apple") == 1
    assert word_overlap("a green pear", "a red apple") == pytest.approx(1 / 3)
    assert word_overlap("", "") == 1
    assert spread(10, 3) == [0, 3, 6]
    assert spread(2, 5) == [0, 1]


def test_images_are_measured_with_their_captions_alone_and_captions_with_their_pictures():
    """By hand: the mean over the caption's ids and <eos>, given the picture; the sum over the picture's codes."""
    model, tokenizer = make_model("linear")
    pipe = Pipeline(model, tokenizer, make_tokenizer())
    codes = torch.randint(0, 16, (1, 2, 2, 2), generator=torch.Generator().manual_seed(0))
    pairs = Pairs([tuple(pipe.encode_text("a red circle"))], codes, ["a red circle"], ["a"], ["a"])
    found, form = losses(model, pairs), model.form
    ids_TW = form.build(pairs.document(0, "image_to_text"))
    with torch.no_grad():
        hidden = model.lm.base_model(inputs_embeds=model.embed(ids_TW).sum(1)[None]).last_hidden_state[0]
    wanted = [*pairs.captions[0], form.vocabulary.eos]
    logits = model.lm.get_output_embeddings()(hidden[-len(wanted) - 1 : -1])[
        :, : form.vocabulary.image_offset
    ]
    v = form.vocabulary
    logits[:, [v.pad, v.image_end, v.bos]] = -torch.inf
    by_hand = F.cross_entropy(logits.detach(), torch.tensor(wanted))
    assert found["text_loss"] == pytest.approx(float(by_hand), rel=1e-5)


# --- several grids and styles ---------------------------------------------------------------------------------------


def test_pictures_are_drawn_and_looked_for_in_their_own_grid(monkeypatch):
    model, tokenizer = make_model(more_grids=((1, 3),))
    pipe = Pipeline(model, tokenizer, make_tokenizer())
    random = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 16, (*((2, 2), (1, 3))[n % 2], 2), generator=random) for n in range(6)]
    names = [f"a red circle {n}" for n in range(6)]
    pairs = Pairs([tuple(pipe.encode_text(n)) for n in names], codes, names, names, names)
    first, second = select(pairs, [0, 1]), select(pairs, [2, 3, 4, 5])
    gallery = Gallery.of(pipe, [first, second])
    assert {grid: tuple(x.shape) for grid, x in gallery.pixels.items()} == {
        (2, 2): (3, 3, 16, 16),
        (1, 3): (3, 3, 8, 24),
    }
    torch.testing.assert_close(gallery.pixels[1, 3][2], pipe.decode([pairs.image(5)])[0])

    def draw_codes(texts, n, sampling, seed, size):
        return [pairs.image(names.index(text)) for text in texts]

    monkeypatch.setattr(pipe, "draw_codes", draw_codes)
    found, drawn, chosen = drawing(pipe, gallery, second, {(2, 2): 1, (1, 3): 1}, 0, 4)
    assert (found["nearest"], found["captions"], found["chance"]) == (1.0, 4, 1.0)
    assert chosen == [0, 1, 2, 3]
    assert [tuple(x.shape) for x in drawn] == [(3, 16, 16), (3, 8, 24), (3, 16, 16), (3, 8, 24)]
    found, *_ = drawing(pipe, gallery, second, {(2, 2): 0, (1, 3): 1}, 0, 4)  # a wrong place is seen
    assert found["nearest"] == 0.5


def test_held_out_styles_are_told_from_held_out_concepts():
    codes = torch.arange(4).reshape(4, 1, 1, 1)

    def pairs(concepts):
        names = [f"{c}{n}" for n, c in enumerate(concepts)]
        return Pairs([(1,)] * len(names), codes[: len(names)], names, names, list(concepts))

    parts = in_parts(pairs("aab"), pairs("acbd"), {"a", "b"})
    assert {name: part.concepts for name, part in parts.items()} == {
        "train": ["a", "a", "b"],
        "heldout": ["c", "d"],
        "heldout_style": ["a", "b"],
    }
    assert parts["heldout_style"].codes.flatten().tolist() == [0, 2]
    assert set(in_parts(pairs("a"), pairs("b"), {"a"})) == {"train", "heldout"}


# --- plain text -----------------------------------------------------------------------------------------------------

TEXTS = ["a red circle, inset 1", "a blue square", "été <|image_3|>", "a", ""]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A base model's folder, and the pipeline that was made of it."""
    folder = tmp_path_factory.mktemp("plain") / "base"
    torch.manual_seed(0)
    make_plain_llama(folder)
    return folder, extended(folder)


def extended(folder, head="layered", rows=None):
    made = HuggingFace(str(folder), rows).build([], Pictures(16, 2), 0)
    form, _ = make_format()
    form = type(form)(made.vocabulary, form.layout, form.grids)
    model = MultimodalLM(made.lm, make_head(head, form.width, trunk_layers=4), form)
    return Pipeline(model.eval(), made.tokenizer, make_tokenizer())


def transformers_loss(folder, texts):
    """Mean over all tokens of transformers' own loss, document after document, <bos> before each."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for text in texts:
        ids = [
            tokenizer.bos_token_id,
            *tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids,
        ]
        if len(ids) > 1:
            given = torch.tensor([ids])
            with torch.no_grad():
                total += float(lm(input_ids=given, labels=given).loss) * (len(ids) - 1)
            count += len(ids) - 1
    return total / count, count


def test_an_untouched_extended_model_has_the_base_models_own_loss(plain):
    folder, pipe = plain
    text = PlainText.of(pipe, TEXTS)
    wanted, count = transformers_loss(folder, TEXTS)
    found = text_loss(pipe.model.lm, text)
    assert (found["loss"], found["tokens"]) == (pytest.approx(wanted, rel=1e-5), count)
    base = text_loss(AutoModelForCausalLM.from_pretrained(folder), text)
    assert base == pytest.approx(found, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-5)
    bits = wanted * count / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / sum(len(t.encode()) for t in TEXTS), rel=1e-5)


def test_rows_of_images_take_no_part(plain):
    folder, _ = plain
    pipe = extended(folder)
    before = text_loss(pipe.model.lm, PlainText.of(pipe, TEXTS))
    with torch.no_grad():
        pipe.model.lm.get_output_embeddings().weight[base_size(pipe) :] += 5.0
    assert text_loss(pipe.model.lm, PlainText.of(pipe, TEXTS)) == pytest.approx(before, rel=1e-6)
    with torch.no_grad():
        pipe.model.lm.get_output_embeddings().weight[5] += 5.0
    assert text_loss(pipe.model.lm, PlainText.of(pipe, TEXTS)) != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("head", HEADS)
def test_the_plain_model_reads_text_as_the_whole_one_does(plain, head):
    """Text is measured without the head: no head may change what it does to text."""
    pipe = extended(plain[0], head)
    model, ids = pipe.model, pipe.encode_text("a red circle")
    ids_TW = model.form.build([Text(tuple(ids))])
    mask = torch.ones(1, 1, len(ids_TW), len(ids_TW), dtype=torch.bool).tril()
    positions = torch.arange(len(ids_TW))[None]
    with torch.no_grad():
        made = model.teach(ids_TW[None], torch.full_like(ids_TW, -1)[None], mask, positions)
        whole = model.text_logits(made.hidden_BTC[0])
        own = model.lm(input_ids=ids_TW[None, :, 0]).logits[0, :, : model.form.vocabulary.image_offset]
    torch.testing.assert_close(whole, own)


def test_base_ids_end_where_ours_begin(plain):
    folder, pipe = plain
    assert base_size(pipe) == len(AutoTokenizer.from_pretrained(folder))
    model, tokenizer = make_model()  # its <bos>, <eos> and <pad> are ours
    scratch = Pipeline(model, tokenizer, make_tokenizer())
    assert base_size(scratch) == model.form.vocabulary.image_start - 3
    # a <bos> that the base model never saw does not begin a text: the first token is then only read
    assert PlainText.of(scratch, ["a red circle"]).documents == [scratch.encode_text("a red circle")]
    with pytest.raises(ValueError, match="hold nothing to predict"):
        PlainText.of(scratch, ["", "a"])


def test_windows_predict_each_id_once_from_half_a_window():
    for length in range(1, 40):
        ids, seen = list(range(length)), []
        for piece, known in windows(ids, 8):
            assert len(piece) <= 8
            assert piece[0] == 0 or known >= 4
            seen += piece[known:]
        assert seen == ids[1:]


def test_long_texts_are_read_in_windows(plain):
    _, pipe = plain
    text = PlainText.of(pipe, ["a red circle, inset 1 " * 9])
    lm, ids = pipe.model.lm, text.documents[0]
    total = 0.0
    for t in range(1, len(ids)):  # the slow way: the window in which position t stands as late as it can
        start = 0 if t < 8 else 4 * ((t - 8) // 4 + 1)
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([ids[start:t]])).logits[0, -1, : text.size]
        total -= float(logits.log_softmax(-1)[ids[t]])
    assert text_loss(lm, text, 8)["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert text_loss(lm, text, 8)["loss"] != pytest.approx(text_loss(lm, text, 64)["loss"], rel=1e-6)


# --- before, during and after training ------------------------------------------------------------------------------


def training(pipe, batches):
    return LMLearner(
        pipe.model,
        NextToken(),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        Budget(batches=batches, warmup=0),
    )


class PictureBatches(torch.utils.data.Dataset):
    def __init__(self, pipe, total):
        codes = torch.randint(0, 16, (4, 2, 2, 2), generator=torch.Generator().manual_seed(0))
        self.batch = pack([pipe.model.form.lay([Image(c)]) for c in codes], pipe.model.form, 64)
        self.total = total

    def __len__(self):
        return self.total

    def __getitem__(self, n):
        return self.batch


def test_retention_is_measured_before_during_and_after(plain, tmp_path):
    folder, _ = plain
    pipe, watch = extended(folder, rows=Statistics()), Retention(every=2, texts=3)
    watch.look_at(pipe, TEXTS[:3], tmp_path)
    made = training(pipe, 5)
    pipe.model.train()
    fit(made, lambda total: PictureBatches(pipe, 5), tmp_path, detect("cpu", "fp32"), "t", callbacks=[watch])
    found = watch.conclude(pipe, made.batches_seen)
    entries = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [entry["batch"] for entry in entries] == [0, 2, 4, 5]
    assert found["before"]["loss"] == pytest.approx(transformers_loss(folder, TEXTS[:3])[0], rel=1e-5)
    after = text_loss(pipe.model.lm, PlainText.of(pipe, TEXTS[:3]))
    assert found["after"]["loss"] == pytest.approx(after["loss"], rel=1e-6)
    assert found["ratio"] == pytest.approx(found["after"]["perplexity"] / found["before"]["perplexity"])
    assert found["ratio"] > 1.001  # pictures alone were taught
    assert all(module.training for module in pipe.model.modules())  # as they were
    # going on: the model has changed, what it was before has not
    again = Retention(every=2, texts=3)
    again.look_at(pipe, TEXTS[:3], tmp_path)
    assert again.entries[0]["loss"] == found["before"]["loss"]


def test_no_texts_nothing_measured(plain, tmp_path):
    watch = Retention()
    watch.look_at(plain[1], [], tmp_path)
    assert watch.conclude(plain[1], 3) == {}
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="every=-1"):
        Retention(every=-1)


def test_a_bundle_is_compared_with_its_base_or_with_what_was_stored(plain, tmp_path):
    folder, _ = plain
    pipe = extended(folder)
    with torch.no_grad():
        pipe.model.lm.get_input_embeddings().weight += 0.02
    found = kept(pipe, TEXTS, str(folder), tmp_path / "metrics.json", 64)
    assert found["before"]["loss"] == pytest.approx(transformers_loss(folder, TEXTS)[0], rel=1e-5)
    assert found["ratio"] != pytest.approx(1.0, abs=1e-3)
    assert set(kept(pipe, TEXTS, None, tmp_path / "metrics.json", 64)) == {"after"}
    (tmp_path / "metrics.json").write_text(json.dumps({"text": found}))
    assert kept(pipe, TEXTS, None, tmp_path / "metrics.json", 64) == found
    assert set(kept(pipe, TEXTS[:2], None, tmp_path / "metrics.json", 64)) == {"after"}  # of other texts
    with pytest.raises(ConfigError, match="base=nowhere"):
        kept(pipe, TEXTS, "nowhere", tmp_path / "metrics.json", 64)


def test_another_base_is_refused(plain, tmp_path):
    folder, pipe = plain
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["red circle"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="the model was made from one of"):
        kept(pipe, TEXTS, str(tmp_path), tmp_path / "metrics.json", 64)


def test_the_table_says_what_text_became():
    split = {
        "image_bits": 2.0,
        "text_bits": 3.0,
        "drawing": {"captions": 4, "among_ten_nearest": 0.5, "chance": 0.1},
        "captioning": {"word_f1": 0.25},
    }
    before = {"perplexity": 20.0, "bits_per_byte": 1.25}
    text = {"before": before, "after": {"perplexity": 21.0, "bits_per_byte": 1.5}, "ratio": 1.05}
    told = table({"train": split, "heldout": split, "heldout_style": split, "text": text})
    assert "held-out style" in told and "perplexity 21.00" in told and "times 1.050" in told
    assert "its base model is not known" in table({"train": split, "text": {"after": text["after"]}})
    assert "plain text" not in table({"train": split})
