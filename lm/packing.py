"""Documents → rows of a batch: packing, labels, the mask, noise.

A position looks only into its own document, no label crosses a document, and positions start anew in each. Knows
nothing of where documents come from.

Legend: B rows, T positions, W columns, N documents, S positions of all documents laid end to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lm.grammar import grammar_of
from lm.sequence import NONE, Laid, SequenceFormat


@dataclass
class Batch:
    """Packed documents."""

    ids_BTW: Tensor  # int64; <pad> after the last document of a row
    next_BTW: Tensor  # what follows; NONE at ends of documents and where nothing is to be predicted
    document_BT: Tensor  # number of the document within its row, NONE for padding
    positions_BT: Tensor  # position within the document
    picture_BT: Tensor  # number within its row of a given picture that sees all of itself, NONE elsewhere
    samples: int  # documents

    @property
    def mask(self) -> Tensor:
        """(B,1,T,T) bool: causal, within the document, and all of a given picture that is read in both directions.

        A padding position sees itself, so that no row is empty.
        """
        same = self.document_BT[:, :, None] == self.document_BT[:, None, :]
        causal = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril()
        picture = self.picture_BT[:, :, None] == self.picture_BT[:, None, :]
        return (same & causal | picture & (self.picture_BT != NONE)[:, None])[:, None]

    @property
    def padding(self) -> float:
        """Share of the positions that hold no document."""
        return float((self.document_BT == NONE).float().mean())

    def to(self, device: torch.device) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class Arrangement:
    """Where each of N documents lies in a batch."""

    shape: tuple[int, int]  # B, T
    lengths_N: np.ndarray
    row_N: np.ndarray
    start_N: np.ndarray
    number_N: np.ndarray  # of the document within its row

    def places(self, chosen: Sequence[int]) -> Tensor:
        """(S) index in a flattened (B·T) of each position of the chosen documents, laid end to end."""
        lengths = self.lengths_N[chosen]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        first = self.row_N[chosen] * self.shape[1] + self.start_N[chosen]
        return torch.from_numpy(np.repeat(first, lengths) + within)


@lru_cache(maxsize=4)  # noise and packing ask for the same one
def arrange(lengths: tuple[int, ...], row_length: int) -> Arrangement:
    """The longest document first, each into the first row with room (first-fit decreasing).

    ValueError if one is longer than a row. Rows are as long as the fullest of them.
    """
    lengths_N = np.array(lengths, np.int64)
    row_N, start_N, number_N = (np.zeros(len(lengths), np.int64) for _ in range(3))
    used = np.zeros(len(lengths), np.int64)
    numbers: Counter[int] = Counter()
    for i in np.argsort(-lengths_N, kind="stable"):
        if lengths_N[i] > row_length:
            raise ValueError(f"a document of {lengths_N[i]} positions does not fit row_length={row_length}")
        row = int(np.argmax(used + lengths_N[i] <= row_length))  # the first; an empty one always has room
        row_N[i], start_N[i], number_N[i] = row, used[row], numbers[row]
        used[row] += lengths_N[i]
        numbers[row] += 1
    return Arrangement((len(numbers), int(used.max(initial=0))), lengths_N, row_N, start_N, number_N)


def pack(documents: list[Laid], form: SequenceFormat, row_length: int) -> Batch:
    """Documents → rows of at most `row_length` positions.

    Labels are whatever the grammar leaves open, but no given part of a document. Given pictures see themselves in both
    directions where the form says so. ValueError if a document is longer than a row.
    """
    plan = arrange(tuple(len(each) for each in documents), row_length)
    place_S = plan.places(range(len(documents)))
    lengths_N = torch.from_numpy(plan.lengths_N)
    owner_S = torch.arange(len(documents)).repeat_interleave(lengths_N)
    ids_SW = torch.cat([each.ids_TW for each in documents])
    given_S = torch.cat([each.given_T for each in documents])
    picture_S = torch.cat([each.picture_T for each in documents])

    unlearnt_SW = (grammar_of(form).label_depths(ids_SW) == NONE) | given_S[:, None]
    next_SW = ids_SW.masked_fill(unlearnt_SW, NONE).roll(-1, 0)
    next_SW[lengths_N.cumsum(0) - 1] = NONE
    start_S = torch.from_numpy(plan.start_N)[owner_S]
    seen_S = given_S & (picture_S != NONE) & (form.picture_attention == "bidirectional")

    pad_W = torch.full((form.width,), NONE)
    pad_W[0] = form.vocabulary.pad

    def spread(values_S: Tensor, padding: Tensor | int) -> Tensor:
        empty = torch.as_tensor(padding).expand(plan.shape[0] * plan.shape[1], *values_S.shape[1:]).clone()
        empty[place_S] = values_S
        return empty.view(*plan.shape, *values_S.shape[1:])

    return Batch(
        spread(ids_SW, pad_W),
        spread(next_SW, NONE),
        spread(torch.from_numpy(plan.number_N)[owner_S], NONE),
        spread(place_S % plan.shape[1] - start_S, 0),
        # its document's place in the row makes a picture's number unique there: places grow faster than numbers
        spread(torch.where(seen_S, picture_S + start_S, NONE), NONE),
        len(documents),
    )


def disturb(ids_SW: Tensor, form: SequenceFormat, chosen_S: Tensor, drawn_SW: Tensor) -> Tensor:
    """Replace all picture ids of the chosen positions by drawn codes [0,K) of the same depths."""
    is_picture_SW = ids_SW >= form.vocabulary.image_offset
    codes_SW = (ids_SW - form.vocabulary.image_offset) % form.vocabulary.codebook_size
    return torch.where(chosen_S[:, None] & is_picture_SW, ids_SW - codes_SW + drawn_SW, ids_SW)
