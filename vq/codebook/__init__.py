"""Use of codes measured while training, and unused codes re-initialised: the only owner of that job.

Why not the library's replacement: its threshold is an absolute EMA count, which with a large codebook calls most
codes dead at every step, so they churn for ever. Here the threshold is a share of the average use, judged once the
average code has been chosen often enough to tell. A replaced code is left alone for some windows, and replacing stops
before the run ends, so that codes rest. `finish` then brings every code into use over the whole training set.

    start.py   the first codes: a draw from the data, or k-means      policies.py   what an unused code becomes
    seen.py    what the codes of a book are compared with             kmeans.py     codebooks over a whole training set

Knows nothing of pictures; of quantizers only what `CodebookQuantizer` offers. Several processes (torch.distributed)
come to the same codebooks: counts are sums, and vectors those of all of them.

Legend: D latent width, Q depth, G books, K codebook size, N vectors.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from vq.codebook.kmeans import settle
from vq.codebook.policies import ErrorWeighted, Policy
from vq.codebook.seen import MOST_ROWS, depths_of, generator, see, thinned
from vq.codebook.start import BatchStart, NoStart, Start
from vq.quantizers import CodebookQuantizer
from vqlm.ranks import rows_of_ranks, sum_over_ranks

EVIDENCE = 10.0  # times that the average code is chosen before a code of few uses is called unused


class CodebookReset:
    """Counts codes per book over a window of batches, then re-initialises those used less than `threshold` · average.

    policy: what an unused code becomes (None: a vector with a large error). start: what all codes become at first
    (None: vectors of the first batches). window: batches between two replacements; it goes on until the average code
    has been chosen `EVIDENCE` times, since with fewer a code may be unused by chance alone. threshold: share of the
    average use below which a code counts as unused (relative, so it means the same for any K and batch size).
    cooldown: windows for which a replaced code is not replaced again. stop: share of the run (0..1) after which
    nothing is replaced. rounds: of Lloyd's algorithm in `finish`. seed: of the draws, joined with the batch number, so
    that a resumed run draws the same. State: `state_dict` / `load_state_dict` (plain tensors, equal on all ranks).
    """

    def __init__(
        self,
        policy: Policy | None = None,
        start: Start | NoStart | None = None,
        window: int = 10,
        threshold: float = 0.1,
        cooldown: int = 1,
        stop: float = 0.8,
        rounds: int = 8,
        seed: int = 0,
    ):
        if window < 1 or cooldown < 0 or rounds < 0:
            raise ValueError(
                f"window={window}, cooldown={cooldown}, rounds={rounds}: need at least 1 batch, 0 windows and 0 rounds"
            )
        if not 0 <= threshold < 1 or not 0 <= stop <= 1:
            raise ValueError(f"threshold={threshold} must lie in [0, 1) and stop={stop} in [0, 1]")
        self.policy, self.start = policy or ErrorWeighted(), start or BatchStart()
        self.window, self.threshold, self.cooldown = window, threshold, cooldown
        self.stop, self.rounds, self.seed = stop, rounds, seed
        self.batches = self.since = 0  # observed in all, and since the last replacement
        self.state: dict[str, Tensor] = {}  # counts, rest, shares: (G,K)
        self.warned = False

    @torch.no_grad()
    def observe(
        self,
        quantizer: CodebookQuantizer,
        z_BDhw: Tensor,
        codes_BhwQ: Tensor,
        progress: float,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> list[int]:
        """After a training step: count, and at the end of a window replace. Returns replacements per book, or [].

        codes_BhwQ: may lack the last depths, which quantizer dropout leaves out; entries below 0 are not counted.
        progress: share of the run done, in [0, 1]. optimizer: where it updates the codebook, its moments of replaced
        codes become zero.
        """
        self.batches += 1
        if not self.start.done:
            started = self.start.collect(quantizer, rows_of_ranks(quantizer.start(z_BDhw)), self.random())
            if started:
                clear_moments(optimizer, quantizer, {b: slice(None) for b in range(quantizer.books)})
            return started
        counts_GK = self._count(quantizer, codes_BhwQ)
        self.since += 1
        if progress >= self.stop or self.since < self.window or counts_GK.mean(1).min() < EVIDENCE:
            return []
        return self._replace(quantizer, rows_of_ranks(quantizer.start(z_BDhw)), optimizer)

    def random(self) -> torch.Generator:
        return generator(self.seed, self.batches)

    def _count(self, quantizer: CodebookQuantizer, codes_BhwQ: Tensor) -> Tensor:
        """Adds this batch, of all ranks, to the window's counts (G,K)."""
        counts_QK = sum_over_ranks(count_codes(codes_BhwQ, quantizer.codebook_size))
        books_Q = torch.tensor([quantizer.book_of(d) for d in range(len(counts_QK))], device=counts_QK.device)
        new_GK = counts_QK.new_zeros(quantizer.books, quantizer.codebook_size).index_add_(
            0, books_Q, counts_QK
        )
        if not self.state:
            self.state = {name: torch.zeros_like(new_GK) for name in ("counts", "rest", "shares")}
        self.state = {name: tensor.to(new_GK.device) for name, tensor in self.state.items()}
        self.state["counts"] += new_GK
        share_GK = new_GK / new_GK.sum(1, keepdim=True).clamp(min=1)
        self.state["shares"].lerp_(share_GK, 1 - self.policy.memory)
        return self.state["counts"]

    def _replace(
        self, quantizer: CodebookQuantizer, state_ND: Tensor, optimizer: torch.optim.Optimizer | None
    ) -> list[int]:
        counts_GK, rest_GK = self.state["counts"], self.state["rest"]
        low_GK = counts_GK < self.threshold * counts_GK.mean(1, keepdim=True)
        self._warn(counts_GK)
        unused_GK = low_GK & (rest_GK == 0)
        rest_GK.sub_(1).clamp_(min=0)
        random, state_ND, replaced = self.random(), thinned(state_ND, MOST_ROWS), [0] * quantizer.books
        for book in range(quantizer.books):
            unused = unused_GK[book].nonzero().flatten()
            if not len(unused) and not self.policy.moves_all:
                continue
            # seen again for each book: replacing codes of one depth changes what the next is given
            seen = see(quantizer, state_ND, book, counts_GK[book], self.state["shares"][book])
            indices, vectors = self.policy.propose(seen, unused, random)
            quantizer.replace_codes(book, indices, vectors)
            clear_moments(optimizer, quantizer, {book: indices})
            rest_GK[book, indices] = self.cooldown
            replaced[book] = len(indices)
        counts_GK.zero_()
        self.since = 0
        return replaced

    def _warn(self, counts_GK: Tensor) -> None:
        """Once a run: most codes of a book are out of use."""
        used_G = (counts_GK > 0).float().mean(1)
        if not self.warned and bool((used_G < 0.5).any()):
            self.warned = True
            percent = ", ".join(f"{100 * share:.1f} %" for share in used_G.tolist())
            warnings.warn(
                f"after {self.batches} batches the codes in use are {percent} of each codebook; "
                "unused ones are being re-initialised",
                stacklevel=2,
            )

    @torch.no_grad()
    def finish(self, quantizer: CodebookQuantizer, latents: list[Tensor]) -> list[int]:
        """After training, with the encoder that is kept: codes settle, then every code comes into use.

        latents: of the whole training set, (B,D,h,w) each; equal on all ranks. Returns how many codes are unused at
        the end, per book: 0 unless there are too few distinct vectors, which is warned of. See `settle`.
        """
        state_ND = torch.cat([quantizer.start(z) for z in latents])
        self.batches += 1  # another draw
        return settle(quantizer, state_ND, self.rounds, self.random())

    def state_dict(self) -> dict[str, Tensor]:
        counters = {"batches": torch.tensor(self.batches), "since": torch.tensor(self.since)}
        start = {f"start/{name}": tensor for name, tensor in self.start.state().items()}
        return {**self.state, **counters, **start}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            self.batches, self.since = int(state["batches"]), int(state["since"])
            self.state = {name: state[name].clone() for name in ("counts", "rest", "shares") if name in state}
            found = {name.removeprefix("start/"): t for name, t in state.items() if name.startswith("start/")}
            self.start.load(found)


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
def clear_moments(
    optimizer: torch.optim.Optimizer | None, quantizer: CodebookQuantizer, rows: dict[int, Tensor | slice]
) -> None:
    """What the optimizer remembers of these codes (book → rows) becomes zero: it is of the codes that were replaced."""
    for book, indices in rows.items():
        parameter = quantizer.book_parameter(book)
        if optimizer is None or parameter is None:
            continue
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                per_book = value.view(-1, *parameter.shape[-2:])
                per_book[book if len(per_book) > 1 else 0, indices] = 0


@torch.no_grad()
def residuals(quantizer: CodebookQuantizer, z_BDhw: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per depth: the vectors (N,D') that its codes are compared with, and their squared errors (N)."""
    state_ND = quantizer.start(z_BDhw)
    return [(x_ND, errors_N) for _, x_ND, _, errors_N in depths_of(quantizer, state_ND)]


def count_codes(codes_BhwQ: Tensor, codebook_size: int) -> Tensor:
    """(Q,K) float: how often each code of each depth occurs; entries below 0 are no codes."""
    codes_QN = codes_BhwQ.reshape(-1, codes_BhwQ.shape[-1]).T
    return torch.stack([torch.bincount(c[c >= 0], minlength=codebook_size) for c in codes_QN]).float()
