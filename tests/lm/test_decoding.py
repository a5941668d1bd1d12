"""Every draw of the decoder, replayed: the same random numbers on uncached passes over what was drawn, in float64."""

from dataclasses import replace

import pytest
import torch
from tiny import HEADS, make_model

from lm.decoding import Decoder, Drawing, Row, Sampling, draw_all
from lm.grammar import SIZE, TEXT, Grammar
from lm.packing import pack
from lm.sequence import NONE, Image, Text

FORMS = {
    "stacked": {"layout": "stacked"},
    "flat, sizes": {"layout": "flat", "row_ends": True, "more_grids": ((1, 3),)},
    "delayed": {"layout": "delayed"},
    "stacked, sizes": {"layout": "stacked", "row_ends": True, "more_grids": ((1, 3), (3, 1))},
}


def image(form, seed=0):
    random = torch.Generator().manual_seed(seed)
    return Image(torch.randint(0, 16, (*form.grids[0], form.vocabulary.depth), generator=random), given=True)


class Pass:
    """One uncached pass over whole segments: scores of what follows a position."""

    def __init__(self, model, segments):
        self.model, laid = model, model.form.lay(segments)
        self.ids_TW = laid.ids_TW
        batch = pack([laid], model.form, 10**5)
        self.made = model.teach(batch.ids_BTW, batch.next_BTW, batch.mask, batch.positions_BT)
        where_T = model.is_image(batch.next_BTW).any(-1)[0]
        self.place = {int(t): n for n, t in enumerate(where_T.nonzero())}

    def text(self, t):
        return self.model.text_logits(self.made.hidden_BTC[0, t])[None].float()

    def code(self, t, column, depth):
        return self.model.image_logits(self.made.features[column][self.place[t]], depth)[None].float()


class Replay:
    """Draws a drawing again, position by position. `differences`: what came out otherwise than `made`."""

    def __init__(self, model, given, drawing, made):
        self.model, self.form, self.grammar = model, model.form, Grammar(model.form)
        self.drawing, self.row = drawing, Row(drawing, 0)  # its random numbers and the contexts of its twins
        self.whole = Pass(model, [*given, *made])
        self.pictures = [part for part in made if isinstance(part, Image)]
        self.differences = []
        self.run()

    def draw(self, logits, depth=0):
        uniform = torch.tensor([self.row.uniform()], dtype=torch.float64)
        return int(self.drawing.sampling.draw(logits, uniform, depth))

    def run(self):
        drawing, ids_TW, v = self.drawing, self.whole.ids_TW, self.form.vocabulary
        t = len(drawing.prompt)
        state = self.grammar.start(ids_TW[:t])
        text, left, due = drawing.text, drawing.images, drawing.least_images
        if state != TEXT:
            left, due = left - 1, due - 1
        number = -1
        while t < len(ids_TW):
            token = int(ids_TW[t, 0])
            expected = token
            if state == TEXT and text <= 0:
                assert token == (v.image_start if due > 0 else v.eos)
            elif state == TEXT:
                legal = self.grammar.text_mask()
                legal[v.image_start], legal[v.eos] = left > 0, due <= 0
                expected = self.draw(self.whole.text(t - 1).masked_fill(~legal, -torch.inf))
                text -= 1
            elif state == SIZE:
                expected = self.draw(
                    self.whole.text(t - 1).masked_fill(~self.grammar.size_mask(), -torch.inf)
                )
            elif int(self.grammar.forced_S[state]) == NONE:
                if state in self.grammar.starts:
                    number, start = number + 1, t
                    picture = self.pictures[number]
                    twins = [
                        (Pass(self.model, [*c, picture]), self.opened(c, picture)) for c in self.row.contexts
                    ]
                self.check_codes(t, t - start, state, twins, number)
            if expected != token:
                self.differences.append((t, token, expected))
            if state == TEXT and token == v.image_start:
                left, due = left - 1, due - 1
            state = int(self.grammar.advance(torch.tensor([state]), ids_TW[t][None]))
            t += 1

    def opened(self, context, picture):
        return len(self.form.image_prompt(list(context), picture.grid))

    def check_codes(self, t, cell, state, twins, number):
        sampling, grid = self.drawing.sampling, self.pictures[number].grid
        share = torch.tensor([cell / len(self.form.plan(grid))])
        kept = self.drawing.kept if number == 0 else None
        for column, depth in enumerate(self.grammar.depth_SW[state].tolist()):
            if depth == NONE:
                continue
            branches = [self.whole.code(t - 1, column, depth)]
            branches += [twin.code(first + cell - 1, column, depth) for twin, first in twins]
            expected = (
                self.draw(sampling.guide(branches, share), depth)
                + self.form.vocabulary.image_range(depth).start
            )
            if kept is not None and self.form.place_kept(kept, grid)[cell, column] != NONE:
                expected = int(self.form.place_kept(kept, grid)[cell, column])
            if expected != int(self.whole.ids_TW[t, column]):
                self.differences.append((t, column, int(self.whole.ids_TW[t, column]), expected))


def made_drawings(form, count, seed):
    """Given segments and drawings of all kinds: text first, a picture that is open, pictures that are owed, edits."""
    random = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=random))]

    found = []
    for n in range(count):
        given = [Text(tuple(range(5, 6 + pick(0, 1, 5))), given=True), image(form, n)][: pick(1, 2)]
        opens = pick(True, False)
        sampling = Sampling(
            pick(1.0, 3.0),
            pick(0.7, 1.5),
            pick(0, 6),
            pick(1.0, 0.9),
            pick(0.0, 0.05),
            deeper=pick(1.0, 0.5),
            image_guidance=pick(1.0, 1.7),
            parallel=pick(1.0, 0.2),
            norm=pick(0.0, 0.3),
            ramp=pick(0.0, 0.6),
        )
        due = pick(0, 1, 2)
        prompt = form.image_prompt(given, form.grids[0]) if opens else form.lay(given, end=False)
        kept = image(form, n + 50).codes_hwQ if opens and pick(True, False) else None
        if kept is not None:
            kept[0, 0] = NONE
        contexts = pick(((),), ((),), ((Text((9, 8)), image(form, 3)), ()))
        images = max(due, pick(1, 2))
        found.append((given, Drawing(prompt, sampling, n, pick(0, 4), images, due, contexts, kept)))
    return found


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("head", HEADS)
def test_every_draw_is_that_of_an_uncached_pass(head, form, attention):
    """Rows join while others are under way; each is what it is alone."""
    model, _ = make_model(head, **form)
    model.form = replace(model.form, picture_attention=attention)
    model.double()
    drawings = made_drawings(model.form, 7, seed=len(head) + len(attention))
    decoder, rows = Decoder(model), []
    with torch.inference_mode():
        for _, drawing in drawings:
            rows.append(decoder.add(drawing))
            decoder.step()
        while decoder.rows:
            decoder.step()
        for (given, drawing), row in zip(drawings, rows, strict=True):
            assert Replay(model, given, drawing, row.segments).differences == []


@pytest.mark.parametrize("layout", ["stacked", "flat", "delayed"])
def test_guidance_of_pictures_that_begin_after_the_prompt(layout):
    """A row alone, whose twin begins anew with its second picture."""
    model, _ = make_model("layered" if layout == "stacked" else "linear", layout)
    model.double()
    given = [Text((5, 6, 7), given=True)]
    for text in (0, 6):
        drawing = Drawing(model.form.lay(given, end=False), Sampling(3.0), 3, text, 2, 2, ((),))
        (made,) = draw_all(model, [drawing])
        assert sum(isinstance(part, Image) for part in made) == 2
        with torch.inference_mode():
            assert Replay(model, given, drawing, made).differences == []


def test_the_replay_sees_what_is_wrong():
    model, _ = make_model()
    model.double()
    given = [Text((5, 6, 7), given=True)]
    drawing = Drawing(model.form.image_prompt(given), Sampling(3.0), 3, 0, 1, 0, ((),))
    (made,) = draw_all(model, [drawing])
    with torch.inference_mode():
        for other in (
            replace(drawing, seed=4),
            replace(drawing, sampling=Sampling(1.3)),
            replace(drawing, contexts=()),
        ):
            assert Replay(model, given, other, made).differences


def test_any_row_may_be_removed_at_any_time():
    model, _ = make_model(more_grids=((1, 3),))
    drawings = [each for _, each in made_drawings(model.form, 9, seed=5)]
    alone = [draw_all(model, [each])[0] for each in drawings]
    for gone in range(9):
        decoder = Decoder(model)
        rows = [decoder.add(each) for each in drawings]
        for turn in range(200):
            decoder.step()
            if turn == 1 and rows[gone] in decoder.rows:
                decoder.remove(rows[gone])
            if not decoder.rows:
                break
        assert not decoder.branches
        kept = [n for n in range(9) if n != gone]
        assert [rows[n].segments for n in kept] == [alone[n] for n in kept]


def test_a_row_that_cannot_begin_leaves_nothing_behind():
    model, _ = make_model()
    decoder = Decoder(model)
    wrong = Drawing(model.form.image_prompt([]), images=1, kept=torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="kept codes"):
        decoder.add(wrong)
    assert not decoder.rows and not decoder.branches and not decoder.step()


def test_limits_do_not_take_memory_before_they_are_used():
    model, _ = make_model()
    decoder = Decoder(model)
    decoder.add(Drawing(model.form.lay([], end=False), text=10**9, images=10**9))
    assert decoder.cache.room[1] < 1000


def test_damaged_weights_are_told(recwarn):
    model, _ = make_model()
    with torch.no_grad():
        model.lm.base_model.norm.weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        drawing = Drawing(model.form.image_prompt([]), Sampling(temperature=temperature), images=1)
        with pytest.raises(ArithmeticError, match="weights are damaged"):
            draw_all(model, [drawing])
