"""Batches are a function of (seed, n), and augmentation stays a picture."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vq.batches import Augment, GroupedOrder, NoAugment, PictureBatches
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
    indices = Order(30, 4, 0).indices(3)
    expected = PICTURES[torch.from_numpy(indices)].float() / 127.5 - 1
    torch.testing.assert_close(data[3].x_BCHW, expected)
    assert data[3].ids == [f"picture {i}" for i in indices]
    assert data[3].captions == [f"caption {i}" for i in indices]


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


# --- several shapes


@pytest.mark.parametrize("count, batch_size", [(30, 4), (3, 8), (8, 8)])
def test_one_group_is_dealt_in_its_own_order(count, batch_size):
    grouped, plain = GroupedOrder([count], batch_size, 5), Order(count, batch_size, 5)
    for n in range(60):
        group, indices = grouped.batch(n)
        assert group == 0 and np.array_equal(indices, plain.indices(n))


@pytest.mark.parametrize("counts, batch_size", [([37, 5, 12], 4), ([3, 2], 8), ([1, 100], 16), ([8, 8], 4)])
def test_every_sample_of_every_group_comes_once_a_round(counts, batch_size):
    order = GroupedOrder(counts, batch_size, 3)
    drawn: Counter = Counter()
    number, n = 0, 0
    while number < 5:
        ends = sum(-(-(number + 1) * count // batch_size) for count in counts)
        for n in range(n, ends):  # noqa: B020 (goes on where the last round ended)
            group, indices = order.batch(n)
            assert len(indices) == batch_size
            drawn.update((group, int(i)) for i in indices)
        n, number = ends, number + 1
        for group, count in enumerate(counts):
            times = [drawn[group, i] for i in range(count)]
            # a batch larger than its group goes through it several times at once
            assert number <= min(times) and max(times) <= number + -(-batch_size // count), (number, group)


def test_batches_of_all_groups_are_mixed_and_random_access_agrees():
    order = GroupedOrder([64, 64, 32], 4, 0)
    groups = [order.batch(n)[0] for n in range(40)]
    assert Counter(groups) == {0: 16, 1: 16, 2: 8}
    assert groups != sorted(groups) and len({tuple(groups[i : i + 3]) for i in range(38)}) > 10
    again = GroupedOrder([64, 64, 32], 4, 0)
    for n in (170, 3, 39, 0):
        assert order.batch(n)[0] == again.batch(n)[0]
        assert np.array_equal(order.batch(n)[1], again.batch(n)[1])
    assert [GroupedOrder([64, 64, 32], 4, 1).batch(n)[0] for n in range(40)] != groups


def test_a_batch_holds_pictures_of_one_shape():
    wide = PictureSet(PICTURES[:10, :, :8], [f"wide {i}" for i in range(10)], [""] * 10, [""] * 10)
    data = PictureBatches([SET, wide], 4, 0, Augment(share=1.0), 50)
    shapes = Counter()
    for n in range(20):
        batch = data[n]
        assert len({id_.split()[0] for id_ in batch.ids}) == 1
        assert batch.x_BCHW.shape == ((4, 3, 8, 16) if batch.ids[0].startswith("wide") else (4, 3, 16, 16))
        shapes[tuple(batch.x_BCHW.shape)] += 1
    assert shapes == {(4, 3, 16, 16): 15, (4, 3, 8, 16): 5}
    assert torch.equal(data[7].x_BCHW, PictureBatches([SET, wide], 4, 0, Augment(share=1.0), 50)[7].x_BCHW)
    with pytest.raises(ValueError, match="empty"):
        PictureBatches([], 4, 0, NoAugment(), 5)


@pytest.mark.parametrize("height, width", [(32, 32), (24, 64), (64, 24)])
def test_a_warp_turns_pixels_whatever_the_shape(height, width):
    """A small square in the middle keeps its right angles and its sides; its corners lie where a turn puts them."""
    augment = Augment(share=1.0, shift=0, scale=0, rotate=15.0, flip=False, colours=0)
    theta = augment._affine(1, height, width, torch.Generator().manual_seed(3))[0].double()
    in_pixels = torch.tensor([[width / 2, 0], [0, height / 2]], dtype=torch.double)
    turn = in_pixels @ theta[:, :2] @ in_pixels.inverse()  # pixels → normalised → mapped → pixels
    torch.testing.assert_close(turn @ turn.T, torch.eye(2, dtype=torch.double), atol=1e-6, rtol=0)
    assert turn.det() > 0 and abs(turn[0, 1]) > 0.01
    shifted = Augment(share=1.0, shift=3.0, scale=0, rotate=0, flip=False, colours=0)
    moves = shifted._affine(2000, height, width, torch.Generator().manual_seed(3))[:, :, 2]
    largest = (moves * torch.tensor([width / 2, height / 2])).abs().amax(0)
    torch.testing.assert_close(largest, torch.tensor([3.0, 3.0]), atol=0.02, rtol=0)


def test_a_warp_of_a_wide_picture_equals_the_middle_of_a_square_one():
    """Cut from the middle of a square canvas, both see the same pixels turned by the same angle."""
    canvas = F.interpolate(
        torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 64, mode="bicubic"
    )
    augment = Augment(share=1.0, shift=0, scale=0, rotate=15.0, flip=False, colours=0)
    square = augment(canvas.clone(), torch.Generator().manual_seed(1))
    wide = augment(canvas[:, :, 16:48].clone(), torch.Generator().manual_seed(1))
    torch.testing.assert_close(wide[:, :, 10:22, 10:54], square[:, :, 26:38, 10:54], atol=1e-4, rtol=0)
