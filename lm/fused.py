"""Decoder layers of Llama's family in fewer and larger steps, for decoding on a CPU.

Beside the weights a step of decoding reads little, so the number of operations counts: transformers makes seven
products and some sixty small operations of a layer. Here queries, keys and values are one product, gate and up another,
a norm is one operation. Same numbers up to rounding. Knows one layer: nothing of rows, ids or heads.

Legend: B rows, T new positions, C hidden width, H heads of queries, G of keys, N all of them, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lm import attention

FAMILY = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
Step = Callable[[Tensor], Tensor]
Pack = Callable[[Tensor, Tensor | None], Step]  # weight (N,C) and bias (N) → x (…,C) → (…,N)


def suits(module: nn.Module) -> bool:
    """Whether a module is a layer of transformers that computes what `FusedLayer` does, by plain products."""
    kind = type(module)
    known = kind.__name__ in FAMILY and kind.__module__.startswith("transformers.models.")
    return known and all(type(part) is nn.Linear for part in module.modules() if hasattr(part, "in_features"))


class FusedLayer:
    """Stands in for a layer's `forward`, with its weights as they are now. pack: how its products are made."""

    def __init__(self, layer: Any, pack: Pack):
        own, mlp = layer.self_attn, layer.mlp
        self.attention, self.activate, self.width = own, mlp.act_fn, own.head_dim
        self.before, self.between = rms_norm(layer.input_layernorm), rms_norm(layer.post_attention_layernorm)
        self.each = [rms_norm(own.q_norm), rms_norm(own.k_norm)] if hasattr(own, "q_norm") else []  # Qwen3
        self.qkv = joined([own.q_proj, own.k_proj, own.v_proj], pack)
        self.out = joined([own.o_proj], pack)
        self.gate_up = joined([mlp.gate_proj, mlp.up_proj], pack)
        self.down = joined([mlp.down_proj], pack)
        H, G = (part.out_features // own.head_dim for part in (own.q_proj, own.k_proj))
        self.heads = [H, G, G]

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> Tensor:
        """hidden (B,T,C) → (B,T,C). Arguments as transformers names them."""
        x_BTC = hidden_states
        q, k, v = self._heads(self.qkv(self.before(x_BTC)), *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.attention.layer_idx)
        found, _ = attention.attend(self.attention, q, k, v, attention_mask, scaling=self.attention.scaling)
        x_BTC = x_BTC + self.out(found.flatten(2))
        gate, up = self.gate_up(self.between(x_BTC)).chunk(2, -1)
        return x_BTC + self.down(self.activate(gate) * up)

    def _heads(self, qkv: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> list[Tensor]:
        """Queries (B,H,T,D), keys and values (B,G,T,D) of one product (B,T,N·D)."""
        H, G, _ = self.heads
        heads_BNTD = qkv.view(*qkv.shape[:2], H + 2 * G, self.width).transpose(1, 2)
        turning, value = heads_BNTD[:, : H + G], heads_BNTD[:, H + G :]
        if self.each:
            parts = zip(self.each, turning.split([H, G], 1), strict=True)
            turning = torch.cat([normed(part) for normed, part in parts], 1)
        return [*rotated(turning, cos_BTD, sin_BTD).split([H, G], 1), value]


def joined(layers: list[nn.Linear], pack: Pack) -> Step:
    """One product for layers that read the same; a layer without a bias, beside one that has one, has zeros."""
    weights: list[Tensor] = [layer.weight for layer in layers]
    if all(layer.bias is None for layer in layers):
        return pack(torch.cat(weights), None)
    biases: list[Tensor | None] = [layer.bias for layer in layers]
    parts = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return pack(torch.cat(weights), torch.cat(parts))


def rms_norm(norm: Any) -> Step:
    """Zhang & Sennrich 2019 (arXiv 1910.07467), in one operation."""
    weight_C, epsilon = norm.weight, norm.variance_epsilon
    return lambda x: F.rms_norm(x, weight_C.shape, weight_C, epsilon)


def rotated(x_BNTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864); the halves of a head are pairs, as in transformers."""
    first, second = x_BNTD.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return torch.addcmul(x_BNTD * cos_BTD[:, None], turned, sin_BTD[:, None])
