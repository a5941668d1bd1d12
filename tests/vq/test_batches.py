"""Batches are a function of (seed, n), and augmentation stays a picture."""

import numpy as np
import pytest
import torch

from vq.batches import Augment, NoAugment, PictureBatches
from vq.data import PictureSet
from vqlm.batches import Order

PICTURES = torch.randint(
    0, 256, (30, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
NAMES = [f"picture {i}" for i in range(30)]
SET = PictureSet(PICTURES, NAMES, [f"caption {i}" for i in range(30)], NAMES)


def test_batch_n_does_not_depend_on_what_was_read_before():
    first, again = (PictureBatches(SET, 4, 7, Augment(), 50) for _ in range(2))
    _ = [first[n] for n in (9, 2)]
    assert torch.equal(first[13].x_BCHW, again[13].x_BCHW)
    assert not torch.equal(first[13].x_BCHW, PictureBatches(SET, 4, 8, Augment(), 50)[13].x_BCHW)


def test_every_sample_comes_once_an_epoch_even_across_batches():
    order = Order(10, 4, 0)
    drawn = np.concatenate([order.indices(n) for n in range(5)])  # 20 = two epochs
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert list(drawn[:10]) != list(drawn[10:])


def test_without_augmentation_pictures_are_as_stored():
    data = PictureBatches(SET, 4, 0, NoAugment(), 5)
    expected = PICTURES[torch.from_numpy(data.order.indices(3))].float() / 127.5 - 1
    torch.testing.assert_close(data[3].x_BCHW, expected)
    assert data[3].ids == [f"picture {i}" for i in data.order.indices(3)]
    assert data[3].captions == [f"caption {i}" for i in data.order.indices(3)]


def test_augmented_pixels_stay_in_range_and_pictures_are_not_changed_in_place():
    before = PICTURES.clone()
    batch = PictureBatches(SET, 16, 0, Augment(share=1.0, colours=1.0), 5)[0]
    assert batch.x_BCHW.abs().max() <= 1
    assert torch.equal(PICTURES, before)


def test_a_warp_of_nothing_changes_nothing():
    still = Augment(share=1.0, shift=0, scale=0, rotate=0, flip=False, colours=0)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(still(x.clone(), torch.Generator()), x, atol=1e-5, rtol=0)


def test_flips_and_colours_keep_the_pixels_of_a_picture():
    x = torch.rand(40, 3, 8, 8)
    random = torch.Generator().manual_seed(0)
    flipped = Augment(share=0, flip=True, colours=0)(x.clone(), random)
    mirrored = [torch.equal(a.flip(2), b) for a, b in zip(flipped, x, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(flipped, x, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 10 < sum(mirrored) < 30
    coloured = Augment(share=0, flip=False, colours=1.0)(x.clone(), random)
    torch.testing.assert_close(coloured.sort(1).values, x.sort(1).values)
    assert (
        20 < sum(not torch.equal(a, b) for a, b in zip(coloured, x, strict=True)) < 40
    )  # 1 of 6 orders is the old


@pytest.mark.parametrize("options", [{"share": 1.5}, {"colours": -0.1}, {"scale": 1.0}, {"shift": -1.0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Augment(**options)
