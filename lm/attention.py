"""Attention over stored keys and values on a CPU: in fp32, whatever the model's own numbers are.

torch's attention on CPUs packs bf16 keys and values into blocks before it multiplies them. For one query a row that
takes three to five times as long as reading fp32 ones does (B = 16 rows, 12 heads, 170 positions, one thread: 3.8
against 1.5 ms), and was half of a step of eight pictures. It knows nothing of rows, ids or what is decoded.

Legend: B rows, H heads, T new positions, S stored ones, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "vqlm_stored"
STORED = torch.float32
NARROWER = (torch.float32, torch.bfloat16, torch.float16)  # or as wide


def suits(lm: PreTrainedModel) -> bool:
    """Whether a model's attention can be exchanged for this one: it is on a CPU, and would call torch's own."""
    # another thread may be decoding with the same model right now
    own = lm.config._attn_implementation in ("sdpa", NAME) and getattr(
        lm, "_supports_attention_backend", False
    )
    weight = next(lm.parameters())
    return bool(own) and weight.device.type == "cpu" and weight.dtype in NARROWER


@contextmanager
def used(lm: PreTrainedModel) -> Iterator[None]:
    """For the length of the block the model attends this way; its cache must hold keys and values as `STORED`."""
    before = lm.config._attn_implementation
    lm.config._attn_implementation = NAME
    try:
        yield
    finally:
        lm.config._attn_implementation = before


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: query (B,H,T,D), key and value (B,·,S,D), mask (B,1,T,S), True where one may look."""
    found = sdpa_attention_forward(module, query.to(key.dtype), key, value, attention_mask, **others)[0]
    return found.to(query.dtype), None


AttentionInterface.register(NAME, attend)
