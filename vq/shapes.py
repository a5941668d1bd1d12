"""A toy set that needs no download: coloured shapes, named. For smoke runs, tests and first steps."""

from __future__ import annotations

import itertools

from PIL import Image, ImageDraw

from vq.data import Picture

COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 150, 30),
    "yellow": (250, 215, 60),
    "green": (50, 160, 70),
    "blue": (45, 95, 215),
    "purple": (130, 60, 170),
    "black": (25, 25, 25),
}
SIZES = {"small": 0.2, "medium": 0.32, "large": 0.44}
PLACES = {"left": -0.14, "middle": 0.0, "right": 0.14}
SHAPES = ("circle", "square", "triangle", "bar")


class Shapes:
    """252 pictures with captions such as "a small red circle, left"; every caption is a concept of its own."""

    name = "shapes"

    def pictures(self, size: int = 64) -> list[Picture]:
        """All pictures, in a fixed order. size: side at which they are drawn, before they are reduced to it."""
        combined = itertools.product(SIZES, COLOURS, SHAPES, PLACES)
        return [self._picture(*words, side=4 * size) for words in combined]

    def _picture(self, size: str, colour: str, shape: str, place: str, side: int) -> Picture:
        caption = f"a {size} {colour} {shape}, {place}"
        return Picture(
            caption.replace(",", "").replace(" ", "-"),
            caption,
            caption,
            lambda: draw(size, colour, shape, place, side),
        )


def draw(size: str, colour: str, shape: str, place: str, side: int) -> Image.Image:
    """One picture of side x side pixels, on white."""
    picture = Image.new("RGB", (side, side), "white")
    radius, x, y = SIZES[size] * side, (0.5 + PLACES[place]) * side, 0.5 * side
    box = (x - radius, y - radius, x + radius, y + radius)
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    elif shape == "triangle":
        pen.polygon(
            [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=COLOURS[colour]
        )
    else:
        pen.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill=COLOURS[colour])
    return picture
