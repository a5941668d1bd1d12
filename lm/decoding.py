"""Prompts → drawn segments: the decode loop, for every head and layout.

Every row is in a state of its own: one writes text, one is in the middle of a picture, a third has just been added.
Only ids that the grammar allows can be drawn, and counts are exact, so no result is ever clamped, padded or repaired.
Inside a picture only the rows of the output matrix that can be drawn from are multiplied. Knows ids alone: no strings,
no pixels.

Legend: B branches (a sequence and, with guidance, its less conditioned twins), T positions, W columns, C hidden width,
V ids, S slots of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lm import attention
from lm.architecture import decoder_layers, most_positions
from lm.cache import PADDING, RowCache
from lm.grammar import DONE, SIZE, TEXT, grammar_of
from lm.logits import draw, guide, guide_edit, guide_projected, min_p, temper, top_k, top_p
from lm.model import MultimodalLM
from lm.packed import weights_of
from lm.packing import pack
from lm.sequence import NONE, Grid, Image, Laid, Segment, SequenceFormat, Text

ROWS = 128  # branches decoded together
UNIFORMS = 256  # random numbers that a row draws at a time
LIKELY_TEXT = 256  # ids that the cache has room for at first, however many are allowed


LIMITS = {
    "guidance": (0, 1e4),
    "temperature": (0, 1e4),
    "top_k": (0, 2**31),
    "top_p": (1e-9, 1),
    "min_p": (0, 1),
    "deeper": (0.01, 100),
    "image_guidance": (0, 1e4),
    "parallel": (0, 1),
    "norm": (0, 1e4),
    "ramp": (0, 1),
}


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn.

    guidance: u + s·(c - u) on the logits of pictures, 1 = none. image_guidance: of an edit, how much the given picture
    counts (`lm.logits.guide_edit`; edits are never projected). parallel, norm: 1 and 0 are plain guidance, others
    project it (`lm.logits.guide_projected`). ramp: guidance rises linearly from 1 over this share of a picture's
    positions. temperature: 0 = greedy; deeper: factor on it for each further depth of a cell. top_k: 0 = all.
    top_p: 1 = all. min_p: 0 = all.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    deeper: float = 1.0
    image_guidance: float = 1.0
    parallel: float = 1.0
    norm: float = 0.0
    ramp: float = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole and (each.name == "top_k" or not isinstance(value, float)):
                kind = "a whole number" if each.name == "top_k" else "a number"
                raise ValueError(f"{each.name}={value!r}: must be {kind}")
            low, high = LIMITS[each.name]
            if not low <= value <= high:
                raise ValueError(f"{each.name}={value}: must lie in [{low:g}, {high:g}]")

    def guide(self, branches: list[Tensor], share_B: Tensor) -> Tensor:
        """Logits (B,V) of each branch, the fully conditioned one first → guided ones. share: of the picture done."""
        if len(branches) == 1:
            return branches[0]
        risen = (share_B / max(self.ramp, 1e-6)).clamp(max=1)[:, None] if self.ramp else 1.0
        scale = 1 + (self.guidance - 1) * risen
        if len(branches) == 3:
            full_BV, image_BV, nothing_BV = branches
            return guide_edit(full_BV, image_BV, nothing_BV, scale, self.image_guidance)
        conditional_BV, unconditional_BV = branches
        if self.parallel == 1 and not self.norm:
            return guide(conditional_BV, unconditional_BV, scale)
        return guide_projected(conditional_BV, unconditional_BV, scale, self.parallel, self.norm)

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, depth: int = 0) -> Tensor:
        """Logits (B,V) → ids (B). uniform: a random number in [0, 1) for each.

        ArithmeticError on logits that are no numbers.
        """
        if not bool(torch.isfinite(logits_BV.amax(-1)).all()):
            raise ArithmeticError("the model's scores are not finite: its weights are damaged, or overflow")
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        kept = temper(logits_BV.float(), self.temperature * self.deeper**depth)
        return draw(top_p(top_k(min_p(kept, self.min_p), self.top_k), self.top_p), uniform_B)


Contexts = tuple[tuple[Segment, ...], ...]


@dataclass(frozen=True)
class Drawing:
    """A sequence to go on from, and what is wanted.

    prompt: ends in text, or has opened a picture. images: the most pictures, that one counted; least_images: no end
    before so many. text: the most text ids; once they are used up, pictures that are still owed are opened by force.
    contexts: what the twins of guidance have read before each picture, the richest first; none: no guidance. kept:
    (h,w,Q) codes of the first picture, NONE where they are to be drawn.
    """

    prompt: Laid
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    text: int = 0
    images: int = 0
    least_images: int = 0
    contexts: Contexts = ()
    kept: Tensor | None = None


def positions_needed(drawing: Drawing, form: SequenceFormat) -> int:
    """Positions that a drawing takes at least: its prompt, and the pictures that it has opened or owes."""
    opened = int(drawing.prompt.ids_TW[-1, 0]) in (form.vocabulary.image_start, *form.vocabulary.sizes)
    return len(drawing.prompt) + max(drawing.least_images, int(opened)) * form.longest_marked


class Branch:
    """One row of the cache: what it has read, and what it is to read next."""

    def __init__(self) -> None:
        self.length = 0  # positions read
        self.pending: list[Tensor] = []  # parts (n,W) to be read in the next pass
        self.prompt: Laid | None = None  # until it has been read

    def begin(self, prompt: Laid) -> None:
        self.length, self.pending, self.prompt = 0, [prompt.ids_TW], prompt

    @property
    def waiting(self) -> int:
        return sum(len(part) for part in self.pending)


class Row:
    """A drawing under way. Its first branch reads everything, the others are the twins of guidance."""

    def __init__(self, drawing: Drawing, state: int):
        self.drawing, self.state = drawing, state
        sampling = drawing.sampling
        guided = sampling.guidance != 1 or (len(drawing.contexts) > 1 and sampling.image_guidance != 1)
        self.contexts = drawing.contexts if guided else ()  # of the twins
        self.branches = [Branch() for _ in range(1 + len(self.contexts))]
        self.branches[0].begin(drawing.prompt)
        self.random = torch.Generator().manual_seed(drawing.seed % 2**63)
        self.uniforms: list[float] = []
        self.segments: list[Segment] = []
        self.text: list[int] = []  # of the piece that is being written
        self.text_left, self.images_left, self.images_due = drawing.text, drawing.images, drawing.least_images
        self.grid: Grid = (0, 0)
        self.cells: list[Tensor] = []  # positions (W) of the picture that is being drawn
        self.kept_LW: Tensor | None = None
        self.finished = False

    def uniform(self) -> float:
        """The row's next random number: the same ones whatever else is decoded beside it."""
        if not self.uniforms:
            self.uniforms = torch.rand(UNIFORMS, generator=self.random, dtype=torch.float64).tolist()
        return self.uniforms.pop()

    @property
    def unread(self) -> bool:
        """Nothing of it has been read yet."""
        return self.branches[0].length == 0

    def close_text(self) -> None:
        if self.text:
            self.segments.append(Text(tuple(self.text)))
            self.text = []


@dataclass(frozen=True)
class Group:
    """Rows of one pass that are drawn together: equal sampling, equal plan of the next position."""

    rows: list[Row]
    sampling: Sampling
    plan_W: tuple[int, ...]
    at_NB: Tensor  # which branches of the pass: N of each row, B rows
    share_B: Tensor  # of the picture that is done


class Decoder:
    """Rows that are decoded together. Rows may be added at any time; each `step` reads what they have waiting."""

    def __init__(self, model: MultimodalLM):
        self.model, self.form = model, model.form
        self.device = next(model.parameters()).device
        self.grammar = grammar_of(self.form)
        self.rows: list[Row] = []
        self.branches: list[Branch] = []  # in the order of the cache's rows
        self.attends = attention.suits(model.lm)
        stored = attention.STORED if self.attends else None
        self.cache = RowCache(len(decoder_layers(model.lm.base_model)), stored)
        self.weights = weights_of(model)
        self.text_mask, self.size_mask = (
            self.grammar.text_mask(self.device),
            self.grammar.size_mask(self.device),
        )
        self.positions = most_positions(model.lm.config)
        self.plans = [tuple(plan_W) for plan_W in self.grammar.depth_SW.tolist()]
        self.forced = self.grammar.forced_S.tolist()

    # --- rows --------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def add(self, drawing: Drawing) -> Row:
        """ValueError on a prompt that breaks the grammar, or has opened a picture where none is wanted, and where the
        model has too few positions for the prompt and the pictures that are owed. Text ends where they are used up.
        """
        needed, prompt = positions_needed(drawing, self.form), len(drawing.prompt)
        if needed > self.positions:
            raise ValueError(
                f"the prompt has {prompt} positions and its pictures need {needed - prompt}: the language model has "
                f"{self.positions} in all. Shorten the prompt, or ask for fewer pictures"
            )
        row = Row(drawing, self.grammar.start(drawing.prompt.ids_TW))
        opened = row.state >= 0 or row.state == SIZE
        if (
            row.state == DONE
            or (opened and not drawing.images)
            or row.state not in {TEXT, SIZE, *self.grammar.starts}
        ):
            raise ValueError(
                "a prompt must stop in text, or where a wanted image begins: not after <eos>, not inside"
            )
        if opened:
            self._open(row)
        if row.state >= 0:
            self._begin_picture(row)
        self._settle(row)
        self.rows.append(row)
        self.branches += row.branches
        likely = min(drawing.text, LIKELY_TEXT) + min(drawing.images, 2) * self.form.longest_marked
        self.cache.reserve(len(self.branches), min(len(drawing.prompt) + likely + 1, self.positions))
        return row

    @torch.inference_mode()
    def remove(self, row: Row) -> None:
        """Stop a row. The last branches take the places of its own in the cache."""
        self.rows.remove(row)
        for branch in row.branches:
            at, last = self.branches.index(branch), len(self.branches) - 1
            if at != last:
                self.cache.move(last, at)
                self.branches[at] = self.branches[last]
            self.branches.pop()

    # --- a pass ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Read what is waiting, draw one position for each row that was read; returns the rows that are finished.

        New prompts are read first, on their own: the others would have to be padded to their length.
        """
        part = self._part()
        branches = self.branches[part]
        if branches:
            rows = [row for row in self.rows if not row.finished and row.branches[0] in branches]
            groups, drawn = self._groups(rows, branches), {id(row): [] for row in rows}

            def choose(column: int, feature_BC: Tensor) -> Tensor:
                ids_B = torch.full((len(branches),), NONE, device=self.device)
                for group in groups:
                    ids_B = self._draw_column(group, column, feature_BC, ids_B, drawn)
                return ids_B

            hidden_BC = self._read(part, branches, choose)
            self._draw_words([row for row in rows if row.state < 0], branches, hidden_BC, drawn)
            self._advance(rows, [drawn[id(row)] for row in rows])
        finished = [row for row in self.rows if row.finished]
        for row in finished:
            self.remove(row)
        return finished

    def _part(self) -> slice:
        """The branches to read: all; or the last ones, if these are new and no other is."""
        # a twin begins anew with each picture; its row's first branch then has something to read too
        fresh = {id(b) for row in self.rows if row.unread for b in row.branches}
        new = [id(branch) in fresh for branch in self.branches]
        first = len(new)
        while first and new[first - 1]:
            first -= 1
        return slice(first, len(new)) if first < len(new) and not any(new[:first]) else slice(0, len(new))

    def _read(self, part: slice, branches: list[Branch], choose: Callable[[int, Tensor], Tensor]) -> Tensor:
        """One pass of the model. Returns the hidden states (B,C) of the last positions."""
        nothing_0W = torch.empty(0, self.form.width, dtype=torch.int64)
        unread = [torch.cat(branch.pending) if branch.pending else nothing_0W for branch in branches]
        for branch, new_TW in zip(branches, unread, strict=True):
            branch.length += len(new_TW)
            branch.pending = []
        new_BTW = pad_sequence(unread, batch_first=True, padding_value=NONE, padding_side="left")
        T = new_BTW.shape[1]
        length_B1 = torch.tensor([[branch.length] for branch in branches])
        waiting_B1 = torch.tensor([[len(new_TW)] for new_TW in unread])
        before_T = torch.arange(-T, 0)  # the end of the pass
        slots_BT = (length_B1 + 1 + before_T).masked_fill(before_T < -waiting_B1, PADDING)
        new_BTW[..., 0].masked_fill_(slots_BT == PADDING, self.form.vocabulary.pad)
        self.cache.reserve(len(self.branches), max(branch.length for branch in self.branches))
        limit = self.cache.enter(part, slots_BT.to(self.device))
        visible_BTS = torch.arange(limit) <= slots_BT[..., None]
        visible_BTS[..., PADDING] = slots_BT == PADDING  # padding sees padding: an empty row would be NaN
        self._open_given(branches, visible_BTS, T)
        positions_BT = (slots_BT - 1).clamp(min=0)
        attending = attention.used(self.model.lm) if self.attends else nullcontext()
        with self.weights.used(), attending:
            made = self.model.step(
                new_BTW.to(self.device),
                visible_BTS[:, None].to(self.device),
                positions_BT.to(self.device),
                self.cache,
                choose,
            )
        return made.hidden_BTC[:, -1]

    def _open_given(self, branches: list[Branch], visible_BTS: Tensor, T: int) -> None:
        """Positions of a given picture of a prompt see each other, if the format says so; in place."""
        for b, branch in enumerate(branches):
            prompt, branch.prompt = branch.prompt, None
            if prompt is not None and self.form.picture_attention == "bidirectional":
                picture_P = torch.where(prompt.given_T, prompt.picture_T, NONE)
                same_PP = (picture_P[:, None] == picture_P) & (picture_P != NONE)
                first = T - branch.length  # of the prompt in the pass: something may stand behind it
                visible_BTS[b, first : first + len(prompt), 1 : 1 + len(prompt)] |= same_PP

    def _groups(self, rows: list[Row], branches: list[Branch]) -> list[Group]:
        """The rows that are inside a picture, by what they have in common."""
        place = {id(branch): b for b, branch in enumerate(branches)}
        found: dict[tuple[Sampling, int, tuple[int, ...]], list[Row]] = {}
        for row in rows:
            if row.state >= 0:
                key = (row.drawing.sampling, len(row.branches), self.plans[row.state])
                found.setdefault(key, []).append(row)
        groups = []
        for (sampling, count, plan_W), members in found.items():
            at_NB = torch.tensor([[place[id(row.branches[n])] for row in members] for n in range(count)])
            share = (
                [len(row.cells) / len(self.form.plan(row.grid)) for row in members]
                if sampling.ramp
                else [0.0]
            )
            groups.append(
                Group(
                    members, sampling, plan_W, at_NB.to(self.device), torch.tensor(share, device=self.device)
                )
            )
        return groups

    def _draw_column(
        self, group: Group, column: int, feature_BC: Tensor, ids_B: Tensor, drawn: dict[int, list[int]]
    ) -> Tensor:
        """Draw what stands in a column for the rows of a group; returns `ids_B` with it."""
        depth = group.plan_W[column]
        if depth == NONE:
            for row in group.rows:
                drawn[id(row)].append(NONE)
            return ids_B
        logits_NBV = self.weights.image_logits(feature_BC[group.at_NB], depth).float()
        guided_BV = group.sampling.guide(list(logits_NBV), group.share_B)
        uniform_B = torch.tensor([row.uniform() for row in group.rows], device=self.device)
        chosen = (
            group.sampling.draw(guided_BV, uniform_B, depth) + self.form.vocabulary.image_range(depth).start
        )
        chosen_B = chosen.cpu()
        for b, row in enumerate(group.rows):
            if row.kept_LW is not None and row.kept_LW[len(row.cells), column] != NONE:
                chosen_B[b] = row.kept_LW[len(row.cells), column]
            drawn[id(row)].append(int(chosen_B[b]))
        return ids_B.index_copy(0, group.at_NB.flatten(), chosen_B.to(self.device).repeat(len(group.at_NB)))

    def _draw_words(
        self, rows: list[Row], branches: list[Branch], hidden_BC: Tensor, drawn: dict[int, list[int]]
    ) -> None:
        """Text, marks and sizes of the rows that are outside of pictures."""
        found: dict[Sampling, list[Row]] = {}
        for row in rows:
            found.setdefault(row.drawing.sampling, []).append(row)
        for sampling, members in found.items():
            at_B = torch.tensor([branches.index(row.branches[0]) for row in members], device=self.device)
            legal_BV = torch.stack([self._legal(row) for row in members])
            logits_BV = self.weights.text_logits(hidden_BC[at_B]).float().masked_fill(~legal_BV, -torch.inf)
            uniform_B = torch.tensor([row.uniform() for row in members], device=self.device)
            for row, token in zip(members, sampling.draw(logits_BV, uniform_B).tolist(), strict=True):
                drawn[id(row)] += [token, *[NONE] * (self.form.width - 1)]

    def _legal(self, row: Row) -> Tensor:
        """(V) bool: what the grammar and what is wanted allow a row outside of pictures."""
        if row.state == SIZE:
            return self.size_mask
        vocabulary, mask_V = self.form.vocabulary, self.text_mask.clone()
        fits = row.images_due > 0 or self._room(row) >= self.form.longest_marked
        mask_V[vocabulary.image_start] = row.images_left > 0 and fits
        mask_V[vocabulary.eos] = row.images_due <= 0
        return mask_V

    def _room(self, row: Row) -> int:
        """Positions that the model has left for a row, after the pictures that are owed."""
        first = row.branches[0]
        owed = max(row.images_due, 0) * self.form.longest_marked
        return self.positions - first.length - first.waiting - owed

    # --- what was drawn ----------------------------------------------------------------------------------------------

    def _advance(self, rows: list[Row], ids: list[list[int]]) -> None:
        """Take one more position (W ids) of each row, and whatever it forces."""
        if not rows:
            return
        ids_BW = torch.tensor(ids)
        states = self.grammar.advance(torch.tensor([row.state for row in rows]), ids_BW).tolist()
        for row, state, ids_W in zip(rows, states, ids_BW, strict=True):
            before, row.state = row.state, state
            if before == TEXT:
                self._take_word(row, int(ids_W[0]))
            row.branches[0].pending.append(ids_W[None])
            if before >= 0:
                row.cells.append(ids_W)
                for twin in row.branches[1:]:
                    twin.pending.append(ids_W[None])
            elif row.state >= 0:
                self._begin_picture(row)
            self._settle(row)

    def _take_word(self, row: Row, token: int) -> None:
        vocabulary = self.form.vocabulary
        if token == vocabulary.image_start:
            self._open(row)
        elif token != vocabulary.eos:
            row.text.append(token)
            row.text_left -= 1

    def _open(self, row: Row) -> None:
        row.close_text()
        row.images_left -= 1
        row.images_due -= 1

    def _begin_picture(self, row: Row) -> None:
        """The size is known: the twins read their contexts and open the same picture."""
        row.grid = self.form.grids[self.grammar.starts.index(row.state)]
        row.cells = []
        first = not any(isinstance(segment, Image) for segment in row.segments)
        kept = row.drawing.kept if first else None
        row.kept_LW = None if kept is None else self.form.place_kept(kept, row.grid)
        for twin, context in zip(row.branches[1:], row.contexts, strict=True):
            twin.begin(self.form.image_prompt(list(context), row.grid))

    def _settle(self, row: Row) -> None:
        """Write what the grammar, or what is wanted, leaves no choice about; see whether the row is finished."""
        if row.state >= 0 and self.forced[row.state] != NONE:
            token = self.forced[row.state]
            if token == self.form.vocabulary.image_end:
                row.segments.append(self.form.read_image(torch.stack(row.cells), row.grid))
            self._advance([row], [self._word(token)])
            if row.state == TEXT:
                for twin in row.branches[1:]:
                    twin.pending = []
        elif row.state == TEXT and (row.text_left <= 0 or self._room(row) <= 0):
            if row.images_due > 0:
                self._advance([row], [self._word(self.form.vocabulary.image_start)])
            else:
                row.finished = True
        row.finished |= row.state == DONE
        if row.finished:
            row.close_text()

    def _word(self, token: int) -> list[int]:
        return [token, *[NONE] * (self.form.width - 1)]


Watch = Callable[[list[Row]], object]


def unwatched(rows: list[Row]) -> None:
    """Nobody is told."""


def draw_all(
    model: MultimodalLM, drawings: Iterable[Drawing], watch: Watch = unwatched
) -> list[list[Segment]]:
    """What each drawing became, in their order. At most `ROWS` branches are decoded at a time; as one row ends, the
    next one begins. watch: called after each pass with the rows under way.
    """
    decoder, waiting, order = Decoder(model), list(drawings)[::-1], []
    while waiting or decoder.rows:
        while waiting and (not decoder.rows or len(decoder.branches) + 1 + len(waiting[-1].contexts) <= ROWS):
            order.append(decoder.add(waiting.pop()))
        decoder.step()
        watch(decoder.rows)
    return [row.segments for row in order]


def draw_images(
    model: MultimodalLM,
    prompts: list[Laid],
    sampling: Sampling,
    seeds: list[int],
    contexts: Contexts = ((),),
    watch: Watch = unwatched,
) -> list[Image]:
    """One picture for each prompt, which has opened it. contexts: see `Drawing`."""
    drawings = [
        Drawing(prompt, sampling, seed, images=1, contexts=contexts)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    drawn = [segment for segments in draw_all(model, drawings, watch) for segment in segments]
    return [segment for segment in drawn if isinstance(segment, Image)]


def draw_text(
    model: MultimodalLM, prompts: list[Laid], sampling: Sampling, seeds: list[int], limit: int
) -> list[list[int]]:
    """At most `limit` text ids after each prompt, up to <eos>."""
    plain = replace(sampling, guidance=1.0)
    drawings = [Drawing(p, plain, seed, text=limit) for p, seed in zip(prompts, seeds, strict=True)]
    drawn = draw_all(model, drawings)
    return [[i for part in segments if isinstance(part, Text) for i in part.ids] for segments in drawn]


@torch.inference_mode()
def likelihoods(model: MultimodalLM, pictures: list[Image], text: Text) -> list[float]:
    """log p(text, <eos> | picture) for each picture (nats), over the ids that may stand in text."""
    form, device = model.form, next(model.parameters()).device
    legal_V = grammar_of(form).text_mask(device)  # as the loss of training has it
    found, n = [], len(text.ids) + 1
    for picture in pictures:
        laid = form.lay([replace(picture, given=True), text])
        batch = pack([laid], form, len(laid)).to(device)
        made = model.teach(batch.ids_BTW, batch.next_BTW, batch.mask, batch.positions_BT)
        logits_NV = model.text_logits(made.hidden_BTC[0, -n - 1 : -1]).float()
        likely_NV = logits_NV.masked_fill(~legal_V, -torch.inf).log_softmax(-1)
        found.append(float(likely_NV.gather(1, batch.ids_BTW[0, -n:, :1]).sum()))
    return found
