"""C.13 to C.17: pictures as strangers leave them. Each gives the right pixels, or one line in rejects.jsonl."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from faults import hostile_pictures
from faults.hostile_pictures import BOMBS, EVERY
from pictures import psnr
from PIL import Image
from tiny import make_tokenizer
from torch.utils.data import DataLoader

from vq.data import ImageData, ImageFolder
from vq.drivers import Local
from vq.encode import encode
from vq.images import open_image, to_pixels
from vq.store import CodeStore
from vqlm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
GOOD = 40  # dB: less is another picture
pytestmark = pytest.mark.filterwarnings("ignore:::PIL", "ignore::PIL.Image.DecompressionBombWarning")


class Vanishing(ImageFolder):
    """A folder of which some files are removed after it was listed."""

    def __init__(self, path, made):
        super().__init__(path)
        self.made = made

    def pictures(self, size=64):
        found = super().pictures(size)
        hostile_pictures.vanish(self.made)
        return found


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, count):
    folder = tmp_path_factory.mktemp("hostile") / "pictures"
    made = hostile_pictures.write(folder, count(len(hostile_pictures.kinds()), 500))
    yield made
    for each in made:
        if each.kind == "no permission":
            each.path.chmod(0o600)


@pytest.fixture
def tokenizer(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def encoded(tokenizer, source, out, **options):
    images = ImageData(source, None, holdout=0.2, **options)
    encode(tokenizer, images, str(out), 16, 64, "cpu", "auto", None, None, Local())
    return CodeStore.open(out)


def name_of(path):
    return os.fsencode(path.name).decode("utf-8", "backslashreplace")


# --- C.13 -----------------------------------------------------------------------------------------------------


def plainly(path):
    """What most scripts do with a picture."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def judged(made, read):
    """How a reader deals with a file: "read" or "refused", as it should be, or what is wrong."""
    kind = EVERY[made.kind]
    if kind.waits:
        return "waits for ever"
    try:
        pixels = read(made.path)
    except Exception:
        return "refused" if kind.reason else "raises"
    if kind.reason:
        return "took what is none"
    same = pixels.shape == made.pixels_HWC.shape and psnr(pixels, made.pixels_HWC) >= GOOD
    return "read" if same else "misread"


def all_judged(made, read):
    """Bombs of a kind are all alike: one of each is read."""
    once = cache(lambda kind: judged(next(each for each in made if each.kind == kind), read))
    return Counter(once(each.kind) if each.kind in BOMBS else judged(each, read) for each in made)


def waits(path):
    """Whether a plain reader waits for whoever might write to a pipe."""
    thread = threading.Thread(target=lambda: plainly_or_not(path), daemon=True)
    thread.start()
    thread.join(0.3)
    waited = thread.is_alive()
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # let it go
    thread.join()
    return waited


def plainly_or_not(path):
    with contextlib.suppress(Exception):
        plainly(path)


def by_pillow(made):
    found = all_judged(made, plainly)
    assert all(waits(each.path) for each in made if EVERY[each.kind].waits)
    return told(found, len(made))


def by_datasets(made):
    """One by one; and shuffled behind a DataLoader, which ends at the first that cannot be read."""
    import datasets

    rows = [each for each in made if not EVERY[each.kind].waits and each.kind != "name not UTF-8"]
    listed = datasets.Dataset.from_dict({"image": [str(each.path) for each in rows]})
    images = listed.cast_column("image", datasets.Image(mode="RGB"))
    number = {each.path: n for n, each in enumerate(rows)}
    found = all_judged(rows, lambda path: np.array(images[number[path]]["image"]))
    random, came = torch.Generator().manual_seed(0), 0
    with contextlib.suppress(Exception):
        for _ in DataLoader(images, batch_size=None, shuffle=True, generator=random):
            came += 1
    return told(found, len(rows)), f"ends after {came} of {len(rows)}"


def told(found, total):
    wrong = {name: number for name, number in found.items() if name not in ("read", "refused")}
    return f"of {total}: " + ", ".join(f"{number} {name}" for name, number in sorted(wrong.items()))


def test_a_folder_of_hostile_pictures(count, figure, hostile, tokenizer, tmp_path):
    kinds = {each.kind: EVERY[each.kind] for each in hostile}
    good = [each for each in hostile if not EVERY[each.kind].reason]
    wanted = {
        name_of(each.path): EVERY[each.kind].reason
        for each in hostile
        if EVERY[each.kind].reason not in ("", "unlisted")
    }
    asked = [
        each
        for each in hostile
        if (each.kind not in BOMBS or count(0, 1))  # which take them seconds
        and EVERY[each.kind].reason not in ("unlisted", "outside-folder")  # they list no folder
        and not EVERY[each.kind].gone
    ]
    pillow, (library, loader) = by_pillow(asked), by_datasets(asked)
    folder = hostile[0].path.parent
    store = encoded(tokenizer, Vanishing(folder, hostile), tmp_path / "store", max_bad_fraction=0.9)
    assert sorted(store.ids()) == sorted(name_of(each.path) for each in good)
    assert {each["id"]: each["reason"] for each in store.rejects} == wanted
    assert len(store.rejects) == len(wanted)
    assert store.manifest["rejects"]["reasons"] == dict(sorted(Counter(wanted.values()).items()))
    lines = (tmp_path / "store/rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["id"] for line in lines} == wanted.keys()
    same_codes(store, good)

    with pytest.raises(ConfigError, match=r"cannot be used \(.*max_bad_fraction=0.1 allows"):
        encoded(tokenizer, ImageFolder(folder), tmp_path / "strict", max_bad_fraction=0.1)
    assert not (tmp_path / "strict/manifest.json").exists()

    reasons = len(set(wanted.values()))
    left_out = "" if "no permission" in kinds else "; run as root, to whom no permission is denied"
    figure(
        "C.13",
        f"{len(hostile)} pictures of {len(kinds)} kinds, "
        f"{sum(bool(k.reason) for k in kinds.values())} of them hostile or broken",
        "a file gives the right pixels or one line in rejects.jsonl; too many of those end the run",
        f"{len(store)}/{len(good)} good ones encoded, {len(store.rejects)}/{len(wanted)} others rejected for the "
        f"right one of {reasons} reasons, 0 crashes; ends above max_bad_fraction{left_out}",
        {
            "Pillow, open and convert": pillow,
            "datasets, one by one": library,
            "datasets in a DataLoader": loader,
        },
    )


def same_codes(store, good):
    """What was stored are the codes of the golden pixels, but for what JPEG loses."""
    tokenizer = make_tokenizer()
    kept = dict(zip(store.ids(), store, strict=True))
    for each in good:
        if each.path.suffix not in (".jpg",):
            x_CHW = to_pixels(Image.fromarray(each.pixels_HWC), 16)
            codes_hwQ = tokenizer.encode(x_CHW[None])[0]
            assert torch.equal(kept[name_of(each.path)].codes_hwQ, codes_hwQ), each


# --- C.14, C.15 -----------------------------------------------------------------------------------------------


def of_kinds(made, *names):
    return [each for each in made if each.kind in names]


COLOURS = (
    "CMYK, Adobe",
    "CMYK, straight",
    "16-bit grey",
    "32-bit float",
    "LA",
    "P, transparent",
    "RGBA",
    "1-bit",
    "ICC",
    "EXIF 2-8",
    "palette",
)
SEVERAL = ("animated GIF", "animated WebP", "APNG", "pages of a TIFF")


def quality(each, read):
    """dB; -inf where it has another shape."""
    pixels = read(each.path)
    return psnr(pixels, each.pixels_HWC) if pixels.shape == each.pixels_HWC.shape else -np.inf


def ours(path):
    return np.array(open_image(path))


def decibels(number):
    return "another shape" if number == -np.inf else "exact" if number == np.inf else f"{number:.0f} dB"


def test_colours_against_golden_pictures(figure, hostile):
    worst = {name: min(quality(each, ours) for each in of_kinds(hostile, name)) for name in COLOURS}
    stock = {name: min(quality(each, plainly) for each in of_kinds(hostile, name)) for name in COLOURS}
    assert min(worst.values()) >= GOOD, worst
    deep = of_kinds(hostile, "16-bit grey")
    errors = [
        np.mean([np.abs(read(each.path).astype(float) - each.pixels_HWC).mean() for each in deep])
        for read in (ours, plainly)
    ]
    assert errors[0] < 0.5
    wrong = {name: decibels(found) for name, found in stock.items() if found < GOOD}
    assert {
        "16-bit grey",
        "EXIF 2-8",
        "CMYK, straight",
        "RGBA",
        "ICC",
    } <= wrong.keys()  # the goldens can tell
    figure(
        "C.14",
        "colour models, depths, profiles, orientations",
        "scaled, laid on white, turned, brought to sRGB; what has no known range is a reject",
        f"{len(worst)}/{len(worst)} kinds at {GOOD} dB or more to the golden picture (the worst: "
        f"{decibels(min(worst.values()))}); 16-bit grey off by {errors[0]:.2f} of 255 on average",
        {
            "Pillow": f"{len(wrong)} kinds below {GOOD} dB ("
            + ", ".join(f"{name}: {found}" for name, found in wrong.items())
            + f"); 16-bit grey off by {errors[1]:.0f}"
        },
    )


def test_the_first_of_several_frames(figure, hostile, monkeypatch):
    sought = []
    for plugin in ("GifImagePlugin.GifImageFile", "TiffImagePlugin.TiffImageFile"):
        module, _, name = plugin.partition(".")
        cls = getattr(__import__(f"PIL.{module}").__dict__[module], name)
        seek = cls.seek
        monkeypatch.setattr(cls, "seek", lambda self, n, seek=seek: (sought.append(n), seek(self, n))[1])
    several = of_kinds(hostile, *SEVERAL)
    for each in several:
        with Image.open(each.path) as image:
            assert image.n_frames == 6
        sought.clear()
        assert quality(each, ours) == np.inf, each.kind
        assert not any(sought)
    figure(
        "C.15",
        "animated GIF, WebP and PNG, TIFF of several pages",
        "the first frame is read, and documented",
        f"{len(SEVERAL)}/{len(SEVERAL)} kinds: 1 frame of 6 read, exact",
    )


# --- C.16 -----------------------------------------------------------------------------------------------------


def measured(reader, paths):
    """Per file: what became of it, milliseconds, MB that the peak rose; in a new process."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    words = [sys.executable, str(ROOT / "tests/faults/reader.py"), reader, *map(str, paths)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads /proc")
def test_bombs_take_neither_memory_nor_time(count, figure, hostile, tmp_path):
    paths = {each.kind: each.path for each in of_kinds(hostile, *BOMBS)}
    assert paths.keys() == set(BOMBS)
    wanted = {name: EVERY[name].reason for name in paths}
    for name, data in pictures.bombs().items():
        paths[name], wanted[name] = tmp_path / name, "too-many-pixels"
        paths[name].write_bytes(data)
    warm = tmp_path / "warm.png"
    Image.new("RGB", (64, 64)).save(warm)  # what libraries load once
    found = dict(zip(paths, measured("ours", [warm, *paths.values()])[1:], strict=True))
    assert {name: told for name, (told, *_) in found.items()} == wanted
    rise, slowest = max(more for *_, more in found.values()), max(ms for _, ms, _ in found.values())
    assert rise < 50
    stock = list(paths.values()) if count(0, 1) else [paths["100 megapixels"]]
    theirs = measured("pillow", [warm, *stock])[1:]
    assert max(more for *_, more in theirs) > 50  # so a rise would be seen
    took, longest = sum(told == "took" for told, *_ in theirs), max(ms for _, ms, _ in theirs) / 1000
    figure(
        "C.16",
        f"decompression bombs ({', '.join(paths)})",
        "size and what lies beside the pixels are read from the file's headers, before anything is unpacked",
        f"{len(found)}/{len(found)} rejected, the slowest in {slowest:.0f} ms; memory rises by {rise:.0f} MB at most",
        {
            "Pillow": f"{took} of {len(theirs)} read, the slowest in {longest:.1f} s; "
            f"memory rises by {max(more for *_, more in theirs):.0f} MB"
        },
    )


# --- C.17 -----------------------------------------------------------------------------------------------------

SIZES = ("1x1", "1x4000", "4000x1", "17x31")


def test_sizes_that_nothing_divides(figure, hostile, tokenizer, tmp_path):
    made = {each.kind: each for each in of_kinds(hostile, *SIZES)}
    folder = tmp_path / "sizes"
    folder.mkdir()
    for name, each in made.items():
        (folder / f"{name}.png").write_bytes(each.path.read_bytes())
    for fit in ("crop", "pad"):
        store = encoded(tokenizer, ImageFolder(folder), tmp_path / fit, fit=fit)
        policy = store.manifest["job"]["source"]
        assert (policy["size"], policy["fit"], policy["shapes"]) == (16, fit, [[16, 16]])
        assert len(store) == len(SIZES) and store.grid == (2, 2)
    model = make_tokenizer()
    for each in made.values():
        x_BCHW = to_pixels(Image.fromarray(each.pixels_HWC))[None]
        assert model.reconstruct(x_BCHW).shape == x_BCHW.shape
    refused = 0
    for each in made.values():
        with pytest.raises(ValueError, match="multiples of 8"):
            model.encode(to_pixels(Image.fromarray(each.pixels_HWC))[None])
        refused += 1
    figure(
        "C.17",
        f"pictures of {', '.join(SIZES)} pixels",
        "cropped or padded to the shapes that the store names; `reconstruct` fills up to whole cells and cuts again",
        f"{len(SIZES)}/{len(SIZES)} encoded with either policy, which manifest.json records; reconstructed in their "
        f"own sizes; `encode` alone refuses {refused}/{refused}, naming the factor",
    )
