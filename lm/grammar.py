"""Which ids may come next, row by row: one state machine for decoding and for the loss.

State of a row: `TEXT`; `SIZE` after <image_start>, where a size has to be announced; a number from 0: the position that
comes next in the plans of all grids, each with its <image_end>, laid behind one another; `DONE` after <eos>. Rows of a
batch are in states of their own. The loss is normalised over the same ids that decoding may draw, so neither modality
pays for the other's vocabulary.

Legend: B rows, T positions, W columns, S positions of all plans, Q depth, V text ids and specials (below image_offset).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lm.sequence import NONE, SequenceFormat

TEXT, DONE, SIZE = -1, -2, -3


@lru_cache(maxsize=8)  # every batch and every row that is drawn asks for it
def grammar_of(form: SequenceFormat) -> Grammar:
    """The rules of a format, made once and shared."""
    return Grammar(form)


class Grammar:
    """The rules of one sequence format. `images=False` forbids new pictures."""

    def __init__(self, form: SequenceFormat, images: bool = True):
        self.form, self.images = form, images
        vocabulary, Q = form.vocabulary, form.vocabulary.depth
        plans = [form.plan(grid) for grid in form.grids]
        end_1W = torch.full((1, form.width), NONE)
        self.starts = [0]  # state in which each grid's picture begins
        for plan_LW in plans:
            self.starts.append(self.starts[-1] + len(plan_LW) + 1)
        self.plan_SW = torch.cat([part for plan_LW in plans for part in (plan_LW, end_1W)])
        forced_S = torch.where(
            self.plan_SW[:, 0] == Q, NONE if vocabulary.row_end is None else vocabulary.row_end, NONE
        )
        self.closing_S = torch.zeros(len(self.plan_SW), dtype=torch.bool)
        self.closing_S[[start - 1 for start in self.starts[1:]]] = True
        self.forced_S = torch.where(self.closing_S, vocabulary.image_end, forced_S)
        self.depth_SW = torch.where(self.plan_SW == Q, NONE, self.plan_SW)
        self.text_V = self.text_mask()

    def start(self, ids_TW: Tensor) -> int:
        """State after a prompt. ValueError if the prompt itself breaks the rules."""
        bos = self.form.vocabulary.bos
        if not len(ids_TW) or ids_TW[0, 0] != bos or bool((ids_TW[0, 1:] != NONE).any()):
            raise ValueError(f"a prompt must begin with <bos>, id {bos}, alone in its position")
        state = torch.tensor([TEXT])
        for row_W in ids_TW[1:]:
            state = self.advance(state, row_W[None])
        return int(state[0])

    def advance(self, state_B: Tensor, ids_BW: Tensor) -> Tensor:
        """States after one more position of each row. ValueError on an id that its row's state does not allow."""
        vocabulary = self.form.vocabulary
        self._check_pictures(state_B, ids_BW)
        self._check_words(state_B, ids_BW)
        token_B = ids_BW[:, 0]
        in_text, sizing, reading = state_B == TEXT, state_B == SIZE, state_B >= 0
        legal_B = self.text_V[token_B.clamp(0, vocabulary.image_offset - 1)]
        if bool((in_text & ~(legal_B & (token_B >= 0) & (token_B < vocabulary.image_offset))).any()):
            raise ValueError(f"ids {token_B[in_text].tolist()} in text, where only text may stand")
        following_B = torch.where(self.closing_S[state_B.clamp(min=0)], TEXT, state_B + 1)
        next_B = torch.where(reading, following_B, state_B)
        opened = SIZE if vocabulary.sizes else 0
        next_B = torch.where(in_text & (token_B == vocabulary.image_start), opened, next_B)
        for size, first in zip(vocabulary.sizes, self.starts, strict=False):
            next_B = torch.where(sizing & (token_B == size), first, next_B)
        if bool((next_B == SIZE)[sizing].any()):
            raise ValueError(f"ids {token_B[sizing].tolist()} where the size of an image must be announced")
        return torch.where(in_text & (token_B == vocabulary.eos), DONE, next_B)

    def _check_words(self, state_B: Tensor, ids_BW: Tensor) -> None:
        """ValueError where a row outside of pictures holds more than one id, or goes on after its end.

        Finished rows of a batch are filled up with <pad>, or with <eos> (what transformers does without a <pad>).
        """
        vocabulary, token_B = self.form.vocabulary, ids_BW[:, 0]
        crowded_B = (state_B < 0) & (ids_BW[:, 1:] != NONE).any(1)
        filled_B = (token_B == vocabulary.pad) | (token_B == vocabulary.eos)
        wrong_B = crowded_B | ((state_B == DONE) & ~filled_B)
        if bool(wrong_B.any()):
            row = int(wrong_B.nonzero()[0, 0])
            wanted = "one id alone" if bool(crowded_B[row]) else "nothing, after <eos>,"
            raise ValueError(f"ids {ids_BW[row].tolist()} in row {row}, where {wanted} must stand")

    def _check_pictures(self, state_B: Tensor, ids_BW: Tensor) -> None:
        """ValueError where a row that is inside a picture holds anything but what its plan says."""
        vocabulary, at_B = self.form.vocabulary, state_B.clamp(min=0)
        depth_BW, forced_B = self.depth_SW[at_B], self.forced_S[at_B]
        found_BW = (ids_BW - vocabulary.image_offset).div(vocabulary.codebook_size, rounding_mode="floor")
        wrong_BW = torch.where(depth_BW >= 0, found_BW != depth_BW, ids_BW != NONE)
        wrong_BW[:, 0] = torch.where(forced_B == NONE, wrong_BW[:, 0], ids_BW[:, 0] != forced_B)
        wrong_BW &= (state_B >= 0)[:, None]
        if bool(wrong_BW.any()):
            row, column = wrong_BW.nonzero()[0].tolist()
            depth, forced = int(depth_BW[row, column]), int(forced_B[row])
            wanted = f"an image id of depth {depth}" if depth >= 0 else "nothing"
            wanted = {vocabulary.image_end: "<image_end>", vocabulary.row_end: "<row_end>"}.get(
                forced, wanted
            )
            raise ValueError(
                f"id {int(ids_BW[row, column])} in row {row}, column {column}, where {wanted} must stand"
            )

    def text_mask(self, device: torch.device | None = None) -> Tensor:
        """(V) bool: ids that may follow in the state TEXT: text, <image_start> (if allowed), <eos>."""
        vocabulary = self.form.vocabulary
        mask = torch.ones(vocabulary.image_offset, dtype=torch.bool, device=device)
        mask[list(vocabulary.specials)] = False
        mask[vocabulary.eos] = True
        mask[vocabulary.image_start] = self.images
        return mask

    def size_mask(self, device: torch.device | None = None) -> Tensor:
        """(V) bool: ids that may follow in the state SIZE."""
        mask = torch.zeros(self.form.vocabulary.image_offset, dtype=torch.bool, device=device)
        mask[list(self.form.vocabulary.sizes)] = True
        return mask

    def legal_table(self, device: torch.device | None = None) -> Tensor:
        """(Q+5, size) bool: ids of depth 0..Q-1, of TEXT, of SIZE, <row_end>, <image_end>, and <pad> after DONE."""
        vocabulary, Q = self.form.vocabulary, self.form.vocabulary.depth
        table = torch.zeros(Q + 5, vocabulary.size, dtype=torch.bool, device=device)
        for depth in range(Q):
            table[depth, vocabulary.image_range(depth)] = True
        table[Q, : vocabulary.image_offset] = self.text_mask(device)
        table[Q + 1, : vocabulary.image_offset] = self.size_mask(device)
        for kind, token in (
            (Q + 2, vocabulary.row_end),
            (Q + 3, vocabulary.image_end),
            (Q + 4, vocabulary.pad),
        ):
            if token is not None:
                table[kind, token] = True
        return table

    def legal_kinds(self, state_B: Tensor) -> Tensor:
        """(B): which row of `legal_table` says what may stand in column 0 next."""
        Q, at_B = self.form.vocabulary.depth, state_B.clamp(min=0)
        inside_B = torch.where(self.plan_SW[at_B, 0] == Q, Q + 2, self.plan_SW[at_B, 0])
        inside_B = torch.where(self.closing_S[at_B], Q + 3, inside_B)
        outside_B = torch.where(state_B == TEXT, Q, torch.where(state_B == SIZE, Q + 1, Q + 4))
        return torch.where(state_B >= 0, inside_B, outside_B)

    def label_depths(self, ids_TW: Tensor) -> Tensor:
        """(…,W): what each column is: depth 0..Q-1 of a picture id, Q text, Q+1 a size, NONE nothing to predict.

        Nothing to predict: <bos>, empty columns, and ids that the rules force.
        """
        vocabulary, Q = self.form.vocabulary, self.form.vocabulary.depth
        is_text = (ids_TW >= 0) & (ids_TW < vocabulary.image_offset)
        kind_V = torch.where(self.text_mask(ids_TW.device), Q, NONE)
        kind_V[list(vocabulary.sizes)] = Q + 1
        depth = (ids_TW - vocabulary.image_offset).div(vocabulary.codebook_size, rounding_mode="floor")
        text = kind_V[ids_TW.clamp(0, vocabulary.image_offset - 1)]
        return torch.where(ids_TW == NONE, NONE, torch.where(is_text, text, depth))
