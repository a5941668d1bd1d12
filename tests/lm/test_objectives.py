"""Objectives against hand-written cross-entropy in float64; memory-saving forms against the plain ones; ranks."""

import math
import os
import shutil

import pytest
import torch
from on_ranks import make_documents
from tiny import HEADS, make_model
from torch.nn import functional as F

from lm.architecture import exchanged
from lm.learner import Drift, LMLearner, model_flops, norm, parts
from lm.model import decoder_layers
from lm.objectives import scoring, soft_codes
from lm.objectives.full_vocabulary import FullVocabulary
from lm.objectives.next_token import NextToken, measure
from lm.objectives.scoring import Weights, cross_entropy, score
from lm.objectives.soft_codes import SoftCodes
from lm.packing import pack
from lm.sequence import NONE, Image, Text
from vqlm.errors import ConfigError
from vqlm.training import Budget

FORMS = {
    "flat": {"layout": "flat"},
    "stacked": {"layout": "stacked"},
    "delayed": {"layout": "delayed"},
    "sizes": {"layout": "stacked", "more_grids": ((1, 3),)},
    "row ends": {"layout": "stacked", "row_ends": True},
}


def made(head="linear", form="stacked"):
    """A model in float64 and a batch of two documents, one of them with two pictures."""
    model, _ = make_model(head, **FORMS[form])
    model.double()
    random = torch.Generator().manual_seed(0)
    pictures = [
        Image(torch.randint(0, 16, (*grid, 2), generator=random)) for grid in (*model.form.grids, (2, 2))
    ]
    documents = [[Text((5, 6)), *pictures[:-1], Text((7,))], [pictures[-1], Text((9, 10, 11))]]
    return model, pack([model.form.lay(each) for each in documents], model.form, 64)


def each_by_hand(model, batch, compete):
    """(is it a picture's, logits of the ids among which it has to be found, which of them it is), label by label.

    compete(id) → those ids.
    """
    predicted = model.teach(batch.ids_BTW, batch.next_BTW, batch.mask, batch.positions_BT)
    weight = model.lm.get_output_embeddings().weight
    offset, n = model.form.vocabulary.image_offset, 0
    for row_TC, next_TW in zip(predicted.hidden_BTC, batch.next_BTW, strict=True):
        for hidden_C, next_W in zip(row_TC, next_TW, strict=True):
            is_picture = any(i >= offset for i in next_W.tolist())
            for column, token in enumerate(next_W.tolist()):
                if token == NONE:
                    continue
                feature_C = predicted.features[column][n] if is_picture else hidden_C
                ids = compete(token)
                yield is_picture, feature_C @ weight[ids].T, ids.index(token)
            n += is_picture


def by_hand(model, batch, compete):
    """[text, image] sums of -log p."""
    sums = [torch.zeros((), dtype=torch.float64)] * 2
    for is_picture, logits, index in each_by_hand(model, batch, compete):
        sums[is_picture] = sums[is_picture] + F.cross_entropy(logits, torch.tensor(index))
    return sums


def legal(vocabulary):
    v = vocabulary
    marks = {v.bos, v.pad, v.image_end, *v.sizes, *([] if v.row_end is None else [v.row_end])}

    def compete(token):
        if token in v.sizes:
            return list(v.sizes)
        if token < v.image_offset:
            return [i for i in range(v.image_offset) if i not in marks]
        ids = v.image_range((token - v.image_offset) // v.codebook_size)
        return list(range(ids.start, ids.stop))

    return compete


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_cross_entropy_over_the_legal_ids(head, form):
    model, batch = made(head, form)
    text, image = measure(model, batch)
    expected = by_hand(model, batch, legal(model.form.vocabulary))
    torch.testing.assert_close(text.nll, expected[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(image.nll, expected[1], atol=1e-9, rtol=0)
    sizes = 2 + 1 if form == "sizes" else 0
    marks = 3 if form == "sizes" else 2  # <image_start> of each picture
    assert text.count == 2 + 1 + 3 + marks + sizes + 2  # … and two <eos>
    assert image.count == (8 + 6 + 8 if form == "sizes" else 16)


@pytest.mark.parametrize("form", FORMS)
def test_the_full_vocabulary_is_cross_entropy_over_all_ids(form):
    model, batch = made("layered" if form != "flat" else "linear", form)
    text, image = FullVocabulary().measure(model, batch)
    expected = by_hand(model, batch, lambda token: list(range(model.form.vocabulary.size)))
    torch.testing.assert_close(text.nll, expected[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(image.nll, expected[1], atol=1e-9, rtol=0)
    narrow = measure(model, batch)
    assert text.nll > narrow[0].nll and image.nll > narrow[1].nll


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", [NextToken, FullVocabulary])
def test_log_z_is_that_of_all_ids_that_compete(objective, form):
    model, batch = made("linear" if form == "flat" else "layered", form)
    vocabulary = model.form.vocabulary
    compete = legal(vocabulary) if objective is NextToken else lambda token: list(range(vocabulary.size))
    squares = {False: [], True: []}
    for is_picture, logits, _ in each_by_hand(model, batch, compete):
        squares[is_picture].append(torch.logsumexp(logits.detach(), 0).item() ** 2)
    logs = objective().losses(model, batch)[1]
    for name, is_picture in (("text", False), ("image", True)):
        expected = math.sqrt(sum(squares[is_picture]) / len(squares[is_picture]))
        assert logs[f"{name}_log_z"] == pytest.approx(expected, rel=1e-6), name


def test_rows_beyond_the_vocabulary_do_not_compete():
    model, batch = made()
    expected = FullVocabulary().measure(model, batch)
    model.lm.resize_token_embeddings(model.form.vocabulary.size + 5, mean_resizing=False)
    with torch.no_grad():
        model.lm.get_output_embeddings().weight[-5:] = 9.0
    for part, same in zip(FullVocabulary().measure(model, batch), expected, strict=True):
        torch.testing.assert_close(part.nll, same.nll, atol=1e-9, rtol=0)


def gradients(model, losses):
    model.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 700, 1500])
def test_logits_made_in_parts_have_the_same_loss_and_gradients(chunk, monkeypatch):
    model, batch = made("layered")
    largest, widths = [], {}
    plain = scoring.cross_entropy

    def watched(logits, *rest):
        largest.append(logits.numel())
        widths[logits.shape[1]] = max(len(logits), widths.get(logits.shape[1], 0))
        return plain(logits, *rest)

    monkeypatch.setattr(scoring, "cross_entropy", watched)

    def legal_in_parts():
        return Weights(0.2, 1.0, 0.1).weigh(*measure(model, batch, chunk))[0]

    roads = {
        "legal": (lambda: NextToken(z=0.1).losses(model, batch)[0], legal_in_parts),
        "full": (
            lambda: FullVocabulary(z=0.1).losses(model, batch)[0],
            lambda: FullVocabulary(z=0.1, chunk=chunk).losses(model, batch)[0],
        ),
    }
    for whole, in_parts in roads.values():
        expected_loss, expected = whole(), gradients(model, whole())
        largest.clear(), widths.clear()
        found_loss, found = in_parts(), gradients(model, in_parts())
        assert max(largest) <= max(chunk, model.form.vocabulary.size)
        assert all(rows <= max(1, chunk // width) for width, rows in widths.items())
        assert len(largest) > 8
        for name, loss in expected_loss.items():
            torch.testing.assert_close(found_loss[name], loss, atol=1e-12, rtol=1e-12)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=1e-10, msg=name)


def test_parts_keep_no_logits_for_the_backward_pass():
    weight = torch.randn(50, 8, requires_grad=True)
    kept = []
    for limit in (10_000, 100):
        logits = []

        def remember(x, logits=logits):
            logits += [len(x)] if x.ndim == 2 and x.shape[1] == 50 and len(x) != 8 else []
            return x

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
            x = torch.randn(40, 8, requires_grad=True)
            score(x, torch.zeros(40, dtype=torch.int64), lambda f: f @ weight.T, 50, limit=limit)
        kept.append(sum(logits))
    assert kept[0] >= 40 and kept[1] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("some", [False, True], ids=["all compete", "some compete"])
@pytest.mark.parametrize("block", [3 * 40, 7])  # three rows at once, then one; less than a row
def test_the_competition_is_logsumexp_and_gather_and_so_are_its_gradients(some, dtype, block, monkeypatch):
    random = torch.Generator().manual_seed(0)
    logits_NV = (5 * torch.randn(7, 40, generator=random)).to(dtype)
    allowed_V = torch.rand(40, generator=random) < 0.6 if some else None
    targets_N = torch.arange(40)[allowed_V if some else slice(None)][:7]
    to_z_N, to_chosen_N = torch.randn(2, 7, generator=random)
    monkeypatch.setattr(scoring, "BLOCK", block)

    def plain(x_NV):
        x_NV = x_NV.double()
        x_NV = x_NV if allowed_V is None else x_NV.masked_fill(~allowed_V, -math.inf)
        return x_NV.logsumexp(-1), x_NV.gather(-1, targets_N[:, None])[:, 0]

    def both(road):
        x_NV = logits_NV.clone().requires_grad_()
        z_N, chosen_N = road(x_NV)
        ((z_N * to_z_N).sum() + (chosen_N * to_chosen_N).sum()).backward()
        assert torch.equal(x_NV.detach(), logits_NV)
        return z_N, chosen_N, x_NV.grad

    found = both(lambda x_NV: scoring.Competition.apply(x_NV, targets_N, allowed_V))
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found[2].dtype == dtype
    exact = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    for mine, expected in zip(found[:2], both(plain)[:2], strict=True):
        torch.testing.assert_close(mine.double(), expected, atol=exact, rtol=exact)
    torch.testing.assert_close(found[2], both(plain)[2], atol=exact, rtol=exact if exact < 1e-6 else 1e-2)


def test_an_id_that_may_not_stand_has_no_chance_and_no_slope():
    logits = torch.zeros(2, 4, requires_grad=True)
    found = cross_entropy(logits, torch.tensor([0, 3]), allowed_V=torch.tensor([True, True, False, False]))
    assert float(found.nll.detach()) == math.inf and float(found.entropy) == pytest.approx(2 * math.log(2))
    found.nll.backward()
    assert logits.grad.tolist() == [[-0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]]


def test_sums_over_bf16_logits_are_taken_in_fp32():
    random = torch.Generator().manual_seed(0)
    logits_NV, soft_NV = 5 * torch.randn(2, 64, 300, generator=random)
    logits_NV, soft_NV = logits_NV.bfloat16(), soft_NV.softmax(-1)
    targets_N = torch.randint(300, (64,), generator=random)
    found = cross_entropy(logits_NV, targets_N, soft_NV)
    expected = cross_entropy(logits_NV.double(), targets_N, soft_NV.double())
    for name in ("nll", "z", "entropy", "soft"):
        assert float(getattr(found, name)) == pytest.approx(float(getattr(expected, name)), rel=1e-5), name


def test_entropy_is_that_of_the_distribution():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, -math.inf], [3.0, 1.0, 0.0, -1.0, 2.0]])
    found = cross_entropy(logits, torch.tensor([0, 0])).entropy
    expected = math.log(4) + float(torch.distributions.Categorical(logits=logits[1]).entropy())
    assert float(found) == pytest.approx(expected, rel=1e-6)
    many = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0))
    exact = float(torch.distributions.Categorical(logits=many).entropy().sum())
    assert float(cross_entropy(many, torch.zeros(1000, dtype=torch.int64)).entropy) == pytest.approx(
        exact, rel=0.02
    )


@pytest.mark.parametrize("objective", [NextToken, FullVocabulary])
def test_an_absent_modality_costs_nothing(objective):
    model, _ = make_model()
    batch = pack([model.form.lay([Text((5, 6))])], model.form, 64)
    losses, logs = objective().losses(model, batch)
    assert float(losses["image"].detach()) == 0 and not {"image_bits", "image_log_z"} & set(logs)
    total = torch.stack(list(losses.values())).sum()
    assert math.isfinite(float(total.detach()))
    total.backward()


@pytest.mark.parametrize("wrong", [{"text": -1.0}, {"text": 0.0, "image": 0.0}, {"z": -0.1}])
@pytest.mark.parametrize("objective", [NextToken, FullVocabulary])
def test_impossible_weights_are_refused(objective, wrong):
    with pytest.raises(ValueError, match="text or image positive"):
        objective(**wrong)


# --- soft codes -------------------------------------------------------------------------------------------------------

VECTORS = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))


def softened(temperature):
    soft = SoftCodes(temperature)
    soft.look_at(VECTORS)
    return soft


def test_soft_targets_are_the_formula():
    found = softened(0.7).distribution(torch.tensor([3, 8]), 1)
    for row, code in zip(found, (3, 8), strict=True):
        squares = [
            float(sum((a - b) ** 2 for a, b in zip(VECTORS[1, code], e, strict=True))) for e in VECTORS[1]
        ]
        expected = torch.softmax(torch.tensor([-square / 0.7 for square in squares]), 0)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)


def test_cold_soft_codes_are_hard_ones_and_warm_ones_the_cross_entropy_of_distributions():
    model, batch = made("depth_transformer", "delayed")
    hard = NextToken().losses(model, batch)
    cold = NextToken(soft=softened(1e-6)).losses(model, batch)
    for one, other in zip(hard, cold, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert float(other[name]) == pytest.approx(float(value), rel=1e-6), name

    logits, codes = torch.randn(5, 16), torch.tensor([1, 1, 4, 9, 0])
    target = softened(2.0).distribution(codes, 0)
    found = cross_entropy(logits, codes, target)
    torch.testing.assert_close(found.aim, F.cross_entropy(logits, target, reduction="sum"))
    torch.testing.assert_close(
        found.nll, F.cross_entropy(logits, codes, reduction="sum")
    )  # what is logged as bits


@pytest.mark.parametrize("form", ["flat", "stacked", "delayed"])
def test_drawn_codes_are_read_where_the_head_was_told_of_them(form, monkeypatch):
    monkeypatch.setattr(soft_codes, "CHUNK", 32)
    model, batch = made("linear", form)
    v = model.form.vocabulary
    batch.ids_BTW[0, 5] = torch.where(
        batch.ids_BTW[0, 5] >= v.image_offset, v.image_offset, batch.ids_BTW[0, 5]
    )
    torch.manual_seed(0)
    ids, following = softened(3.0).replace(v, batch.ids_BTW, batch.next_BTW)
    is_code = batch.next_BTW >= v.image_offset
    assert torch.equal(following[~is_code], batch.next_BTW[~is_code])
    assert not torch.equal(following[is_code], batch.next_BTW[is_code])
    depth = lambda x: (x[is_code] - v.image_offset) // v.codebook_size  # noqa: E731
    assert torch.equal(depth(following), depth(batch.next_BTW))
    same = (batch.ids_BTW[:, 1:] == batch.next_BTW[:, :-1]) & is_code[:, :-1]
    assert torch.equal(ids[:, 1:][same], following[:, :-1][same])
    assert torch.equal(ids[:, 1:][~same], batch.ids_BTW[:, 1:][~same])  # text, noise and first positions


def test_codes_are_drawn_as_often_as_the_distribution_says():
    soft = softened(2.0)
    torch.manual_seed(0)
    drawn = soft._draw(torch.full((20_000,), 5), 0).bincount(minlength=16) / 20_000
    assert float((drawn - soft.distribution(torch.tensor([5]), 0)[0]).abs().max()) < 0.015


def test_soft_codes_without_vectors_or_temperature_are_refused():
    with pytest.raises(ValueError, match="temperature=0"):
        SoftCodes(0.0)
    with pytest.raises(RuntimeError, match="look_at"):
        SoftCodes().distribution(torch.tensor([0]), 0)


# --- the learner ------------------------------------------------------------------------------------------------------


def numbers_kept(learner, batch):
    """For the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        learner.losses(batch)
    return sum(kept)


def learner_of(model, **options):
    return LMLearner(model, NextToken(), torch.optim.AdamW, Budget(batches=1), **options)


@pytest.mark.parametrize("form", ["flat", "stacked"])
@pytest.mark.parametrize("head", HEADS)
def test_layers_that_run_again_have_the_same_gradients(head, form):
    model, batch = made(head, form)
    model.train()
    expected = gradients(model, NextToken().losses(model, batch)[0])
    calls, layers = [], decoder_layers(model.lm.base_model)
    handle = layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    losses = learner_of(model, recompute=True).losses(batch)[0]
    assert "forward" not in vars(layers[0])
    found = gradients(model, losses)
    handle.remove()
    assert len(calls) == 2  # forward, and again in the backward pass
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=0, msg=name)


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler"
)
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_have_the_same_gradients_and_share_their_kernels(recompute):
    from torch._dynamo.utils import counters

    model, batch = made("layered")  # its hooks stand between layers
    model.train()
    expected = gradients(model, NextToken().losses(model, batch)[0])
    torch._dynamo.reset()
    counters.clear()
    learner = learner_of(model, recompute=recompute, compile_layers=True)
    for _ in range(2):
        found = gradients(model, learner.losses(batch)[0])
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            # not closer: a fused norm rounds to fp32 elsewhere than the layer's own does
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5, msg=name)
    if recompute:  # the layers' inputs alone are kept
        assert 3 * numbers_kept(learner, batch) < numbers_kept(learner_of(model), batch)
    assert counters["stats"]["unique_graphs"] == 2  # the one that asks for a compiler, and one for all layers
    assert not counters["graph_break"]
    assert "forward" not in vars(decoder_layers(model.lm.base_model)[0])


def test_a_block_that_fails_leaves_every_layer_its_own_forward():
    layers = decoder_layers(made()[0].lm.base_model)
    with pytest.raises(KeyError), exchanged(dict.fromkeys(layers, print)):
        assert layers[0].forward is print
        raise KeyError
    assert not any("forward" in vars(layer) for layer in layers)


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch):
    def missing(*_):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", missing)
    model, batch = made()
    with pytest.raises(
        ConfigError, match=r"\(no C\+\+ compiler\)\. It needs a C\+\+ .* learner.compile_layers=false"
    ):
        learner_of(model, compile_layers=True).losses(batch)


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_norms_by_part_add_up(tied):
    from tiny import QWEN, make_format, make_head

    from lm.model import MultimodalLM, from_scratch

    form, _ = make_format()
    lm = from_scratch({**QWEN, "tie_word_embeddings": tied}, form.vocabulary.size, 0)
    model = MultimodalLM(lm, make_head("layered", form.width), form)
    batch = make_documents()(1)[0]
    torch.stack(list(NextToken().losses(model, batch)[0].values())).sum().backward()
    norms = {name: float(norm(part(), torch.device("cpu"))) for name, part in parts(model).items()}
    assert norms.keys() == {"text_rows", "image_rows", "trunk", "head"}
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert math.sqrt(sum(n**2 for n in norms.values())) == pytest.approx(float(total), rel=1e-5)
    rows = model.lm.get_output_embeddings().weight.grad[form.vocabulary.image_offset :]
    if tied:
        assert norms["image_rows"] == pytest.approx(float(rows.norm()), rel=1e-5)
    assert min(norms.values()) > 0


def test_vectors_and_named_parameters_are_not_decayed():
    model, _ = make_model()
    rows = model.lm.get_input_embeddings().weight
    frozen = model.lm.base_model.layers[0].mlp.up_proj.weight.requires_grad_(False)

    def groups():
        adam = torch.optim.AdamW
        learner = LMLearner(model, NextToken(), lambda groups: adam(groups, lr=1.0), Budget(batches=1))
        return [group["params"] for group in learner.optimizer.param_groups]

    for held in (0, 7):
        model.held_rows = held  # as `lm.tune` leaves a model whose old rows must stay
        decayed, spared = groups()
        assert all(p.ndim >= 2 for p in decayed)
        assert (id(rows) in {id(p) for p in spared}) == bool(held)
        grouped = [id(p) for p in (*decayed, *spared)]
        assert sorted(grouped) == sorted({id(p) for p in model.parameters()} - {id(frozen)})


def test_drift_is_the_last_tenth_and_the_largest_of_what_a_run_went_through():
    values = {"text": [5.0, 9.0, *[7.0] * 16, 1.0, 3.0], "image": [6.0, 2.0, *[4.0] * 18]}
    drift = Drift()
    for n in range(20):
        if n == 10:  # a run that goes on has what it saw before
            drift, seen = Drift(), drift.seen
            drift.seen = {name: kept.clone() for name, kept in seen.items()}
        drift.add({f"{name}_log_z": each[n] for name, each in values.items()}, n / 20)
    assert drift.report() == {
        "text": {"log_z": 2.0, "log_z_largest": 9.0, "log_z_growth": 4.0},
        "image": {"log_z": 4.0, "log_z_largest": 6.0, "log_z_growth": 0.0},
    }
    short = Drift()
    short.add({"text_log_z": 3.0}, 0.0)
    assert short.report() == {"text": {"log_z": 3.0, "log_z_largest": 3.0, "log_z_growth": 0.0}}


def test_a_learner_remembers_drift_and_operations_and_leaves_bad_batches_out():
    model, _ = make_model()
    adam = torch.optim.AdamW

    def learner():
        found = LMLearner(model.train(), NextToken(), lambda groups: adam(groups, lr=0.0), Budget(batches=4))
        found.manual_backward = torch.Tensor.backward  # without a trainer
        return found

    first, batch = learner(), make_documents()(1)[0]
    first.training_step(batch, 0)
    log_z = NextToken().losses(model, batch)[1]["image_log_z"]
    assert first.drift.report()["image"]["log_z"] == pytest.approx(log_z, rel=1e-6)
    assert first.flops == model_flops(model, NextToken(), batch)
    second = learner()
    second.load_training_state(*first.training_state())
    assert (second.drift.report(), second.flops) == (first.drift.report(), first.flops)
    second.objective = Spoiled()
    with pytest.warns(UserWarning, match="skipped"):
        second.training_step(batch, 1)
    assert second.drift.report() == first.drift.report()
    second.load_extra_state({})  # a checkpoint of before it was measured


class Spoiled(NextToken):
    """Logits larger than ever, and a loss that is not finite."""

    def losses(self, model, batch):
        losses, logs = super().losses(model, batch)
        return {name: loss * math.nan for name, loss in losses.items()}, {**logs, "image_log_z": 1e9}


def test_operations_of_a_step_are_those_of_its_matrix_products():
    """Against torch's counter, for one document without padding (it counts the scores of masked pairs too)."""
    from torch.utils.flop_counter import FlopCounterMode

    for head in HEADS:
        model, _ = make_model(head)
        model.lm.set_attn_implementation("eager")
        picture = Image(torch.zeros(2, 2, 2, dtype=torch.int64))
        batch = pack([model.form.lay([Text(tuple(range(20))), picture])], model.form, 64)
        with FlopCounterMode(display=False) as counter:
            torch.stack(list(NextToken().losses(model, batch)[0].values())).sum().backward()
        T, A, layers = batch.ids_BTW.shape[1], 32, 5
        masked = 12 * layers * A * (T * T - T * (T + 1) / 2)
        found = model_flops(model, NextToken(), batch) + masked
        if head == "parallel":  # it works at all positions, and is needed at those before picture ids
            found += 6 * sum(p.numel() for p in model.head.parameters() if p.ndim > 1) * (T - 4)
        # the counter also has the depth transformer's own small attention
        assert counter.get_total_flops() == pytest.approx(found, rel=0.03), head
