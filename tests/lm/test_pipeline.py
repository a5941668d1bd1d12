"""The bundle: saved, loaded, used, and refused when its parts do not belong together."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import HEADS, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm import Pipeline
from lm.decoding import Sampling
from lm.grammar import Grammar
from lm.logits_processor import GrammarProcessor
from lm.objectives.next_token import measure
from lm.packing import pack
from lm.pipeline import cells_to_redraw
from lm.sequence import Text
from vqlm.errors import ConfigError


def same(a, b):
    return [p.tobytes() for p in a] == [p.tobytes() for p in b]


@pytest.mark.parametrize("layout", ["stacked", "flat", "delayed"])
@pytest.mark.parametrize("head", HEADS)
def test_saved_and_loaded_draws_the_same(head, layout, tmp_path):
    model, tokenizer = make_model(head, layout)
    with torch.no_grad():
        for parameter in model.head.parameters():  # weights of the head must travel too
            parameter.add_(0.5 * torch.randn_like(parameter))
    pipe = Pipeline(model, tokenizer, make_tokenizer())
    pipe.save_pretrained(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model")
    assert same(pipe.generate("a red circle", n=3, seed=5), loaded.generate("a red circle", n=3, seed=5))
    picture = Image.new("RGB", (40, 30), "red")
    assert pipe.caption(picture, limit=5) == loaded.caption(picture, limit=5)


def test_generate_gives_pictures_and_follows_seed_prompt_and_n(bundle):
    pipe = Pipeline.from_pretrained(bundle)
    pictures = pipe.generate("a red circle", n=4, guidance=3.0, temperature=1.0, top_k=0, top_p=1.0, seed=0)
    pipe.sampling = Sampling(guidance=3.0)  # what is not said is as the bundle says
    assert [(p.size, p.mode) for p in pictures] == [((16, 16), "RGB")] * 4
    assert same(pictures, pipe.generate("a red circle", n=4))
    assert not same(pictures, pipe.generate("a red circle", n=4, seed=1))
    assert not same(
        pipe.generate("a red circle", temperature=0.0), pipe.generate("a blue square", temperature=0.0)
    )
    assert len(pipe.generate(["a", "b"], n=3)) == 6


def test_a_model_of_several_sizes_draws_and_reads_each(tmp_path):
    model, tokenizer = make_model(more_grids=((1, 3), (3, 1)), row_ends=True)
    Pipeline(model, tokenizer, make_tokenizer()).save_pretrained(tmp_path / "model")
    pipe = Pipeline.from_pretrained(tmp_path / "model")
    assert pipe.sizes == [(16, 16), (8, 24), (24, 8)]
    assert pipe.generate("a")[0].size == (16, 16)
    assert pipe.generate("a", size=(8, 24), guidance=2.0)[0].size == (24, 8)  # PIL: width first
    with pytest.raises(ValueError, match=r"size=\(8, 8\)"):
        pipe.generate("a", size=(8, 8))
    wide, high = Image.new("RGB", (90, 30), "red"), Image.new("RGB", (10, 31), "red")
    assert pipe.encode_image(wide).grid == (1, 3) and pipe.encode_image(high).grid == (3, 1)
    assert isinstance(pipe.caption(wide, limit=3), str)
    made = pipe.complete([wide], limit=3, max_images=4, min_images=4, temperature=9.0, seed=1)
    assert sum(isinstance(part, Image.Image) for part in made) == 4
    assert {part.size for part in made if isinstance(part, Image.Image)} <= {(16, 16), (24, 8), (8, 24)}


def test_an_empty_prompt_and_any_characters_draw(bundle):
    pipe = Pipeline.from_pretrained(bundle)
    for prompt in ("", "  ", "日本語 🍎 <|image_3|> <|end|>", "x" * 2000):
        assert len(pipe.generate(prompt)) == 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"n": 0}, "n=0"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"guidance": -2.0}, "guidance"),
    ],
)
def test_impossible_requests_are_refused(bundle, options, name):
    with pytest.raises(ValueError, match=name):
        Pipeline.from_pretrained(bundle).generate("a", **options)


@pytest.mark.parametrize("prompt", ["half \ud83e", "caf\udce9"])
def test_a_prompt_that_is_no_unicode_is_refused_with_its_place(bundle, prompt):
    place = next(i for i, letter in enumerate(prompt) if ord(letter) >= 0xD800)
    with pytest.raises(ValueError, match=rf"character {place} of a text .*Give the text as UTF-8"):
        Pipeline.from_pretrained(bundle).generate(prompt)


def test_complete_goes_on_from_text_and_pictures(bundle):
    pipe = Pipeline.from_pretrained(bundle)
    kinds = set()
    for seed in range(12):
        made = pipe.complete(
            ["draw the same in green:", Image.new("RGB", (20, 20), "red")], limit=6, seed=seed
        )
        assert all(isinstance(part, str | Image.Image) for part in made)
        assert sum(isinstance(part, Image.Image) for part in made) <= 1
        kinds |= {type(part) for part in made}
    assert str in kinds
    with pytest.raises(ValueError, match="int"):
        pipe.complete([3])


def test_captions_of_every_kind_of_picture(bundle):
    pipe = Pipeline.from_pretrained(bundle)
    for mode in ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"):
        assert isinstance(pipe.caption(Image.new(mode, (33, 17)), limit=3), str)


def test_the_folder_is_a_plain_hugging_face_model(bundle):
    pipe = Pipeline.from_pretrained(bundle)
    lm = AutoModelForCausalLM.from_pretrained(bundle)
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    vocabulary = pipe.model.form.vocabulary
    assert tokenizer.convert_tokens_to_ids("<|image_0|>") == vocabulary.image_offset
    assert lm.get_input_embeddings().weight.shape[0] >= vocabulary.size
    ids = torch.tensor([[vocabulary.bos, 5, 6, 7]])
    assert torch.equal(lm(input_ids=ids).logits, pipe.model.lm(input_ids=ids).logits)


@pytest.mark.parametrize("form", [{}, {"row_ends": True, "more_grids": ((1, 3),)}], ids=["one size", "sizes"])
def test_flat_linear_greedy_drawing_is_plain_generate_under_the_grammar(tmp_path, form):
    """The plain folder in transformers' own loop, with our grammar, draws what we draw; two prompts in one batch."""
    model, tokenizer = make_model("linear", "flat", **form)
    pipe = Pipeline(model, tokenizer, make_tokenizer())
    pipe.save_pretrained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    form, v = model.form, model.form.vocabulary
    texts = ["a red circle", "a blue square, inset 1 1 1"]
    prompts = [form.image_prompt(pipe.segments([text]), form.grids[0]).ids_TW[:, 0] for text in texts]
    longest = max(map(len, prompts))
    rows = torch.stack([torch.cat([torch.full((longest - len(p),), v.pad), p]) for p in prompts])
    out = plain.generate(
        rows,
        attention_mask=(rows != v.pad).long(),
        max_new_tokens=form.picture_length(form.grids[0]) - bool(v.sizes) + 1,
        do_sample=False,
        logits_processor=[GrammarProcessor.from_pretrained(tmp_path / "model")],
        eos_token_id=None,
        pad_token_id=v.pad,
    )
    assert out[:, -1].tolist() == [v.image_end] * 2
    expected = [form.read_image(row[longest:-1, None], form.grids[0]) for row in out]
    drawn = pipe.generate(texts, guidance=1.0, temperature=0.0)
    assert same(drawn, pipe.show(pipe.decode(expected)))


def test_the_grammar_bounds_whatever_plain_generate_draws(tmp_path):
    model, tokenizer = make_model("linear", "flat", more_grids=((1, 3),), row_ends=True)
    Pipeline(model, tokenizer, make_tokenizer()).save_pretrained(tmp_path / "model")
    plain, form = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model.form
    processor = GrammarProcessor.from_pretrained(tmp_path / "model")
    start = form.image_prompt([]).ids_TW[:, 0].expand(6, -1)
    torch.manual_seed(0)
    out = plain.generate(
        start,
        max_new_tokens=60,
        do_sample=True,
        temperature=9.0,
        logits_processor=[processor],
        eos_token_id=None,
        pad_token_id=form.vocabulary.pad,
    )
    for row in out.tolist():
        end = row.index(form.vocabulary.image_end)
        (picture,) = form.split(torch.tensor(row)[: end + 1, None])
        assert picture.grid in form.grids
        Grammar(form).start(torch.tensor([t for t in row if t != form.vocabulary.pad])[:, None])
    with pytest.raises(ValueError, match="bos"):
        processor(torch.tensor([[5, 6]]), torch.zeros(1, form.vocabulary.size))
    with pytest.raises(ValueError, match="flat"):
        GrammarProcessor(make_model()[0].form)


def test_parts_that_do_not_belong_together_are_refused(bundle, tmp_path):
    other = make_tokenizer(seed=3)
    shutil.copytree(bundle, tmp_path / "mixed")
    other.save_pretrained(tmp_path / "mixed" / "vq")
    with pytest.raises(ConfigError) as error:
        Pipeline.from_pretrained(tmp_path / "mixed")
    assert other.fingerprint in str(error.value)
    assert make_tokenizer().fingerprint in str(error.value)


@pytest.mark.parametrize(
    "missing",
    [
        "multimodal.json",
        "model.safetensors",
        "tokenizer.json",
        "vq/model.safetensors",
        "head.safetensors",
        "config.json",
    ],
)
def test_a_bundle_with_a_part_missing_says_so(bundle, missing):
    (bundle / missing).unlink()
    with pytest.raises(ConfigError):
        Pipeline.from_pretrained(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "format 9"),
        ({"layout": "spiral"}, "spiral"),
        ({"head": {"type": "os.system"}}, "unknown type"),
        ({"vocabulary": None}, "damaged|vocabulary"),
        ({"grids": [3]}, "damaged"),
        ({"grids": []}, "damaged.*at least one"),
        ({"grids": [[2, 2], [1, 4]]}, "damaged.*2 grids"),
        ({"picture_attention": "both"}, "damaged.*bidirectional"),
        ({"grids": [[10**9, 10**9]]}, "damaged.*whole numbers"),
        ({"grids": [[2000, 2000]]}, "damaged.*at most"),
        ({"grids": [[200, 200]]}, "damaged.*positions"),
        ({"grids": [[True, 2]]}, "damaged.*whole numbers"),
        (
            {"head": {"type": "LayeredHead", "width": 2, "hidden_size": 32, "trunk_layers": 10**9}},
            "damaged.*65536",
        ),
        (
            {"head": {"type": "LayeredHead", "width": 2, "hidden_size": 60000, "trunk_layers": 5}},
            "does not fit",
        ),
        (
            {"head": {"type": "DepthTransformerHead", "width": 2, "hidden_size": 32, "layers": 9999}},
            "at most 256",
        ),
        (
            {"head": {"type": "LinearHead", "width": {"type": "ConvEncoder"}, "hidden_size": 32}},
            "damaged.*width",
        ),
        ({"head": {"type": "LinearHead", "width": 2, "hidden_size": 32}}, "head.safetensors is there"),
        ({"sampling": {"top_k": 2.5}}, "damaged.*top_k"),
        ({"format": True}, "format"),
    ],
)
def test_a_changed_description_is_refused(bundle, change, message):
    path = bundle / "multimodal.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        Pipeline.from_pretrained(bundle)


@pytest.mark.parametrize(
    "change",
    [
        {"image_start": 285, "image_end": 284},
        {"bos": 5},
        {"bos": 1.5},
        {"row_end": True},
        {"codebook_size": 8, "depth": 4},
        {"eos": 283, "pad": 282},
    ],
)
def test_ids_that_are_not_those_of_the_tokenizers_are_refused(bundle, change):
    path = bundle / "multimodal.json"
    told = json.loads(path.read_text())
    told["vocabulary"] |= change
    path.write_text(json.dumps(told))
    with pytest.raises(ConfigError):
        Pipeline.from_pretrained(bundle)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1e999}', "null", "\x00"])
def test_a_description_that_is_no_description_is_refused(bundle, text):
    (bundle / "multimodal.json").write_text(text)
    for load in (Pipeline.from_pretrained, GrammarProcessor.from_pretrained):
        with pytest.raises(ConfigError):
            load(bundle)


def test_weights_that_are_not_there_are_missed(bundle):
    """transformers would draw a sixth layer at random."""
    path = bundle / "config.json"
    told = json.loads(path.read_text())
    told |= {"num_hidden_layers": 6, "layer_types": [*told["layer_types"], told["layer_types"][0]]}
    path.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="do not hold the weights"):
        Pipeline.from_pretrained(bundle)


def test_code_beside_a_model_is_not_run(bundle, monkeypatch, tmp_path):
    (bundle / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        told = json.loads((bundle / name).read_text())
        told["auto_map"] = {
            "AutoConfig": "evil.Evil",
            "AutoModelForCausalLM": "evil.Evil",
            "AutoTokenizer": ["evil.Evil", None],
        }
        told["model_type"] = "evil"
        (bundle / name).write_text(json.dumps(told))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ConfigError):
        Pipeline.from_pretrained(bundle)
    assert not (tmp_path / "ran").exists()


def test_a_mask_is_cut_as_its_picture_is(tmp_path):
    """A wide picture loses its sides; so does the mask."""
    mask = Image.new("L", (300, 100), 0)
    mask.paste(255, (100, 0, 150, 100))  # the left half of what is left of a square cut
    assert cells_to_redraw(mask, (2, 2), (300, 100)).tolist() == [[True, False]] * 2
    assert cells_to_redraw(mask.resize((30, 10)), (2, 2), (300, 100)).tolist() == [[True, False]] * 2


def test_a_mistyped_folder_suggests_its_neighbour(bundle):
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        Pipeline.from_pretrained(bundle.parent / "modle")


def test_a_picture_is_the_same_whatever_is_drawn_beside_it(bundle):
    pipe = Pipeline.from_pretrained(bundle)
    four = pipe.generate("a red circle", n=4, guidance=2.0, seed=3)
    assert same(four[:2], pipe.generate("a red circle", n=2, guidance=2.0, seed=3))
    mixed = pipe.generate(["a blue square, inset 1", "a red circle"], n=2, guidance=2.0, seed=3)
    assert same(mixed[2:], four[:2])


def test_inpainting_keeps_the_other_cells(bundle):
    pipe = Pipeline.from_pretrained(bundle)
    picture = pipe.generate("a red circle", seed=1)[0]
    codes = pipe.encode_image(picture).codes_hwQ
    redraw = [[True, False], [False, True]]
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 8))
    mask.paste(255, (8, 8, 16, 16))
    drawn = pipe.inpaint(picture, redraw, "a blue square", n=3, temperature=3.0)
    assert len(drawn) == 3 and same(drawn, pipe.inpaint(picture, mask, "a blue square", n=3, temperature=3.0))
    nothing = pipe.inpaint(picture, [[False] * 2] * 2)[0]
    assert same([nothing], pipe.show(pipe.images.decode(codes[None])))
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(2, 2\)"):
        pipe.inpaint(picture, [[True, False]])
    assert len(pipe.vary(picture, 0.5, n=2, guidance=2.0)) == 2
    with pytest.raises(ValueError, match="share"):
        pipe.vary(picture, 1.5)


def test_an_edit_reads_picture_and_instruction(bundle):
    pipe = Pipeline.from_pretrained(bundle)
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    greedy = {"temperature": 0.0, "guidance": 2.0, "image_guidance": 1.5}
    made = {
        name: pipe.edit(picture, told, **greedy)[0].tobytes()
        for name, picture, told in (("1", red, "a"), ("2", blue, "a"), ("3", red, "a blue square"))
    }
    assert len(set(made.values())) == 3
    assert len(pipe.edit(red, "a", n=2)) == 2
    with pytest.raises(ValueError, match="open_image"):
        pipe.edit("star.png", "a")
    with pytest.raises(ValueError, match="size=64"):
        pipe.generate("a", size=64)


def test_ranking_is_the_models_own_likelihood(bundle):
    """Against the loss of the same document in training; and the best of several is the first in rank."""
    pipe = Pipeline.from_pretrained(bundle)
    pictures = pipe.generate("a red circle", n=4, seed=2, temperature=2.0)
    fit = pipe.rank("a red circle", pictures)
    form, text = pipe.model.form, Text(tuple(pipe.encode_text("a red circle")))
    for picture, told in zip(pictures, fit, strict=True):
        given = replace(pipe.encode_image(picture), given=True)
        batch = pack([form.lay([given, text])], form, 64)
        with torch.inference_mode():
            assert float(measure(pipe.model, batch)[0].nll) == pytest.approx(-told, rel=1e-4)
    best = pipe.generate("a red circle", n=2, best_of=3, seed=2, temperature=2.0)
    six = pipe.draw_codes("a red circle", 6, pipe.sampling_with(temperature=2.0), 2)
    six_fit = pipe._fit("a red circle", six, None)
    wanted = [six[i + six_fit[i : i + 3].index(max(six_fit[i : i + 3]))] for i in (0, 3)]
    assert same(best, pipe.show(pipe.decode(wanted)))


def test_unknown_settings_are_named(bundle):
    pipe = Pipeline.from_pretrained(bundle)
    with pytest.raises(ValueError, match=r"unknown temprature.*temperature"):
        pipe.generate("a", temprature=1.0)
    seen = []
    pipe.generate("a", n=2, watch=lambda rows: seen.append([len(row.cells) for row in rows]))
    assert seen[0] == [1, 1] and len(seen) == 4


@pytest.mark.parametrize("head", HEADS)
def test_bf16_weights_draw_and_are_not_saved_over(head, tmp_path):
    model, tokenizer = make_model(head)
    Pipeline(model, tokenizer, make_tokenizer()).save_pretrained(tmp_path / "model")
    pipe = Pipeline.from_pretrained(tmp_path / "model", precision="bf16")
    assert {p.dtype for p in pipe.model.parameters()} == {torch.bfloat16}
    pictures = pipe.generate("a red circle", n=2, guidance=2.0)
    assert len(pictures) == 2 and isinstance(pipe.caption(pictures[0], limit=3), str)
