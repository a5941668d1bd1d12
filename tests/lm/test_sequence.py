"""Segments ↔ sequences, for each layout; whatever `build` cannot have written is an error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_format

from lm.grammar import DONE, SIZE, TEXT, Grammar
from lm.sequence import NONE, Image, SequenceFormat, Text

MORE = {"more_grids": ((3, 2), (1, 4))}
FORMATS = {name: make_format(name, (2, 3), depth=2)[0] for name in ("flat", "stacked", "delayed")}
FORMATS["flat, row ends"] = make_format("flat", (2, 3), depth=2, row_ends=True)[0]
FORMATS["stacked, row ends"] = make_format("stacked", (2, 3), depth=2, row_ends=True)[0]
ONE_GRID = dict(FORMATS)
FORMATS["flat, sizes"] = make_format("flat", (2, 3), depth=2, row_ends=True, **MORE)[0]
FORMATS["stacked, sizes"] = make_format("stacked", (2, 3), depth=2, row_ends=True, **MORE)[0]
FORMATS["delayed, sizes"] = make_format("delayed", (2, 3), depth=2, **MORE)[0]


def image(seed=0, grid=(2, 3)):
    return Image(torch.randint(0, 16, (*grid, 2), generator=torch.Generator().manual_seed(seed)))


texts = st.lists(st.integers(0, 255), min_size=1, max_size=5).map(lambda ids: Text(tuple(ids)))
seeds, places = st.integers(0, 99), st.integers(0, 2)
parts_of_documents = st.lists(st.one_of(texts, st.tuples(seeds, places)), max_size=5)


def segments(form, parts):
    """Drawn parts → segments: a picture takes one of the format's grids."""
    made = [image(p[0], form.grids[p[1] % len(form.grids)]) if isinstance(p, tuple) else p for p in parts]
    return made


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
@given(parts=parts_of_documents, end=st.booleans())
def test_split_of_build_is_the_segments(form, parts, end):
    parts = segments(form, parts)
    assert form.split(form.build(parts, end)) == merged(parts)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@settings(max_examples=40, deadline=None)
@given(parts=parts_of_documents)
def test_the_grammar_accepts_what_build_writes(form, parts):
    parts = segments(form, parts)
    grammar = Grammar(form)
    assert grammar.start(form.build(parts)) == DONE
    assert grammar.start(form.build(parts, end=False)) == TEXT
    assert grammar.start(form.image_prompt(parts).ids_TW) == (0 if len(form.grids) == 1 else SIZE)
    for grid, first in zip(form.grids, grammar.starts, strict=False):
        assert grammar.start(form.image_prompt(parts, grid).ids_TW) == first


def test_positions_of_a_picture():
    lengths = {name: (form.picture_length((2, 3)), form.width) for name, form in FORMATS.items()}
    assert lengths == {
        "flat": (12, 1),
        "stacked": (6, 2),
        "delayed": (7, 2),
        "flat, row ends": (14, 1),
        "stacked, row ends": (8, 2),
        "flat, sizes": (15, 1),
        "stacked, sizes": (9, 2),
        "delayed, sizes": (8, 2),
    }
    for form in FORMATS.values():
        assert len(form.build([image()])) == form.picture_length((2, 3)) + 4  # <bos>, two marks, <eos>
    assert FORMATS["stacked, sizes"].longest_picture == 10  # 3 rows of 2, 3 row ends, the size


def test_delayed_columns_by_hand():
    """MusicGen's figure: depth 1 of a cell stands beside depth 0 of the next one."""
    form = FORMATS["delayed"]
    picture = image()
    ids_NQ = form.vocabulary.codes_to_ids(picture.codes_hwQ).reshape(6, 2).tolist()
    first, second = [row[0] for row in ids_NQ], [row[1] for row in ids_NQ]
    assert form.build([picture])[2:9].tolist() == [
        list(pair) for pair in zip([*first, NONE], [NONE, *second], strict=True)
    ]


def test_what_positions_belong_to():
    form = FORMATS["stacked, sizes"]
    laid = form.lay([Text((5, 6), given=True), image(grid=(1, 4)), Text((7,)), image(1, (3, 2))])
    pictures, given_T = laid.picture_T.tolist(), laid.given_T.tolist()
    assert pictures == [NONE] * 4 + [0] * 6 + [NONE] * 3 + [1] * 10 + [NONE] * 2
    assert given_T == [False, True, True] + [False] * 22
    assert not form.image_prompt([Text((5,))]).given_T[-1]


def test_formats_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="delayed"):
        make_format("delayed", row_ends=True)
    with pytest.raises(ValueError, match="different"):
        make_format(more_grids=((2, 2),))
    with pytest.raises(ValueError, match="sizes"):
        SequenceFormat(FORMATS["flat"].vocabulary, FORMATS["flat"].layout, ((2, 3), (3, 2)))
    with pytest.raises(ValueError, match="bidirectional"):
        SequenceFormat(FORMATS["flat"].vocabulary, FORMATS["flat"].layout, ((2, 3),), "both")
    with pytest.raises(ValueError, match="name one"):
        _ = FORMATS["flat, sizes"].grid


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_broken_sequences_are_refused(form):
    vocabulary = form.vocabulary
    good = form.build([Text((5,)), image(), Text((6,))])
    last_cell = 3 + form.picture_length((2, 3)) - 1
    assert Grammar(form).start(good) == DONE

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
        *[changed(3, size) for size in vocabulary.sizes[2:]],  # another size than that of the cells
        *[changed(1, size) for size in vocabulary.sizes],
        *[changed(at, vocabulary.row_end) for at in (1, 3) if vocabulary.row_end is not None],
        *[changed(last_cell, 7) for _ in "x" if vocabulary.row_end is not None],
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
    state = torch.tensor([TEXT, 2, form.picture_length(form.grid), TEXT])
    rows = torch.tensor([[7, NONE], cell.tolist(), [vocabulary.image_end, NONE], [vocabulary.eos, NONE]])
    assert grammar.advance(state, rows).tolist() == [TEXT, 3, TEXT, DONE]


def test_images_can_be_forbidden():
    form = FORMATS["stacked"]
    assert bool(Grammar(form).text_mask()[form.vocabulary.image_start])
    assert not bool(Grammar(form, images=False).text_mask()[form.vocabulary.image_start])


def test_a_size_competes_with_other_sizes_alone():
    form = FORMATS["stacked, sizes"]
    depths = Grammar(form).label_depths(form.build([image()]))
    assert depths[2].tolist() == [form.vocabulary.depth + 1, NONE]
    assert depths[6].tolist() == [NONE, NONE]  # <row_end> is forced
    mask = Grammar(form).size_mask()
    assert mask.nonzero().flatten().tolist() == list(form.vocabulary.sizes)
    assert not bool((mask & Grammar(form).text_mask()).any())
