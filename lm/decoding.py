"""Prompts → drawn ids: the decode loop, with a preallocated cache and batched guidance, for every head.

Only ids that the grammar allows can be drawn, and the counts are exact, so no result is ever clamped, padded or
repaired. Knows ids alone: no strings, no pixels.

Legend: R prompts, B rows (R, or 2R with the unconditional halves), T positions, W columns, C hidden width, V ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import StaticCache

from lm.grammar import DONE, TEXT, Grammar
from lm.logits import check_sampling, draw, guide, temper, top_k, top_p
from lm.model import MultimodalLM
from lm.sequence import NONE, Image, SequenceFormat


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn: guidance (1 = none), temperature (0 = greedy), top-k (0 = all), top-p (1 = all)."""

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_sampling(self.guidance, self.temperature, self.top_k, self.top_p)

    def __call__(self, logits_BV: Tensor, random: torch.Generator) -> Tensor:
        """Logits (R,V), or (2R,V) with the unconditional half last → ids (R)."""
        logits_BV = logits_BV.float()
        if self.guided:
            conditional, unconditional = logits_BV.chunk(2)
            logits_BV = guide(conditional, unconditional, self.guidance)
        return draw(top_p(top_k(temper(logits_BV, self.temperature), self.top_k), self.top_p), random)

    @property
    def guided(self) -> bool:
        return self.guidance != 1


@torch.inference_mode()
def draw_images(
    model: MultimodalLM,
    prompts: list[Tensor],
    unconditional: Tensor,
    sampling: Sampling,
    random: torch.Generator,
) -> list[Image]:
    """One picture for each prompt (T_i, W) that ends in <image_start>.

    unconditional: the prompt (T,W) of the guidance branch, which ends in <image_start> too.
    """
    form, grammar = model.form, Grammar(model.form)
    for prompt in [*prompts, unconditional]:
        if grammar.start(prompt) != 0:
            raise ValueError("a prompt for an image must end in <image_start>")
    rows = [*prompts, *[unconditional] * len(prompts)] if sampling.guided else list(prompts)
    state_R = torch.zeros(len(prompts), dtype=torch.int64)
    loop = Loop(model, rows, form.image_length)
    drawn: list[Tensor] = []
    for position in range(form.image_length):
        first = form.layout.depth_of(position, form.vocabulary.depth)
        columns: list[Tensor] = []

        def choose(
            column: int, feature_BC: Tensor, first: int = first, columns: list[Tensor] = columns
        ) -> Tensor:
            depth = first + column
            code_R = sampling(model.image_logits(feature_BC, depth), random)
            columns.append(code_R + form.vocabulary.image_range(depth).start)
            return columns[-1].repeat(len(rows) // len(prompts))

        loop.step(choose)
        ids_RW = torch.stack(columns, -1)
        state_R = grammar.advance(state_R, ids_RW.cpu())
        drawn.append(ids_RW)
        loop.append(ids_RW.repeat(len(rows) // len(prompts), 1))
    return [form.read_image(ids_LW.cpu()) for ids_LW in torch.stack(drawn, 1)]


@torch.inference_mode()
def draw_text(
    model: MultimodalLM,
    prompts: list[Tensor],
    sampling: Sampling,
    random: torch.Generator,
    limit: int,
    images: bool,
) -> list[tuple[list[int], bool]]:
    """Text after each prompt (T_i, W), up to <eos>, <image_start> (if `images`) or `limit` ids.

    Returns for each row its text ids and whether <image_start> ended it.
    """
    grammar = Grammar(model.form, images=images)
    if any(Grammar(model.form).start(prompt) != TEXT for prompt in prompts):
        raise ValueError("a prompt for text must not end inside an image")
    sampling = Sampling(1.0, sampling.temperature, sampling.top_k, sampling.top_p)
    state_B = torch.full((len(prompts),), TEXT)
    loop = Loop(model, prompts, limit)
    allowed = grammar.text_mask(loop.device)
    texts: list[list[int]] = [[] for _ in prompts]
    for _ in range(limit):
        hidden_BC = loop.step(
            lambda column, feature_BC: torch.full_like(feature_BC[:, 0], NONE, dtype=torch.int64)
        )
        token_B = sampling(
            model.text_logits(hidden_BC).float().masked_fill(~allowed, -torch.inf), random
        ).cpu()
        running = state_B == TEXT
        token_B = torch.where(running, token_B, torch.full_like(token_B, model.form.vocabulary.pad))
        ids_BW = text_rows(token_B, model.form)
        state_B = torch.where(running, grammar.advance(state_B, ids_BW), state_B)
        for row in (state_B == TEXT).nonzero().flatten().tolist():
            texts[row].append(int(token_B[row]))
        if not bool((state_B == TEXT).any()):
            break
        loop.append(ids_BW)
    return [(text, int(state) not in (TEXT, DONE)) for text, state in zip(texts, state_B, strict=True)]


def text_rows(token_B: Tensor, form: SequenceFormat) -> Tensor:
    """Text ids (B) → positions (B,W)."""
    rows = torch.full((len(token_B), form.width), NONE)
    rows[:, 0] = token_B
    return rows


class Loop:
    """The state of decoding: what is new since the last step, and the cache. Prompts are padded on the left."""

    def __init__(self, model: MultimodalLM, prompts: list[Tensor], room: int):
        self.model = model
        self.device = next(model.parameters()).device
        longest = max(len(p) for p in prompts)
        self.padding_B = torch.tensor([longest - len(p) for p in prompts], device=self.device)
        self.new_BTW = torch.full((len(prompts), longest, model.form.width), NONE, device=self.device)
        self.new_BTW[..., 0] = model.form.vocabulary.pad
        for row, prompt in zip(self.new_BTW, prompts, strict=True):
            row[longest - len(prompt) :] = prompt.to(self.device)
        self.seen = 0
        self.capacity = longest + room
        self.cache = StaticCache(config=model.lm.config, max_cache_len=self.capacity)

    def step(self, choose_last: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Read what is new; the ids that follow the last position are asked for. Returns its hidden state (B,C)."""
        at_T = torch.arange(self.seen, self.seen + self.new_BTW.shape[1], device=self.device)
        positions_BT = (at_T - self.padding_B[:, None]).clamp(min=0)
        key = torch.arange(self.capacity, device=self.device)
        visible_B1TS = (key <= at_T[:, None]) & (key >= self.padding_B[:, None, None])
        visible_B1TS |= key == at_T[:, None]  # a padding position sees itself: an empty row would be NaN
        made = self.model.step(self.new_BTW, visible_B1TS[:, None], positions_BT, self.cache, choose_last)
        self.seen += self.new_BTW.shape[1]
        return made.hidden_BTC[:, -1]

    def append(self, ids_BW: Tensor) -> None:
        """What was drawn becomes the next input."""
        self.new_BTW = ids_BW.to(self.device)[:, None]
