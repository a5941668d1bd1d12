"""Pictures made byte by byte or by Pillow, of every kind that vq/images.py must read or refuse. Knows no test."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms


def smooth(width=48, height=32) -> np.ndarray:
    """(H, W, 3) uint8: slow gradients, which JPEG keeps and which no turn maps onto themselves."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    channels = [40 + 180 * x / width, 30 + 190 * y / height, 60 + 60 * x / width + 100 * y / height]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def grey(width=48, height=32) -> np.ndarray:
    return smooth(width, height)[..., 0] // 2 + smooth(width, height)[..., 1] // 2


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(np.inf) if error == 0 else float(10 * np.log10(255**2 / error))


def as_rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(float) / 255
    return (colour * share + 255 * (1 - share)).round().astype(np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows: bytes, *extra: bytes) -> bytes:
    """A PNG by hand, for what Pillow cannot write. `rows`: scan lines, each with its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def ink() -> np.ndarray:
    return np.concatenate([smooth() // 2, grey()[..., None] // 3], axis=-1)


def alpha() -> np.ndarray:
    return np.ascontiguousarray(smooth()[::-1, :, 1])


TURNED = {  # what a camera stores for each orientation tag, so that the shown picture is the same
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def swapped_profile() -> bytes:
    """sRGB with red and green exchanged: a profile whose use cannot be overlooked."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    entries = {bytes(data[132 + 12 * n : 136 + 12 * n]): 132 + 12 * n for n in range(count)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return (
        bytes(data)
        .replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
        .replace(b"sRGB built-in", b"x" * 13)
    )


def claimed_gif(width, height) -> bytes:
    data = bytearray(saved(Image.new("L", (2, 2)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def claimed_webp(side) -> bytes:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = bytearray(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    assert data[12:16] == b"VP8X"
    data[24:27] = data[27:30] = (side - 1).to_bytes(3, "little")
    return bytes(data)


def claimed_bmp(side) -> bytes:
    data = bytearray(saved(Image.new("RGB", (2, 2)), "BMP"))
    data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


def bombs() -> dict[str, bytes]:
    zeros = b"\0" * (10_000 * (1 + 10_000 // 8))  # 100 megapixels of one bit: some kilobytes
    return {
        "png-900MP": png(30_000, 30_000, 8, 2, b"\0" * 100),
        "png-100MP-real": png(10_000, 10_000, 1, 0, zeros),
        "gif-4000MP": claimed_gif(65_535, 65_535),
        "webp-100MP": claimed_webp(10_000),
        "bmp-900MP": claimed_bmp(30_000),
        "one-line": png(2**31 - 1, 1, 1, 0, b"\0" * 100),
    }
