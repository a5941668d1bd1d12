"""Unused codes come back to life, stay alive, and nothing else is touched."""

import pytest
import torch

from vq.codebook import CodebookReset, NoReset, count_codes, residuals
from vq.quantizers.residual import ResidualQuantizer


def collapsed(depth=2, size=32, dim=4):
    """All codes but one far away from the data: only one is ever chosen."""
    quantizer = ResidualQuantizer(dim, size, depth, decay=0.9)
    for d in range(depth):
        quantizer.replace_codes(d, torch.arange(1, size), torch.full((size - 1, dim), 100.0))
        quantizer.replace_codes(d, torch.tensor([0]), torch.zeros(1, dim))
    return quantizer


def latents(step):
    return torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(step))


def used(quantizer):
    codes = quantizer.eval()(latents(999)).codes_BhwQ
    quantizer.train()
    return (count_codes(codes, quantizer.codebook_size) > 0).float().mean(1)


def train(quantizer, reset, steps, progress=0.0, first=0):
    for step in range(first, first + steps):
        z = latents(step)
        reset.observe(quantizer, z, quantizer(z).codes_BhwQ, progress)


def test_a_collapsed_codebook_recovers_and_without_resets_it_does_not():
    revived, left = collapsed(), collapsed()
    train(revived, CodebookReset(window=5, threshold=0.1), 40)
    train(left, NoReset(), 40)
    assert used(left)[0] < 0.1
    assert bool((used(revived) > 0.9).all())


def test_a_reset_survives_the_next_ema_step():
    # ml-4m and espnet wrote the embedding alone; the next EMA step restored the dead code from its old sums
    quantizer = collapsed()
    vector = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    quantizer.replace_codes(0, torch.tensor([7]), vector)
    quantizer._update_averages(0, torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(quantizer.codebook(0)[7], vector[0], atol=2e-3, rtol=2e-3)


def test_the_threshold_is_relative_so_a_large_codebook_does_not_churn():
    # an absolute count of 1 or 2 calls most of 512 codes dead when a batch has 256 vectors
    quantizer = ResidualQuantizer(4, 512, 1, decay=0.9)
    reset = CodebookReset(window=20, threshold=0.05, cooldown=0)
    train(quantizer, reset, 60)
    counts = []
    for step in range(100, 160):
        z = latents(step)
        counts += reset.observe(quantizer, z, quantizer(z).codes_BhwQ, 0.0)
    assert len(counts) == 3
    assert max(counts) < 0.1 * 512


def test_replacements_are_vectors_of_that_depth_and_distinct():
    quantizer = collapsed()
    z = latents(0)
    reset = CodebookReset(window=1)
    replaced = reset.observe(quantizer, z, quantizer.eval()(z).codes_BhwQ, 0.0)
    assert replaced == [31, 31]
    given = residuals(quantizer, z)
    for depth in range(2):
        rows = quantizer.codebook(depth)[1:]
        assert len(rows.unique(dim=0)) == 31
        assert bool((torch.cdist(rows.double(), given[depth][0].double()).amin(1) < 1e-6).all())


def test_replacements_prefer_large_errors():
    reset = CodebookReset()
    reset.batches = 1
    errors = torch.cat([torch.full((500,), 0.01), torch.full((20,), 10.0)])
    drawn = reset._draw(errors, 15, 0)
    assert int((drawn >= 500).sum()) >= 13


def test_nothing_is_replaced_after_the_stop():
    quantizer, reset = collapsed(), CodebookReset(window=1, stop=0.5)
    z = latents(0)
    assert reset.observe(quantizer, z, quantizer(z).codes_BhwQ, 0.5) == []
    assert reset.observe(quantizer, z, quantizer(z).codes_BhwQ, 0.49) != []


def test_a_replaced_code_rests_for_the_cooldown():
    quantizer, reset = collapsed(), CodebookReset(window=1, cooldown=2)
    z = latents(0)
    everything_unused = torch.zeros(16, 4, 4, 2, dtype=torch.int64)
    first, second, third, fourth = (
        sum(reset.observe(quantizer, z, everything_unused, 0.0)) for _ in range(4)
    )
    assert (first, second, third) == (62, 0, 0)
    assert fourth == 62


def test_more_unused_codes_than_vectors_replaces_as_many_as_there_are():
    quantizer = ResidualQuantizer(4, 64, 1)
    z = torch.randn(1, 4, 2, 2)
    assert CodebookReset(window=1).observe(quantizer, z, torch.zeros(1, 2, 2, 1, dtype=torch.int64), 0.0) == [
        4
    ]


def test_a_restored_reset_goes_on_as_the_uninterrupted_one():
    whole, parts = collapsed(), collapsed()
    reset = CodebookReset(window=3)
    train(whole, reset, 12)
    first = CodebookReset(window=3)
    train(parts, first, 7)
    second = CodebookReset(window=3)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    train(parts, second, 5, first=7)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


def test_at_the_end_every_code_is_used_on_the_training_set():
    quantizer = collapsed(depth=3)
    z = latents(1)
    before = [quantizer.codebook(d)[0].clone() for d in range(3)]
    assert CodebookReset().finish(quantizer, [z]) == [0, 0, 0]
    counts_QK = count_codes(quantizer.eval()(z).codes_BhwQ, 32)
    assert bool((counts_QK > 0).all())
    assert torch.equal(quantizer.codebook(0)[0], before[0])  # the code in use stayed as it was
    assert CodebookReset().finish(quantizer, [z]) == [0, 0, 0]


def test_fewer_vectors_than_codes_leave_codes_unused_and_say_how_many():
    quantizer = ResidualQuantizer(4, 64, 1)
    (left,) = CodebookReset().finish(quantizer, [torch.randn(1, 4, 3, 3)])
    assert left == 64 - 9


@pytest.mark.parametrize("options", [{"window": 0}, {"threshold": 1.0}, {"stop": 1.5}, {"cooldown": -1}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CodebookReset(**options)
