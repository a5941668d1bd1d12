"""The bundle: saved, loaded, used, and refused when its parts do not belong together."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tiny import HEADS, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm import Pipeline
from lm.decoding import Sampling
from vqlm.errors import ConfigError


def same(a, b):
    return [p.tobytes() for p in a] == [p.tobytes() for p in b]


@pytest.mark.parametrize("layout", ["stacked", "flat"])
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


def test_flat_linear_greedy_drawing_is_plain_generate_within_the_legal_ids(tmp_path):
    model, tokenizer = make_model("linear", "flat")
    pipe = Pipeline(model, tokenizer, make_tokenizer())
    pipe.save_pretrained(tmp_path / "model")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    form, v = model.form, model.form.vocabulary
    prompt = form.image_prompt(pipe._segments(["a red circle"]))[:, 0][None]

    def legal(_, ids):
        allowed = v.image_range((len(ids) - prompt.shape[1]) % v.depth)
        return list(range(allowed.start, allowed.stop))

    out = lm.generate(
        prompt,
        max_new_tokens=form.image_length,
        do_sample=False,
        prefix_allowed_tokens_fn=legal,
        eos_token_id=None,
        pad_token_id=v.pad,
    )
    expected = pipe.decode([form.read_image(out[0, prompt.shape[1] :, None])])
    drawn = pipe.generate("a red circle", guidance=1.0, temperature=0.0)
    assert same(drawn, pipe.show(expected))


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
        ({"grid": [3]}, "damaged|grid"),
    ],
)
def test_a_changed_description_is_refused(bundle, change, message):
    path = bundle / "multimodal.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        Pipeline.from_pretrained(bundle)


def test_a_mistyped_folder_suggests_its_neighbour(bundle):
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        Pipeline.from_pretrained(bundle.parent / "modle")
