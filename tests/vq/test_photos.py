"""Photos as a source: two halves of each, of one concept; nothing is fetched here."""

import pytest
import torch
from PIL import Image

from vq.data import ImageData
from vq.images import picture_bytes
from vq.photos import LandPhotos
from vqlm.errors import ConfigError


def test_halves_of_a_photo_are_of_one_concept(tmp_path):
    for name, colours in (("sea1.jpg", ("red", "blue")), ("city0.jpg", ("green", "white"))):
        photo = Image.new("RGB", (64, 32), colours[0])
        photo.paste(colours[1], (32, 0, 64, 32))
        photo.save(tmp_path / name, quality=95)
    (tmp_path / "notes.txt").write_text("no photo")
    found = LandPhotos(str(tmp_path)).pictures()
    assert [each.id for each in found] == ["city0.jpg#0", "city0.jpg#1", "sea1.jpg#0", "sea1.jpg#1"]
    assert [each.concept for each in found] == ["city0.jpg"] * 2 + ["sea1.jpg"] * 2
    middles = [picture_bytes(each.load())[:, 16, 16].tolist() for each in found]
    expected = [(0, 128, 0), (255, 255, 255), (255, 0, 0), (0, 0, 255)]
    assert all(
        abs(a - b) < 8
        for middle, colour in zip(middles, expected, strict=True)
        for a, b in zip(middle, colour, strict=True)
    )


def test_photos_become_squares(tmp_path):
    for number in range(6):
        Image.effect_noise((80, 40), 60 + number).convert("RGB").save(tmp_path / f"{number}.jpg")
    data = ImageData(LandPhotos(str(tmp_path)), 32, holdout=0.4)
    data.setup()
    assert data.train.x_NCHW.shape[1:] == (3, 32, 32) and data.train.x_NCHW.dtype == torch.uint8
    assert len(data.train) + len(data.heldout) == 12
    assert not set(data.train.concepts) & set(data.heldout.concepts)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"holds no \.jpg: give a folder of photos: images\.source\.folder=DIR"
    ):
        LandPhotos(str(tmp_path)).pictures()
