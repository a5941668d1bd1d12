"""C.9 to C.12: numbers that are none, a loss that jumps, codebooks that collapse, a precision that cannot work."""

import copy
import math
import random
import warnings
from dataclasses import replace

import pytest
import torch
from faults.runs import CPU, Disturbed, documents, lm_run, pictures, spoilt_pixels, state, tokenizer_run
from vector_quantize_pytorch import VectorQuantize

from vq.codebook import CodebookReset, count_codes
from vq.codebook.start import NoStart
from vq.losses.reconstruction import Squared
from vq.quantizers.residual import ResidualQuantizer
from vqlm.errors import ConfigError
from vqlm.hardware import detect
from vqlm.training import fit

WRONG = (math.nan, math.inf, -math.inf)


# --- C.9 ------------------------------------------------------------------------------------------------------


def bad(batch):
    return replace(batch, captions=["bad"] * len(batch.captions))


class Spoilt(Squared):
    """A loss that is `value`, or whose gradient holds it, or that is a factor too large, for captions "bad"."""

    def __init__(self, way, value):
        super().__init__()
        self.way, self.value = way, value

    def __call__(self, batch, made):
        loss = super().__call__(batch, made)
        if batch.captions[0] != "bad":
            return loss
        if self.way == "gradient":
            made.x_BCHW.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), self.value))
            return loss
        return loss * self.value


def poisoned(way, value, at, folder):
    """Codes that are not finite after a run of 6 batches with a bad one; and whether it left anything else behind."""
    learner = tokenizer_run(6)
    learner.terms = {**learner.terms, "squared": Spoilt(way, value)}
    happen = spoilt_pixels(value) if way == "input" else bad
    before = {}

    def remember(batch):
        before.update(copy.deepcopy(state(learner)[0]))
        return happen(batch)

    with pytest.warns(UserWarning, match=f"batch {at} skipped") as told:
        fit(learner, lambda _: Disturbed(pictures(6), {at}, remember), folder, CPU, "test")
    assert learner.bad_batches == 1 and learner.batches_seen == 6
    if way == "input":  # the pictures are named
        assert any("pixels: picture" in str(each.message) for each in told)
    quantizer = learner.model.quantizer
    books = torch.cat([quantizer.codebook(book) for book in range(quantizer.books)])
    return int((~books.isfinite()).any(1).sum()), all(
        t.isfinite().all() for t in learner.model.state_dict().values()
    )


def alone(learner):
    """To be stepped by hand, without Lightning's trainer."""
    learner.manual_backward = lambda loss: loss.backward()
    return learner


def unchanged(way, value, folder):
    """A bad batch after three good ones leaves what the three left, to the bit."""
    states = []
    for batches in (4, 3):
        learner = alone(tokenizer_run(6))  # both on the same schedule; the discriminator included
        learner.budget = replace(learner.budget, cooldown=0.0)
        learner.terms = {**learner.terms, "squared": Spoilt(way, value)}
        spoil = spoilt_pixels(value) if way == "input" else bad
        made = Disturbed(pictures(6), {3}, spoil)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for n in range(batches):
                learner.training_step(made[n], n)
        states.append(state(learner)[0])
    return all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def library_poisoned(value):
    """Rows of vector-quantize-pytorch's codebook that are not finite after one such number in its input."""
    torch.manual_seed(0)
    quantizer = VectorQuantize(dim=4, codebook_size=64).train()
    x_BND = torch.randn(4, 64, 4)
    x_BND[0, 0, 0] = value
    quantizer(x_BND)
    return int((~quantizer.codebook.isfinite()).any(-1).sum())


def test_a_number_that_is_none_poisons_no_code(count, figure, tmp_path):
    cells = [(way, value) for way in ("input", "loss", "gradient") for value in WRONG]
    trials, chance, codes, whole, same = count(1, 10), random.Random(0), 0, 0, 0
    for n in range(trials):
        for way, value in cells:
            found, finite = poisoned(way, value, chance.randrange(6), tmp_path / f"{n} {way} {value}")
            codes, whole = codes + found, whole + finite
    for way, value in cells:
        same += unchanged(way, value, tmp_path)
    assert codes == 0 and whole == trials * len(cells) and same == len(cells)
    figure(
        "C.9",
        "NaN, inf, -inf in a pixel, a loss, a gradient",
        "the step is skipped before any update, codebooks included; pictures are named; ten in a row end the run",
        f"0 poisoned codes in {trials * len(cells)} runs; the skipped step changes no bit in {same}/{len(cells)}",
        {"vector-quantize-pytorch, one NaN": f"{library_poisoned(math.nan)} of 64 codes NaN"},
    )


def test_a_gradient_that_is_none_changes_no_weight_of_a_language_model(tmp_path):
    for value in WRONG:
        learner = lm_run(1)
        before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
        learner.model.lm.get_input_embeddings().weight.register_hook(lambda gradient, v=value: gradient * v)
        with pytest.warns(UserWarning, match="gradient norm"):
            fit(learner, documents, tmp_path / str(value), CPU, "test")
        assert all(torch.equal(tensor, before[name]) for name, tensor in learner.model.state_dict().items())


# --- C.10 -----------------------------------------------------------------------------------------------------


def losses(clip, factor, steps=80, at=10):
    """Loss of each batch of a run whose batch `at` has a loss that is a factor too large."""
    learner = alone(tokenizer_run(steps))
    learner.clip, learner.budget = clip, replace(learner.budget, cooldown=0.0)
    learner.terms = {**learner.terms, "squared": Spoilt("loss", factor)}
    made, found = Disturbed(pictures(steps), {at}, bad), []
    for n in range(steps):
        learner.training_step(made[n], n)
        found.append(learner.latest["squared"])
    return found


def recovered(calm, spiked, at=10):
    """Batches from the jump until the loss is within a tenth of the undisturbed run's, and stays there."""
    outside = [n for n in range(at + 1, len(calm)) if spiked[n] > 1.1 * calm[n]]
    return (outside[-1] - at) if outside else 0


def test_a_loss_that_jumps_is_outlived(figure):
    results = {}
    for name, clip in (("ours", 1.0), ("unclipped", 1e30)):
        calm, spiked = losses(clip, 1.0), losses(clip, 1e6)
        results[name] = recovered(calm, spiked)
    assert results["ours"] <= 2

    watched = len(calm) - 1 - 10

    def told(batches):
        back = f"loss within 10 % of an undisturbed run's after {batches} batches"
        return back if batches < watched else f"not within 10 % of an undisturbed run's in {watched} batches"

    figure(
        "C.10",
        "one batch whose loss is 10^6 times too large",
        "gradients are clipped to norm 1, as a whole",
        told(results["ours"]),
        {"the same without clipping, which is Lightning's default": told(results["unclipped"])},
    )


# --- C.11 -----------------------------------------------------------------------------------------------------


def latents(step, batch=16):
    return torch.randn(batch, 4, 4, 4, generator=torch.Generator().manual_seed(step))


def use(codes_BhwQ, size):
    """Share of codes in use, and perplexity, of the first depth."""
    counts = count_codes(codes_BhwQ, size)[0].double()
    share = counts[counts > 0] / counts.sum()
    return float((counts > 0).double().mean()), float(torch.exp(-(share * share.log()).sum()))


def measured(quantizer, size):
    with torch.no_grad():
        quantizer.eval()
        found = use(quantizer(latents(999, 256)).codes_BhwQ, size)
        quantizer.train()
    return found


def library_after(steps, size, dead):
    """vector-quantize-pytorch, nine codes in ten thrown far away: share in use after as many batches."""
    torch.manual_seed(0)
    quantizer = VectorQuantize(dim=4, codebook_size=size, decay=0.9, threshold_ema_dead_code=dead).train()
    quantizer._codebook.embed[:, size // 10 :] = 100.0
    quantizer._codebook.embed_avg[:, size // 10 :] = 100.0
    rows = [latents(step).flatten(2).mT for step in range(steps)]
    for x_BND in rows:
        quantizer(x_BND)
    quantizer.eval()
    codes = quantizer(latents(999, 256).flatten(2).mT)[1]
    return use(codes[..., None, None], size)[0]


@pytest.mark.filterwarnings("ignore:after")
def test_a_collapsed_codebook_comes_back(count, figure):
    size, steps = 64, count(60, 100)
    torch.manual_seed(0)
    quantizer, reset = ResidualQuantizer(4, size, 1, decay=0.9), CodebookReset(start=NoStart(), window=2)
    quantizer.replace_codes(0, torch.arange(size), torch.randn(size, 4))
    quantizer.replace_codes(0, torch.arange(size // 10, size), torch.full((size - size // 10, 4), 100.0))
    before = measured(quantizer, size)
    back = None
    for step in range(steps):
        z = latents(step)
        reset.observe(quantizer, z, quantizer(z).codes_BhwQ, 0.0)
        if back is None and measured(quantizer, size)[0] > 0.95:
            back = step + 1
    after = measured(quantizer, size)
    assert before[0] < 0.11 and after[0] > 0.95 and back is not None
    with pytest.warns(UserWarning, match="1 distinct"):  # constant pictures cannot use more than one code
        assert reset.finish(quantizer, [torch.ones(1, 4, 2, 2)])[0] == size - 1
    figure(
        "C.11",
        f"nine codes in ten thrown away ({size} codes)",
        "codes that are used too little are re-initialised from what is badly told; what cannot be used is warned of",
        f"{before[0]:.0%} in use before, {after[0]:.0%} after ({back} batches), "
        f"perplexity {before[1]:.0f} → {after[1]:.0f}",
        {
            f"vector-quantize-pytorch, default, {steps} batches": f"{library_after(steps, size, 0):.0%} in use",
            f"vector-quantize-pytorch, threshold 2, {steps} batches": f"{library_after(steps, size, 2):.0%} in use",
        },
    )


# --- C.12 -----------------------------------------------------------------------------------------------------


def test_fp16_is_refused(figure):
    with pytest.raises(ConfigError, match=r"precision=fp16: .*discriminator.*bf16"):
        detect("cpu", "fp16")
    figure("C.12", "precision=fp16", "refused before data is read, bf16 named", "refused, with the reason")
