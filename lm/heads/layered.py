"""Prediction between the trunk's layers (DnD-Transformer, Chen et al. 2024, arXiv 2410.01912).

After layer `layers[d]` column d is predicted from the hidden state, and the embedding of the id that follows is added
to it, so that the layers above refine what comes after. One pass of the trunk for all Q codes of a cell. The peer's
published text-to-image branch slices the wrong axis; here columns and positions are named apart.

The peer adds the embedding as it is, to trunks that learn from nothing. In a pretrained one it is not heard: between
SmolLM2's upper layers the hidden state is a hundred times as long as an embedding. Here it is made as long first.

Legend: B rows, T positions, C hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm.heads import Choose, Head, Predicted, TrunkInputs, between_layers
from vqlm.checkpoint import declared

GAIN = 0.5
SCALE = (
    3.0  # of a column's feature at first: short new rows on features of length 1 can never be sure of a code
)


@declared
class LayeredHead(Head):
    """layers: for each column but the last, the index of the trunk layer after which it is predicted, ascending.

    The last column is predicted from the final hidden state. Each earlier one has a norm of its own. By default the
    columns are spread over the upper half of the trunk's `trunk_layers`, as in the paper. The weights of its norm begin
    at `SCALE`; those of a pretrained trunk's last norm are of that size. `gains`: how long an added embedding is,
    relative to the hidden state; learned, from `GAIN` on.
    """

    def __init__(self, width: int, hidden_size: int, trunk_layers: int, layers: list[int] | None = None):
        super().__init__()
        if layers is None:
            if trunk_layers < width:
                raise ValueError(
                    f"{width} codes a cell are predicted after as many layers, the trunk has {trunk_layers}: a deeper "
                    "trunk, a tokenizer with fewer codes, or head=depth_transformer"
                )
            step = max(1, trunk_layers // (2 * width))
            layers = [trunk_layers - 1 - step * (width - 1 - column) for column in range(width - 1)]
        if len(layers) != width - 1:
            raise ValueError(
                f"layers={layers}: {width} columns need {width - 1} layers (the last is read off the end)"
            )
        if sorted(set(layers)) != list(layers) or any(not 0 <= i < trunk_layers - 1 for i in layers):
            raise ValueError(
                f"layers={layers}: must be ascending, from 0 to below {trunk_layers - 1} (the last layer)"
            )
        self.width, self.layers = width, list(layers)
        norms = [nn.RMSNorm(hidden_size, eps=1e-6) for _ in layers]
        for norm in norms:
            nn.init.constant_(norm.weight, SCALE)
        self.norms = nn.ModuleList(norms)
        self.gains = nn.ParameterList(torch.full((1,), GAIN) for _ in layers)

    def forward(self, inputs: TrunkInputs, choose: Choose) -> Predicted:
        features: list[Tensor] = []

        def predict_and_add(column: int, hidden_BTC: Tensor) -> Tensor:
            features.append(self.norms[column](hidden_BTC))
            row_BTC = F.rms_norm(inputs.embed(choose(column, features[-1])), hidden_BTC.shape[-1:])
            size_BT1 = hidden_BTC.detach().float().square().mean(-1, keepdim=True).sqrt()
            return hidden_BTC + (self.gains[column] * size_BT1 * row_BTC).to(hidden_BTC.dtype)

        changes = {
            layer: lambda hidden, column=column: predict_and_add(column, hidden)
            for column, layer in enumerate(self.layers)
        }
        with between_layers(inputs.layers, changes):
            hidden_BTC = inputs.run()
        choose(self.width - 1, hidden_BTC)
        return Predicted(hidden_BTC, [*features, hidden_BTC])
