"""Fused layers compute what transformers' own do."""

import pytest
import torch
from tiny import make_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lm import fused
from lm.decoding import Sampling, draw_images
from lm.packed import packed, weights_of
from lm.sequence import Text

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
}
FAMILIES = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}


def make_lm(name, dtype=torch.float64, **more):
    """A tiny model whose norms and biases are not at their first values."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split(",")[0], **SIZES, **FAMILIES.get(name, {}), **more)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return lm.to(dtype)


@torch.no_grad()
def logits(lm):
    """(B,T,V) of a prompt with a cache, and of two passes after it."""
    ids_BT = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=lm.config)
    parts = [lm(input_ids=part, past_key_values=cache).logits for part in ids_BT.split([6, 1, 2], 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fused_layer_is_the_layer(name):
    lm = make_lm(name)
    for layer in lm.base_model.layers:
        layer.self_attn.scaling = 0.3  # some models do not divide by the root of the width
    expected = logits(lm)
    for layer in lm.base_model.layers:
        assert fused.suits(layer)
        layer.forward = fused.FusedLayer(layer, lambda weight, bias: lambda x: F.linear(x, weight, bias))
    found = logits(lm)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)  # transformers' norms are fp32 always
    assert not torch.equal(found, expected)  # they were used


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_in_bf16_it_is_as_near_to_the_truth_as_the_layer(name):
    truth, lm = logits(make_lm(name)), make_lm(name, torch.bfloat16)
    theirs = (logits(lm).double() - truth).square().mean()
    for layer in lm.base_model.layers:
        layer.forward = fused.FusedLayer(layer, packed)
    ours = (logits(lm).double() - truth).square().mean()
    assert ours < 1.5 * theirs


def test_other_layers_keep_their_own_forward():
    assert not any(fused.suits(layer) for layer in make_lm("gemma").base_model.layers)
    layer = make_lm("llama").base_model.layers[0]

    class Adapted(nn.Linear):
        """As `peft` puts in the place of a linear layer: more is computed than its weight says."""

    layer.mlp.up_proj = Adapted(32, 48)
    assert not fused.suits(layer)


def test_a_layer_of_that_name_from_elsewhere_keeps_its_own_forward():
    """As models that bring their own code do: what it computes is not known."""
    layer = make_lm("llama").base_model.layers[0]
    assert fused.suits(layer)
    layer.__class__ = type("LlamaDecoderLayer", (type(layer),), {"__module__": "modeling_of_somebody"})
    assert not fused.suits(layer)


@torch.no_grad()
def test_joined_layers_need_not_all_have_a_bias():
    layers = [nn.Linear(4, width, bias=width == 3) for width in (2, 3, 5)]
    x = torch.randn(6, 4)
    found = fused.joined(layers, lambda weight, bias: lambda x: F.linear(x, weight, bias))(x)
    torch.testing.assert_close(found, torch.cat([layer(x) for layer in layers], -1))


def test_a_model_draws_the_same_with_its_own_layers(monkeypatch):
    def drawn():
        model, _ = make_model("layered")
        prompts = [model.form.image_prompt([Text(text)]) for text in ((5, 6), (7,))]
        drawings = draw_images(model, prompts, Sampling(3.0, 0.7), [0, 1], ((),))
        return drawings, len(weights_of(model).parts)

    fast, parts = drawn()
    monkeypatch.setattr(fused, "FAMILY", ())
    slow, more_parts = drawn()
    assert fast == slow
    assert parts < more_parts or not parts  # where this CPU has no oneDNN nothing is packed
