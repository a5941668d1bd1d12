"""Codebooks over a whole set of latents, the encoder being fixed: Lloyd's algorithm, then every code into use.

Used after training, and by the k-means start. Nothing may change the codes after `settle`.

Legend: D width, G books, K codebook size, N vectors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from vq.codebook.seen import depths_of, draw, new_rows, squared_errors, thinned, worth
from vq.quantizers import CodebookQuantizer
from vq.quantizers.nearest import nearest_codes
from vqlm.ranks import rank_count, sum_over_ranks

LOW = 0.3  # share of the average use below which Lloyd's rounds draw a code anew
REDRAWN = 0.6  # share of Lloyd's rounds that do so; in the others codes come to rest
PER_CODE = 16  # vectors for each code that Lloyd's rounds look at, and at least LEAST_ROWS
LEAST_ROWS = 2**18
PAIRS = 2e11  # of vectors and codes that they compare: some 200 s of one core, where a book is large
FILLS = 50  # rounds of filling; each leaves a small share of the codes that it began with


def settle(quantizer: CodebookQuantizer, state_ND: Tensor, rounds: int, random: torch.Generator) -> list[int]:
    """Book by book: up to `rounds` of Lloyd's algorithm, then unused codes are moved until all are used.

    state_ND: positions of the whole training set, equal on all ranks. Returns unused codes per book, and warns where
    there are any.
    """
    ahead_ND, at = state_ND, 0
    for book in range(quantizer.books):
        first = first_depth(quantizer, book)
        ahead_ND, at = _walk(quantizer, ahead_ND, at, first), first
        _settle_book(quantizer, book, ahead_ND, rounds, random)
    counts_GK = count_uses(quantizer, state_ND)
    left = (counts_GK == 0).sum(1).tolist()
    if any(left):
        _warn(quantizer, counts_GK, state_ND)
    return left


def _settle_book(
    quantizer: CodebookQuantizer, book: int, state_ND: Tensor, rounds: int, random: torch.Generator
) -> None:
    """state_ND: that of the first depth which reads the book."""
    shared = sum(quantizer.book_of(d) == book for d in range(quantizer.depth)) > 1
    x_ND = given(quantizer, state_ND, book)
    # earlier depths of a shared book change what its later ones are given
    give = (lambda: given(quantizer, state_ND, book)) if shared else (lambda: x_ND)
    lloyd(quantizer, book, give, rounds, random)
    for _ in range(FILLS if shared else 1):
        if fill(quantizer, book, give(), random) == 0:
            break


def first_depth(quantizer: CodebookQuantizer, book: int) -> int:
    return next(d for d in range(quantizer.depth) if quantizer.book_of(d) == book)


def _walk(quantizer: CodebookQuantizer, state_ND: Tensor, depth: int, target: int) -> Tensor:
    """The state of depth `target` from that of an earlier one."""
    for d in range(depth, target):
        chosen_N = nearest_codes(quantizer.vectors(state_ND, d), quantizer.codebook(quantizer.book_of(d)))
        state_ND = quantizer.leave(state_ND, d, chosen_N)
    return state_ND


def given(quantizer: CodebookQuantizer, state_ND: Tensor, book: int) -> Tensor:
    """What the codes of a book are compared with, from the state of its first depth: of all its depths together."""
    depths = [d for d in range(quantizer.depth) if quantizer.book_of(d) == book]
    found, at = [], depths[0]
    for depth in depths:
        state_ND, at = _walk(quantizer, state_ND, at, depth), depth
        found.append(quantizer.vectors(state_ND, depth))
    return torch.cat(found)


def count_uses(quantizer: CodebookQuantizer, state_ND: Tensor) -> Tensor:
    """(G,K): how often each code of each book is chosen."""
    size = quantizer.codebook_size
    counts_GK = torch.zeros(quantizer.books, size, dtype=torch.int64, device=state_ND.device)
    for depth, _, chosen_N, _ in depths_of(quantizer, state_ND):
        counts_GK[quantizer.book_of(depth)] += torch.bincount(chosen_N, minlength=size)
    return counts_GK


def _warn(quantizer: CodebookQuantizer, counts_GK: Tensor, state_ND: Tensor) -> None:
    distinct = int(new_rows(state_ND).sum())
    percent = ", ".join(f"{100 * share:.1f} %" for share in (counts_GK > 0).float().mean(1).tolist())
    warnings.warn(
        f"the training set uses {percent} of the {quantizer.codebook_size} codes of each codebook: "
        f"its {len(state_ND)} latent vectors have {distinct} distinct values. "
        "Train on more pictures, or choose a smaller codebook_size",
        stacklevel=4,
    )


def lloyd(
    quantizer: CodebookQuantizer,
    book: int,
    give: Callable[[], Tensor],
    rounds: int,
    random: torch.Generator,
) -> None:
    """Up to `rounds` of Lloyd's algorithm on what `give()` returns (N,D), fewer where `PAIRS` is used up before.

    In the first rounds codes in little use become vectors drawn evenly, which evens out the use of codes. Draws by
    error end a little nearer to the training vectors, with less even use and more codes that no new picture needs.
    """
    K = quantizer.codebook_size
    x_ND = thinned(give(), max(PER_CODE * K, LEAST_ROWS))
    rounds = min(rounds, int(PAIRS / K / len(x_ND)))
    for turn in range(rounds):
        x_ND = thinned(give(), max(PER_CODE * K, LEAST_ROWS)) if turn else x_ND
        lloyd_round(quantizer, book, x_ND, LOW if turn < REDRAWN * rounds else 0.0, random)


def lloyd_round(
    quantizer: CodebookQuantizer, book: int, x_ND: Tensor, low: float, random: torch.Generator
) -> None:
    """Each code becomes the mean of its vectors; those used at most `low` · average are drawn anew."""
    book_KD = quantizer.codebook(book)
    chosen_N = nearest_codes(x_ND, book_KD)
    counts_K = torch.bincount(chosen_N, minlength=len(book_KD)).to(x_ND.dtype)
    sums_KD = torch.zeros_like(book_KD).index_add_(0, chosen_N, x_ND)
    # index_add_ on a GPU adds in no fixed order: the mean over ranks is the same on all of them
    means_KD = sum_over_ranks(sums_KD / counts_K.clamp(min=1)[:, None]) / rank_count()
    means_KD = torch.where(counts_K[:, None] > 0, means_KD, book_KD)
    unused = (counts_K <= low * counts_K.mean()).nonzero().flatten()
    apart_N = worth(x_ND, squared_errors(x_ND, book_KD, chosen_N)) > 0
    rows = draw(x_ND, apart_N.float(), len(unused), random)
    means_KD[unused[: len(rows)]] = rows
    quantizer.replace_codes(book, torch.arange(len(book_KD), device=x_ND.device), means_KD)


def fill(quantizer: CodebookQuantizer, book: int, x_ND: Tensor, random: torch.Generator) -> int:
    """Codes that no vector chooses become vectors that are no codes yet, so at least those choose them.

    A code that they take vectors from may fall out of use in turn, hence rounds; each compares the vectors with the
    new codes alone. Codes in use stay as they are. Returns how many were moved.
    """
    book_KD, moved = quantizer.codebook(book), 0
    chosen_N = nearest_codes(x_ND, book_KD)
    errors_N = squared_errors(x_ND, book_KD, chosen_N)
    for _ in range(FILLS):
        counts_K = torch.bincount(chosen_N, minlength=len(book_KD))
        unused = (counts_K == 0).nonzero().flatten()
        # the only vector of a code is left to it
        rows = draw(x_ND, worth(x_ND, errors_N).sqrt() * (counts_K[chosen_N] > 1), len(unused), random)
        if not len(rows):
            break
        moved += len(rows)
        indices = unused[: len(rows)]
        quantizer.replace_codes(book, indices, rows)
        new_KD = quantizer.codebook(book)[indices]
        nearest_N = nearest_codes(x_ND, new_KD)
        nearer_N = squared_errors(x_ND, new_KD, nearest_N)
        chosen_N = torch.where(nearer_N < errors_N, indices[nearest_N], chosen_N)
        errors_N = torch.minimum(nearer_N, errors_N)
    return moved
