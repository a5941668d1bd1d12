"""Codes ↔ ids, text ↔ ids; nobody types their way into a special id."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lm.vocab import Vocabulary, extend, ids_to_text, text_to_ids, train_text_tokenizer


@pytest.fixture
def extended():
    tokenizer = train_text_tokenizer(["a red apple", "blue sky"], 300)
    return tokenizer, extend(tokenizer, 16, 3)


def test_every_code_has_one_id_and_comes_back(extended):
    _, vocabulary = extended
    codes = torch.arange(16)[:, None].expand(16, 3)
    ids = vocabulary.codes_to_ids(codes)
    assert len(ids.unique()) == 48
    assert (int(ids.min()), int(ids.max())) == (vocabulary.image_offset, vocabulary.size - 1)
    assert torch.equal(vocabulary.ids_to_codes(ids), codes)


def test_text_ids_are_untouched_by_extending():
    tokenizer = train_text_tokenizer(["a red apple", "blue sky"], 300)
    before = text_to_ids(tokenizer, "a red sky")
    extend(tokenizer, 16, 3)
    assert text_to_ids(tokenizer, "a red sky") == before


def test_image_tokens_are_named_special_tokens(extended, tmp_path):
    tokenizer, vocabulary = extended
    assert tokenizer.convert_tokens_to_ids("<|image_0|>") == vocabulary.image_offset
    assert tokenizer.convert_tokens_to_ids("<|image_47|>") == vocabulary.size - 1
    assert len(tokenizer) == vocabulary.size
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.convert_tokens_to_ids("<|image_47|>") == vocabulary.size - 1
    assert loaded.decode([vocabulary.image_offset], skip_special_tokens=True) == ""


@pytest.mark.parametrize("name", ["<|image_3|>", "<|end|>", "<|image_start|>", "<|pad|>"])
def test_a_typed_special_token_stays_text(extended, name):
    tokenizer, vocabulary = extended
    ids = text_to_ids(tokenizer, f"a red {name} apple")
    specials = {vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.image_start, vocabulary.image_end}
    assert not specials & set(ids)
    assert max(ids) < vocabulary.image_offset
    assert ids_to_text(tokenizer, ids) == f"a red {name} apple"


@pytest.mark.parametrize("text", ["naïve café", "日本語 🍎", "  two  spaces", "line\nbreak", "\u202eRTL"])
def test_any_text_can_be_written_and_read_back(extended, text):
    tokenizer, _ = extended
    assert ids_to_text(tokenizer, text_to_ids(tokenizer, text)) == text.strip()


@pytest.mark.parametrize("bad", [-1, 16])
def test_codes_outside_are_refused(extended, bad):
    with pytest.raises(ValueError, match=r"0\.\.15"):
        extended[1].codes_to_ids(torch.tensor([[0, bad, 0]]))


def test_ids_of_another_depth_or_of_text_are_refused(extended):
    _, vocabulary = extended
    right = vocabulary.codes_to_ids(torch.zeros(1, 3, dtype=torch.int64))
    for wrong in (right.flip(1), right - 1, torch.zeros_like(right)):
        with pytest.raises(ValueError, match="must stand"):
            vocabulary.ids_to_codes(wrong)


def test_a_tokenizer_keeps_its_own_specials():
    tokenizer = train_text_tokenizer(["a b"], 300)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"})
    vocabulary = extend(tokenizer, 8, 1)
    assert tokenizer.convert_ids_to_tokens([vocabulary.bos, vocabulary.eos]) == ["<s>", "</s>"]
    assert vocabulary.pad != vocabulary.eos  # a shared id would forbid the end wherever padding is forbidden


def test_extending_twice_is_refused(extended):
    with pytest.raises(ValueError, match="already"):
        extend(extended[0], 16, 3)


def test_json_round_trip_and_impossible_ranges(extended):
    _, vocabulary = extended
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary
    with pytest.raises(ValueError, match="special ids"):
        Vocabulary(0, 1, 2, 3, 99, 10, 16, 3)


def test_an_unknown_character_stays_unknown():
    """And is not spelt out, as the names of special tokens are."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "u": 2, "n": 3, "k": 4}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    assert text_to_ids(tokenizer, "a é u") == [1, 0, 2]
