"""The training loop: resumed = uninterrupted, to the bit; signals, NaN, damaged checkpoints, counting."""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from faults.runs import Disturbed
from tiny import make_model, make_tokenizer

from lm.data import Pairs
from lm.learner import LMLearner
from lm.mixture import DocumentBatches, Mixture
from lm.objectives.next_token import NextToken
from lm.objectives.soft_codes import SoftCodes
from vq.batches import Augment, PictureBatches
from vq.codebook import CodebookReset
from vq.data import PictureSet
from vq.learner import TokenizerLearner
from vq.losses.codes import Codes
from vq.losses.reconstruction import Squared
from vqlm.errors import Interrupted
from vqlm.hardware import Hardware, detect
from vqlm.training import Budget, Checkpoints, Throughput, fit, read_log

CPU = Hardware(torch.device("cpu"), "fp32")
PIXELS = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
NAMES = [f"picture {i}" for i in range(20)]
PICTURES = PictureSet(PIXELS, NAMES, NAMES, NAMES)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def tokenizer_learner(batches=8, **options):
    tokenizer = make_tokenizer().train()
    losses = {"squared": Squared(), "commitment": Codes("commitment", 0.25)}
    budget = Budget(batches=batches, warmup=2)
    return TokenizerLearner(tokenizer, losses, CodebookReset(window=2), adam, budget, **options)


def pictures(total):
    return PictureBatches(PICTURES, 4, 0, Augment(), total)


def lm_learner(batches=8):
    model, _ = make_model()
    return LMLearner(model.train(), NextToken(), adam, Budget(batches=batches, warmup=2))


def documents(total):
    form = make_model()[0].form
    generator = torch.Generator().manual_seed(0)
    names = [str(i) for i in range(12)]
    codes = torch.randint(0, 16, (12, 2, 2, 2), generator=generator)
    pairs = Pairs([(i, i + 1) for i in range(12)], codes, names, names, names)
    return DocumentBatches(pairs, form, Mixture(), 4, 32, 0, total)


def terminate(batch):
    os.kill(os.getpid(), signal.SIGTERM)
    return batch


def state(learner):
    tensors, data = learner.training_state()
    data["counters"].pop("seconds")
    return tensors, data


def drawing_learner(batches=8):
    """What the model reads is drawn from torch's own random numbers, and layers run again."""
    soft = SoftCodes(2.0)
    soft.look_at(torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0)))
    budget = Budget(batches=batches, warmup=2)
    model = make_model()[0].train()
    return LMLearner(model, NextToken(soft=soft), adam, budget, average=0.5, recompute=True)


ROADS = {
    "tokenizer": (tokenizer_learner, pictures),
    "language model": (lm_learner, documents),
    "drawn codes": (drawing_learner, documents),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("road", ROADS)
def test_a_terminated_and_resumed_run_is_the_uninterrupted_one_to_the_bit(road, workers, tmp_path):
    make, batches = ROADS[road]
    torch.manual_seed(0)
    whole = make()
    fit(whole, batches, tmp_path / "whole", CPU, "test")

    torch.manual_seed(0)
    first = make()
    with pytest.raises(Interrupted) as exit_:
        fit(first, lambda total: Disturbed(batches(total), {3}, terminate), tmp_path / "parts", CPU, "test")
    assert exit_.value.code == 143
    assert first.batches_seen == 4  # the step was finished
    torch.manual_seed(99)
    second = make()
    fit(second, batches, tmp_path / "parts", CPU, "test", workers)

    expected, found = state(whole), state(second)
    assert expected[1] == found[1]
    assert expected[0].keys() == found[0].keys()
    assert len(expected[0]) > 40
    for name, tensor in expected[0].items():  # the state of the random numbers too
        assert torch.equal(tensor, found[0][name]), name
    logged = [e["batch"] for e in read_log(tmp_path / "parts" / "log.jsonl")]
    assert logged == sorted(set(logged))
    assert logged[-1] == 8


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = tokenizer_learner(3)
    fit(first, pictures, tmp_path, CPU, "test")
    again = tokenizer_learner(3)
    fit(again, lambda total: pytest.fail("read data"), tmp_path, CPU, "test")
    assert again.batches_seen == 3
    assert torch.equal(again.model.quantizer.codebook(0), first.model.quantizer.codebook(0))


def nan_pixel(batch):
    x = batch.x_BCHW.clone()
    x[1, 0, 0, 0] = float("nan")
    return replace(batch, x_BCHW=x)


def name_it_bad(batch):
    return replace(batch, captions=["bad"] * len(batch.captions))


class Spoiled(Squared):
    """A loss that is not finite for captions "bad": by its value, or by its gradient alone."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def __call__(self, batch, made):
        loss = super().__call__(batch, made)
        if batch.captions[0] != "bad":
            return loss
        if self.factor == "gradient":
            made.x_BCHW.register_hook(lambda g: g * float("inf"))
            return loss
        return loss * self.factor


@pytest.mark.parametrize(
    ("spoil", "factor", "message"),
    [
        (nan_pixel, 1.0, "pixels: picture"),
        (name_it_bad, float("nan"), "loss is nan"),
        (name_it_bad, float("inf"), "loss is inf"),
        (name_it_bad, "gradient", "gradient norm"),
    ],
)
def test_a_batch_that_is_not_finite_changes_nothing(spoil, factor, message, tmp_path):
    """Bad batches at the end leave what a run without them leaves: weights, codebooks, optimizer, resets."""

    def learner(batches):
        made = tokenizer_learner(batches)
        made.budget = Budget(batches=batches, warmup=2, cooldown=0.0)
        made.terms = {**made.terms, "squared": Spoiled(factor)}
        return made

    disturbed, reference = learner(5), learner(3)
    with pytest.warns(UserWarning, match=message):
        fit(disturbed, lambda total: Disturbed(pictures(total), {3, 4}, spoil), tmp_path / "a", CPU, "test")
    fit(reference, pictures, tmp_path / "b", CPU, "test")
    assert (disturbed.batches_seen, disturbed.bad_batches) == (5, 2)
    expected, found = state(reference)[0], state(disturbed)[0]
    for name, tensor in expected.items():
        if not name.startswith("random/"):
            assert torch.equal(tensor, found[name]), name


def test_the_pictures_of_a_bad_batch_are_named(tmp_path):
    learner = tokenizer_learner(1)
    batch = pictures(1)[0]
    with pytest.warns(UserWarning, match=f"pixels: {batch.ids[1]};"):
        fit(learner, lambda total: Disturbed(pictures(total), {0}, nan_pixel), tmp_path, CPU, "test")


def test_averaged_weights_are_the_result_and_survive_a_resumed_run(tmp_path):
    def learner(batches):
        torch.manual_seed(0)
        return tokenizer_learner(batches, average=0.2)

    whole, first = learner(4), learner(4)
    before = whole.model.decoder.last_weight.detach().clone()
    weights = []
    whole.after_step = lambda: weights.append(whole.model.decoder.last_weight.detach().clone()) or {}
    fit(whole, pictures, tmp_path / "whole", CPU, "test")
    expected = weights[0]  # the first average is the weight itself
    for n, weight in enumerate(weights[1:], 1):
        decay = min(0.2, (1 + n) / (10 + n))  # 2/11, then the decay that was asked for
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(whole.result.decoder.last_weight, expected)
    assert not torch.equal(before, expected)
    assert torch.equal(whole.result.quantizer.codebook(0), whole.model.quantizer.codebook(0))

    whole = learner(4)
    fit(whole, pictures, tmp_path / "again", CPU, "test")
    with pytest.raises(Interrupted):
        fit(first, lambda total: Disturbed(pictures(total), {1}, terminate), tmp_path / "parts", CPU, "test")
    second = learner(4)
    fit(second, pictures, tmp_path / "parts", CPU, "test")
    for name, tensor in whole.result.state_dict().items():
        assert torch.equal(tensor, second.result.state_dict()[name]), name


def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path):
    learner = lm_learner(1)
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    learner.model.lm.get_input_embeddings().weight.register_hook(lambda g: g * float("inf"))
    with pytest.warns(UserWarning, match="gradient norm"):
        fit(learner, documents, tmp_path, CPU, "test")
    assert all(torch.equal(v, learner.model.state_dict()[k]) for k, v in before.items())


def test_too_many_bad_batches_in_a_row_end_the_run_with_advice(tmp_path):
    learner = tokenizer_learner(20, max_bad_batches=3)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="learning rate"):
        fit(
            learner,
            lambda t: Disturbed(pictures(t), set(range(20)), nan_pixel),
            tmp_path,
            CPU,
            "test",
        )
    assert learner.bad_batches == 3


def test_bad_batches_in_a_row_are_counted_over_resumed_parts(tmp_path):
    def spoiled(at, happen):
        return lambda total: Disturbed(Disturbed(pictures(total), {1, 2, 3}, nan_pixel), {at}, happen)

    first = tokenizer_learner(8, max_bad_batches=3)
    with pytest.warns(UserWarning), pytest.raises(Interrupted):
        fit(first, spoiled(2, terminate), tmp_path, CPU, "test")
    assert first.bad_in_a_row == 2
    second = tokenizer_learner(8, max_bad_batches=3)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="3 batches in a row"):
        fit(second, spoiled(99, terminate), tmp_path, CPU, "test")

    tensors, data = first.training_state()
    del data["counters"]["bad_in_a_row"]  # as checkpoints were before it was kept
    old = tokenizer_learner(8)
    old.load_training_state(tensors, data)
    assert (old.batches_seen, old.bad_in_a_row) == (3, 0)


def test_work_is_counted_from_the_second_step_on():
    throughput = Throughput()
    throughput.peak = 1000.0
    assert throughput.add({"tokens": 999.0, "flops": 9e9}, 99.0) == {}  # it allocates
    throughput.add({"tokens": 10.0, "flops": 400.0}, 1.0)
    assert throughput.add({"tokens": 20.0, "flops": 600.0}, 3.0) == {"tokens_per_second": 7.5, "mfu": 0.25}


def test_a_log_tells_tokens_and_operations_per_second(tmp_path):
    fit(lm_learner(3), documents, tmp_path, CPU, "test")
    last = read_log(tmp_path / "log.jsonl")[-1]
    for name in ("text_tokens_per_second", "image_tokens_per_second", "mfu", "text_entropy", "grad_head"):
        assert last[name] > 0, name
    assert last["mfu"] < 1


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    learner = tokenizer_learner(8)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for seen in (1, 2, 3):
        learner.batches_seen = seen
        checkpoints.save(learner)
    assert [p.name for p in checkpoints.all()] == ["batch-00000002", "batch-00000003"]
    newest = checkpoints.all()[-1] / "state.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # one bit
    newest.write_bytes(damaged)
    fresh = tokenizer_learner(8)
    with pytest.warns(UserWarning, match="damaged"):
        found = checkpoints.resume(fresh)
    assert found is not None and found.name == "batch-00000002"
    assert fresh.batches_seen == 2


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path):
    (tmp_path / ".batch-00000009.0123abcd.part").mkdir()
    (tmp_path / ".batch-00000009.0123abcd.part" / "state.safetensors").write_bytes(b"half")
    assert Checkpoints(tmp_path).resume(tokenizer_learner()) is None
    assert not list(tmp_path.iterdir())


def test_minutes_end_a_run_too(tmp_path):
    learner = tokenizer_learner()
    learner.budget = Budget(minutes=0.5 / 60)
    fit(learner, pictures, tmp_path, CPU, "test")
    assert learner.progress == 1
    assert 0.5 <= learner.seconds < 5


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    budget = Budget(batches=100, warmup=9, cooldown=0.5)
    rates = [budget.rate(n, budget.progress(n, 0.0)) for n in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == 0
    assert Budget(batches=100, minutes=1).progress(10, 30) == 0.5


@pytest.mark.parametrize("options", [{}, {"batches": -1}, {"batches": 1, "cooldown": 2.0}])
def test_impossible_budgets_are_refused(options):
    with pytest.raises(ValueError, match="batches"):
        Budget(**options)


def test_a_cosine_falls_to_its_floor():
    budget = Budget(batches=100, warmup=9, cooldown=1.0, fall="cosine", floor=0.1)
    rates = [budget.rate(n, budget.progress(n, 0.0)) for n in range(101)]
    assert rates[0] == pytest.approx(0.1, rel=1e-3)  # the warm-up
    for n in (10, 50, 75, 100):
        assert rates[n] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * n / 100)) / 2)
    for wrong in ({"fall": "steep"}, {"floor": 1.0}):
        with pytest.raises(ValueError, match=r"fall=.*floor="):
            Budget(batches=1, **wrong)


def test_an_absent_device_is_refused_by_name():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="available: "):
            detect("cuda")
    assert detect("cpu", "fp32").precision == "fp32"
