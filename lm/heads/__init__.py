"""Heads: how the Q ids of one position are predicted from the trunk. Each can stand in for another.

A head runs the trunk once for all positions and gives one feature for each column; the logits of a column are that
feature times the language model's own output rows. The caller says, column by column, which ids come next: known
ones in training and in a prompt, drawn ones at the last position in decoding (`Choose`). So training, decoding with
and without cache, and guidance all pass through the same lines.

Legend: B rows, T positions, C hidden width, W columns (1 flat, Q stacked or delayed), N positions before picture ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Choose = Callable[[int, Tensor], Tensor]
"""choose(column, feature_BTC) → ids (B,T) that come next in that column, NONE where nothing or text comes next."""


@dataclass
class TrunkInputs:
    """What the trunk reads, and the trunk itself."""

    run: Callable[[], Tensor]  # () → hidden (B,T,C), after the final norm
    layers: nn.ModuleList  # the trunk's decoder layers, for heads that work between them
    embed: Callable[[Tensor], Tensor]  # ids (B,T) → rows (B,T,C), zeros where NONE


@dataclass
class Predicted:
    """What a head gives."""

    hidden_BTC: Tensor  # for text logits
    features: list[Tensor] = field(default_factory=list)  # W tensors (B,T,C), or (N,C) from `teach`


class Head(nn.Module):
    """width: columns W that it predicts."""

    width: int

    def forward(self, inputs: TrunkInputs, choose: Choose) -> Predicted:
        """Run the trunk; features of all positions, asked for column by column."""
        raise NotImplementedError

    def teach(self, inputs: TrunkInputs, next_BTW: Tensor, where_BT: Tensor) -> Predicted:
        """As `forward` with all next ids known; features only at `where`, the positions followed by picture ids."""
        made = self(inputs, lambda column, feature: next_BTW[..., column])
        return Predicted(made.hidden_BTC, [feature[where_BT] for feature in made.features])


def last_chosen(next_BTW: Tensor, choose_last: Callable[[int, Tensor], Tensor]) -> Choose:
    """Known ids everywhere but at the last position, where `choose_last(column, feature_BC)` draws them."""

    def choose(column: int, feature_BTC: Tensor) -> Tensor:
        return torch.cat([next_BTW[:, :-1, column], choose_last(column, feature_BTC[:, -1])[:, None]], 1)

    return choose


@contextmanager
def between_layers(layers: nn.ModuleList, changes: dict[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """For the length of the block, pass the output of layer i through changes[i]."""

    def hook(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def changed(module: nn.Module, arguments: Any, output: Any) -> Any:
            if isinstance(output, tuple):  # some architectures return (hidden, …)
                return (change(output[0]), *output[1:])
            return change(output)

        return changed

    handles = [layers[i].register_forward_hook(hook(change)) for i, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
