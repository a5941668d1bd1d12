"""Segments of text and pictures ↔ one sequence of token ids.

    <bos> text … <image_start> <size> cell … cell <row_end> … cell <row_end> <image_end> text … <eos>

<size> is there where a model knows several picture sizes (Emu3, arXiv 2409.18869, and Lumina-mGPT, arXiv 2408.02657,
announce them too), <row_end> where the ends of rows are marked. How the Q codes of a cell become positions is a value,
the layout. A sequence is `ids_TW`: T positions, W columns (1 for flat, Q for the others), where a text id stands in
column 0 and the other columns hold `NONE`. Knows nothing of models or strings.

Legend: T positions, W columns, h w grid of cells, N cells, Q depth, L positions of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from lm.vocab import Vocabulary

NONE = -1  # an empty column, and "nothing to predict" in labels

Grid = tuple[int, int]
PictureAttention = Literal["causal", "bidirectional"]


@dataclass(frozen=True)
class Text:
    """Token ids of a piece of text. given: it is read and not learnt, as a user's prompt is."""

    ids: tuple[int, ...]
    given: bool = False


@dataclass(frozen=True, eq=False)
class Image:
    """Codes (h, w, Q) of a picture. given: it is read and not learnt."""

    codes_hwQ: Tensor
    given: bool = False

    @property
    def grid(self) -> Grid:
        return (self.codes_hwQ.shape[0], self.codes_hwQ.shape[1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and torch.equal(self.codes_hwQ, other.codes_hwQ)


Segment = Text | Image


@dataclass(frozen=True)
class Laid:
    """A sequence, and what its positions belong to."""

    ids_TW: Tensor  # int64
    given_T: Tensor  # bool: part of a given segment, so that nothing is learnt there
    picture_T: (
        Tensor  # number of the picture, counted from 0; NONE outside of pictures and on their two marks
    )

    def __len__(self) -> int:
        return len(self.ids_TW)


class Layout(Protocol):
    """How the ids of N cells (N,Q) lie in positions. `revert(place(ids)) == ids`."""

    name: str

    def width(self, depth: int) -> int: ...
    def length(self, cells: int, depth: int) -> int: ...
    def place(self, ids_NQ: Tensor) -> Tensor:
        """(L,W), NONE in empty columns."""
        ...

    def revert(self, ids_LW: Tensor, depth: int) -> Tensor: ...


class Flat:
    """Each code has a position of its own: N·Q positions of one id, the depths of a cell side by side."""

    name = "flat"

    def width(self, depth: int) -> int:
        return 1

    def length(self, cells: int, depth: int) -> int:
        return cells * depth

    def place(self, ids_NQ: Tensor) -> Tensor:
        return ids_NQ.reshape(-1, 1)

    def revert(self, ids_LW: Tensor, depth: int) -> Tensor:
        return ids_LW.reshape(-1, depth)


class Stacked:
    """Each cell has one position that holds its Q ids: Q codes cost one step of the trunk (RQ-Transformer, DnD)."""

    name = "stacked"

    def width(self, depth: int) -> int:
        return depth

    def length(self, cells: int, depth: int) -> int:
        return cells

    def place(self, ids_NQ: Tensor) -> Tensor:
        return ids_NQ

    def revert(self, ids_LW: Tensor, depth: int) -> Tensor:
        return ids_LW


class Delayed:
    """Depth d stands d positions later: each code sees the earlier depths of its cell (MusicGen, arXiv 2306.05284).

    N + Q - 1 positions. The first and the last ones have empty columns.
    """

    name = "delayed"

    def width(self, depth: int) -> int:
        return depth

    def length(self, cells: int, depth: int) -> int:
        return cells + depth - 1

    def place(self, ids_NQ: Tensor) -> Tensor:
        N, Q = ids_NQ.shape
        ids_LW = torch.full((N + Q - 1, Q), NONE, dtype=ids_NQ.dtype, device=ids_NQ.device)
        for d in range(Q):
            ids_LW[d : d + N, d] = ids_NQ[:, d]
        return ids_LW

    def revert(self, ids_LW: Tensor, depth: int) -> Tensor:
        N = len(ids_LW) - depth + 1
        return torch.stack([ids_LW[d : d + N, d] for d in range(depth)], 1)


LAYOUTS: dict[str, type[Flat] | type[Stacked] | type[Delayed]] = {
    layout.name: layout for layout in (Flat, Stacked, Delayed)
}


@dataclass(frozen=True)
class SequenceFormat:
    """Vocabulary, layout and grids: all that is needed to write a sequence and to read it back.

    grids: heights and widths in cells that pictures may have; each needs its id in the vocabulary if there are several.
    picture_attention: what the positions of a *given* picture see of it: those before them, or all of it (Transfusion,
    arXiv 2408.11039). A picture that is learnt or drawn is always causal.
    """

    vocabulary: Vocabulary
    layout: Layout
    grids: tuple[Grid, ...]
    picture_attention: PictureAttention = "causal"

    def __post_init__(self) -> None:
        if not self.grids or len(set(self.grids)) < len(self.grids) or min(map(min, self.grids)) < 1:
            raise ValueError(f"grids={self.grids}: at least one, all different, of at least 1x1 cells")
        announced = len(self.vocabulary.sizes)
        if announced != (len(self.grids) if len(self.grids) > 1 else 0):
            raise ValueError(f"{len(self.grids)} grids, but the vocabulary has ids for {announced} sizes")
        if self.vocabulary.row_end is not None and self.layout.name == "delayed":
            raise ValueError(
                "row ends and the delayed layout: a row's last codes stand in the next row's positions"
            )
        if self.picture_attention not in ("causal", "bidirectional"):
            raise ValueError(f"picture_attention={self.picture_attention!r}: causal or bidirectional")

    @property
    def grid(self) -> Grid:
        """The only grid. ValueError where there are several."""
        first, *more = self.grids
        if more:
            raise ValueError(f"pictures may have the grids {self.grids}: name one")
        return first

    @property
    def width(self) -> int:
        """W: columns of a sequence."""
        return self.layout.width(self.vocabulary.depth)

    def picture_length(self, grid: Grid) -> int:
        """Positions of a picture between its two marks: size, cells, ends of rows."""
        return len(self.plan(grid)) + bool(self.vocabulary.sizes)

    def marked_length(self, grid: Grid) -> int:
        """Positions of a picture with its two marks."""
        return self.picture_length(grid) + 2

    @cached_property
    def longest_picture(self) -> int:
        """Positions of the largest picture between its two marks."""
        return max(self.picture_length(grid) for grid in self.grids)

    @property
    def longest_marked(self) -> int:
        """Positions of the largest picture with its two marks."""
        return self.longest_picture + 2

    def plan(self, grid: Grid) -> Tensor:
        """(L,W): the depth whose id stands in each column of a picture's cells; Q for <row_end>; NONE if empty.

        Made once and shared: not to be changed.
        """
        return _plan(self, grid)

    # --- segments → sequence -----------------------------------------------------------------------------------------

    def lay(self, segments: list[Segment], end: bool = True) -> Laid:
        """Segments → a sequence from <bos> to <eos> (`end=False`: without <eos>, a prompt to go on from).

        ValueError on a picture whose grid or codes do not fit, or text ids outside the text range.
        """
        parts = [self._rows([self.vocabulary.bos])]
        given, pictures, number = [False], [NONE], 0
        for segment in segments:
            if isinstance(segment, Text):
                parts.append(self._text(segment))
                pictures += [NONE] * len(segment.ids)
            else:
                parts.append(self._image(segment))
                pictures += [NONE, *[number] * (len(parts[-1]) - 2), NONE]
                number += 1
            given += [segment.given] * len(parts[-1])
        if end:
            parts.append(self._rows([self.vocabulary.eos]))
            given.append(False)
            pictures.append(NONE)
        return Laid(torch.cat(parts), torch.tensor(given), torch.tensor(pictures))

    def build(self, segments: list[Segment], end: bool = True) -> Tensor:
        """The ids_TW of `lay`."""
        return self.lay(segments, end).ids_TW

    def image_prompt(self, segments: list[Segment], grid: Grid | None = None) -> Laid:
        """A prompt after which a picture is drawn: the segments, <image_start> and, where a grid is given, its size.

        Without a grid a model of several sizes chooses one.
        """
        marks = [self.vocabulary.image_start]
        if grid is not None:
            marks += self._size(grid)
        laid = self.lay(segments, end=False)
        none = torch.full((len(marks),), NONE)
        return Laid(
            torch.cat([laid.ids_TW, self._rows(marks)]),
            torch.cat([laid.given_T, none != NONE]),
            torch.cat([laid.picture_T, none]),
        )

    def _text(self, segment: Text) -> Tensor:
        specials = self.vocabulary.specials
        wrong = [i for i in segment.ids if not 0 <= i < self.vocabulary.image_offset or i in specials]
        if wrong:
            raise ValueError(f"text holds ids {wrong[:4]} that are not text")
        return self._rows(segment.ids)

    def _image(self, segment: Image) -> Tensor:
        vocabulary = self.vocabulary
        size = self._size(segment.grid)
        cells_LW = self._cells(vocabulary.codes_to_ids(segment.codes_hwQ.long()))
        start, end = self._rows([vocabulary.image_start, *size]), self._rows([vocabulary.image_end])
        return torch.cat([start, cells_LW, end])

    def _cells(self, ids_hwQ: Tensor) -> Tensor:
        """Ids of a picture → its positions (L,W), with the ends of rows."""
        row_end = self.vocabulary.row_end
        if row_end is None:
            return self.layout.place(ids_hwQ.flatten(0, 1))
        end_1W = self._rows([row_end])
        return torch.cat([part for ids_wQ in ids_hwQ for part in (self.layout.place(ids_wQ), end_1W)])

    def place_kept(self, codes_hwQ: Tensor, grid: Grid) -> Tensor:
        """Codes of which some are NONE, to be drawn → positions (L,W) of ids, NONE there too.

        ValueError on codes of another grid, or outside [0,K).
        """
        if tuple(codes_hwQ.shape[:2]) != grid:
            raise ValueError(f"kept codes of {tuple(codes_hwQ.shape[:2])} cells for a picture of {grid}")
        ids_hwQ = self.vocabulary.codes_to_ids(codes_hwQ.long().clamp(min=0))
        return self._cells(torch.where(codes_hwQ < 0, NONE, ids_hwQ))

    def _size(self, grid: Grid) -> list[int]:
        """The id that announces a grid, where there are several. ValueError on another grid."""
        if grid not in self.grids:
            raise ValueError(f"a picture of {grid} cells; the format's grids are {self.grids}")
        return [self.vocabulary.sizes[self.grids.index(grid)]] if self.vocabulary.sizes else []

    def _rows(self, tokens: list[int] | tuple[int, ...]) -> Tensor:
        """Text ids and marks, one a position."""
        rows_TW = torch.full((len(tokens), self.width), NONE)
        rows_TW[:, 0] = torch.tensor(tokens, dtype=torch.int64)
        return rows_TW

    # --- sequence → segments -----------------------------------------------------------------------------------------

    def split(self, ids_TW: Tensor) -> list[Segment]:
        """Inverse of `build`, with or without the final <eos>.

        ValueError on anything that `build` cannot have written: an unfinished picture, an id out of its place.
        """
        vocabulary = self.vocabulary
        if ids_TW.ndim != 2 or ids_TW.shape[1] != self.width:
            raise ValueError(f"a sequence of shape {tuple(ids_TW.shape)}; expected (T, {self.width})")
        if not len(ids_TW) or ids_TW[0, 0] != vocabulary.bos:
            raise ValueError("a sequence must start with <bos>")
        self._check_text_row(ids_TW[0], 0)
        segments: list[Segment] = []
        text: list[int] = []
        t = 1
        while t < len(ids_TW):
            token = int(ids_TW[t, 0])
            self._check_text_row(ids_TW[t], t)
            if token == vocabulary.eos and t == len(ids_TW) - 1:
                break
            if token == vocabulary.image_start:
                if text:
                    segments.append(Text(tuple(text)))
                    text = []
                image, t = self._read_image(ids_TW, t + 1)
                segments.append(image)
                continue
            if token in vocabulary.specials:
                raise ValueError(f"special id {token} at position {t} is out of place")
            text.append(token)
            t += 1
        return [*segments, Text(tuple(text))] if text else segments

    def read_image(self, ids_LW: Tensor, grid: Grid) -> Image:
        """The positions of one picture's cells → its codes. ValueError if there are too few, too many or wrong ones."""
        plan_LW, Q = self.plan(grid), self.vocabulary.depth
        if len(ids_LW) != len(plan_LW):
            raise ValueError(f"an unfinished image: {len(ids_LW)} of {len(plan_LW)} positions")
        is_end = plan_LW[:, 0] == Q
        row_end = self.vocabulary.row_end
        if row_end is not None and bool((ids_LW[is_end, 0] != row_end).any()):
            raise ValueError(f"a row of the image does not end in <row_end>, id {row_end}")
        empty_LW = plan_LW == NONE
        if bool((ids_LW[empty_LW] != NONE).any()):
            raise ValueError(f"ids {ids_LW[empty_LW][:4].tolist()} of an image where columns must be empty")
        ids_NQ = self.layout.revert(ids_LW[~is_end], Q)
        return Image(self.vocabulary.ids_to_codes(ids_NQ).reshape(*grid, Q))

    def _read_image(self, ids_TW: Tensor, start: int) -> tuple[Image, int]:
        """The picture whose size, or first cell, stands at `start`; and the position after its <image_end>."""
        grid, first = self.grids[0], start
        if self.vocabulary.sizes:
            token = int(ids_TW[start, 0]) if start < len(ids_TW) else NONE
            if token not in self.vocabulary.sizes:
                raise ValueError(f"id {token} at position {start} where the size of an image must stand")
            self._check_text_row(ids_TW[start], start)
            grid, first = self.grids[self.vocabulary.sizes.index(token)], start + 1
        end = first + len(self.plan(grid))
        image = self.read_image(ids_TW[first:end], grid)
        if len(ids_TW) <= end or ids_TW[end, 0] != self.vocabulary.image_end:
            raise ValueError(f"<image_end> is missing after the image that starts at position {start}")
        self._check_text_row(ids_TW[end], end)
        return image, end + 1

    def _check_text_row(self, row_W: Tensor, position: int) -> None:
        if not 0 <= int(row_W[0]) < self.vocabulary.image_offset or bool((row_W[1:] != NONE).any()):
            raise ValueError(f"position {position} holds {row_W.tolist()}: not one text id")


@lru_cache(maxsize=256)  # it is asked for with every document, and with every position that is drawn
def _plan(form: SequenceFormat, grid: Grid) -> Tensor:
    height, width = grid
    Q = form.vocabulary.depth
    if form.vocabulary.row_end is None:
        return form.layout.place(torch.arange(Q).expand(height * width, Q))
    row_LW = form.layout.place(torch.arange(Q).expand(width, Q))
    end_1W = torch.full((1, form.width), NONE)
    end_1W[0, 0] = Q
    return torch.cat([row_LW, end_1W]).repeat(height, 1)
