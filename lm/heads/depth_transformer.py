"""A small transformer over the Q codes of one position (RQ-Transformer, Lee et al. 2022, arXiv 2203.01941, §3.2.2).

    v_1 = PE(1) + W_h·h        v_d = PE(d) + W_e·Σ_{j<d} e(id_j)        f = transformer(v_1 … v_Q), causal over d

The trunk runs once per position; this runs Q light steps on top of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lm.heads import Choose, Head, Predicted, TrunkInputs
from vqlm.checkpoint import declared


@declared
class DepthTransformerHead(Head):
    """hidden_size: the trunk's width C; dim, layers, heads: of the small transformer."""

    def __init__(
        self,
        width: int,
        hidden_size: int,
        trunk_layers: int = 0,
        dim: int = 256,
        layers: int = 2,
        heads: int = 4,
    ):
        super().__init__()
        if dim < 1 or layers < 1 or heads < 1 or dim % heads:
            raise ValueError(
                f"dim={dim}, layers={layers}, heads={heads}: at least 1 each, dim a multiple of heads"
            )
        self.width = width
        self.from_hidden = nn.Linear(hidden_size, dim)
        self.from_ids = nn.Linear(hidden_size, dim)
        self.position = nn.Parameter(torch.randn(width, dim) * 0.02)
        block = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            block, layers, norm=nn.RMSNorm(dim, eps=1e-6), enable_nested_tensor=False
        )
        self.out = nn.Linear(dim, hidden_size)

    def forward(self, inputs: TrunkInputs, choose: Choose) -> Predicted:
        hidden_BTC = inputs.run()
        B, T, C = hidden_BTC.shape
        before = torch.zeros_like(hidden_BTC)
        steps, features = [], []
        for column in range(self.width):
            steps.append(self._step(column, hidden_BTC, before).reshape(B * T, -1))
            feature_BTC = self._run(torch.stack(steps, 1))[:, -1].reshape(B, T, C)
            features.append(feature_BTC)
            before = before + inputs.embed(choose(column, feature_BTC))
        return Predicted(hidden_BTC, features)

    def teach(self, inputs: TrunkInputs, next_BTW: Tensor, where_BT: Tensor) -> Predicted:
        """All columns in one causal pass, and only at positions followed by picture ids."""
        hidden_BTC = inputs.run()
        hidden_NC, next_NW = hidden_BTC[where_BT], next_BTW[where_BT]
        rows_NWC = inputs.embed(next_NW)
        before_NWC = rows_NWC.cumsum(1) - rows_NWC
        steps = [self._step(column, hidden_NC, before_NWC[:, column]) for column in range(self.width)]
        return Predicted(hidden_BTC, list(self._run(torch.stack(steps, 1)).unbind(1)))

    def _step(self, column: int, hidden: Tensor, before: Tensor) -> Tensor:
        given = self.from_hidden(hidden) if column == 0 else self.from_ids(before)
        return given + self.position[column]

    def _run(self, steps_NDC: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(steps_NDC.shape[1], device=steps_NDC.device)
        return self.out(self.blocks(steps_NDC, mask=mask, is_causal=True))
