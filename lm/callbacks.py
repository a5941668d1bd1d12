"""What watches the training of a multimodal model: the loss of held-out plain text, from the base model on.

Text fades when a model learns pictures, and no loss of pictures shows it. It changes nothing in what it watches.
Knows nothing of where texts come from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from lm.learner import LMLearner
from lm.metrics import PlainText, measured, retention, spread
from lm.pipeline import Pipeline
from vqlm.files import write_text
from vqlm.ranks import rank
from vqlm.training import read_log

LOG = "retention.jsonl"


class Retention(L.Callback):
    """Measures held-out texts before training, every so many batches and at the end; writes `out`/retention.jsonl.

    every: batches between two measurements; 0: before and after training only. texts: how many, spread evenly over
    the held-out ones, always the same. context: positions of a window (`lm.metrics.text_loss`); shortened to what the
    model has.

    Without held-out texts it measures nothing. What was measured before training is read back when a run goes on.
    Every rank measures all of it (a sharded model needs all of them), the first one writes.
    """

    def __init__(self, every: int = 500, texts: int = 500, context: int = 1024):
        for name, value, least in (("every", every, 0), ("texts", texts, 1), ("context", context, 2)):
            if value < least:
                raise ValueError(f"{name}={value}: at least {least}")
        self.every, self.count, self.context = every, texts, context
        self.text: PlainText | None = None
        self.out = Path()
        self.entries: list[dict[str, Any]] = []

    def look_at(self, pipeline: Pipeline, texts: Sequence[str], out: str | Path) -> None:
        """Before training: measure the model as it came. texts: held out; [] measures nothing.

        ValueError where no text has two tokens.
        """
        if not texts:
            return
        self.out = Path(out)
        self.text = PlainText.of(pipeline, [texts[i] for i in spread(len(texts), self.count)])
        self.entries = read_log(self._log) if self._log.is_file() else []
        found = self.entries[0] if self.entries else {}
        if (found.get("batch"), found.get("digest")) != (0, self.text.digest):
            self.entries = [self._measured(pipeline.model.lm, 0)]
            self._write()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LMLearner)
        self.entries = [entry for entry in self.entries if entry["batch"] <= pl_module.batches_seen]
        if self.text is not None:
            self._write()  # without entries of batches that will be trained again

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, LMLearner)
        if (
            self.text is None
            or not self.every
            or pl_module.batches_seen % self.every
            or pl_module.progress >= 1
        ):
            return
        model: Any = pl_module.result
        batch = pl_module.batches_seen
        self.entries.append(pl_module.measured(lambda: self._measured(model.lm, batch)))
        self._write()

    def conclude(self, pipeline: Pipeline, batches: int) -> dict[str, Any]:
        """After training: {before, after, ratio} of the text loss, or {} where nothing is measured."""
        if self.text is None:
            return {}
        kept = [entry for entry in self.entries if entry["batch"] < batches]
        self.entries = [*kept, self._measured(pipeline.model.lm, batches)]
        self._write()
        before, after = (
            {k: v for k, v in e.items() if k != "batch"} for e in (self.entries[0], self.entries[-1])
        )
        return retention(before, after)

    def _measured(self, lm: nn.Module, batch: int) -> dict[str, Any]:
        assert self.text is not None
        return {"batch": batch, **measured(lm, self.text, self.context)}

    @property
    def _log(self) -> Path:
        return self.out / LOG

    def _write(self) -> None:
        if rank() == 0:
            write_text(self._log, "".join(json.dumps(entry) + "\n" for entry in self.entries))
