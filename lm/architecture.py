"""What differs between causal language models, and whether ours computes what the model itself computes.

The trunk is run on summed rows with a block mask and position numbers of our own, and scores are made from slices of
the output matrix. That holds for an architecture whose logits are `finish(trunk(rows) · output rowsᵀ)`, with a
finish that works on each number alone. `check_logits` runs both ways and refuses what differs. It does not know
vocabularies, strings or pictures.

Legend: B rows, T positions, C hidden width, V rows of the output matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lm import attention
from vqlm.errors import ConfigError

MARKS = 4  # <bos>, two marks of a picture, <eos>
Forward = Callable[..., Any]
TOLERANCE = 2e-3  # of the largest logit: packed rows sum in another order; what is wrong is off by far more


@dataclass(frozen=True)
class Finish:
    """What an architecture does to its scores after the output rows, number by number; None: nothing of that kind.

    In the order of operations of the models' own code in transformers, so that results are equal to the bit.
    """

    factor: float | None = None
    divisor: float | None = None
    cap: float | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        if self.factor is not None:
            scores = scores * self.factor
        if self.divisor is not None:
            scores = scores / self.divisor
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap


def final_logits(config: Any) -> Finish:
    """The finish of an architecture, by what its configuration holds.

    Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`, Granite divides by `logits_scaling`,
    Gemma 2 and its kin squash: c·tanh(x / c) with c = `final_logit_softcapping`.
    """
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    divisor = getattr(config, "logits_scaling", None)
    return Finish(factor, divisor, getattr(config, "final_logit_softcapping", None))


@contextmanager
def exchanged(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """For the length of the block, each of these modules has another `forward`.

    What stands around a module stays as it is: its own hooks, such as a head's between layers.
    """
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)  # the class's own shows again
            if forward is not None:
                module.forward = forward


def attention_mask(config: Any, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (True: may look) as the model's attention reads it.

    PyTorch's own attention takes it so. Attention that is written out adds the mask to its scores: a bool would add 1
    where a position may look and 0 where not, without an error (Gemma 2, GPT-OSS and their kin run that way).
    """
    if config._attn_implementation == "sdpa":
        return mask
    if config._attn_implementation == attention.NAME:
        dtype = attention.STORED  # or torch would make it so, in every layer
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def decoder_layers(trunk: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a transformers trunk.

    `layers` in Llama-like ones, `h` in GPT-2-like ones, `decoder.layers` in OPT. ValueError where there is none.
    """
    for holder, name in ((trunk, "layers"), (trunk, "h"), (getattr(trunk, "decoder", None), "layers")):
        layers = getattr(holder, name, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise ValueError(f"{type(trunk).__name__} has no list of decoder layers named 'layers' or 'h'")


def check_logits(lm: PreTrainedModel) -> None:
    """Refuse a model for which our way of computing logits is not its own.

    Two short random texts are packed into one row, with a block mask, as in training; each must get the logits that
    the model itself gives when it reads it alone. That fails where something stands between trunk and output rows,
    where the finish is unknown, and where the mask does not keep texts apart (recurrent layers, positions that are
    counted along the row).

    Raises:
        ConfigError: names the architecture and what differs.
    """
    name = type(lm).__name__
    if getattr(lm.config, "is_encoder_decoder", False) or lm.get_output_embeddings() is None:
        raise ConfigError(f"{name}: a causal language model is needed, with output rows that score ids")
    if not isinstance(getattr(lm.config, "hidden_size", None), int):
        raise ConfigError(f"{name}: its configuration has no hidden_size; give the text model of it alone")
    training = lm.training
    lm.eval()
    try:
        logits = None if _looks_ahead(lm) else _both_ways(lm)
    except Exception as error:  # each architecture has its own way to refuse inputs
        raise ConfigError(f"{name} cannot be run on rows with a block mask: {error}") from error
    finally:
        lm.train(training)
    if logits is None:
        raise ConfigError(f"{name} looks ahead: what follows a position changes its logits. It is not causal")
    theirs, ours = logits
    difference = float((theirs - ours).abs().max()) / max(1e-3, float(theirs.abs().max()))
    if not difference < TOLERANCE:
        raise ConfigError(
            f"{name}: two texts packed into one row get other logits (by {difference:.2g} of the largest) than the "
            "model gives to each alone: it scores ids in a way that is not known here, or its layers do not "
            "follow a mask. Another architecture is needed"
        )


@torch.no_grad()
def _looks_ahead(lm: PreTrainedModel) -> bool:
    """Whether the last id of a text changes the logits before it."""
    ids_BT = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1]], device=lm.device)
    first, second = lm(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return float((first - second).abs().max()) > TOLERANCE * max(1e-3, float(first.abs().max()))


@torch.no_grad()
def _both_ways(lm: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits (T,V) of two texts: read alone by the model, and packed by us."""
    device = lm.device
    decoder_layers(lm.base_model)
    rows = lm.get_input_embeddings()
    output: Any = lm.get_output_embeddings()
    random = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(0, min(1000, output.weight.shape[0]), (1, n), generator=random).to(device)
        for n in (5, 7)
    ]
    theirs = torch.cat([lm(input_ids=text, use_cache=False).logits[0] for text in texts])
    document_T = torch.repeat_interleave(torch.arange(2), torch.tensor([5, 7])).to(device)
    mask_TT = (document_T[:, None] == document_T) & torch.ones(12, 12, dtype=torch.bool, device=device).tril()
    embedded_BTC = rows(torch.cat(texts, 1))
    hidden_BTC = lm.base_model(
        inputs_embeds=embedded_BTC,
        attention_mask=attention_mask(lm.config, mask_TT[None, None], embedded_BTC.dtype),
        position_ids=torch.cat([torch.arange(5), torch.arange(7)])[None].to(device),
        use_cache=False,
    ).last_hidden_state
    bias = getattr(output, "bias", None)
    return theirs.float(), final_logits(lm.config)(F.linear(hidden_BTC[0], output.weight, bias)).float()


def check_context(config: Any, picture_length: int, longest_document: int | None = None) -> None:
    """Refuse documents that the model's positions cannot hold.

    Args:
        config: of the language model.
        picture_length: positions of the longest picture, marks not counted.
        longest_document: positions of the longest document, where it is known.

    Positions are counted from 0 in each document, so it is documents that must fit, not packed rows. Layers with a
    sliding window see the whole document through our mask, which is what they were trained on only within a window.

    Raises:
        ConfigError: with the numbers.
    """
    picture = picture_length + MARKS
    needed = max(picture, longest_document or 0)
    what = "one picture alone takes" if needed == picture else "the longest document takes"
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and needed > positions:
        raise ConfigError(
            f"{what} {needed} positions, the language model has {positions} (max_position_embeddings): "
            "use a layout with fewer positions a picture, a smaller grid, shorter texts or another model"
        )
    window = sliding_window(config)
    if window is not None and needed > window:
        raise ConfigError(
            f"{what} {needed} positions, layers of the language model see {window} (sliding_window): "
            "use a layout with fewer positions a picture, a smaller grid, shorter texts or another model"
        )


def sliding_window(config: Any) -> int | None:
    """Positions that layers with a sliding window see, or None if no layer has one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    return window if kinds is None or "sliding_attention" in kinds else None
