"""Landscapes and cities: photographs that come with a package of Debian, for what must not be tried on drawings alone.

    endless-sky-data, fetched once --LandPhotos.pictures()--> Picture ... (vq/data.py)

273 JPEG files of 720×360 pixels; few faces, animals or interiors, some recoloured, compressed once already: a small
test bed, not ImageNet. Two thirds are in the public domain, the others under CC BY-SA 3.0 or 4.0, by file name in the
package's copyright file. They are fetched by the package's name and not redistributed.

It does not know what is made of the photos.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from PIL import Image

from vq.data import Picture
from vq.images import open_image
from vqlm.errors import ConfigError
from vqlm.fetch import debian_package, user_cache

PACKAGE = "endless-sky-data"
LAND = Path("usr/share/games/endless-sky/images/land")
COPYRIGHT = Path("usr/share/doc", PACKAGE, "copyright")


class LandPhotos:
    """546 pictures of 273 photos, without captions. Id: the file's name and which half, "beach0.jpg#1". Concept: the
    file's name, so that both halves of a photo are held out together.

    Args:
        folder: where the photos lie; null: the package is fetched (70 MB) into the user's cache, which needs apt-get.
    """

    name = "photos"
    attribution = (
        "Photos of the Debian package endless-sky-data: public domain, CC BY-SA 3.0 and CC BY-SA 4.0, by file name in "
        "its copyright file"
    )

    def __init__(self, folder: str | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder else None

    def pictures(self, size: int = 64) -> list[Picture]:
        """Sorted by file name: the left half of each photo, then its right half.

        Raises:
            ConfigError: the package cannot be had, or there is no photo.
        """
        instead = "give a folder of photos: images.source.folder=DIR"
        folder = self.folder or debian_package(PACKAGE, LAND, "70 MB", user_cache(), instead)
        files = sorted(folder.glob("*.jpg"))
        if not files:
            raise ConfigError(f"{folder} holds no .jpg: {instead}")
        halves = [(file, half) for file in files for half in (0, 1)]
        return [
            Picture(f"{file.name}#{half}", "", file.name, partial(half_of, file, half))
            for file, half in halves
        ]


def half_of(file: Path, half: int) -> Image.Image:
    """The left (0) or the right (1) half of a photo."""
    photo = open_image(file)
    middle = photo.width // 2
    return photo.crop((half * middle, 0, (half + 1) * middle, photo.height))
