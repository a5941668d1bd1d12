"""The null head: every column is read off the trunk's last hidden state, independently of the others."""

from __future__ import annotations

from lm.heads import Choose, Head, Predicted, TrunkInputs
from vqlm.checkpoint import declared


@declared
class LinearHead(Head):
    """No parameters (sizes are taken for the family's sake). With the flat layout: a causal LM's own output layer."""

    def __init__(self, width: int, hidden_size: int = 0, trunk_layers: int = 0):
        super().__init__()
        self.width = width

    def forward(self, inputs: TrunkInputs, choose: Choose) -> Predicted:
        hidden_BTC = inputs.run()
        for column in range(self.width):
            choose(column, hidden_BTC)
        return Predicted(hidden_BTC, [hidden_BTC] * self.width)
