"""Each column has a small network of its own over the trunk's last hidden state; none sees the others' ids.

The codebooks' output heads of MusicGen (Copet et al. 2023, arXiv 2306.05284), which belong to its delayed layout; a
residual block in place of a matrix (Medusa, arXiv 2401.10774, §2.1), because the output rows are the language model's.
"""

from __future__ import annotations

from torch import nn

from lm.heads import Choose, Head, Predicted, TrunkInputs
from vqlm.checkpoint import declared


@declared
class ParallelHead(Head):
    """Column d: f_d = h + W_d·silu(V_d·norm(h)), with W_d = 0 at first, so that it begins as the linear head."""

    def __init__(self, width: int, hidden_size: int, trunk_layers: int = 0):
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(_Block(hidden_size) for _ in range(width))

    def forward(self, inputs: TrunkInputs, choose: Choose) -> Predicted:
        hidden_BTC = inputs.run()
        features = [hidden_BTC + block(hidden_BTC) for block in self.blocks]
        for column, feature_BTC in enumerate(features):
            choose(column, feature_BTC)
        return Predicted(hidden_BTC, features)


class _Block(nn.Sequential):
    def __init__(self, width: int):
        last = nn.Linear(width, width, bias=False)
        nn.init.zeros_(last.weight)
        super().__init__(nn.RMSNorm(width, eps=1e-6), nn.Linear(width, width), nn.SiLU(), last)
