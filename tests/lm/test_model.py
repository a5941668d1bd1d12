"""Embeddings, heads, losses and decoding of the language model, each against an independent computation."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tiny import HEADS, QWEN, make_format, make_head, make_model
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, GPT2Config, LlamaConfig

from lm import attention
from lm.decoding import Decoder, Drawing, Sampling, draw_all, draw_images, draw_text
from lm.grammar import Grammar
from lm.heads import TrunkInputs
from lm.heads.layered import LayeredHead
from lm.model import MultimodalLM, from_scratch
from lm.objectives.next_token import NextToken, measure
from lm.packing import pack
from lm.rows import add_rows
from lm.sequence import NONE, Image, Text

LAYOUTS = ("stacked", "flat")
FORMS = {name: {"layout": name} for name in ("stacked", "flat", "delayed")}
FORMS["row ends"] = {"layout": "stacked", "row_ends": True}
FORMS["sizes"] = {"layout": "stacked", "row_ends": True, "more_grids": ((1, 3),)}
FORMS["delayed, sizes"] = {"layout": "delayed", "more_grids": ((1, 3),)}


def image(form, seed=0, grid=None):
    generator = torch.Generator().manual_seed(seed)
    return Image(torch.randint(0, 16, (*(grid or form.grids[0]), form.vocabulary.depth), generator=generator))


def teach(model, segments):
    batch = pack([model.form.lay(segments)], model.form, 64)
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
        _, made = teach(model, [Text((5, 6)), picture])
        stacked = torch.stack(made.features, 1).flatten(0, 1)  # in the order in which codes are predicted
        features.append(stacked)
    difference = (features[0] - features[1]).abs().amax(1)
    at = 2 * form.vocabulary.depth
    assert bool((difference[: at + 1] < 1e-6).all())
    assert difference[at + 2] > 1e-4  # the next cell, depth 0, whatever the head
    if head not in ("linear", "parallel") or layout == "flat":
        assert difference[at + 1] > 1e-4  # the same cell, next depth


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("head", HEADS)
def test_greedy_drawing_with_cache_is_the_largest_logit_without(head, form):
    """Drawn ids, fed back in one uncached pass, are the argmax everywhere; prompts of unequal length share a batch."""
    model, _ = make_model(head, **form)
    form, v = model.form, model.form.vocabulary
    texts = [Text((5, 6, 7)), Text((9,)), Text(tuple(range(40, 52)))]
    for grid in form.grids:
        prompts = [form.image_prompt([text], grid) for text in texts]
        drawn = draw_images(model, prompts, Sampling(temperature=0.0), [0, 1, 2])
        assert not torch.equal(drawn[0].codes_hwQ, drawn[1].codes_hwQ)
        for text, picture in zip(texts, drawn, strict=True):
            batch, made = teach(model, [text, picture])
            next_NW = batch.next_BTW[model.is_image(batch.next_BTW).any(-1)]
            for column, feature_NC in enumerate(made.features):
                for id_, feature_C in zip(next_NW[:, column].tolist(), feature_NC, strict=True):
                    if id_ != NONE:
                        depth, code = divmod(id_ - v.image_offset, v.codebook_size)
                        assert int(model.image_logits(feature_C, depth).argmax()) == code
            assert int((next_NW != NONE).sum()) == grid[0] * grid[1] * v.depth


def test_the_next_code_of_a_delayed_cell_sees_its_earlier_depth():
    """With the delayed layout even independent heads give depth 1 of a cell after depth 0 of the same cell."""
    model, _ = make_model("parallel", "delayed")
    before = image(model.form)
    changed = Image(before.codes_hwQ.clone())
    changed.codes_hwQ[0, 0, 0] = (changed.codes_hwQ[0, 0, 0] + 1) % 16
    depth_0, depth_1 = (
        [teach(model, [Text((5,)), picture])[1].features[column] for picture in (before, changed)]
        for column in (0, 1)
    )
    torch.testing.assert_close(depth_0[0][0], depth_0[1][0])
    assert float((depth_1[0][1] - depth_1[1][1]).abs().max().detach()) > 1e-4  # row 1 holds depth 1 of cell 0


def test_the_model_chooses_among_the_sizes_that_it_knows():
    model, _ = make_model(**FORMS["sizes"])
    prompt = model.form.image_prompt([Text((5,))])
    drawn = draw_images(model, [prompt] * 30, Sampling(temperature=9.0), list(range(30)))
    assert {picture.grid for picture in drawn} == set(model.form.grids)


@pytest.mark.parametrize("head", HEADS)
def test_given_pictures_are_seen_whole_where_the_format_says_so(head):
    """The first code reaches what is read of no earlier position, and the last code reaches the first position."""
    model, _ = make_model(head)
    form = replace(model.form, picture_attention="bidirectional")
    both = MultimodalLM(model.lm, model.head, form).eval()
    first, last = Image(image(form).codes_hwQ, given=True), Image(image(form).codes_hwQ.clone(), given=True)
    last.codes_hwQ[1, 1] = (last.codes_hwQ[1, 1] + 1) % 16

    def hidden(model, picture, given=True):
        segments = [Image(picture.codes_hwQ, given=given), Text((5, 6))]
        return teach(model, segments)[1].hidden_BTC[0]

    difference = (hidden(both, first) - hidden(both, last)).abs().amax(1)
    assert difference[2] > 1e-4  # the picture's first cell sees its last
    assert difference[1] < 1e-6 and difference[0] < 1e-6  # what stands before the picture does not
    causal = (hidden(model, first) - hidden(model, last)).abs().amax(1)
    seen = 4 if head == "layered" else 5  # this head feeds the code that follows back into the trunk
    assert bool((causal[:seen] < 1e-6).all()) and causal[5] > 1e-4
    torch.testing.assert_close(hidden(both, first, given=False), hidden(model, first, given=False))
    batch, _ = teach(both, [first, Text((5, 6))])
    assert not bool(model.is_image(batch.next_BTW).any())  # a picture seen whole has nothing to learn


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("head", HEADS)
def test_decoding_after_a_given_picture_sees_what_training_does(head, attention):
    model, _ = make_model(head)
    model = MultimodalLM(model.lm, model.head, replace(model.form, picture_attention=attention)).eval()
    form = model.form
    prompts = [
        form.lay([Image(image(form, n).codes_hwQ, given=True), *text], end=False)
        for n, text in enumerate([[Text((9, 10, 11))], []])
    ]
    greedy = Sampling(temperature=0.0)
    for n, ids in enumerate(draw_text(model, prompts, greedy, [0, 1], 4)):
        start = (9, 10, 11) if n == 0 else ()
        _, made = teach(model, [Image(image(form, n).codes_hwQ, given=True), Text((*start, *ids))])
        logits = model.text_logits(made.hidden_BTC[0])
        logits = logits.masked_fill(~Grammar(form, images=False).text_mask(), -torch.inf)
        at = 6 + len(start)  # <bos>, two marks, four cells: what follows the last of them
        assert logits[at : at + len(ids)].argmax(1).tolist() == ids


@pytest.mark.parametrize("layout", ["stacked", "flat", "delayed"])
@pytest.mark.parametrize("head", HEADS)
def test_guided_drawing_is_the_formula_on_two_separate_passes(head, layout):
    model, _ = make_model(head, layout)
    form, scale = model.form, 3.0
    prompt = form.image_prompt([Text((5, 6, 7))])
    (drawn,) = draw_images(model, [prompt], Sampling(scale, 0.0), [0])
    batch, made = teach(model, [Text((5, 6, 7)), drawn])
    with_text, without = made.features, teach(model, [drawn])[1].features
    next_NW = batch.next_BTW[model.is_image(batch.next_BTW).any(-1)]
    for n, row in enumerate(next_NW.tolist()):
        for column, id_ in enumerate(row):
            if id_ != NONE:
                depth, code = divmod(id_ - form.vocabulary.image_offset, form.vocabulary.codebook_size)
                c, u = (model.image_logits(f[column][n], depth) for f in (with_text, without))
                assert int((u + scale * (c - u)).argmax()) == code
    (plain,) = draw_images(model, [prompt], Sampling(1.0, 0.0), [0])
    assert not torch.equal(plain.codes_hwQ, drawn.codes_hwQ)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("head", HEADS)
def test_every_draw_parses(head, form):
    """Rows of unequal prompts, wants and settings, decoded together: each is what the grammar and its wants allow."""
    model, _ = make_model(head, **form)
    form = model.form
    random = torch.Generator().manual_seed(7)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=random))]

    drawings = []
    for n in range(24):
        sampling = Sampling(
            pick(0.0, 1.0, 3.0, 10.0), pick(0.0, 1.0, 50.0), pick(0, 3), pick(0.1, 1.0), pick(0.0, 0.2)
        )
        sampling = replace(sampling, parallel=pick(0.0, 1.0), norm=pick(0.0, 0.5), ramp=pick(0.0, 0.5))
        start = form.lay([Text(tuple(range(n % 5))), image(form)][: pick(1, 2)], end=False)
        due = pick(0, 1, 2)
        contexts = pick(((),), ((Text((9,)),), ()))
        drawings.append(Drawing(start, sampling, n, pick(0, 3, 9), max(due, pick(0, 1, 2)), due, contexts))
    for drawing, made in zip(drawings, draw_all(model, drawings), strict=True):
        assert form.split(form.build(made)) == made
        pictures = [segment for segment in made if isinstance(segment, Image)]
        assert drawing.least_images <= len(pictures) <= drawing.images
        assert sum(len(segment.ids) for segment in made if isinstance(segment, Text)) <= drawing.text


@pytest.mark.parametrize("head", HEADS)
def test_a_row_is_drawn_the_same_whatever_is_drawn_beside_it(head):
    """Rows join and leave, prompts have other lengths, pictures begin at other times: each is what it is alone."""
    model, _ = make_model(head, more_grids=((1, 3),), row_ends=True)
    form = model.form
    drawings = []
    for n in range(7):
        start = form.lay([Text(tuple(range(5, 6 + n))), *[image(form)] * (n % 2)], end=False)
        sampling = Sampling(guidance=1.0 if n % 3 else 2.5, temperature=0.7)
        contexts = ((Text((8, 9)),), ()) if n == 3 else ((),)
        drawings.append(Drawing(start, sampling, n, 3 * ((n + 1) % 3), 2, (n + 1) % 3, contexts))
    alone = [draw_all(model, [drawing])[0] for drawing in drawings]
    assert draw_all(model, drawings) == alone
    assert len({str(segments) for segments in alone}) > 4
    decoder = Decoder(model)  # the same, each begun while the others are under way
    rows = []
    for drawing in drawings:
        rows.append(decoder.add(drawing))
        decoder.step()
    gone = decoder.add(replace(drawings[2], seed=99))
    decoder.step()
    if gone in decoder.rows:
        decoder.remove(gone)
    while decoder.rows:
        decoder.step()
    assert [row.segments for row in rows] == alone


@pytest.mark.parametrize("layout", ["stacked", "flat", "delayed"])
def test_kept_cells_stay_and_the_rest_is_drawn_after_them(layout):
    model, _ = make_model("layered", layout)
    form = model.form
    old = image(form)
    kept = old.codes_hwQ.clone()
    kept[0, 1] = kept[1, 0, 1] = NONE
    drawing = Drawing(
        form.image_prompt([Text((5,))]), Sampling(1.5, 0.0), images=1, contexts=((),), kept=kept
    )
    ((new,),) = draw_all(model, [drawing])
    assert torch.equal(new.codes_hwQ[kept >= 0], old.codes_hwQ[kept >= 0])
    assert not torch.equal(new.codes_hwQ, old.codes_hwQ)
    whole = replace(drawing, kept=new.codes_hwQ)  # with every cell kept nothing is drawn
    assert draw_all(model, [whole]) == [[new]]
    with pytest.raises(ValueError, match="kept codes"):
        draw_all(model, [replace(drawing, kept=torch.zeros(1, 1, 2))])


def test_greedy_text_is_the_plain_models_own_choice_among_legal_ids():
    model, _ = make_model("linear")
    form = model.form
    prompt = form.lay([Text((5, 6, 7))], end=False)
    (ids,) = draw_text(model, [prompt], Sampling(temperature=0.0), [0], 6)
    written = prompt.ids_TW[:, 0].tolist()
    allowed = torch.ones(form.vocabulary.image_offset, dtype=torch.bool)
    v = form.vocabulary
    allowed[[v.bos, v.pad, v.image_start, v.image_end]] = False
    for token in ids:
        logits = model.lm(input_ids=torch.tensor([written])).logits[0, -1, : v.image_offset]
        assert int(logits.masked_fill(~allowed, -torch.inf).argmax()) == token
        written.append(token)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"norm": -1.0}, "norm"),
        ({"ramp": 2.0}, "ramp"),
        ({"deeper": 0.0}, "deeper"),
        ({"deeper": 1e9}, "deeper"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"temperature": "hot"}, "temperature"),
        ({"guidance": 1e39}, "guidance"),
    ],
)
def test_impossible_settings_are_refused(values, name):
    with pytest.raises(ValueError, match=name):
        Sampling(**values)


def test_no_row_outgrows_the_positions_of_the_model(monkeypatch):
    """GPT-2's learned positions: what would come behind the last one is not drawn, or refused beforehand."""
    form, _ = make_format()
    config = GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=form.vocabulary.size, n_positions=24)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    model = MultimodalLM(lm, make_head("linear", 2, trunk_layers=3), form).eval()
    for n in range(12):
        start = form.lay([Text(tuple(range(n)))], end=False)
        (made,) = draw_all(model, [Drawing(start, Sampling(temperature=9.0), n, text=100, images=9)])
        (owed,) = draw_all(
            model, [Drawing(start, Sampling(temperature=9.0), n, text=100, images=9, least_images=1)]
        )
        assert (
            max(len(form.build([Text(tuple(range(n))), *each])) for each in (made, owed)) <= 26
        )  # <eos> is not read
        assert any(isinstance(segment, Image) for segment in owed)
    with pytest.raises(
        ValueError, match="has 20 positions and its pictures need 6: the language model has 24"
    ):
        draw_all(model, [Drawing(form.lay([Text(tuple(range(19)))], end=False), images=1, least_images=1)])
    monkeypatch.setattr(
        Grammar, "start", None
    )  # a prompt of a million ids would be walked through for minutes
    with pytest.raises(ValueError, match="Shorten the prompt"):
        draw_images(model, [form.image_prompt([Text(tuple(range(30)))])], Sampling(), [0])


def test_impossible_prompts_are_refused():
    model, _ = make_model()
    form = model.form
    inside = form.image_prompt([])
    inside = replace(inside, ids_TW=form.build([image(form)])[:4])
    for wrong, images in ((form.lay([Text((5,))]), 1), (form.image_prompt([]), 0), (inside, 1)):
        with pytest.raises(ValueError, match="must stop in text"):
            draw_all(model, [Drawing(wrong, images=images)])


def test_the_loss_is_hand_written_cross_entropy_over_legal_ids():
    model, _ = make_model("linear")
    form, v = model.form, model.form.vocabulary
    picture = image(form)
    batch = pack([form.lay([Text((5, 6)), picture])], form, 64)
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
        form.lay([Text((5, 6)), image(form)]),
        form.lay([image(form, 1), Text((7,))]),
        form.lay([Text((9,))]),
    ]
    whole = pack(documents, form, 64)
    assert len(whole.ids_BTW) == 1
    parts = [measure(model, pack([d], form, 64)) for d in documents]
    text, codes = measure(model, whole)
    torch.testing.assert_close(text.nll, sum(t.nll for t, _ in parts), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(codes.nll, sum(c.nll for _, c in parts), atol=1e-3, rtol=1e-5)


def test_weights_and_names_of_the_losses():
    model, _ = make_model()
    batch = pack([model.form.lay([Text((5,)), image(model.form)])], model.form, 64)
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
    # transformers' default: nearly equal rows
    assert float(rows.std(0).mean() / old.std(0).mean()) == pytest.approx(0.2, rel=0.1)
    assert len(rows.unique(dim=0)) == 32


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("head", HEADS)
def test_heads_work_on_other_architectures(family, head):
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
    drawn = draw_images(model, prompts, Sampling(2.0, 0.0), [0, 0])
    assert [d.codes_hwQ.shape for d in drawn] == [(2, 2, 2)] * 2


def test_a_head_or_model_of_another_size_is_refused():
    form, _ = make_format()
    with pytest.raises(ValueError, match="rows"):
        MultimodalLM(from_scratch(QWEN, 10, 0), make_head("linear", 2), form)
    with pytest.raises(ValueError, match="per position"):
        MultimodalLM(from_scratch(QWEN, form.vocabulary.size, 0), make_head("linear", 1), form)
    with pytest.raises(
        ValueError, match="7 codes a cell are predicted after as many layers, the trunk has 3"
    ):
        make_head("layered", 7, trunk_layers=3)


def test_decoding_on_a_cpu_attends_in_fp32_as_the_model_itself_does(monkeypatch):
    """The exchanged attention is used, gives back what was there, and what a full pass in fp32 gives."""
    model, _ = make_model(seed=3)
    form = model.form
    before, seen, attend = model.lm.config._attn_implementation, [], attention.attend

    def watched(*arguments, **named):
        seen.append(arguments[2].dtype)
        return attend(*arguments, **named)

    AttentionInterface.register(attention.NAME, watched)
    monkeypatch.setattr(attention, "attend", watched)  # fused layers call it themselves
    try:
        half = deepcopy(model).to(torch.bfloat16)
        start = form.image_prompt([Text((5, 6, 7))])
        (drawn,) = draw_all(half, [Drawing(start, Sampling(1.0, 0.0), 0, 0, 1, 1)])
    finally:
        AttentionInterface.register(attention.NAME, attend)
    assert set(seen) == {torch.float32} and len(seen) >= len(form.plan(form.grid))
    assert model.lm.config._attn_implementation == before == "sdpa"
    assert sum(isinstance(part, Image) for part in drawn) == 1
    assert not attention.suits(deepcopy(model).double().lm)  # nothing is made narrower


def test_what_the_layered_head_feeds_back_is_as_loud_as_its_gain_says():
    """Against the formula, in float64: h + gain · rms(h) · e / rms(e), for two unlike gains."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4)).double()
    rows, start = torch.randn(20, 8).double(), 50 * torch.randn(1, 3, 8).double()
    head = LayeredHead(3, 8, 4, layers=[0, 2]).double()
    with torch.no_grad():
        head.gains[0].fill_(0.25)
        head.gains[1].fill_(2.0)
    ids = torch.tensor([[[4, 7, 2], [NONE, NONE, NONE], [9, 1, 0]]])

    def run():
        h = start
        for layer in layers:
            h = layer(h)
        return h

    inputs = TrunkInputs(run, layers, lambda ids: rows[ids.clamp(min=0)] * (ids >= 0)[..., None])
    made = head(inputs, lambda column, feature: ids[..., column])
    h, rms = start, lambda x: x.square().mean(-1, keepdim=True).sqrt()
    for number, layer in enumerate(layers):
        h = layer(h)
        if number in (0, 2):
            e = rows[ids[..., number // 2].clamp(min=0)]
            loud = (0.25, 2.0)[number // 2] * rms(h) * e / rms(e)
            h = torch.where((ids[..., :1] >= 0), h + loud, h)
    torch.testing.assert_close(made.hidden_BTC, h)


def test_the_flat_layout_leaves_a_layered_head_without_weights():
    assert not LayeredHead(1, 8, 4).state_dict()


def test_threads_may_draw_with_one_model():
    model, _ = make_model(seed=1)
    model.to(torch.bfloat16)
    drawings = [
        Drawing(model.form.image_prompt([Text((5, n))]), Sampling(2.0), n, 0, 1, 1, ((),)) for n in range(8)
    ]
    alone = [draw_all(model, [each]) for each in drawings]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(lambda each: draw_all(model, [each]), drawings)) == alone
    assert model.lm.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in model.modules())
