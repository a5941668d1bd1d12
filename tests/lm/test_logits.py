"""Temperature, top-k, top-p, guidance and the draw."""

import torch

from lm.logits import draw, guide, guide_edit, guide_projected, min_p, temper, top_k, top_p

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 5.0, 1.0]])


def test_guidance_one_is_none_and_zero_is_unconditional():
    other = LOGITS.flip(1)
    assert torch.equal(guide(LOGITS, other, 1.0), LOGITS)
    assert torch.equal(guide(LOGITS, other, 0.0), other)
    torch.testing.assert_close(guide(LOGITS, other, 3.0), other + 3 * (LOGITS - other))


def test_guidance_ignores_a_constant_and_keeps_masked_entries_masked():
    masked = LOGITS.clone()
    masked[:, 3] = -torch.inf
    other = masked.flip(0)
    guided = guide(masked, other, 4.0)
    assert bool((guided[:, 3] == -torch.inf).all())
    assert not bool(guided.isnan().any())
    torch.testing.assert_close(guide(masked + 7, other - 3, 4.0).softmax(1), guided.softmax(1))


def test_top_k_keeps_k_and_top_p_the_fewest_that_reach_p():
    assert (top_k(LOGITS, 2) > -torch.inf).sum(1).tolist() == [2, 2]
    assert torch.equal(top_k(LOGITS, 0), LOGITS)
    probabilities = LOGITS.softmax(1)
    for p in (0.1, 0.5, 0.9, 0.999):
        kept = top_p(LOGITS, p) > -torch.inf
        for row, keep in zip(probabilities, kept, strict=True):
            ordered = row.sort(descending=True).values.cumsum(0)
            assert int(keep.sum()) == int((ordered < p).sum()) + 1
            assert row[keep].sum() >= p
    assert torch.equal(top_p(LOGITS, 1.0), LOGITS)


def test_temperature_zero_is_greedy_and_others_divide():
    middle = torch.tensor([0.5, 0.5])
    assert draw(temper(LOGITS, 0.0), middle).tolist() == [0, 2]
    torch.testing.assert_close(temper(LOGITS, 0.5).softmax(1), (LOGITS * 2).softmax(1))
    assert draw(temper(LOGITS, 1e-40), middle).tolist() == [0, 2]


def test_tiny_settings_leave_the_likeliest():
    middle = torch.tensor([0.5, 0.5])
    for kept in (
        temper(LOGITS, 1e-50),
        top_p(LOGITS, 1e-300),
        min_p(LOGITS, 1.0),
        temper(temper(LOGITS, 1e-38), 1e-38),
    ):
        assert draw(kept, middle).tolist() == [0, 2]


def test_draws_follow_the_probabilities():
    logits = LOGITS[:1].expand(20_000, 4)
    drawn = draw(logits, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(share, LOGITS[0].softmax(0), atol=0.02, rtol=0)  # 6 standard deviations


def test_no_random_number_draws_a_masked_id():
    masked = torch.full((3, 6), -torch.inf)
    masked[:, 2], masked[:, 3] = 1.0, -40.0
    ends = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert set(draw(masked, ends).tolist()) <= {2, 3}
    masked[:, 3] = -torch.inf
    assert draw(masked, ends).tolist() == [2, 2, 2]


def test_min_p_keeps_what_is_likely_enough():
    for p in (0.01, 0.1, 0.5, 1.0):
        kept = min_p(LOGITS, p) > -torch.inf
        probabilities = LOGITS.softmax(1)
        assert torch.equal(kept, probabilities >= p * probabilities.amax(1, keepdim=True) * (1 - 1e-6))
    assert torch.equal(min_p(LOGITS, 0.0), LOGITS)


def test_projected_guidance():
    c, u = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0)).unbind()
    c[:, 4] = u[:, 4] = -torch.inf
    plain = guide_projected(c, u, 3.0, parallel=1.0).softmax(1)
    torch.testing.assert_close(plain, guide(c, u, 3.0).softmax(1))
    torch.testing.assert_close(guide_projected(c, u, 1.0, 0.0).softmax(1), c.softmax(1))
    moved = guide_projected(c + 5, u - 2, 3.0, 0.0, 0.1)
    torch.testing.assert_close(moved, guide_projected(c, u, 3.0, 0.0, 0.1))
    assert bool((moved[:, 4] == -torch.inf).all())
    # what is added stands at right angles to c, and is not longer than norm·√V
    legal = [i for i in range(9) if i != 4]
    centred = c[:, legal] - c[:, legal].mean(1, keepdim=True)
    added = guide_projected(c, u, 2.0, 0.0, 0.1)[:, legal] - centred
    assert float((added * centred).sum(1).abs().max()) < 1e-5
    assert bool((added.norm(dim=1) <= 0.1 * 8**0.5 + 1e-6).all()) and float(added.norm()) > 0.1


def test_guidance_of_an_edit():
    f, i, u = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(guide_edit(f, i, u, 3.0, 1.2), u + 1.2 * (i - u) + 3 * (f - i))
    torch.testing.assert_close(guide_edit(f, i, u, 1.0, 1.0), f)
    torch.testing.assert_close(guide_edit(f, i, i, 3.0, 9.0), guide(f, i, 3.0))
    f[:, 1] = i[:, 1] = u[:, 1] = -torch.inf
    assert bool((guide_edit(f, i, u, 2.0, 0.0)[:, 1] == -torch.inf).all())
