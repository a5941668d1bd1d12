"""Segments of text and pictures ↔ one sequence of token ids.

    <bos> text … <image_start> cell cell … cell <image_end> text … <eos>

How the Q codes of a cell become positions is a value, the layout: `Flat` gives each code a position, `Stacked` gives
each cell one position that carries Q ids. A sequence is therefore `ids_TW`: T positions, W columns (1 for flat, Q for
stacked), where a text id stands in column 0 and the other columns hold `NONE`. Knows nothing of models or strings.

Legend: T positions, W columns, h w grid of cells, Q depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lm.vocab import Vocabulary

NONE = -1  # an empty column, and "nothing to predict" in labels


@dataclass(frozen=True)
class Text:
    """Token ids of a piece of text."""

    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Image:
    """Codes (h, w, Q) of a picture."""

    codes_hwQ: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and torch.equal(self.codes_hwQ, other.codes_hwQ)


Segment = Text | Image


class Layout(Protocol):
    """How a picture's ids (h·w, Q) lie in positions. `revert(place(ids)) == ids`."""

    name: str

    def width(self, depth: int) -> int: ...
    def length(self, cells: int, depth: int) -> int: ...
    def depth_of(self, position: int, depth: int) -> int: ...
    def place(self, ids_NQ: Tensor) -> Tensor: ...
    def revert(self, ids_LW: Tensor, depth: int) -> Tensor: ...


class Flat:
    """Each code has a position of its own: h·w·Q positions of one id, the depths of a cell side by side."""

    name = "flat"

    def width(self, depth: int) -> int:
        return 1

    def length(self, cells: int, depth: int) -> int:
        return cells * depth

    def depth_of(self, position: int, depth: int) -> int:
        """The first depth that a position holds."""
        return position % depth

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

    def depth_of(self, position: int, depth: int) -> int:
        return 0

    def place(self, ids_NQ: Tensor) -> Tensor:
        return ids_NQ

    def revert(self, ids_LW: Tensor, depth: int) -> Tensor:
        return ids_LW


LAYOUTS: dict[str, type[Flat] | type[Stacked]] = {layout.name: layout for layout in (Flat, Stacked)}


@dataclass(frozen=True)
class SequenceFormat:
    """Vocabulary, layout and grid: all that is needed to write a sequence and to read it back."""

    vocabulary: Vocabulary
    layout: Layout
    grid: tuple[int, int]

    @property
    def width(self) -> int:
        """W: columns of a sequence."""
        return self.layout.width(self.vocabulary.depth)

    @property
    def image_length(self) -> int:
        """Positions of a picture, markers not counted."""
        return self.layout.length(self.grid[0] * self.grid[1], self.vocabulary.depth)

    def build(self, segments: list[Segment], end: bool = True) -> Tensor:
        """Segments → ids_TW, from <bos> to <eos> (`end=False`: without <eos>, a prompt to go on from).

        ValueError on a picture whose grid or codes do not fit, or text ids outside the text range.
        """
        parts = [self._row(self.vocabulary.bos)]
        for segment in segments:
            parts += self._text(segment) if isinstance(segment, Text) else self._image(segment)
        if end:
            parts.append(self._row(self.vocabulary.eos))
        return torch.cat(parts)

    def split(self, ids_TW: Tensor) -> list[Segment]:
        """Inverse of `build`, with or without the final <eos>.

        ValueError on anything that `build` cannot have written: an unfinished picture, an id out of its place.
        """
        vocabulary = self.vocabulary
        if ids_TW.ndim != 2 or ids_TW.shape[1] != self.width:
            raise ValueError(f"a sequence of shape {tuple(ids_TW.shape)}; expected (T, {self.width})")
        if not len(ids_TW) or ids_TW[0, 0] != vocabulary.bos:
            raise ValueError("a sequence must start with <bos>")
        segments: list[Segment] = []
        text: list[int] = []
        t = 1
        while t < len(ids_TW):
            token = int(ids_TW[t, 0])
            if token == vocabulary.eos and t == len(ids_TW) - 1:
                break
            self._check_text_row(ids_TW[t], t)
            if token == vocabulary.image_start:
                if text:
                    segments.append(Text(tuple(text)))
                    text = []
                segments.append(self._read_image(ids_TW, t + 1))
                t += self.image_length + 2
                continue
            if token in (vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.image_end):
                raise ValueError(f"special id {token} at position {t} is out of place")
            text.append(token)
            t += 1
        return [*segments, Text(tuple(text))] if text else segments

    def image_prompt(self, segments: list[Segment]) -> Tensor:
        """A prompt after which a picture is drawn: the segments, then <image_start>."""
        return torch.cat([self.build(segments, end=False), self._row(self.vocabulary.image_start)])

    def read_image(self, ids_LW: Tensor) -> Image:
        """The positions of one picture → its codes. ValueError if there are too few, too many or wrong ones."""
        if len(ids_LW) != self.image_length:
            raise ValueError(f"an unfinished image: {len(ids_LW)} of {self.image_length} positions")
        ids_NQ = self.layout.revert(ids_LW, self.vocabulary.depth)
        return Image(self.vocabulary.ids_to_codes(ids_NQ).reshape(*self.grid, self.vocabulary.depth))

    def _read_image(self, ids_TW: Tensor, start: int) -> Image:
        end = start + self.image_length
        image = self.read_image(ids_TW[start:end])
        if len(ids_TW) <= end or ids_TW[end, 0] != self.vocabulary.image_end:
            raise ValueError(f"<image_end> is missing after the image that starts at position {start}")
        self._check_text_row(ids_TW[end], end)
        return image

    def _check_text_row(self, row_W: Tensor, position: int) -> None:
        if not 0 <= int(row_W[0]) < self.vocabulary.image_offset or bool((row_W[1:] != NONE).any()):
            raise ValueError(f"position {position} holds {row_W.tolist()}: not one text id")

    def _text(self, segment: Text) -> list[Tensor]:
        specials = {getattr(self.vocabulary, n) for n in ("bos", "eos", "pad", "image_start", "image_end")}
        wrong = [i for i in segment.ids if not 0 <= i < self.vocabulary.image_offset or i in specials]
        if wrong:
            raise ValueError(f"text holds ids {wrong[:4]} that are not text")
        return [self._row(i) for i in segment.ids]

    def _image(self, segment: Image) -> list[Tensor]:
        if tuple(segment.codes_hwQ.shape[:2]) != self.grid:
            raise ValueError(
                f"a picture of {tuple(segment.codes_hwQ.shape[:2])} cells; the format's grid is {self.grid}"
            )
        ids_NQ = self.vocabulary.codes_to_ids(segment.codes_hwQ.long()).reshape(-1, self.vocabulary.depth)
        return [
            self._row(self.vocabulary.image_start),
            self.layout.place(ids_NQ),
            self._row(self.vocabulary.image_end),
        ]

    def _row(self, token: int) -> Tensor:
        row = torch.full((1, self.width), NONE)
        row[0, 0] = token
        return row
