"""What differs between causal language models, and whether ours computes what the model itself computes.

The trunk is run on summed rows with a block mask and position numbers of our own, and scores are made from slices of
the output matrix. That holds for an architecture whose logits are `finish(trunk(rows) · output rowsᵀ)`, with a
finish that works on each number alone. `check_logits` runs both ways and refuses what differs. It does not know
vocabularies, strings or pictures.

Legend: B rows, T positions, C hidden width, V rows of the output matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lm import attention
from lm.cache import PADDING, RowCache
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
    the model itself gives when it reads it alone, and so must their last ids, read from a cache as in drawing. That
    fails where something stands between trunk and output rows, where the finish is unknown, where the mask does not
    keep texts apart (recurrent layers, positions that are counted along the row), and where layers keep more than
    keys and values.

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
        raise ConfigError(
            f"{name} cannot be run on rows with a block mask, or not from a cache: {error}"
        ) from error
    finally:
        lm.train(training)
    if logits is None:
        raise ConfigError(f"{name} looks ahead: what follows a position changes its logits. It is not causal")
    theirs, ours = logits
    difference = float((theirs - ours).abs().max()) / max(1e-3, float(theirs.abs().max()))
    if not difference < TOLERANCE:
        raise ConfigError(
            f"{name}: two texts packed into one row, or cached, get other logits (by {difference:.2g} of the largest) "
            "than the model gives to each alone: it scores ids in a way that is not known here, or its layers do not "
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
    """Logits of two texts: read alone by the model, and packed by us; then of their last ids, from a cache of ours."""
    device = lm.device
    layers = len(decoder_layers(lm.base_model))
    rows = lm.get_input_embeddings()
    output: Any = lm.get_output_embeddings()

    def read(ids_1T: Tensor, mask_TS: Tensor, position_T: Tensor, cache: RowCache | None) -> Tensor:
        embedded_BTC = rows(ids_1T)
        hidden_BTC = lm.base_model(
            inputs_embeds=embedded_BTC,
            attention_mask=attention_mask(lm.config, mask_TS[None, None].to(device), embedded_BTC.dtype),
            position_ids=position_T[None].to(device),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        scores_TV = F.linear(hidden_BTC[0], output.weight, getattr(output, "bias", None))
        return final_logits(lm.config)(scores_TV).float()

    random = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(0, min(1000, output.weight.shape[0]), (1, n), generator=random).to(device)
        for n in (5, 7)
    ]
    theirs = [lm(input_ids=text, use_cache=False).logits[0].float() for text in texts]
    document_T = torch.repeat_interleave(torch.arange(2), torch.tensor([5, 7]))
    mask_TT = (document_T[:, None] == document_T) & torch.ones(12, 12, dtype=torch.bool).tril()
    packed = read(torch.cat(texts, 1), mask_TT, torch.cat([torch.arange(5), torch.arange(7)]), None)
    cache, last = RowCache(layers), []
    cache.reserve(2, 7)
    for row, text in enumerate(texts):
        for position_T in torch.arange(text.shape[1]).tensor_split(
            [text.shape[1] - 1]
        ):  # all but the last; the last
            slots_T = position_T + 1
            limit = cache.enter(slice(row, row + 1), slots_T[None].to(device))
            mask_TS = torch.arange(limit) <= slots_T[:, None]
            mask_TS[:, PADDING] = False
            logits_TV = read(text[:, position_T.to(device)], mask_TS, position_T, cache)
        last.append(logits_TV[-1:])
    return torch.cat([*theirs, *(text[-1:] for text in theirs)]), torch.cat([packed, *last])


def check_context(config: Any, picture_length: int, longest_document: int | None = None) -> None:
    """Refuse documents that the model's positions cannot hold.

    Args:
        config: of the language model.
        picture_length: positions of the longest picture, marks not counted.
        longest_document: positions of the longest document, where it is known.

    Positions are counted from 0 in each document, so it is documents that must fit, not packed rows.

    Raises:
        ConfigError: with the numbers.
    """
    picture = picture_length + MARKS
    needed = max(picture, longest_document or 0)
    what = "one picture alone takes" if needed == picture else "the longest document takes"
    for name, positions in limits(config).items():
        if needed > positions:
            raise ConfigError(
                f"{what} {needed} positions, {LIMITS[name]} {positions} ({name}): "
                "use a layout with fewer positions a picture, a smaller grid, shorter texts or another model"
            )


def check_widths(lm: PreTrainedModel, head: nn.Module) -> None:
    """Refuse a head with modules of its own on a trunk whose rows are not as wide as its layers (OPT-350m)."""
    layers, rows = lm.config.hidden_size, lm.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr]
    if layers != rows and any(True for _ in head.parameters()):
        raise ConfigError(
            f"{type(lm).__name__}: its rows are {rows} wide and its layers {layers}, and {type(head).__name__} stands "
            "on both; head=linear works on it"
        )


LIMITS = {  # what a document must not be longer than: name in the configuration → what it says of the model
    "max_position_embeddings": "the language model has",
    "sliding_window": "layers of the language model see",  # in ours the whole document, which they never learnt
    "window_size": "layers of the language model see",  # GPT-Neo: cut by a slot of the cache, not by a position
    "keep_window_size": "layers of the language model look at no more than",  # Doge: the most likely ones
    # LongRoPE (arXiv 2402.13753) has two sets of frequencies. transformers chooses by the largest position of a batch:
    # a short document would be read otherwise beside a long one, and what is cached otherwise than what follows.
    "original_max_position_embeddings": "the language model turns positions in one way up to",
}


def limits(config: Any) -> dict[str, int]:
    """Those of `LIMITS` that a configuration has."""
    local = "local" in (getattr(config, "attention_layers", None) or ())
    found = {
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "sliding_window": sliding_window(config),
        "window_size": getattr(config, "window_size", None) if local else None,
        "keep_window_size": getattr(config, "keep_window_size", None),
        "original_max_position_embeddings": _longrope(config),
    }
    return {name: positions for name, positions in found.items() if positions is not None}


def most_positions(config: Any) -> int:
    """Positions that a document can have; without end where the configuration does not say."""
    return min(limits(config).values(), default=sys.maxsize)


def _longrope(config: Any) -> int | None:
    """Positions from which LongRoPE turns all of them in its other way, or None without it."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [
        rope,
        *(each for each in rope.values() if isinstance(each, Mapping)),
    ]  # one, or one for a kind of layers
    found = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    own = getattr(config, "original_max_position_embeddings", None)
    switches = [kind.get("original_max_position_embeddings", own) for kind in found]
    return min((each for each in switches if each is not None), default=None)


def sliding_window(config: Any) -> int | None:
    """Positions that layers with a sliding window see, or None if no layer has one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    return window if kinds is None or "sliding_attention" in kinds else None
