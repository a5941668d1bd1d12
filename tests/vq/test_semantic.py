"""Latents against captions: both losses by hand, what they may not see, ranks, scorers, and captions of any kind."""

import json
import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer
from torch import distributed as dist
from torch import multiprocessing
from torch.nn import functional as F

from vq.batches import Augment, PictureBatch, PictureBatches
from vq.codebook import CodebookReset
from vq.data import PictureSet
from vq.learner import TokenizerLearner
from vq.losses.codes import Codes
from vq.losses.reconstruction import Squared
from vq.losses.semantic import Captioning, Contrastive, caption_names, contrastive_loss, save_scorer
from vq.quantizers import Quantized
from vq.scorer import Aligner, Captioner, Scorer, quantized_latent
from vq.text import END, PADDING, PretrainedText, WordEncoder, to_bytes
from vq.tokenizer import ImageTokenizer, Reconstruction
from vq.train import finish
from vqlm.checkpoint import load_tensors, save_module
from vqlm.errors import ConfigError, Interrupted
from vqlm.hardware import Hardware
from vqlm.training import Budget, fit

CPU = torch.device("cpu")
NAMES = ["red apple", "green tree", "blue car", "red car", "old house", "two dogs", "a cat", "night sky"]


def contrastive(seed=0, **options):
    torch.manual_seed(seed)
    return Contrastive(4, WordEncoder(16, 512), width=16, **options)


def captioning(seed=0, **options):
    torch.manual_seed(seed)
    return Captioning(4, width=16, layers=1, heads=2, length=16, **options)


def batch_of(captions, seed=1):
    x_BCHW = torch.rand(len(captions), 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return PictureBatch(x_BCHW, [str(i) for i in range(len(captions))], captions)


def made_of(z_BDhw):
    """A forward pass with these latents, of which the quantized ones are another tensor."""
    tokenizer = make_tokenizer()
    return Reconstruction(torch.zeros(1), Quantized(2 * z_BDhw, None), z_BDhw, tokenizer.quantizer)


def latents(count, seed=2):
    return torch.randn(count, 4, 2, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def clip_by_hand(u, t, captions, scale):
    """Loops in float64: pair i against itself and the pairs of other captions."""
    u, t = u.detach().double(), t.detach().double()
    total = 0.0
    for a, b in ((u, t), (t, u)):
        for i in range(len(u)):
            own = scale * float(a[i] @ b[i])
            others = [scale * float(a[i] @ b[j]) for j in range(len(u)) if captions[j] != captions[i]]
            total += math.log(sum(math.exp(x - own) for x in [own, *others]))
    return total / 2 / len(u)


@pytest.mark.parametrize("where", ["encoder", "codes"])
@pytest.mark.parametrize("captions", [NAMES, ["a", "b", "a", "a", "c", "b"]])
def test_contrastive_is_the_loss_of_clip_by_hand(captions, where):
    loss, z = contrastive(latents=where, weight=0.5), latents(len(captions))
    found = loss(batch_of(captions), made_of(z))
    seen = z if where == "encoder" else 2 * z
    u, t = loss.judge.pictures(seen), loss.judge.captions(captions, CPU)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(len(u)))
    assert float(found.detach()) == pytest.approx(0.5 * clip_by_hand(u, t, captions, 1 / 0.07), rel=1e-5)


def test_contrastive_agrees_with_transformers_where_captions_differ():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    u, t = (F.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
    scale = torch.tensor(20.0)
    ours = contrastive_loss(u, t, torch.arange(7), scale)
    torch.testing.assert_close(ours, image_text_contrastive_loss(scale * t @ u.T))


def test_pictures_of_one_caption_are_no_negatives_of_each_other():
    """Perfect alignment costs nothing; taken for different captions, the two equal ones would cost 2/3 · ln 2."""
    u = torch.eye(3)[[0, 0, 1]]
    scale = torch.tensor(100.0)
    assert float(contrastive_loss(u, u, caption_names(["an apple", " an apple", "a tree"]), scale)) < 1e-6
    assert float(contrastive_loss(u, u, torch.arange(3), scale)) == pytest.approx(2 / 3 * math.log(2))


@pytest.mark.parametrize("make", [contrastive, captioning])
def test_gradients_reach_the_encoder_and_every_part_of_the_text_side(make):
    loss, tokenizer = make(), make_tokenizer().train()
    batch = batch_of(NAMES)
    loss(batch, tokenizer(batch.x_BCHW)).backward()
    missed = [name for name, p in loss.named_parameters() if p.grad is None or not p.grad.any()]
    assert missed == []
    first = next(tokenizer.encoder.parameters())  # nearest to the pixels
    assert first.grad is not None and first.grad.any()
    assert all(p.grad is None for p in tokenizer.decoder.parameters())


def trained(loss, steps):
    """Tokenizer and loss, fitted to eight pictures with captions."""
    tokenizer, batch = make_tokenizer().train(), batch_of(NAMES)
    optimizer = torch.optim.Adam([*tokenizer.encoder.parameters(), *loss.parameters()], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(batch, tokenizer(batch.x_BCHW)).backward()
        optimizer.step()
    return tokenizer.eval(), batch


@pytest.mark.parametrize(("make", "steps"), [(contrastive, 30), (captioning, 120)])
@torch.random.fork_rng()
def test_shuffled_captions_cost_more_after_training(make, steps):
    loss = make()
    tokenizer, batch = trained(loss, steps)
    with torch.no_grad():
        made = tokenizer(batch.x_BCHW)
        right = float(loss(batch, made))
        shuffled = PictureBatch(batch.x_BCHW, batch.ids, NAMES[3:] + NAMES[:3])
        wrong = float(loss(shuffled, made))
        scores = loss.judge.score(made.quantized.z_BDhw, NAMES)
    assert wrong > 1.5 * right
    assert int((scores.argmax(0) == torch.arange(8)).sum()) >= 6  # each caption's best picture


def test_the_scale_never_exceeds_100_and_finds_its_way_back():
    loss = contrastive(temperature=0.01)
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    loss(batch_of(NAMES), made_of(latents(8))).backward()
    assert float(loss.log_scale.detach().exp()) == pytest.approx(100)
    assert loss.log_scale.grad.abs() > 1e-3


def test_captioning_is_cross_entropy_over_three_bytes(monkeypatch):
    loss, z = captioning(weight=3.0), latents(2)
    found = float(loss(batch_of(["ab", "c"]), made_of(z)).detach())
    ids = torch.tensor([[END, 97, 98], [END, 99, END]])
    with torch.no_grad():
        logp = loss.judge(2 * z, ids).double().log_softmax(2)
    costs = [-logp[0, 0, 97], -logp[0, 1, 98], -logp[0, 2, END], -logp[1, 0, 99], -logp[1, 1, END]]
    assert found == pytest.approx(3 * float(sum(costs)) / 5, rel=1e-6)
    monkeypatch.setattr("vq.scorer.PAIRS", 3)
    with torch.no_grad():
        scores = loss.judge.score(2 * z, ["ab", "c"])
        torch.testing.assert_close(scores[:1, 1:], loss.judge.score(2 * z[:1], ["c"]))
    assert float(scores[0, 0]) == pytest.approx(-float(sum(costs[:3])), rel=1e-5)
    assert float(scores[1, 1]) == pytest.approx(-float(sum(costs[3:])), rel=1e-5)


def test_a_later_byte_changes_no_earlier_logit_and_latents_change_all():
    judge, z = captioning().judge, latents(1)
    ids, _ = to_bytes(["captions"], 16)
    changed = ids.clone()
    changed[0, 5] = 7
    with torch.no_grad():
        before, after, other = judge(z, ids), judge(z, changed), judge(-z, ids)
    assert torch.equal(before[0, :5], after[0, :5])
    assert bool((before[0, 5:] != after[0, 5:]).any(1).all())
    assert bool((before != other).any(2).all())


def test_the_captioner_tells_places_of_latents_apart():
    judge, z = captioning().judge, latents(1)
    ids, _ = to_bytes(["a"], 16)
    with torch.no_grad():
        assert not torch.allclose(judge(z, ids), judge(z.flip(3), ids), atol=1e-4)
        assert not torch.allclose(judge(z, ids), judge(z.flip(2), ids), atol=1e-4)


def test_bytes_of_captions():
    read, labels = to_bytes(["né", "", "abcdef"], 4)
    assert read.tolist() == [[END, 110, 195, 169], [END] * 4, [END, 97, 98, 99]]
    assert labels.tolist() == [[110, 195, 169, END], [END, *[PADDING] * 3], [97, 98, 99, 100]]


@pytest.mark.parametrize("make", [contrastive, captioning])
def test_pictures_without_a_caption_take_no_part(make):
    loss, z = make(), latents(5)
    some = loss(batch_of(["red", "", "a tree", " \n", "sky"]), made_of(z))
    alone = loss(batch_of(["red", "a tree", "sky"]), made_of(z[[0, 2, 4]]))
    torch.testing.assert_close(some, alone)
    none = loss(batch_of([""] * 5), made_of(z))
    none.backward()
    assert float(none.detach()) == 0
    assert not z.grad.any()


@pytest.mark.parametrize("make", [contrastive, captioning])
def test_captions_of_a_million_characters_and_broken_ones(make):
    captions = ["x" * 10**6, "word " * 200_000, "\ud800 half a pair", "\x00\u200b", "👩‍🚀" * 1000, "?"]
    loss, z = make(), latents(6)
    start = time.perf_counter()
    loss(batch_of(captions), made_of(z)).backward()
    assert time.perf_counter() - start < 2
    assert torch.isfinite(z.grad).all()


def test_a_loss_for_other_latents_is_refused():
    with pytest.raises(ConfigError, match=r"dim=8.*4 channels"):
        Captioning(8).check(make_tokenizer())
    contrastive().check(make_tokenizer())
    for build in (
        lambda: contrastive(temperature=0.001),
        lambda: contrastive(latents="decoder"),
        lambda: captioning(weight=0.0),
        lambda: Captioner(4, width=18),
        lambda: WordEncoder(0),
    ):
        with pytest.raises(ValueError, match=r"(temperature|latents|weight|width)="):
            build()


# --- several processes --------------------------------------------------------------------------------------

CAPTIONS = ["a", "b", "a", "", "c", "d", "b", "e"]
PARTS = [[0, 1, 2], [3, 4, 5, 6, 7]]


def gradients(rows):
    """The loss of these pictures, and gradients of its parameters and of a small encoder's."""
    loss = contrastive()
    encoder = torch.nn.Conv2d(3, 4, 8, 8)
    batch = batch_of(CAPTIONS)
    batch = PictureBatch(batch.x_BCHW[rows], batch.ids, [CAPTIONS[row] for row in rows])
    value = loss(batch, made_of(encoder(batch.x_BCHW)))
    value.backward()
    parameters = [*loss.named_parameters(), *encoder.named_parameters()]
    return {"value": value.detach(), **{name: p.grad for name, p in parameters}}


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = gradients(PARTS[rank])
    for tensor in found.values():
        dist.all_reduce(tensor)
        tensor /= 2
    if rank == 0:
        save_file(
            {name: tensor.contiguous() for name, tensor in found.items()}, f"{folder}/found.safetensors"
        )
    dist.destroy_process_group()


def test_two_processes_give_the_loss_and_the_averaged_gradients_of_one(tmp_path):
    # fork, as loader workers are made: a spawned process would first import torch for seconds
    multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    alone, together = gradients(list(range(8))), load_file(str(tmp_path / "found.safetensors"))
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, msg=name)


# --- scorers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [contrastive, captioning])
def test_a_saved_scorer_gives_the_same_scores_for_codes_and_pixels(make, tmp_path):
    loss, tokenizer, x = make(), make_tokenizer(), batch_of(NAMES).x_BCHW
    assert save_scorer({"named": loss, "squared": Squared()}, tokenizer, tmp_path) == [tmp_path / "named"]
    scorer = Scorer.from_pretrained(tmp_path / "named", tokenizer)
    with torch.no_grad():
        expected = loss.judge.score(quantized_latent(tokenizer, x), NAMES[:3])
    found = scorer.score(tokenizer.encode(x), NAMES[:3])
    assert found.shape == (8, 3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scorer.score(x, NAMES[:3]), expected)
    assert scorer.score(x, []).shape == (8, 0)


def test_a_scorer_refuses_another_tokenizer(tmp_path):
    mine, other = make_tokenizer(), make_tokenizer(seed=1)
    save_scorer({"contrastive": contrastive()}, mine, tmp_path)
    with pytest.raises(ConfigError, match=rf"{mine.fingerprint}.*{other.fingerprint}"):
        Scorer.from_pretrained(tmp_path / "contrastive", other)
    with pytest.raises(RuntimeError, match="bind"):
        Scorer(Aligner(4, WordEncoder(8, 16)), mine.fingerprint).score(torch.zeros(1, 3, 16, 16), ["a"])


def test_vq_train_leaves_a_scorer_that_fits_its_tokenizer(tmp_path):
    finish(learner(2), SimpleNamespace(train_sets=[PICTURES]), 8, tmp_path / "tokenizer")
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    for name in ("contrastive", "captioning"):
        scorer = Scorer.from_pretrained(tmp_path / "scorer" / name, tokenizer)
        assert scorer.score(batch_of(NAMES).x_BCHW, NAMES).shape == (8, 8)
    assert not any("judge" in name for name in load_file(str(tmp_path / "tokenizer" / "model.safetensors")))


# --- training -----------------------------------------------------------------------------------------------

PIXELS = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TITLES = [NAMES[i % 8] if i % 5 else "" for i in range(20)]
PICTURES = PictureSet(PIXELS, [str(i) for i in range(20)], TITLES, TITLES)


def learner(batches=6):
    losses = {"squared": Squared(), "commitment": Codes("commitment", 0.25)}
    losses |= {"contrastive": contrastive(weight=0.1), "captioning": captioning(weight=0.1)}

    def optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3)

    tokenizer, budget = make_tokenizer().train(), Budget(batches=batches, warmup=1)
    return TokenizerLearner(tokenizer, losses, CodebookReset(window=2), optimizer, budget)


class Ended(PictureBatches):
    """The run is told to end while its batch 3 is read."""

    def __getitem__(self, n):
        if n == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(n)


def test_a_resumed_run_with_semantic_losses_is_the_uninterrupted_one_to_the_bit(tmp_path):
    hardware, whole, first, second = Hardware(CPU, "fp32"), learner(), learner(), learner()
    with torch.no_grad():  # what a resumed run must not keep
        for parameter in second.parameters():
            parameter.add_(1.0)
    arguments = (PICTURES, 4, 0, Augment())
    fit(whole, lambda total: PictureBatches(*arguments, total), tmp_path / "whole", hardware, "test")
    with pytest.raises(Interrupted):
        fit(first, lambda total: Ended(*arguments, total), tmp_path / "parts", hardware, "test")
    fit(second, lambda total: PictureBatches(*arguments, total), tmp_path / "parts", hardware, "test")
    expected, found = whole.training_state()[0], second.training_state()[0]
    assert expected.keys() == found.keys()
    assert any(name.startswith("companions/captioning.judge") for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


# --- text encoders of transformers --------------------------------------------------------------------------


def save_text_model(folder, kind="bert", two_towers=False):
    """A random text encoder of three words' vocabulary, as transformers saves one."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"[PAD]": 0, "[UNK]": 1, "[END]": 2, "red": 3, "apple": 4, "tree": 5}
    split = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    split.post_processor = processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 6, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 12}
    if two_towers:
        vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 8}
        vision |= {"num_attention_heads": 2, "patch_size": 4}
        config = transformers.CLIPConfig(text_config={**sizes, "eos_token_id": 2}, vision_config=vision)
        model = transformers.CLIPModel(config)
    elif kind == "clip":
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, eos_token_id=2))
    else:
        model = transformers.BertModel(transformers.BertConfig(**sizes))
    model.eval().save_pretrained(folder)
    return model


def test_a_text_encoder_of_transformers_is_read_with_masked_mean_pooling(tmp_path):
    model = save_text_model(tmp_path)
    text = PretrainedText(str(tmp_path))
    found = text(["red apple", "tree", "red " * 10**5], CPU)
    for row, ids in enumerate([[3, 4, 2], [5, 2], [3] * 11 + [2]]):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)
    assert text.width == 8 and text.tokens == 12
    assert text([], CPU).shape == (0, 8)
    assert torch.isfinite(text(["", "\ud800", "x" * 10**6], CPU)).all()


@pytest.mark.parametrize("two_towers", [False, True])
def test_the_text_tower_of_clip_gives_its_own_pooled_vector(two_towers, tmp_path):
    model = save_text_model(tmp_path, "clip", two_towers)
    tower = model.text_model if two_towers else model
    with torch.no_grad():
        expected = tower(input_ids=torch.tensor([[3, 4, 2]])).pooler_output
    found = PretrainedText(str(tmp_path), pooling="own")(["red apple"], CPU)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_frozen_encoder_is_in_no_checkpoint_and_a_changed_one_is_refused(tmp_path):
    save_text_model(tmp_path / "text")
    loss = Contrastive(4, PretrainedText(str(tmp_path / "text")), width=8)
    assert not any(".net." in name for name in loss.state_dict())
    assert sum(p.numel() for p in loss.judge.text.parameters()) == 0
    loss(batch_of(NAMES), made_of(latents(8))).backward()
    assert loss.judge.caption.weight.grad.any()
    tokenizer = make_tokenizer()
    save_scorer({"c": loss}, tokenizer, tmp_path)
    again = Scorer.from_pretrained(tmp_path / "c", tokenizer)
    x = batch_of(NAMES).x_BCHW
    with torch.no_grad():
        torch.testing.assert_close(
            again.score(x, NAMES), loss.judge.score(quantized_latent(tokenizer, x), NAMES)
        )
    weights = load_file(str(tmp_path / "text" / "model.safetensors"))
    weights["embeddings.word_embeddings.weight"] += 0.1
    save_file(weights, str(tmp_path / "text" / "model.safetensors"), {"format": "pt"})
    with pytest.raises(ConfigError, match="have changed since"):
        Scorer.from_pretrained(tmp_path / "c", tokenizer)


def test_a_trained_encoder_is_saved_with_the_scorer(tmp_path):
    save_text_model(tmp_path / "text")
    text = PretrainedText(str(tmp_path / "text"), frozen=False)
    with torch.no_grad():
        text.net.embeddings.word_embeddings.weight.add_(1.0)
    save_module(tmp_path / "saved", text)
    again = PretrainedText(str(tmp_path / "text"), frozen=False)
    load_tensors(again, tmp_path / "saved" / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(["red"], CPU), text.eval()(["red"], CPU))
    again(["red"], CPU).sum().backward()
    assert again.net.embeddings.word_embeddings.weight.grad.any()


def test_an_unusable_encoder_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(ConfigError, match=r"path=.*folder"):
            PretrainedText(str(path))
    save_text_model(tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    (tmp_path / "text" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ConfigError, match=r"weights are missing.*layer\.1\."):
        PretrainedText(str(tmp_path / "text"))
