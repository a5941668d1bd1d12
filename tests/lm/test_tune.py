"""Which tensors move: after three steps of AdamW, for each way to train, with tied and untied rows."""

import builtins

import pytest
import torch
from tiny import QWEN, make_format, make_head

from lm.model import MultimodalLM, from_scratch
from lm.objectives.next_token import NextToken
from lm.packing import pack
from lm.sequence import Image, Text
from lm.tune import Full, LoRA, NewRowsOnly, undecayed
from vqlm.errors import ConfigError

ROWS = {"lm.model.embed_tokens.weight", "lm.lm_head.weight"}
PHI = {
    "model_type": "phi",
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def make(config=QWEN, tied=True, head="depth_transformer"):
    form, _ = make_format()
    torch.manual_seed(0)
    lm = from_scratch({**config, "tie_word_embeddings": tied}, form.vocabulary.size, 0)
    return MultimodalLM(lm, make_head(head, form.width), form)


def batch_of(form):
    picture = Image(torch.randint(0, 16, (*form.grid, form.vocabulary.depth)))
    return pack([form.lay([Text((5, 6)), picture]), form.lay([picture, Text((7,))])], form, 64)


def step(model, n=3, optimizer=None):
    """n steps of AdamW with weight decay, as the learner groups parameters; returns the optimizer."""
    spared = {id(p) for p in undecayed(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in spared]},
        {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
    ]
    optimizer = optimizer or torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    batch = batch_of(model.form)
    for _ in range(n):
        optimizer.zero_grad()
        sum(NextToken(text=1.0).losses(model, batch)[0].values()).backward()
        optimizer.step()
    return optimizer


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("config", "tied"),
    [(QWEN, True), (QWEN, False), (PHI, False)],  # Phi's output rows have a bias
    ids=["tied", "untied", "bias"],
)
def test_with_new_rows_alone_the_trunk_and_the_old_rows_stay_to_the_bit(config, tied):
    model = make(config, tied)
    first = model.form.vocabulary.image_start
    NewRowsOnly().prepare(model, first)
    before = state(model)
    step(model)
    after = state(model)
    head = {name for name in before if name.startswith("head.")}
    bias = {"lm.lm_head.bias"} & before.keys()
    assert moved(before, after) == head | ROWS | bias
    for name in ROWS | bias:
        assert torch.equal(before[name][:first], after[name][:first])
        assert bool((before[name][-32:] != after[name][-32:]).any())


@pytest.mark.parametrize("tied", [True, False])
def test_in_full_training_every_tensor_moves(tied):
    model = make(tied=tied)
    Full().prepare(model, model.form.vocabulary.image_start)
    before = state(model)
    step(model)
    assert moved(before, state(model)) == before.keys()
    assert not undecayed(model)


@pytest.mark.parametrize("tied", [True, False])
def test_with_lora_only_additions_new_rows_and_head_move_and_merging_changes_no_logit(tied):
    model = make(tied=tied)
    names, first = set(model.state_dict()), model.form.vocabulary.image_start
    tune = LoRA(rank=4, targets=["q_proj", "down_proj"])
    tune.prepare(model, first)
    before = state(model)
    step(model)
    after = state(model)
    head = {name for name in before if name.startswith("head.")}
    additions = {name for name in before if "lora_" in name}
    assert len(additions) == 2 * 2 * 5  # A and B of two matrices in five layers
    assert moved(before, after) == head | ROWS | additions
    for name in ROWS:
        assert torch.equal(before[name][:first], after[name][:first])

    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        adapted = model.eval().lm(input_ids=ids).logits
        tune.finish(model)
        torch.testing.assert_close(model.lm(input_ids=ids).logits, adapted, atol=1e-5, rtol=1e-4)
    assert set(model.state_dict()) == names  # plain again
    plain = {name: tensor for name, tensor in before.items() if name in names}
    changed = moved(plain, state(model))
    assert changed == head | ROWS
    assert not torch.equal(model.lm.model.layers[0].self_attn.q_proj.weight, before[base("q_proj")])


def base(name):
    return f"lm.model.layers.0.self_attn.{name}.base_layer.weight"


def test_lora_on_experts_is_merged_too():
    """Their matrices are parameters of one module, which peft wraps once for each."""
    experts = {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    model = make({**QWEN, **experts})
    before, tune = state(model), LoRA(rank=2)
    tune.prepare(model, model.form.vocabulary.image_start)
    assert any("experts" in name and "lora_" in name for name in state(model))
    step(model)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        adapted = model.eval().lm(input_ids=ids).logits
        tune.finish(model)
        torch.testing.assert_close(model.lm(input_ids=ids).logits, adapted, atol=1e-4, rtol=1e-4)
    assert set(state(model)) == set(before)
    assert any("experts" in name for name in moved(before, state(model)))


def test_the_row_of_a_padding_id_is_trained_as_any_other():
    form, _ = make_format()
    size = form.vocabulary.size
    lm = from_scratch({**QWEN, "tie_word_embeddings": False, "pad_token_id": size - 1}, size, 0)
    model = MultimodalLM(lm, make_head("linear", form.width), form)
    picture = Image(torch.full((*form.grid, form.vocabulary.depth), 15))  # its last id is the padding id
    loss = NextToken().losses(model, pack([form.lay([picture])], form, 64))[0]
    sum(loss.values()).backward()
    assert float(lm.get_input_embeddings().weight.grad[-1].abs().max()) > 0


def test_a_merged_model_is_a_plain_folder(tmp_path):
    from transformers import AutoModelForCausalLM

    model, tune = make(), LoRA(rank=2)
    tune.prepare(model, 300)
    step(model)
    tune.finish(model)
    model.eval().lm.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(again(input_ids=ids).logits, model.lm(input_ids=ids).logits)


@pytest.mark.parametrize("tune", [LoRA(rank=2), NewRowsOnly()], ids=["lora", "rows"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tune):
    def prepared():
        torch.manual_seed(1)  # of the additions, and of the pictures
        model = make()
        tune.prepare(model, 300)
        return model

    def train(model, n, optimizer=None):
        torch.manual_seed(2)
        return step(model, n, optimizer)

    whole = prepared()
    train(whole, 4)
    first = prepared()
    saved = train(first, 2).state_dict()
    second = prepared()
    second.load_state_dict(first.state_dict())
    optimizer = train(second, 0)
    optimizer.load_state_dict(saved)
    train(second, 2, optimizer)
    assert moved(state(whole), state(second)) == set()


def test_old_rows_would_shrink_if_they_were_decayed():
    """What `undecayed` is for: the gradient of a held row is 0, its decay is not."""
    model = make(head="linear")
    NewRowsOnly().prepare(model, 300)
    weight = model.lm.get_input_embeddings().weight
    before = weight.detach().clone()
    assert [id(p) for p in undecayed(model)] == [id(weight)]
    optimizer = torch.optim.AdamW(undecayed(model), lr=1e-2, weight_decay=0.1)
    step(model, 1, optimizer)
    assert not torch.equal(before[:300], weight[:300])


def test_layers_that_are_not_there_are_named_with_those_that_are():
    with pytest.raises(ConfigError, match=r"down_proj.*q_proj"):
        LoRA(targets=["c_attn"]).prepare(make(), 300)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": []}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoRA(**wrong)


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("lm.tune.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'vqlm\[lora\]'"):
        LoRA()


def test_other_ways_to_train_do_not_need_peft(monkeypatch):
    plain = builtins.__import__

    def without(name, *arguments, **named):
        if name.startswith("peft"):
            raise ModuleNotFoundError(name)
        return plain(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    model = make()
    for tune in (Full(), NewRowsOnly()):
        tune.prepare(model, 300)
        tune.finish(model)
