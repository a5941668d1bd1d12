"""Use of codes measured while training, and unused codes re-initialised: the only owner of that job.

Why not the library's replacement: its threshold is an absolute EMA count, which with a large codebook calls most
codes dead at every step, so they churn for ever. Here the threshold is a share of the average use over a window of
batches. Replacements are residuals of the depth at hand, drawn where its error is large. A replaced code is left
alone for some windows, and replacing stops before the run ends, so that codes rest when a store is written.

Legend: D latent width, Q depth, K codebook size, N vectors of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vq.quantizers import CodebookQuantizer
from vq.quantizers.nearest import nearest_codes

MOST_CANDIDATES = 2**22  # torch.multinomial refuses more than 2^24


class CodebookReset:
    """Counts codes per depth over `window` batches, then re-initialises those used less than `threshold` · average.

    window: batches between two replacements; the first happens after the first batch, which makes it the
    data-dependent initialisation. threshold: share of the average use below which a code counts as unused (relative,
    so it means the same for any K and batch size). cooldown: windows for which a replaced code is not replaced again.
    stop: share of the run (0..1) after which nothing is replaced. seed: of the draws, joined with the batch number,
    so that a resumed run draws the same. State: `state_dict` / `load_state_dict` (plain tensors).
    """

    def __init__(
        self, window: int = 50, threshold: float = 0.1, cooldown: int = 1, stop: float = 0.8, seed: int = 0
    ):
        if window < 1 or cooldown < 0:
            raise ValueError(f"window={window}, cooldown={cooldown}: need at least 1 batch and 0 windows")
        if not 0 <= threshold < 1 or not 0 <= stop <= 1:
            raise ValueError(f"threshold={threshold} must lie in [0, 1) and stop={stop} in [0, 1]")
        self.window, self.threshold, self.cooldown, self.stop, self.seed = (
            window,
            threshold,
            cooldown,
            stop,
            seed,
        )
        self.counts_QK: Tensor | None = None
        self.rest_QK: Tensor | None = None
        self.batches = 0

    @torch.no_grad()
    def observe(
        self,
        quantizer: CodebookQuantizer,
        z_BDhw: Tensor,
        codes_BhwQ: Tensor,
        progress: float,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> list[int]:
        """After a training step: count, and at the end of a window replace. Returns replacements per depth, or [].

        progress: share of the run done, in [0, 1].
        """
        if self.counts_QK is None or self.rest_QK is None:
            self.counts_QK = torch.zeros(quantizer.depth, quantizer.codebook_size, device=z_BDhw.device)
            self.rest_QK = torch.zeros_like(self.counts_QK)
        self.counts_QK, self.rest_QK = self.counts_QK.to(z_BDhw.device), self.rest_QK.to(z_BDhw.device)
        self.counts_QK += count_codes(codes_BhwQ, quantizer.codebook_size)
        self.batches += 1
        if progress >= self.stop or (self.batches > 1 and self.batches % self.window):
            return []
        return self._replace(quantizer, z_BDhw)

    def _replace(self, quantizer: CodebookQuantizer, z_BDhw: Tensor) -> list[int]:
        assert self.counts_QK is not None and self.rest_QK is not None
        counts_QK = self.counts_QK
        unused_QK = (counts_QK < self.threshold * counts_QK.mean(1, keepdim=True)) & (self.rest_QK == 0)
        self.rest_QK.sub_(1).clamp_(min=0)
        replaced = []
        for depth in range(quantizer.depth):
            # residuals again at each depth: replacing codes of one depth changes what the next is given
            vectors_ND, errors_N = residuals(quantizer, z_BDhw)[depth]
            unused = unused_QK[depth].nonzero().flatten()
            drawn = self._draw(errors_N, len(unused), depth)
            unused = unused[: len(drawn)]
            quantizer.replace_codes(depth, unused, vectors_ND[drawn])
            self.rest_QK[depth, unused] = self.cooldown
            replaced.append(len(unused))
        self.counts_QK.zero_()
        return replaced

    def _draw(self, errors_N: Tensor, wanted: int, depth: int) -> Tensor:
        """Distinct vectors, with probability in proportion to their squared error (as in k-means++ seeding)."""
        weights = errors_N.cpu().double() + 1e-12  # not every device has float64
        wanted = min(wanted, len(weights), MOST_CANDIDATES // 2)
        if wanted == 0:
            return torch.empty(0, dtype=torch.int64, device=errors_N.device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.batches * 101 + depth)
        step = -(-len(weights) // MOST_CANDIDATES)  # more, evenly thinned out
        drawn = torch.multinomial(weights[::step], wanted, replacement=False, generator=generator)
        return (drawn * step).to(errors_N.device)

    @torch.no_grad()
    def finish(self, quantizer: CodebookQuantizer, latents: list[Tensor], rounds: int = 8) -> list[int]:
        """After training: codes that no latent of the training set chooses are replaced, until every code is chosen.

        latents: of the whole training set, (B,D,h,w) each. Depth by depth, since one changes what the next is given.
        A replacement is a residual with a large error, so at least that one chooses it; a code it takes vectors from
        may fall out of use, hence rounds. Codes in use stay as they are. Returns how many are unused at the end, per
        depth: 0 unless the training set has too few distinct residuals.
        """
        left = []
        state_ND = torch.cat([quantizer.start(z) for z in latents])
        for depth in range(quantizer.depth):
            given_ND = quantizer.vectors(state_ND, depth)
            for _ in range(rounds):
                unused, errors_N = self._unused(quantizer.codebook(depth), given_ND)
                if not len(unused):
                    break
                self.batches += 1  # another draw
                drawn = self._draw(errors_N, len(unused), depth)
                quantizer.replace_codes(depth, unused[: len(drawn)], given_ND[drawn])
            book_KD = quantizer.codebook(depth)
            left.append(len(self._unused(book_KD, given_ND)[0]))
            state_ND = quantizer.leave(state_ND, depth, nearest_codes(given_ND, book_KD))
        return left

    @staticmethod
    def _unused(book_KD: Tensor, given_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Codes that no vector chooses, and the squared error of each vector."""
        chosen_N = nearest_codes(given_ND, book_KD)
        unused = (torch.bincount(chosen_N, minlength=len(book_KD)) == 0).nonzero().flatten()
        return unused, (given_ND - book_KD[chosen_N]).square().sum(1)

    def state_dict(self) -> dict[str, Tensor]:
        if self.counts_QK is None or self.rest_QK is None:
            return {}
        return {"counts": self.counts_QK, "rest": self.rest_QK, "batches": torch.tensor(self.batches)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            self.counts_QK, self.rest_QK = state["counts"].clone(), state["rest"].clone()
            self.batches = int(state["batches"])


class NoReset:
    """The null member: codes are left as they are."""

    def observe(
        self,
        quantizer: object,
        z_BDhw: Tensor,
        codes_BhwQ: Tensor,
        progress: float,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> list[int]:
        return []

    def finish(self, quantizer: object, latents: list[Tensor]) -> list[int]:
        return []

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


@torch.no_grad()
def residuals(quantizer: CodebookQuantizer, z_BDhw: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per depth: the vectors (N,D') that its codes are compared with, and their squared errors (N)."""
    state_ND, found = quantizer.start(z_BDhw), []
    for depth in range(quantizer.depth):
        vectors_ND, book_KD = quantizer.vectors(state_ND, depth), quantizer.codebook(quantizer.book_of(depth))
        indices_N = nearest_codes(vectors_ND, book_KD)
        found.append((vectors_ND, (vectors_ND - book_KD[indices_N]).square().sum(1)))
        state_ND = quantizer.leave(state_ND, depth, indices_N)
    return found


def count_codes(codes_BhwQ: Tensor, codebook_size: int) -> Tensor:
    """(Q,K) float: how often each code of each depth occurs."""
    codes_QN = codes_BhwQ.reshape(-1, codes_BhwQ.shape[-1]).T
    return torch.stack([torch.bincount(c, minlength=codebook_size) for c in codes_QN]).float()
