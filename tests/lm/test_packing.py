"""Packing: against one document at a time, and against a naive first-fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_format

from lm.grammar import Grammar
from lm.packing import arrange, pack
from lm.sequence import NONE, Image, SequenceFormat, Text


def documents(form, count=40, seed=0):
    """Documents of every kind: given and learnt parts, one or two pictures, with and without an end."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        codes = torch.from_numpy(random.integers(0, 16, (2, *form.grids[i % len(form.grids)], 2)))
        text = Text(tuple(random.integers(0, 200, random.integers(0, 9)).tolist()), given=bool(i % 3 == 0))
        segments = [text, Image(codes[0], given=bool(i % 2)), Text((i,))]
        found.append(
            form.lay([*segments, Image(codes[1], given=True)] if i % 5 == 0 else segments, bool(i % 4))
        )
    return found


def apart(batch):
    """(row, places) of each document of a batch, row by row."""
    return [
        (b, (row == n).nonzero().flatten())
        for b, row in enumerate(batch.document_BT)
        for n in range(int(row.max()) + 1)
    ]


FORMS = [
    "stacked causal",
    "flat bidirectional",
    "delayed bidirectional",
    "stacked bidirectional",
    "stacked one-mark",
]


@pytest.fixture(params=FORMS)
def form(request):
    layout, attention = request.param.split()
    made = make_format(layout, more_grids=((1, 3),), row_ends=layout == "flat")[0]
    vocabulary = made.vocabulary
    if attention == "one-mark":  # as GPT-2 has it: what ends a document could be what begins the next one
        vocabulary, attention = replace(vocabulary, bos=vocabulary.eos), "causal"
    return SequenceFormat(vocabulary, made.layout, made.grids, attention)


def test_every_document_is_there_once_as_it_would_be_alone(form):
    made = documents(form)
    batch = pack(made, form, 60)
    left = list(made)
    for b, at in apart(batch):
        assert at.tolist() == list(range(int(at[0]), int(at[0]) + len(at)))
        document = left.pop(
            next(i for i, d in enumerate(left) if torch.equal(d.ids_TW, batch.ids_BTW[b, at]))
        )
        assert batch.positions_BT[b, at].tolist() == list(range(len(at)))
        labels = Grammar(form).label_depths(document.ids_TW)
        for t in range(len(document)):
            follows = t + 1 < len(document) and not document.given_T[t + 1]
            expected = [
                int(document.ids_TW[t + 1, w]) if follows and labels[t + 1, w] != NONE else NONE
                for w in range(form.width)
            ]
            assert batch.next_BTW[b, at[t]].tolist() == expected
        alone, mask = pack([document], form, 60).mask[0, 0], batch.mask[b, 0]
        assert torch.equal(mask[at][:, at], alone)
        elsewhere = torch.ones(len(mask), dtype=torch.bool)
        elsewhere[at] = False
        assert not mask[at][:, elsewhere].any()
    assert not left and batch.samples == len(made)
    padding = batch.document_BT == NONE
    assert bool((batch.ids_BTW[padding][:, 0] == form.vocabulary.pad).all())
    assert bool((batch.next_BTW[padding] == NONE).all()) and bool((batch.picture_BT[padding] == NONE).all())
    assert batch.padding == pytest.approx(1 - sum(map(len, made)) / batch.document_BT.numel())
    assert bool(batch.mask.any(-1).all())  # no position sees nothing


def test_given_pictures_see_all_of_themselves_and_nothing_else_ahead(form):
    for document in documents(form):
        mask = pack([document], form, 60).mask[0, 0]
        both = form.picture_attention == "bidirectional"
        for t in range(len(document)):
            for s in range(len(document)):
                together = document.picture_T[t] == document.picture_T[s] != NONE
                together = both and together and bool(document.given_T[t])
                assert bool(mask[t, s]) == (s <= t or together)


def test_no_label_follows_what_sees_it(form):
    # a position that sees ahead must not be asked for what it sees
    batch = pack(documents(form), form, 60)
    T = batch.ids_BTW.shape[1]
    ahead = (batch.mask[:, 0] & torch.ones(T, T, dtype=torch.bool).triu(1)).any(-1)
    last = (batch.picture_BT[:, :-1] != batch.picture_BT[:, 1:]) & (batch.picture_BT[:, :-1] != NONE)
    assert bool((batch.next_BTW[ahead] == NONE).all())
    assert bool((batch.next_BTW[:, :-1][last] == NONE).all())  # <image_end> is forced


def naive(lengths, row_length):
    """First-fit decreasing, as one would write it down: rows of document numbers."""
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row in rows:
            if sum(lengths[j] for j in row) + lengths[i] <= row_length:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_documents_are_arranged_first_fit_decreasing(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 65, 50).tolist()
    plan, rows = arrange(tuple(lengths), 64), naive(lengths, 64)
    assert plan.shape == (len(rows), max(sum(lengths[i] for i in row) for row in rows))
    for b, row in enumerate(rows):
        start = 0
        for n, i in enumerate(row):
            assert (plan.row_N[i], plan.number_N[i], plan.start_N[i]) == (b, n, start)
            start += lengths[i]
    # Johnson 1973: at most 11/9 of the best, and 6/9 of a row more
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 6 / 9 + 3


def test_a_document_longer_than_a_row_is_refused(form):
    with pytest.raises(ValueError, match="30 positions does not fit row_length=8"):
        pack([form.lay([Text((1,) * 28)])], form, 8)
