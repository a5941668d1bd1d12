"""The first codes: taken from the data once some batches have been seen. Knows nothing of later replacements.

Legend: D latent width, K codebook size, N vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vq.codebook.kmeans import first_depth, lloyd
from vq.codebook.seen import MOST_ROWS, depths_of, draw, thinned
from vq.quantizers import CodebookQuantizer


class Start:
    """Collects positions until there are `per_code` for each code, then places the codes of all books in order.

    most_batches: after so many it is done with what there is; codes that remain as they were are unused, and so are
    replaced later.
    """

    def __init__(self, per_code: float, most_batches: int):
        if per_code < 1 or most_batches < 1:
            raise ValueError(f"per_code={per_code}, most_batches={most_batches}: both must be at least 1")
        self.per_code, self.most_batches = per_code, most_batches
        self.rows: list[Tensor] = []
        self.done = False

    def collect(self, quantizer: CodebookQuantizer, state_ND: Tensor, random: torch.Generator) -> list[int]:
        """After each batch, with the positions (N,D) of all ranks. Codes placed per book, or [] while it waits."""
        self.rows.append(state_ND)
        enough = sum(map(len, self.rows)) >= self.per_code * quantizer.codebook_size
        if not enough and len(self.rows) < self.most_batches:
            return []
        most = max(MOST_ROWS, int(self.per_code * quantizer.codebook_size))
        rows = [each.to(state_ND.device) for each in self.rows]  # those of a checkpoint come on the CPU
        placed = self._place_all(quantizer, thinned(torch.cat(rows), most), random)
        self.rows, self.done = [], True
        return placed

    def _place_all(
        self, quantizer: CodebookQuantizer, state_ND: Tensor, random: torch.Generator
    ) -> list[int]:
        placed = [0] * quantizer.books
        for book in range(quantizer.books):
            at = first_depth(quantizer, book)
            given_ND = next(x for depth, x, _, _ in depths_of(quantizer, state_ND) if depth == at)
            placed[book] = self.place(quantizer, book, given_ND, random)
        return placed

    def place(
        self, quantizer: CodebookQuantizer, book: int, given_ND: Tensor, random: torch.Generator
    ) -> int:
        """Codes of one book from what its first depth is given; returns how many were placed."""
        rows = draw(given_ND, torch.ones(len(given_ND)), quantizer.codebook_size, random)
        quantizer.replace_codes(book, torch.arange(len(rows), device=rows.device), rows)
        return len(rows)

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self.done)} | {f"rows{i}": rows for i, rows in enumerate(self.rows)}

    def load(self, state: dict[str, Tensor]) -> None:
        self.done = bool(state["done"])
        self.rows = [state[f"rows{i}"].clone() for i in range(len(state) - 1)]


class BatchStart(Start):
    """Distinct vectors, drawn evenly from the first batches."""

    def __init__(self, per_code: float = 1.0, most_batches: int = 16):
        super().__init__(per_code, most_batches)


class KMeansStart(Start):
    """k-means on the vectors of the first batches, from a draw of distinct ones; empty codes are drawn again."""

    def __init__(self, per_code: float = 8.0, most_batches: int = 32, rounds: int = 10):
        super().__init__(per_code, most_batches)
        if rounds < 1:
            raise ValueError(f"rounds={rounds}: must be at least 1")
        self.rounds = rounds

    def place(
        self, quantizer: CodebookQuantizer, book: int, given_ND: Tensor, random: torch.Generator
    ) -> int:
        placed = super().place(quantizer, book, given_ND, random)
        lloyd(quantizer, book, lambda: given_ND, self.rounds, random)
        return placed


class NoStart:
    """The null member: codes begin as they are, for a codebook that was trained before."""

    done = True

    def collect(self, quantizer: CodebookQuantizer, state_ND: Tensor, random: torch.Generator) -> list[int]:
        return []

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        pass
