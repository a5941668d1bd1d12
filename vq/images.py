"""Image files, pictures and pixels: the only place that knows ranges, colour models, resizing, hostile files.

    file --open_image--> RGB picture --to_pixels--> x_CHW in [-1, 1] --to_image--> RGB picture

Every file ends in one of two ways: the right pixels, or a `Reject` that says why. Nothing is repaired on the
way. It does not know where files come from, what is said about them, or what is done with the pixels.

What is decided here:

- *Formats*: PNG, JPEG, WebP, GIF, BMP, TIFF, told by content and never by name. SVG is not opened here.
- *Several frames or pages*: the first one (for an animated PNG: the picture that a plain viewer shows).
- *Transparency*: laid on a background, white unless asked otherwise, by the stored (sRGB) values.
- *Orientation*: the EXIF tag is applied. EXIF that cannot be read is taken as absent.
- *Colour profile*: RGB, grey and CMYK profiles are converted to sRGB; a broken or mismatched one is ignored.
- *CMYK JPEG*: ink is stored inverted where the Adobe marker says who wrote it, and straight otherwise.
- *Grey of 12 or 16 bits*: full scale becomes 255. Integers of 32 bits are read as 16-bit values.
- *Floating point*: the smallest full scale among 1, 255 and 65535 that holds every value becomes 255.
- *Beyond these ranges*, negative or not finite: a reject, since any scale would be a guess.
- *Pillow's LOAD_TRUNCATED_IMAGES*, where some library switched it on, is refused: it makes cut files grey.

Shape suffixes: C = 3 channels in RGB order, H, W = height and width in pixels, B = batch.
"""

import io
import math
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import (
    Image,
    ImageChops,
    ImageCms,
    ImageColor,
    ImageDraw,
    ImageFile,
    ImageFont,
    UnidentifiedImageError,
)
from torch import Tensor

MAX_PIXELS = 50_000_000
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")

# Everything in a PNG that is not pixels: text, EXIF, profiles. Real files stay far below.
_MAX_PNG_METADATA = 16 * 2**20
_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Reject(Exception):
    """A picture that cannot be used.

    Attributes:
        reason: a short stable word, fit for counting. From this file: missing, not-a-file, unreadable, empty,
            not-an-image, too-many-pixels, too-much-metadata, truncated, corrupt, unsupported-colour,
            unknown-range, out-of-memory. Sources of pictures add their own.
        detail: one line for a person.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = " ".join(detail.split())[:300]

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


# --------------------------------------------------------------------------- file -> picture


def open_image(
    source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS, background: str = "white"
) -> Image.Image:
    """Read one picture, whatever its format, as upright 8-bit sRGB.

    Args:
        source: a path, or the bytes of a file.
        max_pixels: the most pixels; the file's header is asked before anything is decoded. (Pillow's own
            limit, 179 million unless changed, holds too.)
        background: what shows through transparent parts: a name or "#rrggbb".

    Returns:
        A picture of mode RGB.

    Raises:
        Reject: for every file that does not give right pixels.
        ValueError: the background is no colour.
        RuntimeError: `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is on.
    """
    ImageColor.getrgb(background)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so cut files would pass: set it to False"
        )
    with _stream(source) as file:
        image = _read_header(file, _format_of(file))
        width, height = image.size
        if width * height > max_pixels:
            raise Reject("too-many-pixels", f"{width}x{height}, at most {max_pixels} pixels are read")
        _load(image)
        return _upright(to_rgb(_positive(image), background), image)


def _stream(source: str | Path | bytes) -> IO[bytes]:
    """The bytes of a regular, non-empty file: pipes and devices would block or never end."""
    if isinstance(source, bytes):
        if not source:
            raise Reject("empty", "no bytes")
        return io.BytesIO(source)
    try:
        handle = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except IsADirectoryError as error:
        raise Reject("not-a-file", "a folder") from error
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise Reject("missing", "a broken link" if os.path.islink(source) else "no such file") from error
    except OSError as error:
        raise Reject("unreadable", error.strerror or type(error).__name__) from error
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISREG(status.st_mode):
        raise Reject("empty", "0 bytes")
    raise Reject("not-a-file", "a folder, a pipe or a device")


def _format_of(file: IO[bytes]) -> str:
    """Pillow's name of the format, by the first bytes; what is cheap to check of its frame is checked."""
    head = _read_at(file, 0, 16)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        _check_length(file, 8 + int.from_bytes(head[4:8], "little"))
        return "WEBP"
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            if name == "PNG":
                _check_png_chunks(file)
            return name
    raise Reject("not-an-image", f"starts with {head!r}; read are PNG, JPEG, WebP, GIF, BMP and TIFF")


def _read_at(file: IO[bytes], position: int, count: int) -> bytes:
    try:
        file.seek(position)
        return file.read(count)
    except OSError as error:
        raise Reject("unreadable", error.strerror or type(error).__name__) from error


def _check_length(file: IO[bytes], announced: int) -> None:
    length = file.seek(0, os.SEEK_END)
    if length < announced:
        raise Reject("truncated", f"{length} of {announced} bytes")


def _check_png_chunks(file: IO[bytes]) -> None:
    """Walk from chunk to chunk by their lengths, reading none: is the end there, how much is not pixels?"""
    position, other = 8, 0
    while True:
        head = _read_at(file, position, 8)
        if len(head) < 8:
            raise Reject("truncated", "the PNG file has no end")
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        position += 12 + length
        other += 0 if kind in (b"IDAT", b"fdAT") else length
        if other > _MAX_PNG_METADATA:
            raise Reject("too-much-metadata", f"over {_MAX_PNG_METADATA} bytes beside the pixels")
        if kind == b"IEND":
            return _check_length(file, position)


def _read_header(file: IO[bytes], name: str) -> ImageFile.ImageFile:
    file.seek(0)
    try:
        return Image.open(file, formats=[name])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Reject("too-many-pixels", str(error)) from error
    except UnidentifiedImageError as error:
        # Its text names the object in memory, which differs from run to run.
        raise Reject("corrupt", f"the {name} header cannot be read") from error
    except Exception as error:  # decoders raise whatever their parsing meets: struct.error, KeyError, ...
        raise _reject(error) from error


def _load(image: ImageFile.ImageFile) -> None:
    _mend_transparent_colour(image)
    try:
        image.load()
    except Exception as error:  # as above
        raise _reject(error) from error


def _reject(error: Exception) -> Reject:
    """What a decoder's exception means."""
    text = str(error)
    if isinstance(error, OSError) and error.errno:
        return Reject("unreadable", error.strerror or text)
    if isinstance(error, MemoryError):
        return Reject("out-of-memory", text)
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return Reject("too-many-pixels", text)
    if "text chunk" in text or "Decompressed data too large" in text:
        return Reject("too-much-metadata", text)
    cut = any(sign in text.lower() for sign in ("truncated", "not enough", "unexpected end", "end of file"))
    return Reject("truncated" if cut else "corrupt", f"{type(error).__name__}: {text}")


def _mend_transparent_colour(image: ImageFile.ImageFile) -> None:
    """PNG names its transparent colour in the file's own depth; Pillow keeps it so, but scales the pixels.

    Without this, transparent parts of 2-, 4- and 16-bit pictures come out opaque.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or isinstance(key, bytes):
        return
    assert image.fp is not None
    here = image.fp.tell()
    depth = _read_at(image.fp, 24, 1)[0]
    image.fp.seek(here)
    if depth in (2, 4) and image.mode == "L":
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif depth == 16 and image.mode == "RGB":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _positive(image: ImageFile.ImageFile) -> Image.Image:
    """Undo Pillow's inversion of a CMYK JPEG where there is no Adobe marker: only Adobe stores ink inverted."""
    if image.format != "JPEG" or image.mode != "CMYK" or "adobe" in image.info:
        return image
    inverted = ImageChops.invert(image)
    inverted.info = dict(image.info)
    return inverted


def _upright(picture: Image.Image, opened: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of the opened file (Pillow has already applied a TIFF's own)."""
    try:
        turn = opened.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF: the picture is as good as one without
        return picture
    return picture.transpose(_TURNS[turn]) if turn in _TURNS else picture


# --------------------------------------------------------------------------- any colour model -> RGB


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """A picture of any mode as 8-bit sRGB, by the rules at the top of this file.

    Raises:
        Reject: unsupported-colour or unknown-range.
    """
    profile = image.info.get("icc_profile")
    plain = _grey_to_8_bits(image) if image.mode.startswith(("I", "F")) else image
    colour, alpha = _split_alpha(_without_palette(plain))
    colour = _to_srgb(colour, profile)
    if alpha is not None:
        canvas = Image.new("RGB", colour.size, background)
        canvas.paste(colour, mask=alpha)
        return canvas
    if colour is image:
        colour = image.copy()
    colour.info = {}  # a profile or a transparent colour must not be applied a second time
    return colour


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 12, 16 or 32 bits, or floating point, scaled (Pillow's own conversion clips)."""
    values = np.asarray(image)
    scale = _full_scale(image, values)
    if values.dtype.kind == "f":
        grey = np.rint(values * np.float32(255 / scale)).astype(np.uint8)
    else:
        # A table: no copy in floating point of what may be 50 million values.
        table = np.rint(np.arange(scale + 1) * (255 / scale)).astype(np.uint8)
        grey = table[values]
    if getattr(image, "tag_v2", {}).get(262) == 0:  # TIFF "white is zero": Pillow inverts 8 bits only
        grey = 255 - grey
    result = Image.fromarray(grey)
    key = image.info.get("transparency")
    if isinstance(key, int):
        result.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return result


def _full_scale(image: Image.Image, values: np.ndarray) -> int:
    """The value that means white."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and np.isfinite(high)):
        raise Reject("unknown-range", f"values from {low:g} to {high:g}: negative or not finite")
    if image.mode == "F":
        scales = [1, 255, 65535]
    elif image.mode == "I":
        scales = [65535]
    else:
        bits = getattr(image, "tag_v2", {}).get(258, 16)
        scales = [2 ** (bits[0] if isinstance(bits, tuple) else bits) - 1]
    for scale in scales:
        if high <= scale:
            return scale
    raise Reject("unknown-range", f"values up to {high:g}, above {scales[-1]}")


_PLAIN = {"1": "L", "P": "RGB", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB"}


def _without_palette(image: Image.Image) -> Image.Image:
    """One of L, LA, RGB, RGBA, CMYK: transparency as a channel, premultiplied colours divided again."""
    target = _PLAIN.get(image.mode, image.mode)
    if image.mode in ("1", "L", "P", "PA", "RGB") and image.has_transparency_data:
        target = "RGBA"
    if target not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        raise Reject("unsupported-colour", f"the colour model {image.mode}")
    return image if target == image.mode else image.convert(target)


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.mode == "RGBA":
        return image.convert("RGB"), image.getchannel("A")
    return image, None


def _to_srgb(colour: Image.Image, icc: object) -> Image.Image:
    """L, RGB or CMYK as RGB, through the colour profile where there is a usable one for these channels."""
    if isinstance(icc, bytes) and icc:
        # Viewers show a file with a broken profile as if it had none, and so do we.
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            colour = _through_profile(colour, ImageCms.ImageCmsProfile(io.BytesIO(icc)))
    return colour if colour.mode == "RGB" else colour.convert("RGB")


def _through_profile(colour: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    facts: Any = profile.profile
    space = facts.xcolor_space.strip()
    if "sRGB" in (facts.profile_description or ""):
        return colour  # the values are sRGB already: exact, and faster
    if space == "RGB" and colour.mode == "L":
        colour = colour.convert("RGB")
    if {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space) != colour.mode:
        return colour
    return ImageCms.profileToProfile(colour, profile, _srgb(), outputMode="RGB") or colour


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


# --------------------------------------------------------------------------- picture <-> pixels


Size = int | tuple[int, int]  # the side of a square, or (height, width)


def fit_shape(
    image: Image.Image, size: Size, fit: Literal["crop", "pad"] = "crop", background: str = "white"
) -> Image.Image:
    """An RGB picture of any shape as one of the given shape, antialiased (Lanczos).

    `crop` keeps the largest part in the middle that has the wanted proportions and drops the rest; `pad` keeps
    everything and fills two sides with the background. Smaller pictures are enlarged. A 1x4000 strip is legal:
    cropped to a square it leaves its middle pixel, padded a line one pixel wide.

    Args:
        size: side of a square, or (height, width).

    Raises:
        ValueError: another `fit`, or a side below 1.
    """
    high, wide = (size, size) if isinstance(size, int) else size
    if min(high, wide) < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    width, height = image.size
    if fit == "crop":
        # The box goes to resize as it is: scaling first would blow a long strip up to gigabytes.
        taken_w = width if width * high <= height * wide else height * wide / high
        taken_h = height if width * high >= height * wide else width * high / wide
        left, top = (width - taken_w) / 2, (height - taken_h) / 2
        return _resize(image, (wide, high), (left, top, left + taken_w, top + taken_h))
    if fit != "pad":
        raise ValueError(f"fit must be 'crop' or 'pad', not {fit!r}")
    scale = min(wide / width, high / height)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    corner = ((wide - inner[0]) // 2, (high - inner[1]) // 2)
    canvas = Image.new("RGB", (wide, high), background)
    canvas.paste(_resize(image, inner, (0, 0, width, height)), corner)
    return canvas


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    if box == (0, 0, *image.size) and size == image.size:
        return image
    # A gap of 3: large pictures are first reduced by whole factors, which no eye and no test here can tell.
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def nearest_shape(shapes: Sequence[tuple[int, int]], width: int, height: int) -> tuple[int, int]:
    """The (height, width) whose proportions are nearest to a picture's; of two that are equally near, the first."""
    return min(shapes, key=lambda shape: abs(math.log(shape[1] / shape[0]) - math.log(width / height)))


def to_pixels(
    image: Image.Image,
    size: Size | None = None,
    fit: Literal["crop", "pad"] = "crop",
    background: str = "white",
) -> Tensor:
    """A picture of any mode as numbers; `to_image` is the way back.

    Args:
        size: side of the square to make, or (height, width): see `fit_shape`; None keeps the picture's own shape.

    Returns:
        x_CHW, float32 in [-1, 1], C = 3.
    """
    return from_bytes(picture_bytes(image, size, fit, background))


def picture_bytes(
    image: Image.Image,
    size: Size | None = None,
    fit: Literal["crop", "pad"] = "crop",
    background: str = "white",
) -> Tensor:
    """As `to_pixels`, but uint8 in 0..255, (3, H, W): the form in which pictures are kept in memory."""
    picture = to_rgb(image, background)
    if size is not None:
        picture = fit_shape(picture, size, fit, background)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_image(x_CHW: Tensor) -> Image.Image:
    """Numbers as a picture, back within 1/255 of what `to_pixels` was given.

    Args:
        x_CHW: float in [-1, 1], clamped, or uint8; C = 3.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if x_CHW.ndim != 3 or x_CHW.shape[0] != 3:
        raise ValueError(f"a picture has the shape (3, H, W), not {tuple(x_CHW.shape)}")
    return Image.fromarray(to_bytes(x_CHW).permute(1, 2, 0).contiguous().cpu().numpy())


def to_bytes(x: Tensor) -> Tensor:
    """Float in [-1, 1] (clamped, rounded) to uint8 in 0..255, of the same shape; uint8 passes through.

    Raises:
        ValueError: values that are not finite, which have no brightness.
    """
    if x.dtype == torch.uint8:
        return x
    x = x.detach().float()
    if not torch.isfinite(x).all():
        raise ValueError("pixels that are not finite (NaN or infinite)")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(x: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1], of the same shape; `to_bytes` is its exact inverse."""
    return x.float() / 127.5 - 1


# --------------------------------------------------------------------------- pictures -> one sheet

_PAPER, _FRAME, _INK = "#f4f4f2", "#d8d8d4", "#333333"
_FONT_SIZE, _LINE_HEIGHT, _MAX_LINES = 13, 17, 3
_MARGIN, _GAP, _LABEL_GAP = 24, 14, 5


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[Sequence[str]] | None = None,
    *,
    tile: int = 112,
    title: str = "",
) -> Image.Image:
    """Pictures in a grid on light paper, each with its words beneath.

    Small pictures are enlarged by a whole factor without smoothing, so that single pixels can be judged;
    large ones are reduced. Labels are wrapped to the tile and end in "…" after three lines; characters that
    the built-in font lacks show as boxes.

    Args:
        rows: RGB pictures; rows may differ in length, pictures in size.
        labels: a word or sentence for each picture, in the same shape.
        tile: side in pixels that a tile has at least, and about.
        title: a line above the grid.

    Raises:
        ValueError: no picture at all, or labels of another shape.
    """
    if not any(len(row) for row in rows):
        raise ValueError("a contact sheet needs at least one picture")
    if labels is not None and [len(row) for row in labels] != [len(row) for row in rows]:
        raise ValueError("labels must have the shape of rows")
    tiles = [[_tile(picture, tile) for picture in row] for row in rows]
    cell = max(tile, *(max(each.size) for row in tiles for each in row))
    words = labels or [[""] * len(row) for row in rows]
    texts = [[_wrap(text, cell) for text in row] for row in words]
    heights = [cell + _text_height(max((len(lines) for lines in row), default=0)) for row in texts]
    header = _LINE_HEIGHT + _GAP if title else 0
    columns = max(len(row) for row in rows)
    width = 2 * _MARGIN + columns * cell + (columns - 1) * _GAP
    height = 2 * _MARGIN + header + sum(heights) + (len(rows) - 1) * _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), _printable(title), fill=_INK, font=_font())
    y = _MARGIN + header
    for row, lines_of_row, height in zip(tiles, texts, heights, strict=True):
        for column, (picture, lines) in enumerate(zip(row, lines_of_row, strict=True)):
            _place(sheet, draw, picture, lines, _MARGIN + column * (cell + _GAP), y, cell)
        y += height + _GAP
    return sheet


def _tile(picture: Image.Image, tile: int) -> Image.Image:
    width, height = picture.size
    long = max(width, height)
    if long > 2 * tile:
        scale = 2 * tile / long
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        return picture.resize(inner, Image.Resampling.LANCZOS, reducing_gap=3.0)
    factor = max(1, -(-tile // long))
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def _place(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    picture: Image.Image,
    lines: list[str],
    x: int,
    y: int,
    cell: int,
) -> None:
    left, top = x + (cell - picture.width) // 2, y + (cell - picture.height) // 2
    draw.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=_FRAME)
    sheet.paste(picture, (left, top))
    for number, line in enumerate(lines):
        middle = x + cell / 2 - _font().getlength(line) / 2
        draw.text((middle, y + cell + _LABEL_GAP + number * _LINE_HEIGHT), line, fill=_INK, font=_font())


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=_FONT_SIZE)


def _text_height(lines: int) -> int:
    return lines * _LINE_HEIGHT + _LABEL_GAP if lines else 0


def _printable(text: str) -> str:
    """One line that every font can be asked to draw: no control characters, no lone surrogates."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def _wrap(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in _printable(text[:1000]).split():
        if lines and _fits(f"{lines[-1]} {word}", width):
            lines[-1] = f"{lines[-1]} {word}"
            continue
        while not _fits(word, width) and len(lines) <= _MAX_LINES:
            cut = next((n for n in range(len(word), 1, -1) if _fits(word[:n], width)), 1)
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    if len(lines) <= _MAX_LINES:
        return lines
    last = lines[_MAX_LINES - 1]
    while last and not _fits(last + "…", width):
        last = last[:-1]
    return [*lines[: _MAX_LINES - 1], last + "…"]


def _fits(text: str, width: int) -> bool:
    return _font().getlength(text) <= width
