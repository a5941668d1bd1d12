"""Embeddings, heads, losses and decoding of the language model, each against an independent computation."""

import pytest
import torch
from tiny import HEADS, QWEN, make_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lm.data import pack
from lm.decoding import Sampling, draw_images, draw_text
from lm.model import MultimodalLM, add_rows, from_scratch
from lm.objectives.next_token import NextToken, measure
from lm.sequence import Image, Text

LAYOUTS = ("stacked", "flat")


def image(form, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Image(torch.randint(0, 16, (*form.grid, form.vocabulary.depth), generator=generator))


def teach(model, document):
    batch = pack([document], model.form, 64)
    return batch, model.teach(batch.ids_BTW, batch.next_BTW, batch.mask, batch.positions_BT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", HEADS)
def test_a_feature_sees_only_what_comes_before_it(head, layout):
    """Changing code (t, d) leaves the features of (t, ≤ d) and of earlier positions, and changes later ones."""
    model, _ = make_model(head, layout)
    form = model.form
    before = image(form)
    changed = Image(before.codes_hwQ.clone())
    changed.codes_hwQ[1, 0, 0] = (changed.codes_hwQ[1, 0, 0] + 1) % 16  # cell 2 of 4, depth 0
    features = []
    for picture in (before, changed):
        _, made = teach(model, form.build([Text((5, 6)), picture]))
        stacked = torch.stack(made.features, 1).flatten(0, 1)  # in the order in which codes are predicted
        features.append(stacked)
    difference = (features[0] - features[1]).abs().amax(1)
    at = 2 * form.vocabulary.depth
    assert bool((difference[: at + 1] < 1e-6).all())
    assert difference[at + 2] > 1e-4  # the next cell, depth 0, whatever the head
    if head != "linear":
        assert difference[at + 1] > 1e-4  # the same cell, next depth


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", HEADS)
def test_greedy_drawing_with_cache_is_the_largest_logit_without(head, layout):
    """Drawn ids, fed back in one uncached pass, are the argmax everywhere; prompts of unequal length share a batch."""
    model, _ = make_model(head, layout)
    form = model.form
    texts = [Text((5, 6, 7)), Text((9,)), Text(tuple(range(40, 52)))]
    prompts = [form.image_prompt([text]) for text in texts]
    random = torch.Generator().manual_seed(0)
    drawn = draw_images(model, prompts, form.image_prompt([]), Sampling(temperature=0.0), random)
    assert not torch.equal(drawn[0].codes_hwQ, drawn[1].codes_hwQ)
    for text, picture in zip(texts, drawn, strict=True):
        _, made = teach(model, form.build([text, picture]))
        expected = picture.codes_hwQ.reshape(-1)
        flat = torch.stack(made.features, 1).flatten(0, 1)
        best = [int(model.image_logits(f, i % form.vocabulary.depth).argmax()) for i, f in enumerate(flat)]
        assert best == expected.tolist()


@pytest.mark.parametrize("head", HEADS)
def test_guided_drawing_is_the_formula_on_two_separate_passes(head):
    model, _ = make_model(head)
    form, scale = model.form, 3.0
    prompt, empty = [Text((5, 6, 7))], []
    random = torch.Generator().manual_seed(0)
    (drawn,) = draw_images(
        model, [form.image_prompt(prompt)], form.image_prompt(empty), Sampling(scale, 0.0), random
    )
    with_text = teach(model, form.build([*prompt, drawn]))[1].features
    without = teach(model, form.build([drawn]))[1].features
    for depth in range(2):
        c, u = (model.image_logits(f[depth], depth) for f in (with_text, without))
        assert (u + scale * (c - u)).argmax(1).tolist() == drawn.codes_hwQ[..., depth].reshape(-1).tolist()
    (plain,) = draw_images(
        model, [form.image_prompt(prompt)], form.image_prompt(empty), Sampling(1.0, 0.0), random
    )
    assert not torch.equal(plain.codes_hwQ, drawn.codes_hwQ)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("head", HEADS)
def test_every_draw_parses(head, temperature):
    model, _ = make_model(head)
    form = model.form
    sampling = Sampling(guidance=5.0, temperature=temperature, top_k=9, top_p=0.9)
    prompts = [form.image_prompt([Text(tuple(range(n + 1)))]) for n in range(20)]
    drawn = draw_images(model, prompts, form.image_prompt([]), sampling, torch.Generator().manual_seed(1))
    for picture in drawn:
        assert form.split(form.build([picture])) == [picture]


def test_greedy_text_is_the_plain_models_own_choice_among_legal_ids():
    model, _ = make_model("linear")
    form = model.form
    prompt = form.build([Text((5, 6, 7))], end=False)
    ((ids, _),) = draw_text(model, [prompt], Sampling(temperature=0.0), torch.Generator(), 6, images=False)
    written = prompt[:, 0].tolist()
    allowed = torch.ones(form.vocabulary.image_offset, dtype=torch.bool)
    v = form.vocabulary
    allowed[[v.bos, v.pad, v.image_start, v.image_end]] = False
    for token in ids:
        logits = model.lm(input_ids=torch.tensor([written])).logits[0, -1, : v.image_offset]
        assert int(logits.masked_fill(~allowed, -torch.inf).argmax()) == token
        written.append(token)


def test_text_of_rows_of_unequal_length_is_that_of_each_alone():
    model, _ = make_model()
    form = model.form
    prompts = [form.build([image(form), Text((5, 6, 7))], end=False), form.build([Text((9,))], end=False)]
    greedy = Sampling(temperature=0.0)
    together = draw_text(model, prompts, greedy, torch.Generator(), 5, images=True)
    alone = [draw_text(model, [p], greedy, torch.Generator(), 5, images=True)[0] for p in prompts]
    assert together == alone


def test_a_prompt_that_is_inside_an_image_is_refused():
    model, _ = make_model()
    form = model.form
    with pytest.raises(ValueError, match="image_start"):
        draw_images(model, [form.build([], end=False)], form.image_prompt([]), Sampling(), torch.Generator())
    with pytest.raises(ValueError, match="inside an image"):
        draw_text(model, [form.image_prompt([])], Sampling(), torch.Generator(), 3, images=True)


def test_the_loss_is_hand_written_cross_entropy_over_legal_ids():
    model, _ = make_model("linear")
    form, v = model.form, model.form.vocabulary
    picture = image(form)
    batch = pack([form.build([Text((5, 6)), picture])], form, 64)
    text, codes = measure(model, batch)

    rows = model.lm.get_input_embeddings().weight
    sequence = batch.ids_BTW[0]
    embedded = torch.stack([sum(rows[i] for i in row.tolist() if i >= 0) for row in sequence])
    hidden = model.lm.model(inputs_embeds=embedded[None]).last_hidden_state[0]
    logits = hidden @ model.lm.get_output_embeddings().weight.T

    legal = [i for i in range(v.image_offset) if i not in (v.bos, v.pad, v.image_end)]
    wanted = {0: 5, 1: 6, 2: v.image_start, len(sequence) - 2: v.eos}  # position → what follows
    expected = sum(
        F.cross_entropy(logits[t, legal][None], torch.tensor([legal.index(i)])) for t, i in wanted.items()
    )
    torch.testing.assert_close(text.nll, expected)
    assert text.count == 4

    cells = picture.codes_hwQ.reshape(-1, 2)
    expected = torch.zeros(())
    for cell in range(4):
        for depth in range(2):
            expected += F.cross_entropy(
                logits[3 + cell, v.image_range(depth)][None], cells[cell, depth][None]
            )
    torch.testing.assert_close(codes.nll, expected)
    assert codes.count == 8


def test_packed_documents_do_not_see_each_other():
    model, _ = make_model()
    form = model.form
    documents = [
        form.build([Text((5, 6)), image(form)]),
        form.build([image(form, 1), Text((7,))]),
        form.build([Text((9,))]),
    ]
    whole = pack(documents, form, 64)
    assert len(whole.ids_BTW) == 1
    parts = [measure(model, pack([d], form, 64)) for d in documents]
    text, codes = measure(model, whole)
    torch.testing.assert_close(text.nll, sum(t.nll for t, _ in parts), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(codes.nll, sum(c.nll for _, c in parts), atol=1e-3, rtol=1e-5)


def test_weights_and_names_of_the_losses():
    model, _ = make_model()
    batch = pack([model.form.build([Text((5,)), image(model.form)])], model.form, 64)
    text, codes = measure(model, batch)
    losses, bits = NextToken(text=0.5, image=2.0, z=0.1).losses(model, batch)
    torch.testing.assert_close(losses["text"], 0.5 * text.nll / text.count)
    torch.testing.assert_close(losses["image"], 2.0 * codes.nll / codes.count)
    torch.testing.assert_close(losses["z"], 0.1 * (text.z / text.count + codes.z / codes.count))
    assert bits["image_bits"] == pytest.approx(float(codes.nll.detach()) / codes.count / 0.6931472, rel=1e-5)
    assert set(NextToken(text=0.0, z=0.0).losses(model, batch)[0]) == {"image"}


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_added_rows_leave_old_logits_exactly_as_they_were(family):
    configs = {
        "llama": LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50
        ),
        "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50),
    }
    torch.manual_seed(0)
    lm = from_scratch(QWEN, 50, 0) if family == "qwen3" else AutoModelForCausalLM.from_config(configs[family])
    lm.eval()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before, kept = lm(input_ids=ids).logits, lm.get_input_embeddings().weight[:50].clone()
    add_rows(lm, 50, 82, seed=0)
    after = lm(input_ids=ids).logits
    assert after.shape[-1] == 82
    # the rows to the bit; their logits up to the order in which a wider matrix product sums
    assert torch.equal(lm.get_input_embeddings().weight[:50], kept)
    torch.testing.assert_close(after[..., :50], before, atol=1e-6, rtol=0)
    rows = lm.get_input_embeddings().weight[50:]
    old = lm.get_input_embeddings().weight[:50]
    assert 0.5 < float(rows.std(0).mean() / old.std(0).mean()) < 2  # transformers' default: nearly equal rows
    assert len(rows.unique(dim=0)) == 32


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("head", HEADS)
def test_heads_work_on_other_architectures(family, head):
    from tiny import make_format, make_head

    form, _ = make_format()
    size = form.vocabulary.size
    configs = {
        "llama": LlamaConfig(
            hidden_size=32, num_hidden_layers=5, num_attention_heads=2, intermediate_size=64, vocab_size=size
        ),
        "gpt2": GPT2Config(n_embd=32, n_layer=5, n_head=2, vocab_size=size, initializer_range=0.2),
    }
    lm = AutoModelForCausalLM.from_config(configs[family])
    model = MultimodalLM(lm, make_head(head, form.width), form).eval()
    prompts = [form.image_prompt([Text((5, 6))]), form.image_prompt([Text((9,))])]
    drawn = draw_images(model, prompts, form.image_prompt([]), Sampling(2.0, 0.0), torch.Generator())
    assert [d.codes_hwQ.shape for d in drawn] == [(2, 2, 2)] * 2


def test_a_head_or_model_of_another_size_is_refused():
    from tiny import make_format, make_head

    form, _ = make_format()
    with pytest.raises(ValueError, match="rows"):
        MultimodalLM(from_scratch(QWEN, 10, 0), make_head("linear", 2), form)
    with pytest.raises(ValueError, match="per position"):
        MultimodalLM(from_scratch(QWEN, form.vocabulary.size, 0), make_head("linear", 1), form)
    with pytest.raises(ValueError, match="ascending"):
        make_head("layered", 7, trunk_layers=3)
