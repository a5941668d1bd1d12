"""Documents, the mixture, and packing."""

import numpy as np
import pytest
import torch
from tiny import make_format

from lm.data import DocumentBatches, Mixture, Pairs, pack
from lm.sequence import NONE, Image, Text
from vqlm.errors import ConfigError


@pytest.fixture
def form():
    return make_format()[0]


def pairs(count=20):
    captions = [tuple(range(1 + i % 4)) for i in range(count)]
    names = [str(i) for i in range(count)]
    return Pairs(captions, torch.randint(0, 16, (count, 2, 2, 2)), names, names, names)


def test_no_label_crosses_a_document(form):
    documents = [form.build([Text((i, i)), Image(torch.full((2, 2, 2), i))]) for i in range(6)]
    batch = pack(documents, form, 24)
    assert batch.samples == 6
    assert batch.ids_BTW.shape[1] <= 24
    same = batch.document_BT[:, 1:] == batch.document_BT[:, :-1]
    has_label = batch.next_BTW[:, :-1, 0] != NONE
    assert bool((~has_label | same).all())
    assert bool((batch.next_BTW[:, -1] == NONE).all())
    # every document is there, whole, once
    found = []
    for row, numbers in zip(batch.ids_BTW, batch.document_BT, strict=True):
        found += [row[numbers == n] for n in range(int(numbers.max()) + 1)]
    assert sorted(d.flatten().tolist() for d in found) == sorted(d.flatten().tolist() for d in documents)


def test_the_mask_is_causal_within_the_document_and_never_empty(form):
    batch = pack(
        [form.build([Text((1,))]), form.build([Text((2, 3))]), form.build([Text((4,) * 9)])], form, 12
    )
    mask = batch.mask[:, 0]
    for b, t in np.ndindex(*mask.shape[:2]):
        seen = mask[b, t].nonzero().flatten().tolist()
        expected = [s for s in range(t + 1) if batch.document_BT[b, s] == batch.document_BT[b, t]]
        assert seen == expected
        assert t in seen


def test_batch_n_is_a_function_of_the_seed_and_n(form):
    def batches(seed):
        return DocumentBatches(pairs_, form, Mixture(), 8, 32, seed, 100)

    pairs_ = pairs()
    first, again, other = batches(0), batches(0), batches(1)
    _ = first[3]  # having read another one must not matter
    assert torch.equal(first[7].ids_BTW, again[7].ids_BTW)
    assert not torch.equal(first[7].ids_BTW, other[7].ids_BTW)


def test_each_pair_comes_once_an_epoch(form):
    pairs_ = pairs(16)
    data = DocumentBatches(pairs_, form, Mixture(1.0, 0.0, 0.0), 8, 32, 0, 10)
    seen = sorted(int(i) for n in (0, 1) for i in data.order.indices(n))
    assert seen == list(range(16))


def test_tasks_are_drawn_at_their_rates():
    random = np.random.default_rng(0)
    drawn = [Mixture(3.0, 1.0, 0.2).draw(random) for _ in range(20_000)]
    share = {task: drawn.count(task) / len(drawn) for task in set(drawn)}
    assert share == pytest.approx(
        {"image_to_text": 0.25, "unconditional": 0.15, "text_to_image": 0.6}, abs=0.02
    )


def test_dropping_the_condition_drops_the_caption_and_keeps_the_picture():
    # one peer inverted the mask, so that text was kept with the drop probability
    kept = pairs().document(3, "text_to_image")
    dropped = pairs().document(3, "unconditional")
    assert [type(s) for s in kept] == [Text, Image]
    assert [type(s) for s in dropped] == [Image]
    random = np.random.default_rng(0)
    assert {Mixture(1.0, 0.0, 0.0).draw(random) for _ in range(50)} == {"text_to_image"}
    assert {Mixture(1.0, 0.0, 1.0).draw(random) for _ in range(50)} == {"unconditional"}


@pytest.mark.parametrize("layout", ["stacked", "flat"])
def test_noise_replaces_codes_that_are_read_and_none_that_are_to_be_predicted(layout):
    form = make_format(layout)[0]
    made = pairs(64)
    clean, noisy = (DocumentBatches(made, form, Mixture(noise=n), 64, 64, 0, 10)[4] for n in (0.0, 0.3))
    assert torch.equal(clean.next_BTW, noisy.next_BTW)
    picture = clean.ids_BTW >= form.vocabulary.image_offset
    assert torch.equal(clean.ids_BTW[~picture], noisy.ids_BTW[~picture])
    changed = (clean.ids_BTW != noisy.ids_BTW)[picture].float().mean()
    assert 0.2 < changed < 0.38  # 0.3, less the draws that hit the same code
    for before, after in zip(clean.ids_BTW[picture], noisy.ids_BTW[picture], strict=True):
        offset = form.vocabulary.image_offset
        assert (before - offset) // 16 == (after - offset) // 16  # the same depth


def test_a_dropped_caption_does_not_teach_that_captions_are_empty(form):
    # with an <eos> right after the picture, greedy captions of the trained model were empty
    def ends(mixture):
        return int(
            (DocumentBatches(pairs(), form, mixture, 8, 32, 0, 10)[0].next_BTW == form.vocabulary.eos).sum()
        )

    assert ends(Mixture(1.0, 0.0, 1.0)) == 0
    assert ends(Mixture(1.0, 0.0, 0.0)) == 8


@pytest.mark.parametrize("values", [(-1.0, 1.0, 0.1), (0.0, 0.0, 0.1), (1.0, 0.0, 1.5), (1.0, 0.0, 0.1, 1.0)])
def test_impossible_mixtures_are_refused(values):
    with pytest.raises(ValueError, match="must"):
        Mixture(*values)


def test_a_row_that_is_too_short_is_refused_before_training(form):
    with pytest.raises(ConfigError, match="row_length=8"):
        DocumentBatches(pairs(), form, Mixture(), 4, 8, 0, 10)
    with pytest.raises(ValueError, match="does not fit"):
        pack([form.build([Text((1,) * 30)])], form, 8)
