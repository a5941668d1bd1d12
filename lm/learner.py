"""The one LightningModule of lm: a multimodal language model in training, and what its steps are made of.

Legend: B rows, T positions, W columns, C hidden width, V text ids and marks, K codes of a depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lm.architecture import Forward, decoder_layers, exchanged
from lm.heads import Head
from lm.heads.depth_transformer import DepthTransformerHead
from lm.model import MultimodalLM
from lm.objectives.full_vocabulary import FullVocabulary
from lm.objectives.next_token import NextToken
from lm.packing import Batch
from lm.tune import row_parameters, undecayed
from vqlm.errors import ConfigError
from vqlm.ranks import sum_over_ranks
from vqlm.shards import held
from vqlm.training import Budget, Learner


class LMLearner(Learner):
    """objective: how a batch becomes losses; recompute: decoder layers keep their inputs alone and run again in the
    backward pass: memory for one layer instead of all, a third more time (Chen et al. 2016, arXiv 1604.06174);
    compile_layers: decoder layers are made into fused kernels by `torch.compile`, which pays on a GPU; others as in
    `vqlm.training.Learner`.

    Weight decay spares vectors and what `lm.tune.undecayed` names; frozen parameters are in no group. Every step is
    logged with the norms of its gradients before clipping: text_rows and image_rows (of embedding and output, a bias
    included), trunk, head. `drift` says how the logits of each modality have grown.
    """

    model: MultimodalLM

    def __init__(
        self,
        model: MultimodalLM,
        objective: NextToken | FullVocabulary,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
        budget: Budget,
        clip: float = 1.0,
        max_bad_batches: int = 10,
        average: float | None = None,
        recompute: bool = False,
        compile_layers: bool = False,
    ):
        super().__init__(model, optimizer, budget, clip, max_bad_batches, average)
        self.objective, self.recompute, self.compiles = objective, recompute, compile_layers
        self.drift = Drift()
        self._found: dict[str, float] = {}
        self.work_has_flops = True

    def units(self, model: Any) -> Iterable[nn.Module]:
        return decoder_layers(model.lm.base_model)

    @cached_property
    def parts(self) -> dict[str, Callable[[], list[Tensor]]]:
        return parts(self.model)  # when they are asked for first: parameters may have been parted by then

    def parameter_groups(self) -> Iterable[Any]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        named = {id(p) for p in undecayed(self.model)}
        spared = [p for p in trained if p.ndim < 2 or id(p) in named]
        chosen = {id(p) for p in spared}
        return [
            {"params": [p for p in trained if id(p) not in chosen]},
            {"params": spared, "weight_decay": 0.0},
        ]

    @cached_property
    def _compiled(self) -> dict[nn.Module, Forward]:
        """Layer → its compiled `forward`. Made once; layers alike share their kernels. Not the whole model: hooks of
        heads and of sharding between layers would break the graph anyway, and one layer is compiled in seconds."""
        try:
            torch.compile(torch.sin)(torch.ones(2, device=self.device))
        except Exception as error:  # of whatever compiler is missing
            raise ConfigError(
                f"learner.compile_layers=true: torch.compile does not work here ({str(error).splitlines()[0]}). It "
                "needs a C++ compiler (CXX), on a GPU Triton; learner.compile_layers=false does without"
            ) from error
        layers = decoder_layers(self.model.lm.base_model)
        return {layer: torch.compile(layer.forward) for layer in layers}

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        layers = decoder_layers(self.model.lm.base_model)
        with ExitStack() as stack:
            if self.compiles:
                stack.enter_context(exchanged(self._compiled))
            if self.recompute:
                stack.enter_context(exchanged({layer: _again(layer.forward) for layer in layers}))
            found = self.objective.losses(self.model, batch)
        self._found = found[1]
        return found

    def after_step(self) -> dict[str, float]:
        self.drift.add(self._found, self.progress)
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        return self.drift.seen

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.drift.seen = {**self.drift.seen, **state}

    def gradients(self) -> dict[str, float]:
        if self.sharded and self.model.held_rows:  # hooks that hold them went with the whole parameters
            for rows in row_parameters(self.model):
                if rows.grad is not None:
                    held(rows.grad, 0, self.model.held_rows).zero_()
        norms = {f"grad_{name}": norm(part(), self.device) for name, part in self.parts.items()}
        if not norms:
            return {}
        values = torch.stack([*norms.values()])
        if self.sharded:  # of this rank's rows
            values = sum_over_ranks(values.square()).sqrt()
        return dict(zip(norms, values.tolist(), strict=True))  # waits for a GPU once

    def work(self, batch: Batch) -> dict[str, float]:
        """Ids read (padding is none), by modality; a picture position counts each of its codes."""
        ids_BTW = batch.ids_BTW[batch.document_BT >= 0]
        pictures = int(self.model.is_image(ids_BTW).sum())
        text = int((ids_BTW >= 0).sum()) - pictures
        return {
            "text_tokens": float(text),
            "image_tokens": float(pictures),
            "flops": model_flops(self.model, self.objective, batch),
        }


# --- logits that grow -----------------------------------------------------------------------------------------------

LATE = 0.9  # of a run: what comes after is its end


class Drift:
    """How log_z of each modality (`Weights.weigh`) went over a run, in a few numbers that a checkpoint keeps.

    The scales of two modalities that share a softmax grow against each other until training diverges; Chameleon
    (arXiv 2405.09818, §2.3) saw it in the norms of its outputs long before it showed in the loss.
    """

    def __init__(self) -> None:
        # by modality: log_z of the first step, the largest so far, the latest; sum and number of the run's last tenth
        self.seen = {f"drift_{name}": torch.zeros(5, dtype=torch.float64) for name in ("text", "image")}

    def add(self, logs: dict[str, float], progress: float) -> None:
        """logs: of a step. progress: share of the run done before it."""
        for name, kept in self.seen.items():
            log_z = logs.get(f"{name.removeprefix('drift_')}_log_z")
            if log_z is None:
                continue
            first, largest, _, total, count = kept.tolist()
            late = progress >= LATE
            new = [first or log_z, max(largest, log_z), log_z, total + late * log_z, count + late]
            self.seen[name] = torch.tensor(new, dtype=torch.float64)

    def report(self) -> dict[str, dict[str, float]]:
        """By modality that was seen: log_z, the mean of the run's last tenth; log_z_largest; log_z_growth, from the
        first step to the largest."""
        found = {}
        for name, kept in self.seen.items():
            first, largest, latest, total, count = kept.tolist()
            if latest:
                # of a run so short that no step lies in its last tenth, the last one
                last = total / count if count else latest
                numbers = {"log_z": last, "log_z_largest": largest, "log_z_growth": largest - first}
                found[name.removeprefix("drift_")] = numbers
        return found


# --- layers that run again -------------------------------------------------------------------------------------------


# A layer's hooks run once: those of `lm.heads.between_layers` are gone in the backward pass, which is why transformers'
# own gradient checkpointing will not do.
def _again(forward: Forward) -> Forward:
    def run(*arguments: Any, **named: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    return run


# --- gradients by part ----------------------------------------------------------------------------------------------


def parts(model: MultimodalLM) -> dict[str, Callable[[], list[Tensor]]]:
    """Name → the gradients of that part of the model, as they are when asked: this rank's rows of them."""
    first, size = model.form.vocabulary.image_offset, model.form.vocabulary.size
    rows = row_parameters(model)
    tables = {id(p) for p in rows}
    trunk = [p for p in model.lm.parameters() if p.requires_grad and id(p) not in tables]
    head = [p for p in model.head.parameters() if p.requires_grad]
    found: dict[str, Callable[[], list[Tensor]]] = {
        "text_rows": lambda: [held(p.grad, 0, first) for p in rows if p.grad is not None],
        "image_rows": lambda: [held(p.grad, first, size) for p in rows if p.grad is not None],
        "trunk": lambda: [held(p.grad) for p in trunk if p.grad is not None],
        "head": lambda: [held(p.grad) for p in head if p.grad is not None],
    }
    wanted = {"text_rows": rows, "image_rows": rows, "trunk": trunk, "head": head}
    return {name: gradients for name, gradients in found.items() if wanted[name]}


def norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Euclidean norm of all numbers together, 0 of none."""
    return nn.utils.get_total_norm(gradients, foreach=True) if gradients else torch.zeros((), device=device)


# --- operations -----------------------------------------------------------------------------------------------------


def model_flops(model: MultimodalLM, objective: NextToken | FullVocabulary, batch: Batch) -> float:
    """Floating-point operations that a step on this batch needs, forward and backward; nothing run twice counts twice.

    As Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, appendix B) count them: 6 for each weight of a layer and position
    (4 for a frozen one, whose gradient is not needed), and 12 · layers · attention width for each position that a
    position sees. Only positions of documents and pairs within one count, not padding. 6 for each number of the output
    rows that competes with a label.
    """
    vocabulary, config = model.form.vocabulary, model.lm.config
    positions = batch.positions_BT[batch.document_BT >= 0]
    layers = decoder_layers(model.lm.base_model)
    weights = sum(p.numel() * (6 if p.requires_grad else 4) for p in layers.parameters() if p.ndim > 1)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    pairs = float((positions + 1).sum())

    labelled_BTW = batch.next_BTW >= 0
    image_BTW = model.is_image(batch.next_BTW)
    codes, places = float(image_BTW.sum()), float(image_BTW.any(-1).sum())
    texts = float((labelled_BTW & ~image_BTW).sum())
    text_width, image_width = objective.competitors(vocabulary)
    rows = 6 * config.hidden_size * (texts * text_width + codes * image_width)
    return weights * len(positions) + 12 * len(layers) * width * pairs + rows + head_flops(model.head, places)


def head_flops(head: Head, places: float) -> float:
    """6 for each weight and use of it; the depth transformer uses all of them for each code of a position."""
    weights = sum(p.numel() for p in head.parameters() if p.ndim > 1)
    return 6 * weights * places * (head.width if isinstance(head, DepthTransformerHead) else 1)
