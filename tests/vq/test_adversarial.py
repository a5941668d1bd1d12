"""The discriminator and its losses: against formulas in float64, finite differences, and what must not leak."""

import json

import pytest
import torch
from tiny import Signalled, make_tokenizer
from torch.nn import functional as F

from vq.batches import NoAugment, PictureBatch, PictureBatches
from vq.codebook import NoReset
from vq.data import PictureSet
from vq.learner import TokenizerLearner
from vq.losses import adversarial
from vq.losses.adversarial import Adversary, NoAdversary, PatchDiscriminator, hinge, lecam
from vq.losses.codes import Codes
from vq.losses.reconstruction import Absolute
from vq.quantizers import Quantized
from vq.quantizers.none import NoQuantizer
from vq.tokenizer import ImageTokenizer, Reconstruction
from vqlm.errors import ConfigError, Interrupted
from vqlm.hardware import Hardware, detect
from vqlm.training import Budget, fit

CPU = Hardware(torch.device("cpu"), "fp32")
PIXELS = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
NAMES = [f"picture {i}" for i in range(12)]
PICTURES = PictureSet(PIXELS, NAMES, NAMES, NAMES)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def adversary(seed=0, **options):
    torch.manual_seed(seed)
    options = {"start": 0.0, "ramp": 0.0, **options}
    return Adversary(PatchDiscriminator(8, 2), adam, **options)


def learner_with(against, batches=6, **options):
    return TokenizerLearner(
        make_tokenizer().train(),
        {"absolute": Absolute(), "commitment": Codes("commitment", 0.25)},
        NoReset(),
        adam,
        Budget(batches=batches, warmup=0, cooldown=0.5),
        adversary=against,
        **options,
    )


def pictures(total):
    return PictureBatches(PICTURES, 4, 0, NoAugment(), total)


def one_pass(tokenizer=None):
    """A batch, its reconstruction, the sum of the other losses, the last weight."""
    tokenizer = tokenizer or make_tokenizer().train()
    batch = pictures(1)[0]
    made = tokenizer(batch.x_BCHW)
    return batch, made, Absolute()(batch, made), tokenizer.decoder.last_weight


# --- formulas -------------------------------------------------------------------------------------------------


def test_hinge_is_the_formula():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([[-3.0], [0.5]])
    assert float(hinge(real, fake)) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.5) / 2))


def test_lecam_is_the_formula():
    real, fake = torch.tensor([2.0, -3.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    averages = torch.tensor([0.5, -1.0], dtype=torch.float64)  # of real, of fake
    expected = ((2 + 1) ** 2 + 0) / 2 + (0 + 0.5**2) / 2
    assert float(lecam(real, fake, averages)) == pytest.approx(expected)
    both = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lecam(x[0], x[1], averages) + hinge(x[0], x[1]), (both,))


@pytest.mark.parametrize(("layers", "sees"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_what_is_documented(layers, sees):
    """By its gradient: the side of the square of pixels that one logit depends on."""
    net = PatchDiscriminator(2, layers).double()
    for part in net.patches:
        if isinstance(part, torch.nn.GroupNorm):
            part.forward = lambda x: x  # a norm sees the whole picture through its mean
    size = 3 * sees
    x = torch.randn(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    logits = net(x)
    logits[0, logits.shape[1] // 2, logits.shape[2] // 2].backward()
    assert x.grad is not None
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == sees


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_picture_leaves_one_logit(layers):
    net = PatchDiscriminator(4, layers)
    assert net(torch.zeros(2, 3, net.smallest, net.smallest + 2**layers)).shape == (2, 1, 2)
    with pytest.raises(RuntimeError):
        net(torch.zeros(2, 3, net.smallest - 2**layers, net.smallest))


def test_a_logit_depends_on_its_own_picture_alone():
    net, x = PatchDiscriminator(8, 2), torch.randn(3, 3, 16, 16)
    alone = torch.cat([net(each) for each in x.split(1)])
    torch.testing.assert_close(net(x), alone)


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    """∇ at the last layer by finite differences in float64, each entry of the weight moved by itself."""
    against = adversary(weight=0.7).double()
    decoder = torch.nn.Sequential(torch.nn.Conv2d(2, 12, 1), torch.nn.PixelShuffle(2)).double()
    x_BCHW, latent = pictures(1)[0].x_BCHW.double(), torch.randn(4, 2, 8, 8, dtype=torch.float64)
    batch, weight = PictureBatch(x_BCHW, NAMES[:4], NAMES[:4]), decoder[0].weight

    def made():
        return Reconstruction(decoder(latent), Quantized(latent, None), latent, NoQuantizer(2))

    def both(made):
        return torch.stack([Absolute()(batch, made), -against.discriminator(made.x_BCHW).mean()])

    flat, gradients = weight.data.view(-1), []
    with torch.no_grad():
        for index in range(len(flat)):
            before, sides = float(flat[index]), []
            for step in (1e-6, -1e-6):
                flat[index] = before + step
                sides.append(both(made()))
            flat[index] = before
            gradients.append((sides[0] - sides[1]) / 2e-6)
    ours, theirs = torch.stack(gradients).norm(dim=0).tolist()
    now = made()
    paid, logs = against.loss(batch, now, both(now)[0], weight, 0.5)
    assert logs["adversary_balance"] == pytest.approx(ours / (theirs + 1e-4), rel=1e-5)
    score = float(both(now)[1].detach())
    assert float(paid["adversary"].detach()) == pytest.approx(0.7 * ours / (theirs + 1e-4) * score, rel=1e-5)


def test_the_adaptive_weight_is_a_constant_within_bounds():
    batch, made, others, last = one_pass()
    balance = adversary().loss(batch, made, others, last, 0.5)[1]["adversary_balance"]
    for lowest, highest, expected in (
        (2 * balance, 3 * balance, 2 * balance),
        (0.0, balance / 2, balance / 2),
    ):
        logs = adversary(lowest=lowest, highest=highest).loss(batch, made, others, last, 0.5)[1]
        assert logs["adversary_balance"] == pytest.approx(expected, rel=1e-5)
    fixed, _ = adversary(lowest=1.0, highest=1.0).loss(batch, made, others, last, 0.5)
    (gradient,) = torch.autograd.grad(fixed["adversary"], last, retain_graph=True)
    score = -adversary().discriminator(made.x_BCHW).mean()
    torch.testing.assert_close(gradient, 0.5 * torch.autograd.grad(score, last, retain_graph=True)[0])
    alone, logs = adversary().loss(batch, made, made.z_BDhw.mean(), last, 0.5)
    assert logs["adversary_balance"] == 0  # no other loss reaches the pixels: nothing to compare with
    assert float(alone["adversary"].detach()) == 0


# --- start and ramp -------------------------------------------------------------------------------------------


def test_the_tokenizers_part_starts_late_and_grows():
    against = adversary(start=0.4, ramp=0.2)
    shares = [against.share(n / 10) for n in range(11)]
    assert shares == pytest.approx([0, 0, 0, 0, 0, 0.5, 1, 1, 1, 1, 1])
    assert adversary(start=0.4).share(0.4) == 1
    batch, made, others, last = one_pass()
    assert against.loss(batch, made, others, last, 0.39) == ({}, {})
    assert against.step(batch, made, 0.39, 1.0) == {}
    assert against.steps == 0
    amounts = [against.loss(batch, made, others, last, p)[0]["adversary"].detach() for p in (0.5, 0.6, 1.0)]
    assert float(amounts[0] * 2) == pytest.approx(float(amounts[1]))
    assert float(amounts[1]) == float(amounts[2])


@pytest.mark.parametrize(("start", "steps"), [(0.0, 10), (0.5, 5), (0.75, 2)])
def test_both_players_count_their_own_batches(start, steps, tmp_path):
    learner = learner_with(adversary(start=start), 10)
    fit(learner, pictures, tmp_path, CPU, "test")
    against = learner.adversary
    assert isinstance(against, Adversary)
    assert (learner.batches_seen, against.steps, against.skipped) == (10, steps, 0)
    for optimizer, count in ((learner.optimizer, 10), (against.optimizer, steps)):
        assert {int(each["step"]) for each in optimizer.state_dict()["state"].values()} == {count}
    assert against.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.2)  # the tokenizer's schedule


def test_before_its_start_an_adversary_changes_nothing(tmp_path):
    with_, without = learner_with(adversary(start=0.9), 6), learner_with(NoAdversary(), 6)
    for name, learner in (("with", with_), ("without", without)):
        fit(learner, pictures, tmp_path / name, CPU, "test")
    for name, tensor in without.model.state_dict().items():
        assert torch.equal(tensor, with_.model.state_dict()[name]), name


# --- nothing leaks --------------------------------------------------------------------------------------------


def test_neither_player_moves_the_other():
    tokenizer, against = make_tokenizer().train(), adversary()
    batch, made, others, last = one_pass(tokenizer)
    paid, _ = against.loss(batch, made, others, last, 0.5)
    assert last.grad is None  # λ is found without leaving a gradient
    (others + paid["adversary"]).backward()
    assert last.grad is not None
    assert all(p.grad is None for p in against.discriminator.parameters())
    assert all(p.requires_grad for p in against.discriminator.parameters())
    ours = {name: p.grad.clone() for name, p in tokenizer.named_parameters() if p.grad is not None}
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    weights = [p.clone() for p in against.discriminator.parameters()]
    assert against.step(batch, made, 0.5, 1.0)
    assert all(torch.equal(p.grad, ours[name]) for name, p in tokenizer.named_parameters() if name in ours)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tokenizer.state_dict().items())
    assert not any(
        torch.equal(a, b) for a, b in zip(weights, against.discriminator.parameters(), strict=True)
    )
    assert all(p.grad is None for p in against.discriminator.parameters())


def test_the_discriminator_takes_the_step_of_its_formula():
    """A step of plain gradient descent, clipped, against the gradient of the formulas written out."""
    torch.manual_seed(0)
    against = Adversary(
        PatchDiscriminator(8, 2),
        lambda p: torch.optim.SGD(p, lr=0.1),
        start=0.0,
        ramp=0.0,
        lecam=0.3,
        decay=0.9,
        clip=0.05,
    )
    batch, made, _, _ = one_pass()
    net, x, fake = against.discriminator, batch.x_BCHW, made.x_BCHW.detach()
    averages = torch.tensor([0.2, -0.1])
    against.averages_2 = averages.clone()
    before = [p.detach().clone() for p in net.parameters()]
    real_logits, fake_logits = net(x), net(fake)
    loss = (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2
    loss = loss + 0.3 * (
        F.relu(real_logits - averages[1]).pow(2).mean() + F.relu(averages[0] - fake_logits).pow(2).mean()
    )
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert norm > 0.05  # clipping bites
    logs = against.step(batch, made, 0.5, 0.5)
    assert logs["adversary_discriminator"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for old, gradient, new in zip(before, gradients, net.parameters(), strict=True):
        torch.testing.assert_close(
            new.detach(), old - 0.1 * 0.5 * gradient * 0.05 / norm, rtol=1e-3, atol=1e-7
        )
    means = torch.stack([real_logits.mean(), fake_logits.mean()]).detach()
    torch.testing.assert_close(against.averages_2, 0.9 * averages + 0.1 * means)


def test_averages_begin_with_the_first_batch():
    against = adversary(decay=0.9)
    batch, made, _, _ = one_pass()
    logs = against.step(batch, made, 0.5, 1.0)
    expected = torch.tensor([logs["adversary_real"], logs["adversary_fake"]])
    torch.testing.assert_close(against.averages_2, expected)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    against = adversary()
    batch, made, _, _ = one_pass()
    against.step(batch, made, 0.5, 1.0)
    before = {name: tensor.clone() for name, tensor in against.state().items()}
    bad = PictureBatch(batch.x_BCHW.clone().fill_(float("nan")), batch.ids, batch.captions)
    with pytest.warns(UserWarning, match="discriminator was skipped"):
        assert against.step(bad, made, 0.5, 1.0) == {"adversary_skipped": 1.0}
    after = against.state()
    assert before.pop("counters").tolist() == [1, 0, 0] and after.pop("counters").tolist() == [1, 1, 1]
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    against.step(batch, made, 0.5, 1.0)
    assert (against.steps, against.skipped, against.skipped_in_a_row) == (2, 1, 0)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=r"10 steps .* in a row"):
        for _ in range(adversarial.MOST_SKIPPED_IN_A_ROW):
            against.step(bad, made, 0.5, 1.0)


def test_without_gradients_nothing_is_paid():
    tokenizer, against = make_tokenizer().eval(), adversary()
    with torch.no_grad():
        batch, made, others, last = one_pass(tokenizer)
        paid, logs = against.loss(batch, made, others, last, 0.5)
    assert paid == {} and set(logs) == {"adversary_generator"}
    assert all(p.requires_grad for p in against.discriminator.parameters())


def test_a_saved_tokenizer_knows_no_adversary(tmp_path):
    learner = learner_with(adversary(), 2)
    fit(learner, pictures, tmp_path, CPU, "test")
    learner.model.save_pretrained(tmp_path / "tokenizer")
    assert "iscriminator" not in json.dumps(json.loads((tmp_path / "tokenizer" / "config.json").read_text()))
    loaded = ImageTokenizer.from_pretrained(tmp_path / "tokenizer").state_dict()
    assert loaded.keys() == make_tokenizer().state_dict().keys()


# --- resumed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 4])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(at, tmp_path):
    """Killed before the adversary's start, and after it."""

    def learner(seed):
        return learner_with(adversary(seed, start=0.3, ramp=0.3, decay=0.5), 8)

    whole = learner(0)
    fit(whole, pictures, tmp_path / "whole", CPU, "test")
    with pytest.raises(Interrupted):
        fit(learner(0), lambda total: Signalled(pictures(total), at), tmp_path / "parts", CPU, "test")
    resumed = learner(99)
    fit(resumed, pictures, tmp_path / "parts", CPU, "test")
    expected, found = whole.training_state()[0], resumed.training_state()[0]
    assert expected.keys() == found.keys()
    names = [name for name in expected if name.startswith("extra/adversary/")]
    assert len(names) > 30 and "extra/adversary/averages" in names
    for name, tensor in expected.items():
        if not name.startswith("random/"):
            assert torch.equal(tensor, found[name]), name
    assert isinstance(resumed.adversary, Adversary)
    assert resumed.adversary.steps == 5


# --- refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weight": 0.0}, "adversary=none"),
        ({"start": 1.0}, "start=1.0"),
        ({"start": 0.5, "ramp": 0.6}, "ramp=0.6"),
        ({"lowest": 2.0, "highest": 1.0}, "lowest=2.0"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"clip": 0.0}, "clip=0.0"),
    ],
)
def test_impossible_settings_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        adversary(**options)


@pytest.mark.parametrize("options", [{"layers": 0}, {"layers": 7}, {"channels": 0}])
def test_impossible_discriminators_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        PatchDiscriminator(**options)


def test_pictures_too_small_for_the_discriminator_are_refused_before_data_is_read():
    against = Adversary(PatchDiscriminator(8, 3), adam)
    with pytest.raises(ConfigError, match=r"layers=3 needs sides of at least 24 px.* 16 px"):
        learner_with(against)


def test_fp16_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"precision=fp16: .*discriminator.*bf16"):
        detect("cpu", "fp16")
