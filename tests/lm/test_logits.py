"""Temperature, top-k, top-p, guidance and the draw."""

import pytest
import torch

from lm.logits import check_sampling, draw, guide, temper, top_k, top_p

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
    random = torch.Generator().manual_seed(0)
    assert draw(temper(LOGITS, 0.0), random).tolist() == [0, 2]
    torch.testing.assert_close(temper(LOGITS, 0.5).softmax(1), (LOGITS * 2).softmax(1))
    assert draw(temper(LOGITS, 1e-40), random).tolist() == [0, 2]


def test_draws_follow_the_probabilities_and_the_seed():
    logits = LOGITS[:1].expand(20_000, 4)
    drawn = draw(logits, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(share, LOGITS[0].softmax(0), atol=0.02, rtol=0)  # 6 standard deviations
    assert torch.equal(drawn, draw(logits, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((1, -1, 0, 1), "temperature"),
        ((1, 1, -1, 1), "top_k"),
        ((1, 1, 0, 0), "top_p"),
        ((-1, 1, 0, 1), "guidance"),
        ((1, float("nan"), 0, 1), "temperature"),
        ((1, 1, 0, 1.5), "top_p"),
        ((float("inf"), 1, 0, 1), "guidance"),
    ],
)
def test_impossible_settings_are_refused(values, name):
    with pytest.raises(ValueError, match=name):
        check_sampling(*values)
