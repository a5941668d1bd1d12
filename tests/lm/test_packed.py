"""Packed weights: the same numbers, and no stale ones."""

import gc
import weakref
from copy import deepcopy

import pytest
import torch
from tiny import make_model
from torch import nn

from lm.decoding import Sampling, draw_images
from lm.packed import packed, weights_of
from lm.sequence import Text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_a_packed_product_is_the_product(dtype, rows):
    torch.manual_seed(0)
    for bias in (False, True):
        layer = nn.Linear(48, 80, bias=bias).to(dtype)
        x = torch.randn(rows, 3, 48, dtype=dtype)
        torch.testing.assert_close(packed(layer.weight, layer.bias)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["layered", "depth_transformer"])
def test_drawing_reads_the_weights_as_they_are_now(head, dtype):
    """A model that has drawn and then changes draws as one that is made with the changed weights."""
    model, _ = make_model(head)
    model.to(dtype)
    prompt = model.form.image_prompt([Text((5, 6))])

    def drawn(model):
        return draw_images(model, [prompt], Sampling(2.0, 0.0), [0])[0]

    before = drawn(model)
    other, _ = make_model(head, seed=3)
    other.to(dtype)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    assert drawn(model) == drawn(other) and drawn(model) != before


def test_a_model_that_becomes_narrower_is_packed_anew():
    model, _ = make_model()
    prompts = [model.form.image_prompt([Text((5, 6))])]
    fresh = deepcopy(model).to(torch.bfloat16)
    draw_images(model, prompts, Sampling(2.0, 0.0), [0])
    model.to(torch.bfloat16)
    again = draw_images(model, prompts, Sampling(2.0, 0.0), [0])
    assert again == draw_images(fresh, prompts, Sampling(2.0, 0.0), [0])


def test_layers_are_their_own_again_and_nothing_is_kept_alive():
    model, _ = make_model()
    weights = weights_of(model)
    if not weights.pays:
        pytest.skip("this CPU has no oneDNN for fp32")
    assert weights_of(model) is weights and len(weights.parts) >= 5
    with weights.used():
        assert all("forward" in vars(layer) for layer in weights.parts)
    assert not any("forward" in vars(layer) for layer in weights.parts)
    assert len(model.state_dict()) == len(make_model()[0].state_dict())
    gone = weakref.ref(model)
    del model, weights
    gc.collect()
    assert gone() is None
