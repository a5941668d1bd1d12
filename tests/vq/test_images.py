"""vq/images.py: every kind of file gives the right pixels or a reject with its reason; pixels come back unchanged.

All files are made here. It does not test folders, captions or data sets.
"""

import io
import os
import random
import struct
import tempfile
import time
import zlib

import numpy as np
import pytest
import torch
from pictures import (
    TURNED,
    alpha,
    as_rgb,
    bombs,
    chunk,
    grey,
    ink,
    on_white,
    png,
    psnr,
    saved,
    smooth,
    swapped_profile,
)
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from vq.images import (
    Reject,
    contact_sheet,
    fit_shape,
    from_bytes,
    open_image,
    picture_bytes,
    to_bytes,
    to_image,
    to_pixels,
    to_rgb,
)

# --------------------------------------------------------------------------- made pictures


def pixels(source) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB" and image.info == {}
    return np.array(image)


def reason(source, **options) -> str:
    with pytest.raises(Reject) as caught:
        open_image(source, **options)
    return caught.value.reason


# --------------------------------------------------------------------------- formats and colour models


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_are_exact(format):
    data = saved(Image.fromarray(smooth()), format, **({"lossless": True} if format == "WEBP" else {}))
    assert np.array_equal(pixels(data), smooth())


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff_is_exact(compression):
    assert np.array_equal(pixels(saved(Image.fromarray(smooth()), "TIFF", compression=compression)), smooth())


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(progressive):
    data = saved(Image.fromarray(smooth()), "JPEG", quality=98, subsampling=0, progressive=progressive)
    assert psnr(pixels(data), smooth()) >= 40


def test_path_string_and_bytes_give_the_same(tmp_path):
    data = saved(Image.fromarray(smooth()), "PNG")
    (tmp_path / "wrong.jpg").write_bytes(data)  # told by content, not by name
    for source in (tmp_path / "wrong.jpg", str(tmp_path / "wrong.jpg"), data):
        assert np.array_equal(pixels(source), smooth())


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "GIF"])
def test_grey_and_palette(format):
    assert np.array_equal(pixels(saved(Image.fromarray(grey()), format)), as_rgb(grey()))
    palette = Image.fromarray(smooth()).quantize(64)
    assert np.array_equal(pixels(saved(palette, format)), np.array(palette.convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "GIF"])
def test_one_bit(format):
    bits = grey() > 120
    image = Image.fromarray((bits * 255).astype(np.uint8)).convert("1", dither=Image.Dither.NONE)
    assert np.array_equal(pixels(saved(image, format)), as_rgb((bits * 255).astype(np.uint8)))


def ramp(height=2) -> np.ndarray:
    """Every 16-bit value, twice."""
    return np.tile(np.arange(65536, dtype=np.uint16).reshape(256, 256), (height, 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: saved(Image.fromarray(ramp()), "PNG"),
        lambda: saved(Image.fromarray(ramp()), "TIFF"),
        lambda: saved(Image.fromarray(ramp()), "TIFF", compression="tiff_lzw"),
        lambda: saved(Image.fromarray(ramp()).convert("I"), "TIFF"),
        lambda: saved(Image.frombytes("I;16B", (256, 512), ramp().astype(">u2").tobytes()), "TIFF"),
        lambda: saved(Image.fromarray((ramp() / np.float32(65535)).astype(np.float32)), "TIFF"),
        lambda: saved(Image.fromarray(ramp().astype(np.float32)), "TIFF"),
    ],
    ids=["png", "tiff", "tiff-lzw", "int32", "big-endian", "float-1", "float-65535"],
)
def test_deep_grey_is_scaled_not_clipped(make):
    wanted = np.rint(ramp() / 257).astype(np.uint8)
    got = pixels(make())
    assert np.array_equal(got, as_rgb(got[..., 0]))
    assert np.abs(got[..., 0].astype(int) - wanted).max() <= 1
    assert psnr(got[..., 0], wanted) >= 60


def test_float_of_0_to_255():
    assert np.array_equal(pixels(saved(Image.fromarray(grey().astype(np.float32)), "TIFF")), as_rgb(grey()))


def test_white_is_zero_tiff_of_16_bits():
    values = grey().astype(np.uint16) * 257
    tags = {256: 48, 257: 32, 258: 16, 259: 1, 262: 0, 277: 1, 278: 32, 279: 48 * 32 * 2}
    entries = sorted({**tags, 273: 8 + 2 + 12 * 9 + 4}.items())
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", k, 4, 1, v) for k, v in entries)
    data = b"II*\0" + struct.pack("<I", 8) + ifd + struct.pack("<I", 0) + values.astype("<u2").tobytes()
    assert np.array_equal(pixels(data), as_rgb(255 - grey()))


@pytest.mark.parametrize("bad", [-1.0, 70000.0, float("nan"), float("inf")])
def test_values_without_a_scale_are_rejected(bad):
    values = np.ones((4, 4), np.float32)
    values[1, 2] = bad
    assert reason(saved(Image.fromarray(values), "TIFF")) == "unknown-range"


def test_16_bit_colour_png():
    wide = smooth().astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    assert np.array_equal(pixels(png(48, 32, 16, 2, rows)), smooth())


def test_cmyk_tiff():
    wanted = np.array(Image.fromarray(ink(), "CMYK").convert("RGB"))
    assert np.array_equal(pixels(saved(Image.fromarray(ink(), "CMYK"), "TIFF")), wanted)


def test_cmyk_jpeg_with_adobe_marker_is_inverted():
    image = Image.fromarray(ink(), "CMYK")
    data = saved(image, "JPEG", quality=99, subsampling=0)
    assert b"Adobe" in data
    assert psnr(pixels(data), np.array(image.convert("RGB"))) >= 40


def test_cmyk_jpeg_without_adobe_marker_is_not():
    image = Image.fromarray(255 - ink(), "CMYK")  # Pillow stores ink inverted
    data = saved(image, "JPEG", quality=99, subsampling=0)
    at = data.index(b"\xff\xee")
    bare = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    assert b"Adobe" not in bare
    wanted = np.array(Image.fromarray(ink(), "CMYK").convert("RGB"))
    assert psnr(pixels(bare), wanted) >= 40


# --------------------------------------------------------------------------- transparency


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_rgba_on_white(format):
    image = Image.fromarray(np.dstack([smooth(), alpha()]))
    data = saved(image, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    assert np.abs(pixels(data).astype(int) - on_white(smooth(), alpha())).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_with_alpha_on_white(format):
    data = saved(Image.fromarray(np.dstack([grey(), alpha()]), "LA"), format)
    assert np.abs(pixels(data).astype(int) - on_white(as_rgb(grey()), alpha())).max() <= 1


def test_background_is_the_callers():
    clear = saved(Image.new("RGBA", (3, 2), (10, 200, 30, 0)), "PNG")
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(clear, background="#102030").getpixel((0, 0)) == (16, 32, 48)
    with pytest.raises(ValueError):
        open_image(clear, background="no colour")


def test_palette_with_transparent_colours():
    image = Image.fromarray(smooth()).quantize(64)
    levels = bytes((7 * n) % 256 for n in range(64))
    rgba = np.array(image.convert("RGB")), np.frombuffer(levels, np.uint8)[np.array(image)]
    data = saved(image, "PNG", transparency=levels)
    assert np.abs(pixels(data).astype(int) - on_white(*rgba)).max() <= 1
    gif = saved(image, "GIF", transparency=int(np.array(image)[0, 0]))
    assert tuple(pixels(gif)[0, 0]) == (255, 255, 255)
    assert tuple(pixels(gif)[-1, -1]) != (255, 255, 255)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_grey_of_every_depth(depth):
    """Two pixels, the lowest and the second-lowest value; the second is the transparent colour."""
    packed = {1: b"\x40", 2: b"\x10", 4: b"\x01", 8: b"\x00\x01", 16: b"\x00\x00\x00\x01"}[depth]
    data = png(2, 1, depth, 0, b"\0" + packed, chunk(b"tRNS", b"\x00\x01"))
    assert pixels(data)[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("depth", [8, 16])
def test_transparent_colour_of_every_depth(depth):
    wide = ">u1" if depth == 8 else ">u2"
    factor = 1 if depth == 8 else 257
    values = np.array([[[10, 20, 30], [40, 50, 60]]]) * factor
    key = (np.array([40, 50, 60]) * factor).astype(">u2").tobytes()
    data = png(2, 1, depth, 2, b"\0" + values.astype(wide).tobytes(), chunk(b"tRNS", key))
    assert pixels(data)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


# --------------------------------------------------------------------------- orientation, profiles


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_orientation(format, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    stored = Image.fromarray(np.ascontiguousarray(TURNED[tag](smooth())))
    assert psnr(pixels(saved(stored, format, exif=exif, **options)), smooth()) >= 40


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_exif_is_taken_as_absent():
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):
        assert psnr(pixels(saved(Image.fromarray(smooth()), "JPEG", quality=98, exif=exif)), smooth()) >= 35


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_colour_profile_is_applied_once(format):
    data = saved(Image.fromarray(smooth()), format, icc_profile=swapped_profile())
    wanted = smooth()[..., [1, 0, 2]]
    assert psnr(pixels(data), wanted) >= 40
    assert psnr(np.array(to_image(to_pixels(open_image(data)))), wanted) >= 40


def test_srgb_profile_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(saved(Image.fromarray(smooth()), "PNG", icc_profile=profile)), smooth())


def test_broken_or_mismatched_profile_is_ignored():
    assert np.array_equal(
        pixels(saved(Image.fromarray(smooth()), "PNG", icc_profile=b"not a profile")), smooth()
    )
    cmyk = saved(Image.fromarray(ink(), "CMYK"), "TIFF", icc_profile=swapped_profile())
    assert np.array_equal(pixels(cmyk), np.array(Image.fromarray(ink(), "CMYK").convert("RGB")))


# --------------------------------------------------------------------------- several frames


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_or_page(format):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(pixels(data), np.array(frames[0]))


# --------------------------------------------------------------------------- bad files


def all_formats() -> dict[str, bytes]:
    """One file a kind, with noise so that a cut shows."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    jpeg = {"quality": 90}
    frames = {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    return {
        "png": saved(image, "PNG"),
        "apng": saved(image, "PNG", **frames),
        "jpeg": saved(image, "JPEG", **jpeg),
        "progressive": saved(image, "JPEG", progressive=True, **jpeg),
        "webp": saved(image, "WEBP", lossless=True),
        "webp-lossy": saved(image, "WEBP"),
        "webp-animated": saved(image, "WEBP", lossless=True, **frames),
        "gif": saved(image.quantize(256), "GIF"),
        "bmp": saved(image, "BMP"),
        "tiff": saved(image, "TIFF"),
        "tiff-lzw": saved(image, "TIFF", compression="tiff_lzw"),
        "tiff-16": saved(Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "TIFF"),
        "tiff-jpeg": saved(image, "TIFF", compression="jpeg"),
    }


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged TIFF tags, on the way to the reject
@pytest.mark.parametrize("kind", sorted(all_formats()))
def test_cut_files_are_rejected_or_whole(kind):
    """At every cut point: a reject, or (only trailing bytes were lost) the whole picture. Never half of it."""
    data = all_formats()[kind]
    whole = pixels(data)
    cuts = sorted(
        {*range(1, 40), *range(40, len(data), max(1, len(data) // 60)), *range(len(data) - 20, len(data))}
    )
    rejected = 0
    for cut in cuts:
        try:
            assert np.array_equal(pixels(data[:cut]), whole), (
                f"silently wrong when cut at {cut} of {len(data)}"
            )
        except Reject as reject:
            assert reject.reason in ("truncated", "corrupt", "not-an-image")
            rejected += 1
    assert rejected >= len(cuts) - 40
    assert reason(data[: len(data) // 2]) in ("truncated", "corrupt")


def test_truncated_is_called_truncated():
    data = all_formats()
    for kind in ("png", "jpeg", "progressive", "webp", "gif", "bmp", "tiff"):
        assert reason(data[kind][: len(data[kind]) * 2 // 3]) == "truncated", kind


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged TIFF tags, on the way to the reject
@pytest.mark.parametrize("kind", sorted(all_formats()))
def test_flipped_bytes_never_crash(kind):
    """Damage that a decoder can notice is a reject; nothing but a picture or a Reject ever comes out."""
    draw = random.Random(0)
    data = all_formats()[kind]
    for _ in range(40):
        bad = bytearray(data)
        for _ in range(draw.choice((1, 4, 30))):
            bad[draw.randrange(min(len(bad), draw.choice((64, 10**6))))] = draw.randrange(256)
        try:
            assert open_image(bytes(bad), max_pixels=10**6).mode == "RGB"
        except Reject as reject:
            assert reject.reason and "0x7" not in reject.detail


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not-an-image"),
        (b"\0" * 1000, "not-an-image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not-an-image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "not-an-image"),
        (b"SIMPLE  =                    T", "not-an-image"),
        (b"BMW is no bitmap, though it begins like one", "truncated"),
        (b"GIF89a", "corrupt"),
    ],
)
def test_what_is_no_picture(tmp_path, content, wanted):
    (tmp_path / "page.jpg").write_bytes(content)
    assert reason(tmp_path / "page.jpg") == wanted
    assert reason(content) == wanted


def test_paths_that_lead_to_no_file(tmp_path):
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "vanished.png") == "missing"
    assert reason(tmp_path / "broken.png") == "missing"
    assert reason("a\0b.png") == "missing"
    assert reason(tmp_path / "round.png") == "unreadable"
    assert reason(tmp_path / "folder.png") == "not-a-file"
    assert reason(tmp_path / "pipe.png") == "not-a-file"  # and does not wait for a writer
    assert reason("/dev/zero") == "not-a-file"


def test_permission_denied():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.png")
        Image.fromarray(smooth()).save(path)
        os.chmod(folder, 0o755)
        os.chmod(path, 0)
        if os.geteuid():
            assert reason(path) == "unreadable"
            return
        os.seteuid(65534)  # nothing is denied to root
        try:
            assert reason(path) == "unreadable"
        finally:
            os.seteuid(0)


def test_pillows_tolerance_of_cut_files_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        open_image(saved(Image.fromarray(smooth()), "JPEG"))


def test_nothing_of_pillow_is_changed():
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, ImageFile.LOAD_TRUNCATED_IMAGES
    open_image(saved(Image.fromarray(smooth()), "PNG"), max_pixels=10**4)
    assert before == (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, ImageFile.LOAD_TRUNCATED_IMAGES)


# --------------------------------------------------------------------------- bombs


@pytest.mark.parametrize("name", sorted(bombs()))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_by_their_header(name):
    data = bombs()[name]
    start = time.perf_counter()
    assert reason(data) == "too-many-pixels"
    assert time.perf_counter() - start < 0.5


@pytest.mark.filterwarnings("error")
def test_bomb_warning_as_error_is_a_reject_too():
    assert reason(bombs()["png-100MP-real"]) == "too-many-pixels"


def test_pixel_limit_is_the_callers():
    data = saved(Image.new("RGB", (30, 20)), "PNG")
    assert open_image(data, max_pixels=600).size == (30, 20)
    assert reason(data, max_pixels=599) == "too-many-pixels"


def test_text_bombs():
    rows = b"\0" * 2
    inflating = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 50_000_000))
    international = chunk(b"iTXt", b"C\0\1\0\0\0" + zlib.compress(b"a" * 50_000_000))
    huge = chunk(b"tEXt", b"Comment\0" + b"a" * 17_000_000)
    many = b"".join(chunk(b"tEXt", b"Comment\0" + b"a" * 900_000) for _ in range(20))
    for extra in (inflating, international, huge, many):
        assert reason(png(1, 1, 8, 0, rows, extra)) == "too-much-metadata"
    assert open_image(png(1, 1, 8, 0, rows, chunk(b"tEXt", b"Comment\0short"))).size == (1, 1)


# --------------------------------------------------------------------------- pixels


def test_pixels_and_back():
    """Every byte value, both ways, exactly."""
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(every)), every)
    assert from_bytes(every).min() == -1 and from_bytes(every).max() == 1
    x_CHW = to_pixels(Image.fromarray(smooth()))
    assert x_CHW.shape == (3, 32, 48) and x_CHW.dtype == torch.float32
    assert np.array_equal(np.array(to_image(x_CHW)), smooth())
    anything = torch.rand(3, 9, 7) * 2 - 1
    assert (to_pixels(to_image(anything)) - anything).abs().max() <= 1 / 255
    batch = torch.rand(2, 3, 4, 5) * 2 - 1
    assert to_bytes(batch).shape == batch.shape


def test_to_bytes_rounds_clamps_and_refuses():
    assert to_bytes(torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255, 255]
    assert to_bytes(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [191]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            to_bytes(torch.tensor([0.0, bad]))
    with pytest.raises(ValueError, match="shape"):
        to_image(torch.zeros(1, 3, 4, 4))


def test_to_pixels_takes_any_mode():
    assert torch.equal(to_pixels(Image.fromarray(grey())), to_pixels(Image.fromarray(as_rgb(grey()))))
    assert to_pixels(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).min() == 1
    deep = Image.fromarray(grey().astype(np.uint16) * 257)
    assert torch.equal(to_pixels(deep), to_pixels(Image.fromarray(grey())))
    with pytest.raises(Reject, match="unsupported-colour"):
        to_rgb(Image.new("LAB", (2, 2)))


def test_to_rgb_leaves_its_input_alone():
    image = Image.fromarray(smooth())
    image.info["dpi"] = (72, 72)
    result = to_rgb(image)
    assert result is not image and image.info == {"dpi": (72, 72)} and result.info == {}


# --------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (31, 17), (400, 300), (32, 32)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_every_shape_becomes_the_square(shape, fit):
    image = Image.new("RGB", shape, "#4080c0")
    result = picture_bytes(image, 32, fit)
    assert result.shape == (3, 32, 32) and result.dtype == torch.uint8
    assert (result == torch.tensor([0x40, 0x80, 0xC0], dtype=torch.uint8).view(3, 1, 1)).all(dim=0).any()
    if fit == "crop":
        assert (result[0] == 0x40).all()


def test_crop_keeps_the_middle_and_pad_the_whole():
    three = np.zeros((20, 60, 3), np.uint8)
    three[:, :20, 0] = three[:, 20:40, 1] = three[:, 40:, 2] = 255
    image = Image.fromarray(three)
    assert np.array_equal(np.array(fit_shape(image, 20)), three[:, 20:40])
    padded = np.array(fit_shape(image, 60, "pad"))
    assert np.array_equal(padded[20:40], three)
    assert (padded[:20] == 255).all() and (padded[40:] == 255).all()
    assert fit_shape(image, 60, "pad", "black").getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (31, 17), (400, 300), (48, 16)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_every_shape_becomes_the_rectangle(shape, fit):
    result = picture_bytes(Image.new("RGB", shape, "#4080c0"), (16, 48), fit)
    assert result.shape == (3, 16, 48)
    if fit == "crop" or shape == (48, 16):
        assert (result[0] == 0x40).all()


def test_crop_to_a_rectangle_keeps_the_middle_in_its_proportions():
    rows, columns = np.meshgrid(np.arange(60), np.arange(100), indexing="ij")
    image = Image.fromarray(np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8))
    wide = np.array(fit_shape(image, (25, 100)))
    assert wide.shape == (25, 100, 3)
    assert np.abs(wide[:, 50, 0].astype(int) - np.arange(17, 42)).max() <= 1  # rows 17.5 to 42.5, unscaled
    assert np.abs(wide[12, :, 1].astype(int) - np.arange(100)).max() <= 1
    tall = np.array(fit_shape(image, (60, 20)))
    assert np.array_equal(tall, np.array(image)[:, 40:60])


def test_long_strip_takes_no_memory():
    """Scaled first and cropped then, this one would pass through 256 x 1,024,000 pixels."""
    start = time.perf_counter()
    fit_shape(Image.new("RGB", (1, 4000)), 256)
    assert time.perf_counter() - start < 0.5


def test_reduction_is_antialiased():
    board = np.indices((256, 256)).sum(axis=0) % 2 * 255
    small = np.array(fit_shape(Image.fromarray(as_rgb(board.astype(np.uint8))), 16))
    assert np.abs(small.astype(int) - 127).max() <= 2


def test_wrong_sizes():
    image = Image.new("RGB", (2, 2))
    with pytest.raises(ValueError, match="size"):
        fit_shape(image, 0)
    with pytest.raises(ValueError, match="fit"):
        fit_shape(image, 4, "stretch")  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------- contact sheet


def test_contact_sheet_shows_every_pixel_of_small_pictures():
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    sheet = np.array(contact_sheet([[picture]], tile=64))
    big = np.array(picture).repeat(8, axis=0).repeat(8, axis=1)
    assert np.array_equal(sheet[24 : 24 + 64, 24 : 24 + 64], big)


def test_contact_sheet_grows_with_what_it_holds():
    tiles = [[Image.new("RGB", (32, 32), "red")] * 3, [Image.new("RGB", (500, 20), "blue")]]
    bare = contact_sheet(tiles)
    labelled = contact_sheet(tiles, [["one", "two", "three"], ["four"]], title="numbers")
    assert bare.width == labelled.width and labelled.height > bare.height
    ink_pixels = (np.array(labelled).max(axis=-1) < 100).sum()
    assert ink_pixels > 50 and (np.array(bare).max(axis=-1) < 100).sum() == 0


def test_contact_sheet_survives_any_words():
    words = ["x" * 500, "word " * 200, "猫とリンゴ", "תפוח אדום", "a\0b\n\tc", "\ud800", "", "🦊 fox"]
    sheet = contact_sheet([[Image.new("RGB", (16, 16))] * len(words)], [words])
    assert sheet.width < 2000 and sheet.height < 300
    right = np.array(sheet)[:, -20:]
    assert (right.max(axis=-1) > 200).all()  # nothing runs into the margin


def test_contact_sheet_refuses():
    picture = Image.new("RGB", (4, 4))
    for rows, labels in (([], None), ([[]], None), ([[picture]], [["a", "b"]]), ([[picture]], [])):
        with pytest.raises(ValueError):
            contact_sheet(rows, labels)
