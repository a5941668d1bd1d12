"""Packed weights: the same numbers, and no stale ones."""

import gc
import threading
import weakref
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from tiny import QWEN, make_format, make_head, make_model
from torch import nn

from lm import packed as module
from lm.decoding import Sampling, draw_images
from lm.fused import FusedLayer
from lm.model import MultimodalLM, from_scratch
from lm.packed import packed, weights_of
from lm.sequence import Text

SAMPLING = Sampling(2.0, 0.0)


def packed_of(model):
    weights = weights_of(model)
    if not weights.pays:
        pytest.skip("this CPU has no oneDNN for fp32")
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_a_packed_product_is_the_product(dtype, rows):
    torch.manual_seed(0)
    for bias in (False, True):
        layer = nn.Linear(48, 80, bias=bias).to(dtype)
        x = torch.randn(rows, 3, 48, dtype=dtype)
        torch.testing.assert_close(packed(layer.weight, layer.bias)(x), layer(x))


WRITES = {
    "in place": lambda mine, theirs: mine.copy_(theirs),
    "through .data": lambda mine, theirs: mine.data.copy_(theirs),
    "through numpy": lambda mine, theirs: (
        mine.detach().view(torch.uint8).numpy().__setitem__(..., theirs.detach().view(torch.uint8).numpy())
    ),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    ("head", "dtype"), [("layered", torch.float32), ("depth_transformer", torch.bfloat16)]
)
def test_drawing_reads_the_weights_as_they_are_now(head, dtype, write):
    """A model that has drawn and then changes draws as one that is made with the changed weights."""
    model, _ = make_model(head)
    model.to(dtype)
    prompt = model.form.image_prompt([Text((5, 6))])

    def drawn(model):
        return draw_images(model, [prompt], SAMPLING, [0])[0]

    before = drawn(model)
    other, _ = make_model(head, seed=3)
    other.to(dtype)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            WRITES[write](mine, theirs)
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
    weights = packed_of(model)
    assert weights_of(model) is weights and len(weights.parts) >= 5
    with weights.used():
        assert all("forward" in vars(layer) for layer in weights.parts)
    assert not any("forward" in vars(layer) for layer in weights.parts)
    assert len(model.state_dict()) == len(make_model()[0].state_dict())
    gone = weakref.ref(model)
    del model, weights
    gc.collect()
    assert gone() is None


def test_a_forward_that_a_layer_had_of_its_own_is_there_again():
    """As hooks of accelerate put one there; and the block may stand in itself."""
    weights = packed_of(make_model()[0])
    first, *others = weights.parts
    own = first.forward = lambda *given, **named: None
    with weights.used():
        assert first.forward is not own
        with weights.used():
            pass
        assert all(part.forward is forward for part, (_, forward) in weights.parts.items())
    assert first.forward is own and not any("forward" in vars(layer) for layer in others)


@pytest.mark.parametrize("what", ["to decode", "to look at the weights"])
def test_while_one_thread_decodes_another_waits(what):
    model, _ = make_model()
    weights, reached = packed_of(model), threading.Event()

    def wanted():
        with weights.used() if what == "to decode" else nullcontext(weights_of(model)):
            reached.set()

    other = threading.Thread(target=wanted, daemon=True)
    with weights.used():
        other.start()
        assert not reached.wait(0.2)
    assert reached.wait(10)


def test_layers_are_fused_only_where_attention_is_ours():
    model, _ = make_model()
    prompts = [model.form.image_prompt([Text((5, 6))])]

    def fused(weights):
        return sum(isinstance(forward, FusedLayer) for _, forward in weights.parts.values())

    assert fused(packed_of(model)) == 5
    drawn = draw_images(model, prompts, SAMPLING, [0])
    model.lm.config._attn_implementation = "eager"
    assert fused(packed_of(model)) == 0 and len(weights_of(model).parts) > 5
    assert draw_images(model, prompts, SAMPLING, [0]) == drawn


def test_a_model_above_the_largest_keeps_its_own_layout(monkeypatch):
    model, _ = make_model()
    prompts = [model.form.image_prompt([Text((5, 6))])]
    assert packed_of(model).parts
    drawn = draw_images(model, prompts, SAMPLING, [0])
    monkeypatch.setattr(module, "LARGEST", sum(p.nbytes for p in model.parameters()) - 1)
    weights = weights_of(model)
    assert not weights.pays and not weights.parts and not weights.rows
    assert draw_images(model, prompts, SAMPLING, [0]) == drawn


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("granite", {"logits_scaling": 7.0}),
        ("cohere", {}),
        ("phi", {"tie_word_embeddings": False}),  # its output rows have a bias
    ],
)
@torch.no_grad()
def test_packed_logits_are_finished_as_the_models_own(family, more):
    form, _ = make_format()
    lm = from_scratch(QWEN | {"model_type": family, "num_hidden_layers": 1} | more, form.vocabulary.size, 0)
    model = MultimodalLM(lm, make_head("linear", form.width), form).eval()
    hidden = 9 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    output = lm.get_output_embeddings()
    for _ in range(2):  # another bias, later, is seen, too
        if family == "phi":
            output.bias = nn.Parameter(output.bias + torch.linspace(-1, 1, len(output.bias)))
        weights = packed_of(model)
        torch.testing.assert_close(weights.text_logits(hidden), model.text_logits(hidden))
        for depth in range(form.vocabulary.depth):
            expected = model.image_logits(hidden, depth)
            torch.testing.assert_close(weights.image_logits(hidden, depth), expected)
    plain = hidden @ output.weight[: form.vocabulary.image_offset].T
    assert not torch.allclose(model.text_logits(hidden), plain, rtol=0.01)  # or nothing was tested
