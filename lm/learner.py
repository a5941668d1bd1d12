"""The one LightningModule of lm: a multimodal language model in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lm.data import Batch
from lm.model import MultimodalLM
from lm.objectives.next_token import NextToken
from vqlm.training import Budget, Learner


class LMLearner(Learner):
    """objective: how a batch becomes losses; others as in `vqlm.training.Learner`. Vectors are not decayed."""

    model: MultimodalLM

    def __init__(
        self,
        model: MultimodalLM,
        objective: NextToken,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
        budget: Budget,
        clip: float = 1.0,
        max_bad_batches: int = 10,
    ):
        super().__init__(model, optimizer, budget, clip, max_bad_batches)
        self.objective = objective

    def parameter_groups(self) -> Iterable[Any]:
        parameters = list(self.model.parameters())
        return [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        return self.objective.losses(self.model, batch)
