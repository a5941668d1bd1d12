"""C.20 and C.21: whatever is drawn parses, whatever does not parse is refused.

The judge is `read` below: a second parser, written from the format's description alone, position by position, with
neither plans nor a state machine. What the decoder wrote is taken where it passes, before the decoder reads it itself.
"""

from collections import Counter

import pytest
import torch
from tiny import HEADS, QWEN, make_format, make_head, make_tokenizer

from lm.decoding import Decoder, Drawing, Sampling
from lm.grammar import DONE, grammar_of
from lm.model import MultimodalLM, from_scratch
from lm.sequence import NONE, Image, Text

FORMS = {
    "flat": {"layout": "flat"},
    "flat, row ends": {"layout": "flat", "row_ends": True, "grid": (2, 3)},
    "flat, sizes": {"layout": "flat", "row_ends": True, "more_grids": ((1, 3), (3, 1))},
    "stacked": {"layout": "stacked", "depth": 3},
    "stacked, row ends": {"layout": "stacked", "row_ends": True, "grid": (3, 2)},
    "stacked, sizes": {"layout": "stacked", "more_grids": ((1, 3), (3, 1), (1, 1))},
    "delayed": {"layout": "delayed", "depth": 3},
    "delayed, sizes": {"layout": "delayed", "more_grids": ((1, 3), (2, 1))},
}


class Illegal(Exception):
    """The stream is none that this format has."""


class Reader:
    """A stream of rows (lists of W ids) and the place in it."""

    def __init__(self, rows, form):
        self.rows, self.v, self.layout, self.form, self.at = rows, form.vocabulary, form.layout.name, form, 0

    def take(self):
        if self.at == len(self.rows):
            raise Illegal("the stream ends too early")
        self.at += 1
        return self.rows[self.at - 1]

    def word(self):
        """One id below the picture block, alone in its row."""
        first, *others = self.take()
        if not 0 <= first < self.v.image_offset or any(other != -1 for other in others):
            raise Illegal("not one word")
        return first

    def mark(self, wanted):
        if self.word() != wanted:
            raise Illegal(f"{wanted} is missing")

    def code(self, token, depth):
        code = token - self.v.image_offset - depth * self.v.codebook_size
        if not 0 <= code < self.v.codebook_size:
            raise Illegal(f"{token} is no code of depth {depth}")
        return code

    def cell(self):
        """The codes of one cell, of a layout in which cells stand one after another."""
        Q = self.v.depth
        tokens = [self.take() for _ in range(Q)] if self.layout == "flat" else [[t] for t in self.take()]
        if any(len(token) != 1 for token in tokens) or len(tokens) != Q:
            raise Illegal("columns")
        return [self.code(token, depth) for depth, (token,) in enumerate(tokens)]

    def shifted(self, cells):
        """The codes of so many cells, depth d standing d rows later."""
        Q, rows = self.v.depth, []
        for n in range(cells + Q - 1):
            row = self.take()
            for depth in range(Q):
                if not 0 <= n - depth < cells and row[depth] != -1:
                    raise Illegal("a column that must be empty")
            rows.append(row)
        return [[self.code(rows[n + d][d], d) for d in range(Q)] for n in range(cells)]

    def picture(self):
        height, width = self.form.grids[0]
        if self.v.sizes:
            size = self.word()
            if size not in self.v.sizes:
                raise Illegal("no size")
            height, width = self.form.grids[self.v.sizes.index(size)]
        if self.layout == "delayed":
            cells = self.shifted(height * width)
        else:
            cells = []
            for _ in range(height):
                cells += [self.cell() for _ in range(width)]
                if self.v.row_end is not None:
                    self.mark(self.v.row_end)
        self.mark(self.v.image_end)
        return ("picture", (height, width), cells)


def read(rows, form):
    """Rows of ids → [("text", ids) or ("picture", grid, codes of each cell)], and whether <eos> was there."""
    reader, v, found = Reader(rows, form), form.vocabulary, []
    reader.mark(v.bos)
    while reader.at < len(rows):
        word = reader.word()
        if word == v.eos:
            if reader.at < len(rows):
                raise Illegal("something stands after the end")
            return found, True
        if word == v.image_start:
            found.append(reader.picture())
        elif word in v.specials:
            raise Illegal(f"special {word} in text")
        elif found and found[-1][0] == "text":
            found[-1][1].append(word)
        else:
            found.append(("text", [word]))
    return found, False


def told(segments):
    """Segments as `read` tells them."""
    return [
        ("text", list(part.ids))
        if isinstance(part, Text)
        else ("picture", part.grid, part.codes_hwQ.flatten(0, 1).tolist())
        for part in segments
    ]


class Chooser:
    """Random choices from one seed."""

    def __init__(self, seed):
        self.random = torch.Generator().manual_seed(seed)

    def below(self, n):
        return int(torch.randint(n, (), generator=self.random))

    def one(self, *choices):
        return choices[self.below(len(choices))]

    def between(self, low, high):
        return low + (high - low) * float(torch.rand((), generator=self.random))


# --- C.21 -----------------------------------------------------------------------------------------------------


def random_sampling(chooser):
    return Sampling(
        guidance=chooser.one(1.0, 0.0, 10.0, chooser.between(0, 10)),
        temperature=chooser.one(0.0, 1.0, chooser.between(0, 3), 100.0),
        top_k=chooser.one(0, 0, 1, 3, 1000),
        top_p=chooser.one(1.0, 1.0, 0.01, chooser.between(0.1, 1)),
        min_p=chooser.one(0.0, 0.0, 1.0, chooser.between(0, 1)),
        deeper=chooser.one(1.0, 0.5, 3.0),
        image_guidance=chooser.one(1.0, chooser.between(0, 10)),
        parallel=chooser.one(1.0, 0.0),
        norm=chooser.one(0.0, 0.5),
        ramp=chooser.one(0.0, 0.7),
    )


def random_image(form, grid, chooser):
    v = form.vocabulary
    codes = torch.randint(0, v.codebook_size, (*grid, v.depth), generator=chooser.random)
    return Image(codes, given=True)


def random_drawing(form, samplings, chooser, seed):
    """Text alone, a picture alone (its size announced or left to the model), or both in turns with forced counts."""
    given = []
    for _ in range(chooser.below(3)):
        words = tuple(chooser.below(256) for _ in range(chooser.below(4)))
        given.append(
            chooser.one(Text(words, given=True), random_image(form, chooser.one(*form.grids), chooser))
        )
    context = ((), (Text((9, 8)),))[chooser.below(2)]
    edit = ((Text((9,)), random_image(form, form.grids[0], chooser)), ())
    contexts = chooser.one((), (context,), edit)
    kind = chooser.one("text", "picture", "both")
    common = {"sampling": chooser.one(*samplings), "seed": seed, "contexts": contexts}
    if kind == "text":
        return kind, None, Drawing(form.lay(given, end=False), text=chooser.below(12), **common)
    if kind == "picture":
        grid = chooser.one(None, *form.grids)
        kept = None
        if grid is not None and chooser.below(3) == 0:
            kept = random_image(form, grid, chooser).codes_hwQ
            kept[torch.rand(kept.shape, generator=chooser.random) < 0.5] = NONE
        return kind, grid, Drawing(form.image_prompt(given, grid), images=1, kept=kept, **common)
    due = chooser.below(4)
    drawing = Drawing(
        form.lay(given, end=False),
        text=chooser.below(8),
        images=max(due, chooser.below(4)),
        least_images=due,
        **common,
    )
    return kind, None, drawing


def random_model(form, head, seed):
    chooser = Chooser(seed)
    torch.manual_seed(seed)
    config = {**QWEN, "initializer_range": chooser.one(0.02, 0.3, 2.0)}
    model = MultimodalLM(from_scratch(config, form.vocabulary.size, seed), make_head(head, form.width), form)
    with torch.no_grad():  # one that would end, open pictures, or write marks all the time
        model.lm.get_input_embeddings().weight[list(form.vocabulary.specials)] *= chooser.one(1, 1, 30)
    if chooser.below(3) == 0:
        model.lm.config.max_position_embeddings = 3 * form.longest_marked + 10  # little room
    return model.eval()


def decoded(model, drawings, monkeypatch):
    """What each drawing wrote, as rows of ids after its prompt, and the segments that the decoder read in them.

    Rows join while others are under way. None for a drawing that the model has no room for.
    """
    written = {}
    advance = Decoder._advance

    def overheard(self, rows, ids):
        for row, ids_W in zip(rows, ids, strict=True):
            written.setdefault(id(row), []).append(list(ids_W))
        return advance(self, rows, ids)

    monkeypatch.setattr(Decoder, "_advance", overheard)
    decoder, rows = Decoder(model), []
    for _, _, drawing in drawings:
        try:
            rows.append(decoder.add(drawing))
        except ValueError as error:
            assert "positions" in str(error)
            rows.append(None)
        if len(rows) % 7 == 0:
            decoder.step()
    while decoder.rows:
        decoder.step()
    monkeypatch.setattr(Decoder, "_advance", advance)
    return [None if row is None else (written.get(id(row), []), row.segments) for row in rows]


def check(form, kind, grid, drawing, rows, segments):
    """What was drawn is of the format, of the announced grid, and as much as was asked for. Returns its pictures."""
    prompt = drawing.prompt.ids_TW.tolist()
    whole, _ = read([*prompt, *rows], form)
    opened = kind == "picture"
    before = []
    if opened:  # the prompt's own last picture is not finished: read what stands before its mark
        marks = [t for t, row in enumerate(prompt) if row[0] == form.vocabulary.image_start]
        prompt = prompt[: marks[-1]]
    before, _ = read(prompt, form)
    if before and before[-1][0] == "text" and len(whole) >= len(before):
        first = whole[len(before) - 1][1][len(before[-1][1]) :]
        made = ([("text", first)] if first else []) + whole[len(before) :]
    else:
        made = whole[len(before) :]
    assert made == told(segments)
    pictures = [part for part in made if part[0] == "picture"]
    text = sum(len(part[1]) for part in made if part[0] == "text")
    assert drawing.least_images <= len(pictures) <= drawing.images
    assert text <= drawing.text
    if kind == "text":
        assert not pictures
    if opened:
        assert len(pictures) == 1 == len(made) and grid in (None, pictures[0][1])
        if drawing.kept is not None:
            codes = torch.tensor(pictures[0][2]).reshape(drawing.kept.shape)
            assert torch.equal(codes[drawing.kept != NONE], drawing.kept[drawing.kept != NONE])
    return pictures


def test_everything_drawn_parses_to_the_announced_grid(count, figure, monkeypatch):
    cells = [(name, head) for name in FORMS for head in HEADS]
    wanted, batch = count(120, 10_000), count(10, 40)
    formats = {name: make_format(**form)[0] for name, form in FORMS.items()}
    drawn = pictures = refused = turn = 0
    kinds = Counter()
    while drawn < wanted:
        name, head = cells[turn * 5 % len(cells)]  # few turns see each layout and head, many each pair
        form, chooser = formats[name], Chooser(turn)
        model = random_model(form, head, turn)
        samplings = [random_sampling(chooser) for _ in range(3)]
        drawings = [random_drawing(form, samplings, chooser, n) for n in range(batch)]
        for (kind, grid, drawing), made in zip(drawings, decoded(model, drawings, monkeypatch), strict=True):
            if made is None:
                refused += 1
                continue
            pictures += len(check(form, kind, grid, drawing, *made))
            drawn += 1
            kinds[kind] += 1
        turn += 1
    assert min(kinds.values()) > drawn / 6 and turn >= 12
    figure(
        "C.21",
        "drawing under any weights, settings and wishes",
        "one state machine a row; only ids that it allows can be drawn",
        f"{drawn:,}/{drawn:,} decodes parse to the announced grid ({min(turn, len(cells))} pairs of layout "
        f"and head, {pictures:,} pictures)",
    )


@pytest.mark.parametrize("broken", ["forced_S", "closing_S", "starts"])
def test_a_broken_grammar_is_found(broken, monkeypatch):
    """The judge is not the decoder's own state machine: with a wrong one, something is told."""
    form, _ = make_format(**FORMS["stacked, row ends"])
    model = random_model(form, "linear", 1)
    grammar = grammar_of(form)
    wrong = {
        "forced_S": grammar.forced_S.where(grammar.forced_S != form.vocabulary.row_end, 5),
        "closing_S": grammar.closing_S.roll(-1),
        "starts": [1, *grammar.starts[1:]],
    }
    monkeypatch.setattr(grammar, broken, wrong[broken])
    drawing = ("picture", None, Drawing(form.image_prompt([]), images=1))
    with pytest.raises((Illegal, AssertionError, ValueError, IndexError)):
        ((rows, segments),) = decoded(model, [drawing], monkeypatch)
        check(form, *drawing, rows, segments)


# --- C.20 -----------------------------------------------------------------------------------------------------


def spoilt(ids_TW, form, chooser):
    """A sequence, changed in one to three places; it may still be legal."""
    v = form.vocabulary
    tokens = [-1, -2, v.size, v.size + 7, 2**40, -(2**62), *v.specials, v.image_offset, v.size - 1, 5]
    rows = ids_TW.tolist()
    for _ in range(1 + chooser.below(3)):
        at, way = chooser.one(0, *[chooser.below(len(rows) or 1)] * 5), chooser.below(9)
        if not rows or way == 0:
            rows.insert(at, [chooser.one(*tokens) for _ in range(form.width)])
        elif way == 1:
            del rows[at]
        elif way == 2:
            rows = rows[:at]
        elif way == 3:
            rows.insert(at, list(rows[at]))
        elif way == 4:
            rows[at] = rows[at][::-1]
        elif way == 5:
            rows += [[v.pad, *[-1] * (form.width - 1)]] * (1 + chooser.below(3))
        elif way == 6:
            other = chooser.below(len(rows))
            rows[at], rows[other] = rows[other], rows[at]
        elif way == 7:
            rows = rows[at:]
        else:
            rows[at] = list(rows[at])
            rows[at][chooser.below(form.width)] = chooser.one(*tokens, chooser.below(v.size))
    return rows


def verdict(form, rows):
    """What `split` does with a stream, beside what it is: refused, read, "silent" or "crash"."""
    try:
        expected = read(rows, form)[0]
    except Illegal:
        expected = None
    ids_TW = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), form.width)
    try:
        found = told(form.split(ids_TW))
    except ValueError:
        return "refused" if expected is None else "silent"
    except Exception:
        return "crash"
    return "read" if found == expected else "silent"


def state_verdict(form, rows):
    """The same of the decoder's state machine: a prompt that it accepts is the beginning of something legal."""
    ids_TW = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), form.width)
    try:
        state = grammar_of(form).start(ids_TW)
    except ValueError:
        return "refused"
    except Exception:
        return "crash"
    if state != DONE:
        return "read"
    word = lambda token: [token, *[-1] * (form.width - 1)]  # noqa: E731
    end = rows.index(word(form.vocabulary.eos)) + 1
    if all(row in (word(form.vocabulary.pad), rows[end - 1]) for row in rows[end:]):
        rows = rows[:end]  # what follows fills up a finished row of a batch
    try:
        read(rows, form)
    except Illegal:
        return "silent"
    return "read"


def test_illegal_streams_are_refused(count, figure):
    formats = [make_format(**form)[0] for form in FORMS.values()]
    wanted, n = count(400, 10_000), 0
    found, states = Counter(), Counter()
    while found["refused"] < wanted:
        form, chooser = formats[n % len(formats)], Chooser(n)
        images = [random_image(form, chooser.one(*form.grids), chooser) for _ in range(1 + chooser.below(2))]
        good = form.build([Text((5, 6)), *images, Text((7,))])
        rows = spoilt(good, form, chooser)
        found[verdict(form, rows)] += 1
        states[state_verdict(form, rows)] += 1
        n += 1
    assert found["read"] and found["silent"] == found["crash"] == 0, found
    assert states["silent"] == states["crash"] == 0, states
    figure(
        "C.20",
        "illegal token streams into split",
        "ValueError with the position; a second parser agrees",
        f"{found['refused']:,} refused, {found['silent']} silent, {found['crash']} crashes",
    )


def spoilt_codes(chooser, K, Q):
    """Codes (B,h,w,Q) of which at least one is outside [0,K)."""
    codes = torch.randint(0, K, (1, 2, 2, Q), generator=chooser.random)
    wrong = chooser.one(-1, -K, K, K + 1, 2**31, -(2**40))
    codes.view(-1)[chooser.below(codes.numel())] = wrong
    return codes


def library_decoders(K):
    """Decoders of vector-quantize-pytorch that take codes (B,N[,Q])."""
    from vector_quantize_pytorch import FSQ, ResidualVQ, VectorQuantize

    torch.manual_seed(0)
    vq = VectorQuantize(dim=4, codebook_size=K)
    rvq = ResidualVQ(dim=4, codebook_size=K, num_quantizers=2)
    fsq = FSQ([4, 4], dim=4)  # 16 codes
    return {
        "VectorQuantize": lambda codes: vq.get_output_from_indices(codes.flatten(1, 2)[..., 0]),
        "ResidualVQ": lambda codes: rvq.get_output_from_indices(codes.flatten(1, 2)),
        "FSQ": lambda codes: fsq.indices_to_codes(codes.flatten(1, 2)[..., 0]),
    }


def silent(decode, codes):
    try:
        decode(codes)
    except Exception:
        return 0
    return 1


def test_codes_outside_the_codebook_are_refused(count, figure):
    tokenizer, K, trials = make_tokenizer(), 16, count(200, 10_000)
    library, wrong, theirs = library_decoders(K), 0, Counter()
    for n in range(trials):
        codes = spoilt_codes(Chooser(n), K, 2)
        try:
            tokenizer.decode(codes)
            wrong += 1
        except ValueError:
            pass
        alone = spoilt_codes(Chooser(n), K, 1).expand(-1, -1, -1, 2)  # each depth is wrong: none looks away
        for name, decode in library.items():
            theirs[name] += silent(decode, alone)
    for shape in ((2, 2, 2), (1, 2, 2, 3), (1, 2, 2)):
        with pytest.raises(ValueError):
            tokenizer.decode(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError):
        tokenizer.decode(torch.zeros(1, 2, 2, 2))
    assert wrong == 0
    figure(
        "C.20",
        "codes outside the codebook into decode",
        "ValueError with what was found and what is allowed",
        f"{wrong} silent of {trials:,}",
        {name: f"{theirs[name]:,} silent of {trials:,}" for name in library},
    )
