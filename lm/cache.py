"""Keys and values of rows that have unequal lengths and come and go: one preallocated tensor for each layer.

Each row has slots of its own: its n-th position lies in slot n + 1, whatever the other rows hold. Slot 0 is where
padding is written, and nobody looks. So rows need no common start, a row can begin anew, and the last row can take the
place of one that has ended. Knows nothing of ids.

Legend: B rows of a pass, R rows there is room for, H heads, T new positions, S slots, D width of a head.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

PADDING = 0  # slot


class RowCache(Cache):
    """`layers`: of the trunk. `reserve` before a pass makes room, `enter` says where its keys and values go.

    dtype: of what is stored; None: as the model makes it.
    """

    def __init__(self, layers: int, dtype: torch.dtype | None = None):
        self.dtype = dtype
        self.rows, self.slots_BT, self.limit = slice(0, 0), torch.zeros(0, 0, dtype=torch.int64), 0
        self.room = (0, 0)  # rows, slots
        self.places: dict[int, Tensor] = {}  # of the pass, by the number of heads
        super().__init__(layers=[_RowLayer(self) for _ in range(layers)])

    def reserve(self, rows: int, positions: int) -> None:
        """Make room for so many rows of so many positions. What is there stays; room grows by half at least."""
        have, wanted = self.room, (rows, positions + 1)
        if wanted[0] > have[0] or wanted[1] > have[1]:
            grown = [
                new if new <= old else max(new, old + old // 2) for new, old in zip(wanted, have, strict=True)
            ]
            self.room = (max(grown[0], have[0]), max(grown[1], have[1]))
            for layer in self.layers:
                layer.grow(*self.room)  # type: ignore[attr-defined]

    def enter(self, rows: slice, slots_BT: Tensor) -> int:
        """The next pass is over these rows, and writes there. Returns how many slots its positions may look at."""
        self.rows, self.slots_BT, self.places = rows, slots_BT, {}
        self.limit = int(slots_BT.max()) + 1
        return self.limit

    def places_of(self, heads: int) -> Tensor:
        """(B·H·T): where the pass writes, in a layer's (R·H·S,D). The same in all layers, so made once."""
        if heads not in self.places:
            row_B = torch.arange(self.rows.start, self.rows.stop, device=self.slots_BT.device)
            head_BH = row_B[:, None] * heads + torch.arange(heads, device=row_B.device)
            self.places[heads] = (head_BH[..., None] * self.room[1] + self.slots_BT[:, None]).flatten()
        return self.places[heads]

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        for layer in self.layers:
            layer.move(source, target)  # type: ignore[attr-defined]


class _RowLayer(CacheLayerMixin):
    def __init__(self, cache: RowCache):
        super().__init__()
        # A ring of references would keep the keys and values until Python looks for rings.
        self._cache = weakref.ref(cache)

    @property
    def cache(self) -> RowCache:
        cache = self._cache()
        assert cache is not None
        return cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, slots = self.cache.room

        def empty(like_BHTD: Tensor) -> Tensor:
            # zeros: what was never written is masked, and 0 · NaN would be NaN
            H, D = like_BHTD.shape[1], like_BHTD.shape[3]
            return like_BHTD.new_zeros(rows, H, slots, D, dtype=self.cache.dtype)

        self.keys, self.values = empty(key_states), empty(value_states)
        self.is_initialized = True

    def grow(self, rows: int, slots: int) -> None:
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old: Any = getattr(self, name)
            new = old.new_zeros(rows, old.shape[1], slots, old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def move(self, source: int, target: int) -> None:
        if self.is_initialized:
            for part in (self.keys, self.values):
                part[target] = part[source]  # type: ignore[index]

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values (B,H,T,D) → those of all slots that are in use (B,H,S,D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache, found = self.cache, []
        at_N = cache.places_of(key_states.shape[1])
        for store, new_BHTD in ((self.keys, key_states), (self.values, value_states)):
            new_ND = new_BHTD.to(store.dtype).reshape(-1, new_BHTD.shape[-1])  # type: ignore[union-attr]
            store.view(-1, new_ND.shape[-1]).index_copy_(0, at_N, new_ND)  # type: ignore[union-attr]
            found.append(store[cache.rows, :, : cache.limit])  # type: ignore[index]
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.limit, 0

    def get_seq_length(self) -> int:
        return self.cache.limit - self.cache.slots_BT.shape[1] if self.cache.limit else 0

    def get_max_length(self) -> int:
        return self.cache.room[1]
