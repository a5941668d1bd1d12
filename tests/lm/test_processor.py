"""The processor for transformers: what it prepares is what the pipeline reads, what it shows is what was drawn."""

import json

import pytest
import torch
from PIL import Image
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoProcessor, ProcessorMixin

from lm import Pipeline
from lm.processor import VqlmProcessor
from lm.sequence import NONE, SequenceFormat, Text
from vqlm.errors import ConfigError

RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (16, 30), "blue")
FORMS = {"one size": {}, "sizes": {"row_ends": True, "more_grids": ((1, 3),)}}


def save(folder, head="linear", layout="flat", **form):
    model, tokenizer = make_model(head, layout, **form)
    pipe = Pipeline(model, tokenizer, make_tokenizer())
    pipe.save_pretrained(folder)
    return pipe


@pytest.fixture(scope="module", params=FORMS)
def door(request, tmp_path_factory):
    """A pipeline, the plain model of its folder, and the processor of that folder."""
    folder = tmp_path_factory.mktemp("door") / "model"
    pipe = save(folder, **FORMS[request.param])
    return pipe, AutoModelForCausalLM.from_pretrained(folder), VqlmProcessor.from_pretrained(folder)


def same(a, b):
    return [p.tobytes() for p in a] == [p.tobytes() for p in b]


def draw(plain, processor, inputs, tokens, **options):
    pad = processor.tokenizer.pad_token_id
    grammar = [processor.grammar()]
    return plain.generate(
        **inputs,
        logits_processor=grammar,
        max_new_tokens=tokens,
        pad_token_id=pad,
        do_sample=False,
        **options,
    )


def test_plain_generate_draws_what_the_pipeline_draws(door):
    """Two prompts of unlike length in one batch: ids and pictures."""
    pipe, plain, processor = door
    texts = ["a red circle", "a blue square, inset 1 1 1"]
    for size in pipe.sizes:
        inputs = processor(text=texts, return_for_image_generation=True, size=size, return_tensors="pt")
        T = inputs["input_ids"].shape[1]
        ids_BT = draw(plain, processor, inputs, processor.picture_tokens(size))
        codes = pipe.draw_codes(texts, 1, pipe.sampling_with(guidance=1.0, temperature=0.0), 0, size)
        start = pipe.form.image_prompt([], pipe.grid_of(size)).ids_TW[:, 0].tolist()
        for row, drawn in zip(ids_BT[:, T:].tolist(), codes, strict=True):
            built = pipe.form.build([drawn], end=False)[:, 0].tolist()
            assert built == [*start, *row]
        pictures = pipe.show(pipe.decode(codes))
        assert same(processor.decode_image_tokens(ids_BT[:, T:], size), pictures)
        assert same(processor.post_process_multimodal_output(ids_BT, generation_mode="image"), pictures)


def test_plain_generate_with_guidance_draws_what_the_pipeline_draws(door):
    pipe, plain, processor = door
    asked = {"return_for_image_generation": True, "return_tensors": "pt"}
    inputs, nothing = processor(text="a red circle", **asked), processor(text="", **asked)
    ids_BT = draw(
        plain,
        processor,
        inputs,
        processor.picture_tokens(),
        guidance_scale=3.0,
        negative_prompt_ids=nothing["input_ids"],
    )
    drawn = pipe.generate("a red circle", guidance=3.0, temperature=0.0)
    assert same(processor.post_process_multimodal_output(ids_BT, generation_mode="image"), drawn)


def test_plain_generate_captions_as_the_pipeline_does(door):
    pipe, plain, processor = door
    inputs = processor(images=[RED, BLUE], return_tensors="pt")
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape
    ids_BT = plain.generate(
        **inputs,
        logits_processor=[processor.grammar(images=False)],
        max_new_tokens=7,
        do_sample=False,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    T = inputs["input_ids"].shape[1]
    told = processor.post_process_multimodal_output(ids_BT, skip_prompt=T)
    assert told == pipe.captions([RED, BLUE], limit=7) and any(told)
    assert [row[-1:] for row in processor.read(ids_BT, T)] == [[each] if each else [] for each in told]


def test_what_is_prepared_is_what_the_pipeline_reads(door):
    """Texts and pictures in any order; the mask says what is padding."""
    pipe, _, processor = door
    texts = ["a <image> and\n<image>", "<image> describe it all"]
    rows = [["a", RED, "and", BLUE], [BLUE, "describe it all"]]
    inputs = processor(images=[RED, BLUE, BLUE], text=texts)
    expected = [pipe.form.build(pipe.segments(row), end=False)[:, 0].tolist() for row in rows]
    v = pipe.form.vocabulary
    for ids, mask, wanted in zip(inputs["input_ids"], inputs["attention_mask"], expected, strict=True):
        assert ids == [v.pad] * (len(ids) - len(wanted)) + wanted
        assert mask == [0] * (len(ids) - len(wanted)) + [1] * len(wanted)
    assert inputs["input_ids"] == processor.lay(rows)["input_ids"]
    nested = processor(images=[[RED, BLUE], [BLUE]], text=texts, padding=False)
    assert nested["input_ids"] == expected
    right = processor.lay(rows, padding_side="right", return_tensors="pt")
    assert right["input_ids"][1][: len(expected[1])].tolist() == expected[1]
    assert right["attention_mask"].sum(1).tolist() == [len(each) for each in expected]
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": RED}]},
        {"role": "assistant", "content": "and"},
        {"role": "user", "content": [{"type": "image", "image": BLUE}]},
    ]
    assert processor.apply_chat_template(conversation)["input_ids"] == [expected[0]]
    assert processor.apply_chat_template([conversation], return_dict=False) == [expected[0]]


def test_interleaved_answers_come_apart_from_their_prompts(door):
    """read: what the prompt held is left out, also where text goes on or a picture was only begun."""
    pipe, _, processor = door
    v, codes = pipe.form.vocabulary, pipe.encode_image(RED)
    words, more = Text((5, 6)), Text((7, 8))
    row = pipe.form.build([codes, Text((*words.ids, *more.ids)), codes, words])[:, 0].tolist()
    show = pipe.show_segment
    begun = row.index(v.image_start, len(pipe.form.build([codes, words], end=False)))
    cases = {
        0: [codes, Text((5, 6, 7, 8)), codes, words],
        len(pipe.form.build([codes, words], end=False)): [more, codes, words],
        begun: [codes, words],
        begun + 1 + bool(v.sizes): [codes, words],
        len(row): [],
    }
    for skip, wanted in cases.items():
        padded = [v.pad] * 3 + row + [v.pad] * 2
        for ids, columns in ((row, skip), (padded, 3 + skip if skip else 0)):
            (read,) = processor.read(torch.tensor([ids]), columns)
            assert [p if isinstance(p, str) else p.tobytes() for p in read] == [
                p if isinstance(p, str) else p.tobytes() for p in map(show, wanted)
            ]
    with pytest.raises(ValueError, match="unfinished"):
        processor.read([row[: begun + 4]])
    with pytest.raises(ValueError, match="bos"):
        processor.read([row[1:]])


@pytest.mark.parametrize(
    "typed", ["<|image_5|>", "<|image_start|>", "<|end|><|begin|>", "<|grid_1x3|>", "a<|image_31|>b"]
)
def test_what_is_typed_stays_text(door, typed):
    pipe, _, processor = door
    v = pipe.form.vocabulary
    for inputs in (
        processor(text=typed),
        processor.lay([[typed]]),
        processor.apply_chat_template([{"role": "user", "content": typed}]),
    ):
        first, *ids = inputs["input_ids"][0]
        assert first == v.bos and max(ids) < v.image_offset and not set(ids) & set(v.specials)
        assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == typed


def test_a_typed_place_is_refused_or_stays_text(door):
    _, _, processor = door
    for given in ({"text": "draw <image>"}, {"text": "no place", "images": [RED]}):
        with pytest.raises(ValueError, match="places <image>"):
            processor(**given)
    with pytest.raises(ValueError, match=r"\[1, 1\] places"):
        processor(text=["<image>", "<image>"], images=[[RED, RED], []])
    (ids,) = processor.lay([["draw <image>"]])["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == "draw <image>"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(), "nothing to prepare"),
        (lambda p: p(text=[]), "text must be"),
        (lambda p: p(text=[3]), "text must be"),
        (lambda p: p(images=["cat.png"]), "PIL"),
        (lambda p: p(text="a", size=(16, 16)), "return_for_image_generation"),
        (lambda p: p(text="a", return_for_image_generation=True, size=(9, 9)), r"size=\(9, 9\)"),
        (lambda p: p(text="a", padding_side="up"), "left or right"),
        (lambda p: p.decode_image_tokens([[1, 2, 3]]), "3 ids"),
        (lambda p: p.decode_image_tokens([[5] * (p.picture_tokens() - 1)]), "image|row"),
        (lambda p: p.post_process_multimodal_output([[1]], generation_mode="sound"), "text or image"),
        (lambda p: p.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False), "no text form"),
        (
            lambda p: p.apply_chat_template(
                [{"role": "user", "content": [{"type": "image", "url": "file:///etc/passwd"}]}]
            ),
            "type 'image' holds NoneType",
        ),
    ],
)
def test_what_cannot_be_prepared_is_refused(door, call, message):
    with pytest.raises(ValueError, match=message):
        call(door[2])


@pytest.mark.parametrize(
    ("head", "layout", "reason"),
    [
        ("linear", "stacked", "2 ids a position"),
        ("linear", "delayed", "2 ids a position"),
        ("parallel", "flat", "ParallelHead has weights"),
        ("depth_transformer", "flat", "DepthTransformerHead has weights"),
    ],
)
def test_bundles_whose_plain_model_is_not_the_whole_model_are_refused(tmp_path, head, layout, reason):
    pipe = save(tmp_path / "model", head, layout)
    with pytest.raises(ValueError, match=reason):
        VqlmProcessor.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "processor_config.json").exists()
    assert len(pipe.generate("a")) == 1


def test_given_pictures_that_are_read_bidirectionally_are_refused(tmp_path):
    """Drawing is causal in any case."""
    pipe = save(tmp_path / "model")
    form = pipe.form
    pipe.model.form = SequenceFormat(form.vocabulary, form.layout, form.grids, "bidirectional")
    pipe.save_pretrained(tmp_path / "model")
    processor = VqlmProcessor.from_pretrained(tmp_path / "model")
    assert processor(text="a", return_for_image_generation=True)["input_ids"]
    with pytest.raises(ValueError, match="bidirectionally"):
        processor(images=RED)


def test_saved_loaded_and_found_by_autoprocessor(tmp_path):
    save(tmp_path / "model")
    processor = VqlmProcessor.from_pretrained(str(tmp_path / "model"))
    processor.save_pretrained(tmp_path / "alone")
    for folder in ("model", "alone"):
        told = json.loads((tmp_path / folder / "processor_config.json").read_text())
        assert told == {"processor_class": "VqlmProcessor"}  # no auto_map: there is no code to run
        found = AutoProcessor.from_pretrained(tmp_path / folder)
        assert isinstance(found, VqlmProcessor) and isinstance(found, ProcessorMixin)
        assert found(images=RED)["input_ids"] == processor(images=RED)["input_ids"]
    assert not list((tmp_path / "alone").rglob("*.py")) and "VqlmProcessor" in repr(processor)
    (tmp_path / "alone" / "vq" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        VqlmProcessor.from_pretrained(tmp_path / "alone")
    with pytest.raises(ConfigError, match=r"multimodal\.json is missing"):
        VqlmProcessor.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        VqlmProcessor.from_pretrained("someone/has-nothing")


def test_codes_are_the_ids_of_their_depth(door):
    """By hand: what stands between the marks of a given picture."""
    pipe, _, processor = door
    (ids,) = processor(images=RED)["input_ids"]
    v, picture = pipe.form.vocabulary, pipe.encode_image(RED)
    cells = [
        v.image_offset + 16 * d + int(c)
        for cell in picture.codes_hwQ.flatten(0, 1)
        for d, c in enumerate(cell)
    ]
    assert [i for i in ids if i >= v.image_offset] == cells and NONE not in ids


def test_what_is_saved_anew_loads_in_both_doors(tmp_path):
    """The usual end of fine-tuning: transformers saves the model, the processor saves the rest beside it."""
    bundle, folder = tmp_path / "model", tmp_path / "tuned"
    save(bundle)
    model = AutoModelForCausalLM.from_pretrained(bundle)
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.01
    model.save_pretrained(folder)
    VqlmProcessor.from_pretrained(bundle).save_pretrained(folder)
    tuned = Pipeline.from_pretrained(folder).model.lm.get_input_embeddings().weight
    assert torch.equal(tuned, model.get_input_embeddings().weight)
    VqlmProcessor.from_pretrained(folder).save_pretrained(folder)
    Pipeline.from_pretrained(folder)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    for door in (Pipeline, VqlmProcessor):
        with pytest.raises(ConfigError, match=r"tokenizer\.json is damaged or was changed"):
            door.from_pretrained(folder)


def test_a_string_is_one_part_and_not_its_letters(door):
    processor = door[2]
    assert processor.lay(["a red apple"])["input_ids"] == processor(text="a red apple")["input_ids"]


@pytest.mark.parametrize(
    "conversation", [[], ["hi"], [{"role": "user", "contents": "hi"}], [{"role": "user", "content": ["hi"]}]]
)
def test_conversations_that_are_none_are_refused(door, conversation):
    processor = door[2]
    with pytest.raises(ValueError, match=r"a conversation|a message|a part"):
        processor.apply_chat_template(conversation)
