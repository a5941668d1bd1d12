"""Which ids may come next, row by row: one state machine for decoding and for the loss.

State of a row: `TEXT`, or the number of picture positions read since <image_start> (0 … L; at L only <image_end> may
follow), or `DONE` after <eos>. Rows of a batch are in states of their own. The loss is normalised over the same
ids that decoding may draw, so neither modality pays for the other's vocabulary.

Legend: B rows, W columns, L positions of a picture, V text ids and specials (below image_offset).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm.sequence import NONE, SequenceFormat

TEXT, DONE = -1, -2


class Grammar:
    """The rules of one sequence format. `images=False` forbids new pictures."""

    def __init__(self, form: SequenceFormat, images: bool = True):
        self.form, self.images = form, images

    def start(self, ids_TW: Tensor) -> int:
        """State after a prompt. ValueError if the prompt itself breaks the rules."""
        state = torch.tensor([TEXT])
        for row_W in ids_TW[1:]:
            state = self.advance(state, row_W[None])
        return int(state[0])

    def advance(self, state_B: Tensor, ids_BW: Tensor) -> Tensor:
        """States after one more position of each row. ValueError on an id that its row's state does not allow."""
        vocabulary, length = self.form.vocabulary, self.form.image_length
        token_B = ids_BW[:, 0]
        reading = (state_B >= 0) & (state_B < length)
        for row in reading.nonzero().flatten().tolist():
            depth = self.form.layout.depth_of(int(state_B[row]), vocabulary.depth)
            for column, token in enumerate(ids_BW[row].tolist()):
                allowed = vocabulary.image_range(depth + column)
                if not allowed.start <= token < allowed.stop:
                    raise ValueError(
                        f"id {token} in row {row} where an image id of depth {depth + column} must stand"
                    )
        closing = state_B == length
        if bool((token_B[closing] != vocabulary.image_end).any()):
            raise ValueError("a complete picture must be followed by <image_end>")
        in_text = state_B == TEXT
        legal_B = self.text_mask(token_B.device)[token_B.clamp(0, vocabulary.image_offset - 1)]
        if bool((in_text & ~(legal_B & (token_B >= 0) & (token_B < vocabulary.image_offset))).any()):
            raise ValueError(f"ids {token_B[in_text].tolist()} in text, where only text may stand")
        state_B = torch.where(reading, state_B + 1, state_B)
        state_B = torch.where(closing, torch.full_like(state_B, TEXT), state_B)
        state_B = torch.where(
            in_text & (token_B == vocabulary.image_start), torch.zeros_like(state_B), state_B
        )
        return torch.where(in_text & (token_B == vocabulary.eos), torch.full_like(state_B, DONE), state_B)

    def text_mask(self, device: torch.device | None = None) -> Tensor:
        """(image_offset) bool: ids that may follow in the state TEXT: text, <image_start> (if allowed), <eos>."""
        vocabulary = self.form.vocabulary
        mask = torch.ones(vocabulary.image_offset, dtype=torch.bool, device=device)
        mask[[vocabulary.pad, vocabulary.image_end]] = False
        mask[vocabulary.bos] = vocabulary.bos == vocabulary.eos
        mask[vocabulary.image_start] = self.images
        return mask

    def label_depths(self, ids_TW: Tensor) -> Tensor:
        """(T,W): what each column of a sequence is: depth 0..Q-1 of a picture, Q for text, NONE for nothing to predict.

        Nothing to predict: <bos>, empty columns, and <image_end>, which the rules force.
        """
        vocabulary = self.form.vocabulary
        depth = (ids_TW - vocabulary.image_offset).div(vocabulary.codebook_size, rounding_mode="floor")
        depth = torch.where(
            ids_TW >= vocabulary.image_offset, depth, torch.full_like(depth, vocabulary.depth)
        )
        mask = self.text_mask()
        text = (ids_TW >= 0) & (ids_TW < vocabulary.image_offset)
        forced = text & ~mask[ids_TW.clamp(0, vocabulary.image_offset - 1)]
        return torch.where(forced | (ids_TW == NONE), torch.full_like(depth, NONE), depth)
