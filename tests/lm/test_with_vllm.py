"""What vLLM is asked for: by contract, with a stand-in that keeps vLLM's promises on transformers' own model."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from lm import Pipeline
from lm.decoding import Sampling
from lm.processor import VqlmProcessor
from lm.with_vllm import Run, arguments, draw, main, picture_runs, pictures, run, sampling_params


@dataclass
class SamplingParams:
    """The fields of vLLM's class that are used, with its defaults (docs.vllm.ai); others are refused as there."""

    allowed_token_ids: list[int] | None = None
    max_tokens: int = 16
    ignore_eos: bool = False
    detokenize: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None


class LLM:
    """A row at a time, without a cache, by transformers: each id from those that are allowed."""

    def __init__(self, model, enable_prefix_caching=False):
        self.lm, self.logits = AutoModelForCausalLM.from_pretrained(model), {}

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm=True):
        return [self.answer(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def answer(self, prompt, params):
        drawn, random = [], torch.Generator().manual_seed(params.seed)
        while len(drawn) < params.max_tokens:
            logits = self.lm(input_ids=torch.tensor([prompt + drawn])).logits[0, -1, params.allowed_token_ids]
            self.logits[tuple(prompt + drawn)] = logits
            chosen = (
                torch.multinomial((logits / params.temperature).softmax(0), 1, generator=random)
                if params.temperature
                else logits.argmax()
            )
            drawn.append(params.allowed_token_ids[int(chosen)])
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=drawn)])


FORMS = {
    "one code": {"depth": 1, "grid": (3, 2)},
    "row ends": {"depth": 1, "grid": (3, 2), "row_ends": True},
    "two codes, sizes": {"row_ends": True, "more_grids": ((1, 3),)},
}


def tokenizer_of(depth):
    from vq.quantizers.residual import ResidualQuantizer
    from vq.tokenizer import ImageTokenizer

    made = make_tokenizer()
    return ImageTokenizer(made.encoder, ResidualQuantizer(4, 16, depth), made.decoder, 16).eval()


@pytest.fixture(scope="module", params=FORMS)
def contract(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("contract") / "model"
    form = FORMS[request.param]
    model, tokenizer = make_model("linear", "flat", **form)
    pipe = Pipeline(model, tokenizer, tokenizer_of(form.get("depth", 2)))
    pipe.save_pretrained(folder)
    return pipe, folder, VqlmProcessor.from_pretrained(folder)


def test_greedy_ids_and_logits_are_those_of_the_pipeline(contract):
    """Ids: as `Pipeline` draws. Logits: as our own model gives them at the same positions."""
    pipe, folder, processor = contract
    engine, prompts = LLM(folder), ["a red circle", "a blue square, inset 1"]
    for size in pipe.sizes:
        engine.logits.clear()
        rows = draw(engine, SamplingParams, processor, prompts, Sampling(1.0, 0.0), size=size)
        codes = pipe.draw_codes(prompts, 1, Sampling(1.0, 0.0), 0, size)
        assert [p.tobytes() for p in pictures(processor, rows)] == [
            p.tobytes() for p in pipe.show(pipe.decode(codes))
        ]
        for row, prompt, drawn in zip(rows, prompts, codes, strict=True):
            assert row == pipe.form.build([*pipe.segments([prompt]), drawn], end=False)[:, 0].tolist()
            ours = logits_of(pipe, torch.tensor(row))
            assert len(ours) == drawn.codes_hwQ.numel()
            for t, logits in ours.items():
                torch.testing.assert_close(engine.logits[tuple(row[: t + 1])], logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def logits_of(pipe, row_T):
    """Position → the logits of the codes that follow it, of the depth that does, by `MultimodalLM.teach`."""
    T, v = len(row_T), pipe.form.vocabulary
    next_1TW = torch.cat([row_T[1:], torch.tensor([-1])])[None, :, None]
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    made = pipe.model.teach(row_T[None, :, None], next_1TW, mask, torch.arange(T)[None])
    at = (next_1TW[0, :, 0] >= v.image_offset).nonzero().flatten().tolist()
    depths = [(int(next_1TW[0, t, 0]) - v.image_offset) // v.codebook_size for t in at]
    return {
        t: pipe.model.image_logits(feature, depth)
        for t, depth, feature in zip(at, depths, made.features[0], strict=True)
    }


def test_a_picture_of_single_codes_is_one_request(contract):
    pipe, _, processor = contract
    v = pipe.form.vocabulary
    runs = picture_runs(pipe.form, pipe.form.grids[0])
    assert sum(each.count for each in runs) == processor.picture_tokens()
    drawn = [each for each in runs if not each.forced]
    if v.depth == 1 and v.row_end is None:
        assert drawn == [Run(range(v.image_offset, v.size), 6)]
    elif v.depth == 1:
        assert [each.count for each in runs] == [2, 1] * 3 + [1]
    else:
        assert {each.count for each in drawn} == {1} and len(drawn) == 8
    assert runs[-1].forced == [v.image_end]


def test_draws_follow_their_seeds_and_never_leave_the_grammar(contract):
    _, folder, processor = contract
    engine = LLM(folder)
    rows = draw(engine, SamplingParams, processor, ["a"] * 6, Sampling(1.0, 9.0), seed=3)
    assert rows == draw(engine, SamplingParams, processor, ["a"] * 6, Sampling(1.0, 9.0), seed=3)
    assert rows != draw(engine, SamplingParams, processor, ["a"] * 6, Sampling(1.0, 9.0), seed=4)
    assert len({tuple(row) for row in rows}) == 6 and len(pictures(processor, rows)) == 6
    asked = []

    def noted(**given):
        asked.append(given["seed"])
        return SamplingParams(**given)

    draw(engine, noted, processor, ["a"] * 3, Sampling(1.0, 9.0), seed=3)
    assert len(set(asked)) == len(asked)  # with one seed, each run would draw with the same random numbers


def test_an_engine_that_gives_something_else_is_found_out(contract):
    pipe, _, processor = contract
    for ids in ([5], [], [pipe.form.vocabulary.eos] * 6):
        outputs = [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)])]
        engine = SimpleNamespace(generate=lambda *_, outputs=outputs, **__: outputs)
        with pytest.raises(ValueError, match="the engine drew"):
            draw(engine, SamplingParams, processor, ["a"], Sampling())


def test_what_vllm_cannot_do_is_refused(tmp_path):
    one = Run(range(5), 1)
    for sampling in (Sampling(2.0), Sampling(deeper=0.5), Sampling(parallel=0.5)):
        with pytest.raises(ValueError, match="guidance must be 1"):
            sampling_params(one, sampling, 0)
    assert SamplingParams(**sampling_params(one, Sampling(1.0, 0.5, 3, 0.9, 0.1), 7)).top_k == 3
    model, tokenizer = make_model("linear", "stacked")
    with pytest.raises(ValueError, match="2 ids a position"):
        picture_runs(model.form, model.form.grid)
    Pipeline(model, tokenizer, make_tokenizer()).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="2 ids a position"):
        run(arguments([str(tmp_path / "model"), "a"]))


def test_the_command(contract, tmp_path, monkeypatch, capsys):
    pipe, folder, _ = contract
    words = [str(folder), "a red circle", "--n", "2", "--temperature", "0", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["vllm", *words])
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "vLLM is not installed" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams))
    main()
    paths = capsys.readouterr().out.split()
    assert paths == [str(tmp_path / "out" / f"000{n}.png") for n in range(2)]
    (wanted,) = pipe.generate("a red circle", guidance=1.0, temperature=0.0)
    assert Image.open(paths[1]).tobytes() == wanted.tobytes()
