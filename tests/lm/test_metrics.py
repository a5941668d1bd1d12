"""Ranks, variants and overlaps on made cases whose answers are known."""

import pytest
import torch
from tiny import make_model, make_tokenizer

from lm.data import Pairs
from lm.metrics import colour_histograms, losses, ranks, spread, variants_followed, word_overlap
from lm.pipeline import Pipeline


def flat(*colour):
    return torch.tensor(colour).reshape(3, 1, 1).expand(3, 4, 4)


def test_rank_counts_the_pictures_that_are_nearer():
    gallery = torch.stack([flat(v, v, v) for v in (-1.0, -0.5, 0.0, 0.5, 1.0)])
    drawn = torch.stack([flat(0.45, 0.45, 0.45), flat(-1.0, -1.0, -1.0)])
    assert ranks(drawn, gallery, [3, 4]).tolist() == [0, 4]
    assert ranks(drawn, gallery, [2, 0]).tolist() == [1, 0]


def test_variants_are_compared_by_colour_wherever_it_is():
    brown, pink, white = (0.2, -0.3, -0.6), (0.9, 0.5, 0.5), (1.0, 1.0, 1.0)

    def picture(colour, rows):
        x = flat(*white).clone()
        x[:, rows] = torch.tensor(colour)[:, None, None]
        return x

    gallery = torch.stack([picture(brown, slice(0, 2)), picture(pink, slice(0, 2)), flat(*white)])
    concepts = ["hand", "hand", "cloud"]
    elsewhere = torch.stack(
        [picture(brown, slice(2, 4)), picture(pink, slice(2, 4)), picture(pink, slice(0, 1))]
    )
    followed, chance = variants_followed(elsewhere, gallery, [0, 0, 2], concepts)
    assert followed == [True, False]  # the cloud has no variants
    assert chance == [0.5, 0.5]


def test_colour_histograms_are_shares():
    x = torch.rand(3, 3, 5, 5) * 2 - 1
    torch.testing.assert_close(colour_histograms(x).sum(1), torch.ones(3))
    assert colour_histograms(flat(1.0, -1.0, 1.0)[None])[0, 5 * 36 + 5] == 1


def test_losses_agree_between_batch_sizes():
    model, tokenizer = make_model()
    pipe = Pipeline(model, tokenizer, make_tokenizer())
    codes = torch.randint(0, 16, (7, 2, 2, 2), generator=torch.Generator().manual_seed(0))
    names = [f"a red circle {i}" for i in range(7)]
    pairs = Pairs([tuple(pipe.encode_text(n)) for n in names], codes, names, names, names)
    one, all_ = losses(model, pairs, documents=1), losses(model, pairs, documents=7)
    assert one == pytest.approx(all_, rel=1e-4)
    assert one["image_bits"] * 8 == pytest.approx(one["image_bits_per_picture"], rel=1e-5)


def test_word_overlap_and_spread():
    assert word_overlap("a red apple", "a red apple") == 1
    assert word_overlap("a green pear", "a red apple") == pytest.approx(1 / 3)
    assert word_overlap("", "") == 1
    assert spread(10, 3) == [0, 3, 6]
    assert spread(2, 5) == [0, 1]
