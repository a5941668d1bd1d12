"""Segments ↔ sequences, for each layout; whatever `build` cannot have written is an error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_format

from lm.grammar import DONE, TEXT, Grammar
from lm.sequence import NONE, Image, Text

FORMATS = {name: make_format(name, (2, 3), depth=2)[0] for name in ("flat", "stacked")}


def image(seed=0):
    return Image(torch.randint(0, 16, (2, 3, 2), generator=torch.Generator().manual_seed(seed)))


texts = st.lists(st.integers(0, 255), min_size=1, max_size=5).map(lambda ids: Text(tuple(ids)))
segments = st.lists(st.one_of(texts, st.integers(0, 99).map(image)), max_size=5)


def merged(parts):
    """Neighbouring texts are one text: a sequence has no mark between them."""
    out = []
    for part in parts:
        if out and isinstance(part, Text) and isinstance(out[-1], Text):
            out[-1] = Text(out[-1].ids + part.ids)
        else:
            out.append(part)
    return out


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@settings(max_examples=60, deadline=None)
@given(parts=segments, end=st.booleans())
def test_split_of_build_is_the_segments(form, parts, end):
    assert form.split(form.build(parts, end)) == merged(parts)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@settings(max_examples=40, deadline=None)
@given(parts=segments)
def test_the_grammar_accepts_what_build_writes(form, parts):
    assert Grammar(form).start(form.build(parts)) == DONE
    assert Grammar(form).start(form.build(parts, end=False)) == TEXT
    assert Grammar(form).start(form.image_prompt(parts)) == 0


def test_stacked_costs_one_position_a_cell():
    assert (FORMATS["stacked"].image_length, FORMATS["stacked"].width) == (6, 2)
    assert (FORMATS["flat"].image_length, FORMATS["flat"].width) == (12, 1)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_broken_sequences_are_refused(form):
    vocabulary = form.vocabulary
    good = form.build([Text((5,)), image(), Text((6,))])
    last_cell = 3 + form.image_length - 1

    def without(position):
        return torch.cat([good[:position], good[position + 1 :]])

    def changed(position, token):
        other = good.clone()
        other[position, 0] = token
        return other

    for broken in [
        good[1:],  # no <bos>
        good[: last_cell + 1],  # cut inside the picture
        without(last_cell),  # a cell too few
        torch.cat([good[:last_cell], good[last_cell:][:1], good[last_cell:]]),  # a cell too many
        without(last_cell + 1),  # no <image_end>
        changed(4, 5),  # text inside the picture
        changed(4, vocabulary.size),  # beyond the vocabulary
        changed(1, vocabulary.image_offset),  # a picture id in text
        changed(1, vocabulary.pad),
        changed(1, vocabulary.eos),  # an end before the end
        changed(1, -1),
        changed(1, vocabulary.image_end),
    ]:
        with pytest.raises(ValueError):
            form.split(broken)
        with pytest.raises(ValueError):
            state = Grammar(form).start(broken)
            if broken[0, 0] != vocabulary.bos or state not in (DONE,):
                raise ValueError("the grammar did not reach the end")
            form.split(broken)


def test_text_must_be_text_and_pictures_must_fit():
    form = FORMATS["stacked"]
    with pytest.raises(ValueError, match="not text"):
        form.build([Text((form.vocabulary.image_start,))])
    with pytest.raises(ValueError, match="not text"):
        form.build([Text((form.vocabulary.image_offset,))])
    with pytest.raises(ValueError, match="grid"):
        form.build([Image(torch.zeros(3, 2, 2, dtype=torch.int64))])
    with pytest.raises(ValueError, match=r"0\.\.15"):
        form.build([Image(torch.full((2, 3, 2), 16))])


def test_labels_leave_out_what_the_rules_force():
    form = FORMATS["stacked"]
    sequence = form.build([Text((5,)), image()])
    depths = Grammar(form).label_depths(sequence)
    text = form.vocabulary.depth
    assert depths[0].tolist() == [NONE, NONE]  # <bos> is never predicted
    assert depths[1].tolist() == [text, NONE]
    assert depths[2].tolist() == [text, NONE]  # <image_start> is a choice
    assert depths[3:9].tolist() == [[0, 1]] * 6
    assert depths[9].tolist() == [NONE, NONE]  # <image_end> is forced
    assert depths[10].tolist() == [text, NONE]  # <eos> is a choice


def test_rows_of_a_batch_are_in_states_of_their_own():
    form = FORMATS["stacked"]
    grammar, vocabulary = Grammar(form), form.vocabulary
    cell = vocabulary.codes_to_ids(torch.tensor([3, 4]))
    state = torch.tensor([TEXT, 2, form.image_length, TEXT])
    rows = torch.tensor([[7, NONE], cell.tolist(), [vocabulary.image_end, NONE], [vocabulary.eos, NONE]])
    assert grammar.advance(state, rows).tolist() == [TEXT, 3, TEXT, DONE]


def test_images_can_be_forbidden():
    form = FORMATS["stacked"]
    assert bool(Grammar(form).text_mask()[form.vocabulary.image_start])
    assert not bool(Grammar(form, images=False).text_mask()[form.vocabulary.image_start])
