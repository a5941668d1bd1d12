"""Prediction between the trunk's layers (DnD-Transformer, Chen et al. 2024, arXiv 2410.01912).

After layer `layers[d]` column d is predicted from the hidden state, and the embedding of the id that follows is added
to it, so that the layers above refine what comes after. One pass of the trunk for all Q codes of a cell. The peer's
published text-to-image branch slices the wrong axis; here columns and positions are named apart.
"""

from __future__ import annotations

from torch import Tensor, nn

from lm.heads import Choose, Head, Predicted, TrunkInputs, between_layers
from vqlm.checkpoint import declared


@declared
class LayeredHead(Head):
    """layers: for each column but the last, the index of the trunk layer after which it is predicted, ascending.

    The last column is predicted from the final hidden state. Each earlier one has a norm of its own. By default the
    columns are spread over the upper half of the trunk's `trunk_layers`, as in the paper.
    """

    def __init__(self, width: int, hidden_size: int, trunk_layers: int, layers: list[int] | None = None):
        super().__init__()
        if layers is None:
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
        self.norms = nn.ModuleList(nn.RMSNorm(hidden_size, eps=1e-6) for _ in layers)

    def forward(self, inputs: TrunkInputs, choose: Choose) -> Predicted:
        features: list[Tensor] = []

        def predict_and_add(column: int, hidden_BTC: Tensor) -> Tensor:
            features.append(self.norms[column](hidden_BTC))
            return hidden_BTC + inputs.embed(choose(column, features[-1])).to(hidden_BTC.dtype)

        changes = {
            layer: lambda hidden, column=column: predict_and_add(column, hidden)
            for column, layer in enumerate(self.layers)
        }
        with between_layers(inputs.layers, changes):
            hidden_BTC = inputs.run()
        choose(self.width - 1, hidden_BTC)
        return Predicted(hidden_BTC, [*features, hidden_BTC])
