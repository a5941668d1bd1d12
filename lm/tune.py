"""How a model's weights are trained: all of them, low-rank additions to the trunk, or the new rows alone.

What is trained is said once, before the optimizer is made (`prepare`), and the model is made plain again before it
is saved (`finish`), so that a bundle does not show how it was trained. It does not know losses, batches or the loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from lm.model import MultimodalLM
from vqlm.errors import ConfigError


class Tune:
    """Which weights move. `prepare`, training, `finish`, in this order; `undecayed` belongs to the optimizer."""

    def prepare(self, model: MultimodalLM, first_new_row: int) -> None:
        """Freeze what stays. Rows below `first_new_row` are those that came with the model.

        Called before a checkpoint is loaded: names and shapes of the state are those of the prepared model.
        """
        raise NotImplementedError

    def finish(self, model: MultimodalLM) -> None:
        """Make a trained model, or a copy of it, plain: the modules and names that it had before `prepare`."""


class Full(Tune):
    """Every weight moves."""

    def prepare(self, model: MultimodalLM, first_new_row: int) -> None:
        model.requires_grad_(True)


class NewRowsOnly(Tune):
    """The trunk stays; the rows of new ids and the head's own modules move (Anole, arXiv 2407.06135, §3)."""

    def prepare(self, model: MultimodalLM, first_new_row: int) -> None:
        model.requires_grad_(False)
        train_new_rows(model, first_new_row)


class LoRA(Tune):
    """The trunk's matrices W gain a product of rank r, W + alpha/r · B·A; new rows and the head's modules move too.

    Hu et al. 2021, arXiv 2106.09685, as peft has it; merged into W in the end.
    rank, alpha: r and alpha. dropout: on what A reads. targets: names of the trunk's linear layers (such as q_proj);
    null: all of them.
    """

    def __init__(
        self, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0, targets: list[str] | None = None
    ):
        if rank < 1 or alpha <= 0 or not 0 <= dropout < 1 or targets == []:
            raise ValueError(
                f"rank={rank} must be at least 1, alpha={alpha} positive, dropout={dropout} in [0, 1), "
                f"targets={targets} null or names of layers"
            )
        if find_spec("peft") is None:
            raise ConfigError("tune=lora needs the package peft: pip install 'vqlm[lora]'")
        self.rank, self.alpha, self.dropout, self.targets = rank, alpha, dropout, targets

    def prepare(self, model: MultimodalLM, first_new_row: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        trunk: Any = model.lm.base_model
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  a number
            lora_dropout=self.dropout,
            target_modules=self.targets or "all-linear",
        )
        try:
            with warnings.catch_warnings():
                # of ranks that peft itself writes for the joined matrices of experts, and then does not find
                warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not")
                inject_adapter_in_model(config, trunk)
        except ValueError as error:
            names = {name.rpartition(".")[2] for name, m in trunk.named_modules() if is_linear(m)}
            raise ConfigError(
                f"tune.targets={self.targets}: the trunk's linear layers are called {sorted(names)}"
            ) from error
        model.requires_grad_(False)
        for name, parameter in trunk.named_parameters():
            parameter.requires_grad_("lora_" in name)
        train_new_rows(model, first_new_row)

    def finish(self, model: MultimodalLM) -> None:
        from peft.tuners.lora import LoraLayer

        trunk: Any = model.lm.base_model
        for name, layer in reversed(
            list(trunk.named_modules())
        ):  # experts are wrapped once for each parameter
            if isinstance(layer, LoraLayer):
                layer.merge(safe_merge=True)
                holder, _, own = name.rpartition(".")
                setattr(trunk.get_submodule(holder), own, layer.get_base_layer())
        if hasattr(trunk, "peft_config"):
            del trunk.peft_config


def train_new_rows(model: MultimodalLM, first_new_row: int) -> None:
    """Let the head's modules move, and of the input and output rows those from `first_new_row` on.

    A row that stays gets a gradient of exactly 0, so an optimizer with momentum from 0 leaves it to the bit, unless
    it decays weights: see `undecayed`.
    """
    model.head.requires_grad_(True)
    model.held_rows = first_new_row
    for weight in row_parameters(model):
        weight.requires_grad_(True)
        weight.register_post_accumulate_grad_hook(hold(first_new_row))


def hold(rows: int) -> Callable[[Tensor], None]:
    """A hook that clears the gradients of the first rows of a parameter."""

    def clear(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad[:rows] = 0

    return clear


def row_parameters(model: MultimodalLM) -> list[nn.Parameter]:
    """Input rows, output rows and their bias: one entry where they are tied, none where there is no bias."""
    given, output = model.lm.get_input_embeddings(), model.lm.get_output_embeddings()
    found = [getattr(given, "weight", None), getattr(output, "weight", None), getattr(output, "bias", None)]
    return list({id(p): p for p in found if isinstance(p, nn.Parameter)}.values())


def undecayed(model: MultimodalLM) -> list[nn.Parameter]:
    """Parameters that an optimizer must not decay: decay would shrink their held rows, whatever the gradient."""
    return row_parameters(model) if model.held_rows else []


def is_linear(module: nn.Module) -> bool:
    """A linear layer; GPT-2's are called Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
