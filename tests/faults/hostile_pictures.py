"""A folder of pictures as strangers leave it: good ones of every kind, and what only looks like a picture.

`write(folder, count, seed)` says of each file what must become of it: the right pixels, or a reason. Where a listing
passes a thing over (a folder, a hidden file), that is said too. Knows no reader.
"""

import gzip
import os
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from pictures import TURNED, as_rgb, chunk, on_white, png, saved, smooth, swapped_profile
from PIL import Image

DEEP = 17 * 2**20  # bytes beside the pixels: more than any real file has


@dataclass(frozen=True)
class Kind:
    """make(path, draw): writes the file; of a good one, returns its pixels (H, W, 3). reason: of a reject; "unlisted":
    a listing passes it over. ending: of its name. waits: whoever opens it waits for ever."""

    make: Callable[[Path, random.Random], np.ndarray | None]
    ending: str
    reason: str = ""
    waits: bool = False
    gone: bool = False  # it is removed after the folder was listed


@dataclass(frozen=True)
class Made:
    path: Path
    kind: str
    pixels_HWC: np.ndarray | None


# --- good ones --------------------------------------------------------------------------------------------------------


def content(draw):
    """(H, W, 3): another picture each time, of sides that few numbers divide."""
    pixels_HWC = smooth(draw.randrange(33, 64, 2), draw.randrange(33, 64, 2))
    return np.ascontiguousarray(pixels_HWC[:: draw.choice((1, -1)), :, draw.sample(range(3), 3)])


def plain(format, **options):
    def make(path, draw):
        path.write_bytes(saved(Image.fromarray(pixels := content(draw)), format, **options))
        return pixels

    return make


def as_kind(make):
    """make(pixels) → file's bytes, pixels that are to be read."""

    def write(path, draw):
        data, pixels = make(content(draw))
        path.write_bytes(data)
        return pixels

    return write


LOSSLESS = {"lossless": True, "exact": True}
JPEG = {"quality": 99, "subsampling": 0}


def palette(pixels):
    drawn = Image.fromarray(pixels).quantize(64)
    return saved(drawn, "GIF"), np.array(drawn.convert("RGB"))


def cmyk(marked):
    def make(pixels):
        ink = np.concatenate([pixels // 2, pixels[..., :1] // 3], axis=-1)
        wanted = np.array(Image.fromarray(ink, "CMYK").convert("RGB"))
        data = saved(Image.fromarray(ink if marked else 255 - ink, "CMYK"), "JPEG", **JPEG)
        if not marked:  # Pillow stores ink as Adobe does, inverted, and says so
            at = data.index(b"\xff\xee")
            data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
        return data, wanted

    return make


def deep_grey(pixels):
    grey = pixels[..., 0].astype(np.uint16) * 257
    return saved(Image.fromarray(grey), "PNG"), as_rgb(pixels[..., 0])


def floating(pixels):
    grey = pixels[..., 1].astype(np.float32) / 255
    return saved(Image.fromarray(grey), "TIFF"), as_rgb(pixels[..., 1])


def grey_alpha(pixels):
    grey, alpha = pixels[..., 0], pixels[::-1, :, 1]
    return saved(Image.fromarray(np.dstack([grey, alpha]), "LA"), "PNG"), on_white(as_rgb(grey), alpha)


def clear_palette(pixels):
    drawn = Image.fromarray(pixels).quantize(64)
    levels = bytes((7 * n) % 256 for n in range(64))
    alpha = np.frombuffer(levels, np.uint8)[np.array(drawn)]
    return saved(drawn, "PNG", transparency=levels), on_white(np.array(drawn.convert("RGB")), alpha)


def colour_alpha(pixels):
    alpha = np.ascontiguousarray(pixels[::-1, :, 1])
    return saved(Image.fromarray(np.dstack([pixels, alpha])), "PNG"), on_white(pixels, alpha)


def one_bit(pixels):
    bits = ((pixels[..., 0] > 120) * 255).astype(np.uint8)
    drawn = Image.fromarray(bits).convert("1", dither=Image.Dither.NONE)
    return saved(drawn, "PNG"), as_rgb(bits)


def profiled(pixels):
    data = saved(Image.fromarray(pixels), "PNG", icc_profile=swapped_profile())
    return data, pixels[..., [1, 0, 2]]


def turned(path, draw):
    exif, tag = Image.Exif(), draw.randint(2, 8)
    exif[0x0112] = tag
    stored = np.ascontiguousarray(TURNED[tag](pixels := content(draw)))
    path.write_bytes(saved(Image.fromarray(stored), "JPEG", exif=exif, **JPEG))
    return pixels


def frames(format, **options):
    def make(pixels):
        others = [Image.fromarray(np.roll(255 - pixels, n, 0)) for n in range(5)]
        drawn = Image.fromarray(pixels)
        if format == "GIF":
            drawn = drawn.quantize(64)
            pixels, others = np.array(drawn.convert("RGB")), [each.quantize(64) for each in others]
        return saved(drawn, format, save_all=True, append_images=others, **options), pixels

    return make


def of_size(width, height):
    def make(path, draw):
        path.write_bytes(saved(Image.fromarray(pixels := smooth(width, height)), "PNG"))
        return pixels

    return make


# --- others -----------------------------------------------------------------------------------------------------------


def holding(make_bytes):
    """make_bytes(draw) → bytes that are no picture to be used."""

    def make(path, draw):
        path.write_bytes(make_bytes(draw))

    return make


def cut(format, **options):
    def make_bytes(draw):
        noise = np.frombuffer(draw.randbytes(40 * 60 * 3), np.uint8).reshape(40, 60, 3)
        data = saved(Image.fromarray(noise), format, **options)
        return data[: draw.randrange(len(data) // 2, len(data) * 9 // 10)]

    return make_bytes


@cache
def bomb(side):
    """side² pixels of one bit, all there; zeros fit into some kilobytes."""
    packer, row = zlib.compressobj(1), b"\0" * (1 + side // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    small = png(side, side, 1, 0, b"")
    empty = chunk(b"IDAT", zlib.compress(b""))
    return small.replace(empty, chunk(b"IDAT", rows))


@cache
def nested_fits():
    """gzip in gzip of a FITS header that names 10^10 pixels (CVE-2026-40192 was such a file)."""
    cards = ["SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 100000", "NAXIS2  = 100000", "END"]
    header = "".join(each.ljust(80) for each in cards).ljust(2880).encode()
    return gzip.compress(gzip.compress(header + b"\0" * 20_000_000, 1))


@cache
def talkative(kind):
    """One pixel, and words or EXIF beside it."""
    beside = {
        "EXIF": lambda: chunk(b"eXIf", b"II*\0" + b"\0" * DEEP),
        "zTXt": lambda: chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 50_000_000, 1)),
        "iTXt": lambda: chunk(b"iTXt", b"C\0\1\0\0\0" + zlib.compress(b"a" * 50_000_000, 1)),
    }
    return png(1, 1, 8, 0, b"\0\0", beside[kind]())


def not_a_number(draw):
    values = np.ones((8, 8), np.float32)
    values[draw.randrange(8), draw.randrange(8)] = draw.choice((float("nan"), float("inf"), -1.0))
    return saved(Image.fromarray(values), "TIFF")


def link(to):
    def make(path, draw):
        path.symlink_to(path.parent / to if to else path)

    return make


def outside(path, draw):
    there = path.parents[1] / "private.png"
    there.write_bytes(saved(Image.fromarray(smooth()), "PNG"))
    path.symlink_to(there)


def forbidden(path, draw):
    path.write_bytes(saved(Image.fromarray(smooth()), "PNG"))
    path.chmod(0)


HTML = b"<!DOCTYPE html><html><body>404</body></html>"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
EVERY = {
    # good ones: the pixels are read
    "PNG": Kind(plain("PNG"), ".png"),
    "JPEG": Kind(plain("JPEG", **JPEG), ".jpg"),
    "WebP": Kind(plain("WEBP", **LOSSLESS), ".webp"),
    "BMP": Kind(plain("BMP"), ".bmp"),
    "TIFF": Kind(plain("TIFF", compression="tiff_lzw"), ".tif"),
    "palette": Kind(as_kind(palette), ".gif"),
    "wrong extension": Kind(plain("PNG"), ".jpeg"),
    "CMYK, Adobe": Kind(as_kind(cmyk(True)), ".jpg"),
    "CMYK, straight": Kind(as_kind(cmyk(False)), ".jpg"),
    "16-bit grey": Kind(as_kind(deep_grey), ".png"),
    "32-bit float": Kind(as_kind(floating), ".tiff"),
    "LA": Kind(as_kind(grey_alpha), ".png"),
    "P, transparent": Kind(as_kind(clear_palette), ".png"),
    "RGBA": Kind(as_kind(colour_alpha), ".png"),
    "1-bit": Kind(as_kind(one_bit), ".png"),
    "ICC": Kind(as_kind(profiled), ".png"),
    "EXIF 2-8": Kind(turned, ".jpg"),
    "animated GIF": Kind(as_kind(frames("GIF")), ".gif"),
    "animated WebP": Kind(as_kind(frames("WEBP", **LOSSLESS)), ".webp"),
    "APNG": Kind(as_kind(frames("PNG")), ".png"),
    "pages of a TIFF": Kind(as_kind(frames("TIFF")), ".tif"),
    "1x1": Kind(of_size(1, 1), ".png"),
    "1x4000": Kind(of_size(1, 4000), ".png"),
    "4000x1": Kind(of_size(4000, 1), ".png"),
    "17x31": Kind(of_size(17, 31), ".png"),
    "name not UTF-8": Kind(plain("PNG"), "-\udcff\udcfe.png"),
    "name of 250 bytes": Kind(plain("PNG"), f"-{'x' * 230}.png"),
    "odd name": Kind(plain("PNG"), "-a\nb\t'\"${x} %2e%2e\u202e.PNG"),
    # the others: a reason is told
    "zero bytes": Kind(holding(lambda draw: b""), ".png", "empty"),
    "garbage": Kind(holding(lambda draw: b"\1" + draw.randbytes(999)), ".png", "not-an-image"),
    "cut JPEG": Kind(holding(cut("JPEG")), ".jpg", "truncated"),
    "cut PNG": Kind(holding(cut("PNG")), ".png", "truncated"),
    "cut WebP": Kind(holding(cut("WEBP")), ".webp", "truncated"),
    "HTML": Kind(holding(lambda draw: HTML), ".jpg", "not-an-image"),
    "SVG": Kind(holding(lambda draw: SVG), ".png", "not-an-image"),
    "no permission": Kind(forbidden, ".png", "unreadable"),
    "vanished": Kind(plain("PNG"), ".png", "missing", gone=True),
    "folder": Kind(lambda path, draw: path.mkdir(), ".png", "unlisted"),
    "hidden": Kind(plain("PNG"), ".png", "unlisted"),
    "broken link": Kind(link("nowhere"), ".png", "missing"),
    "link in a circle": Kind(link(""), ".png", "unreadable"),
    "link out of the folder": Kind(outside, ".png", "outside-folder"),
    "pipe": Kind(lambda path, draw: os.mkfifo(path), ".png", "not-a-file", waits=True),
    "100 megapixels": Kind(holding(lambda draw: bomb(10_000)), ".png", "too-many-pixels"),
    "400 megapixels": Kind(holding(lambda draw: bomb(20_000)), ".png", "too-many-pixels"),
    "FITS in gzip in gzip": Kind(holding(lambda draw: nested_fits()), ".png", "not-an-image"),
    "huge EXIF": Kind(holding(lambda draw: talkative("EXIF")), ".png", "too-much-metadata"),
    "huge iTXt": Kind(holding(lambda draw: talkative("iTXt")), ".png", "too-much-metadata"),
    "huge zTXt": Kind(holding(lambda draw: talkative("zTXt")), ".png", "too-much-metadata"),
    "NaN": Kind(holding(not_a_number), ".tif", "unknown-range"),
    "LAB": Kind(holding(lambda draw: saved(Image.new("LAB", (8, 8)), "TIFF")), ".tif", "unsupported-colour"),
}
BOMBS = tuple(name for name, kind in EVERY.items() if "mega" in name or "huge" in name or "FITS" in name)


def kinds():
    """Those that this process can meet: to root no permission is denied."""
    return {name: kind for name, kind in EVERY.items() if name != "no permission" or os.geteuid()}


def write(folder: Path, count: int, seed: int = 0) -> list[Made]:
    """So many files, of every kind in turn. Those that vanish are still there: see `vanish`."""
    folder.mkdir(parents=True)
    draw, made, every = random.Random(seed), [], list(kinds().items())
    for number in range(count):
        name, kind = every[number % len(every)]
        start = "." if name == "hidden" else ""
        path = folder / f"{start}{number:04d}{kind.ending}"
        made.append(Made(path, name, kind.make(path, draw)))
    return made


def vanish(made: list[Made]) -> None:
    for each in made:
        if EVERY[each.kind].gone:
            each.path.unlink()
