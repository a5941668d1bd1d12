"""Which samples make the n-th batch of a run: a pure function of (seed, n).

So a run that is resumed at batch n, with any number of loader workers, sees exactly what an uninterrupted one sees,
and no loader has a state to save. Knows nothing of what the samples are.
"""

from __future__ import annotations

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


def generator(seed: int, n: int) -> torch.Generator:
    """The random numbers of batch n: independent of every other batch."""
    mixed = np.random.SeedSequence([seed, n, 1]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)
