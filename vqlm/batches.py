"""Which samples make the n-th batch of a run: a pure function of (seed, n).

So a run that is resumed at batch n, with any number of loader workers, sees exactly what an uninterrupted one sees,
and no loader has a state to save. Knows nothing of what the samples are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch


class Order:
    """Shuffled epochs of `count` samples, laid end to end and cut into batches of `batch_size`."""

    def __init__(self, count: int, batch_size: int, seed: int):
        if count < 1 or batch_size < 1:
            raise ValueError(f"count={count}, batch_size={batch_size}: both must be at least 1")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epoch = lru_cache(maxsize=4)(self._shuffled)

    def indices(self, n: int) -> np.ndarray:
        """Sample indices (batch_size) int64 of batch n = 0, 1, 2, …"""
        positions = np.arange(n * self.batch_size, (n + 1) * self.batch_size)
        return np.array([self._epoch(int(p) // self.count)[int(p) % self.count] for p in positions])

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)


class ShardOrder:
    """As `Order`, of samples that lie in shards: a place of a batch looks into one shard at a time.

    In each epoch the shards are shuffled, each in itself too, and laid end to end. That row is cut into `lanes`
    stretches of equal length (to one sample), and the epoch takes a sample of each stretch in turn: its p-th sample is
    the (p // lanes)-th of stretch p mod lanes. So every sample comes once an epoch, a batch holds samples of up to
    `lanes` shards, and a process that makes some places of each batch reads some shards, not all. lanes: the largest
    divisor of the batch's size up to MOST_LANES, so that a place keeps its stretch for a whole epoch. Nothing depends
    on the number of processes.

    counts: samples of each shard. What is held grows with the number of shards, not of samples.
    """

    MOST_LANES = 64

    def __init__(self, counts: Sequence[int] | np.ndarray, batch_size: int, seed: int):
        self.counts = np.asarray(counts, np.int64)
        self.count, self.batch_size, self.seed = int(self.counts.sum()), batch_size, seed
        if self.count < 1 or batch_size < 1:
            raise ValueError(f"{self.count} samples, batch_size={batch_size}: both must be at least 1")
        self.lanes = max(n for n in range(1, self.MOST_LANES + 1) if batch_size % n == 0)
        self._epoch = lru_cache(maxsize=2)(self._laid)
        self._rows = lru_cache(maxsize=2 * self.lanes)(self._shuffled)

    def samples(self, n: int, places: Iterable[int]) -> list[tuple[int, int]]:
        """(shard, sample in it) of some places 0 … batch_size - 1 of batch n = 0, 1, 2, …"""
        return [self._sample(*divmod(n * self.batch_size + place, self.count)) for place in places]

    def open_shards(self, places: Sequence[int]) -> int:
        """How many shards such places of a batch look into at a time, at most."""
        return len({place % self.lanes for place in places})

    def _sample(self, epoch: int, position: int) -> tuple[int, int]:
        shards, ends = self._epoch(epoch)
        turn, lane = divmod(position, self.lanes)
        each, longer = divmod(self.count, self.lanes)
        at = lane * each + min(lane, longer) + turn
        number = int(np.searchsorted(ends, at, side="right"))
        shard = int(shards[number])
        return shard, int(self._rows(epoch, shard)[at - int(ends[number])])  # from the shard's end: below 0

    # To numpy [s, e, 3] and [s, e, 3, 0] are one seed: the numbers that shuffle the shards also shuffle shard 0. That
    # makes no sample likelier in any place, and with another seed runs could not go on in the order that they had.

    def _laid(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and where each ends."""
        shards = np.random.default_rng([self.seed, epoch, 3]).permutation(len(self.counts))
        return shards, np.cumsum(self.counts[shards])

    def _shuffled(self, epoch: int, shard: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch, 3, shard])
        return random.permutation(int(self.counts[shard])).astype(np.int32)


def generator(seed: int, n: int) -> torch.Generator:
    """The random numbers of batch n: independent of every other batch."""
    mixed = np.random.SeedSequence([seed, n, 1]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)
