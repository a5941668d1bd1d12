"""What does depth buy on photographs? Tokenizers of Q = 1, 2, 4, 8 codes a cell against the same net without codes.

    python benchmarks/photos.py                     # fetches 70 MB of photos once, then 5 runs of about 3 minutes
    python benchmarks/photos.py --folder DIR        # photos of your own, sides of at least 256 pixels
    python benchmarks/photos.py --size gpu --cells q4 continuous

Prediction, to be held against the table that it prints: held-out PSNR rises with every doubling of Q, and Q = 8 stays
below the continuous autoencoder, whose latent it only approximates.

Every cell is the default tokenizer of `vq-train` (f = 8) with another quantizer, trained for the same number of
batches of the same crops, on the same learning rate; it is measured on crops of photos that it has never seen. What is
done can be stopped and is resumed; a finished cell is not run again.

The photos are the landscapes of the Debian package endless-sky-data: 273 JPEG files of 720×360 pixels, two thirds of
them in the public domain and the others under CC BY-SA 3.0 or 4.0, by file name in the package's copyright file. They
are fetched by the package's name into a cache and not redistributed; the sheet shows public-domain ones only.
Landscapes and cities, few faces, animals or interiors, compressed once already: a small test bed, not ImageNet.

Legend: N pictures, B batch, H W picture, Q codes per cell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
import record
import torch
from omegaconf import OmegaConf
from PIL import Image
from record import Table
from torch import Tensor
from torch.utils.data import Dataset

from vq.batches import PictureBatch
from vq.data import PictureSet
from vq.images import contact_sheet, from_bytes, open_image, picture_bytes, to_image
from vq.measure import ExtraWeights, MakeMeter, extra_meters, measure, rebuilt
from vq.photos import COPYRIGHT, LAND, PACKAGE
from vq.tokenizer import ImageTokenizer
from vqlm.batches import Order, generator
from vqlm.command import CONF, build
from vqlm.errors import ConfigError
from vqlm.fetch import debian_package, user_cache
from vqlm.files import write_json
from vqlm.hardware import Hardware, detect
from vqlm.training import fit

SIDE = 256  # of the crops that are kept and measured
TRAINING = 200 / 273  # share of the photos
SHOWN = 4  # photos on the sheet
SETTLED = 4  # every fourth crop settles the codebooks after training: 100,000 cells are plenty for 512 codes

CELLS = {
    "q1": ["tokenizer.quantizer.depth=1"],
    "q2": ["tokenizer.quantizer.depth=2"],
    "q4": ["tokenizer.quantizer.depth=4"],
    "q8": ["tokenizer.quantizer.depth=8"],
    "continuous": ["quantizer=none"],
}


@dataclass(frozen=True)
class Size:
    """How much is spent on a cell."""

    batches: int
    batch_size: int
    crop: int  # side of what is drawn from a photo for a batch
    overrides: tuple[str, ...] = ()  # of vq-train's configuration


SIZES = {
    "smoke": Size(6, 2, 64),
    "cpu": Size(700, 8, 128),
    "gpu": Size(20_000, 32, 256, ("vq_size=gpu",)),
}


# --- photos ---------------------------------------------------------------------------------------------------


def public_domain(copyright_file: Path, names: Sequence[str]) -> set[str]:
    """Names of land pictures that every pattern for them calls public domain. (In Debian's format the last pattern that
    fits holds, but "desert1*" there also fits "desert10-sfiera.jpg", which a pattern before it gives to its author.)"""
    licences: dict[str, set[str]] = {name: set() for name in names}
    for paragraph in copyright_file.read_text(encoding="utf-8").split("\n\n"):
        fields: dict[str, list[str]] = {}
        current: list[str] = []
        for line in paragraph.splitlines():
            if not line.startswith(" "):
                key, _, line = line.partition(":")
                current = fields.setdefault(key, [])
            current.append(line.strip())
        patterns = " ".join(fields.get("Files", [])).split()
        licence = fields.get("License", [""])[0]
        for name in names:
            land = [pattern for pattern in patterns if pattern.startswith("images/land/")]
            if any(fnmatch(f"images/land/{name}", pattern) for pattern in land):
                licences[name].add(licence)
    return {name for name, found in licences.items() if found == {"public-domain"}}


def crops(image: Image.Image) -> list[Tensor]:
    """The middle of each half, not resized: two disjoint squares uint8 (3,SIDE,SIDE); one of a narrow photo."""
    count = 2 if image.width >= 2 * SIDE else 1
    found = []
    for n in range(count):
        left = image.width * (2 * n + 1) // (2 * count) - SIDE // 2
        top = (image.height - SIDE) // 2
        found.append(picture_bytes(image.crop((left, top, left + SIDE, top + SIDE))))
    return found


def read_photos(folder: Path) -> tuple[PictureSet, PictureSet]:
    """Crops to train on and crops held out. Photos are dealt, so that no photo is in both: by digest of the name."""
    files = [each for each in folder.iterdir() if each.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]
    files.sort(key=lambda each: hashlib.sha256(each.name.encode()).digest())
    photos = [(each.name, open_image(each)) for each in files]
    photos = [(name, image) for name, image in photos if min(image.size) >= SIDE]
    if len(photos) < 4:
        raise ConfigError(f"{folder} holds {len(photos)} photos with sides of at least {SIDE} px: at least 4")
    border = round(TRAINING * len(photos))
    return picture_set(photos[:border]), picture_set(photos[border:])


def picture_set(photos: list[tuple[str, Image.Image]]) -> PictureSet:
    made = [(f"{name}#{n}", crop) for name, image in photos for n, crop in enumerate(crops(image))]
    names = [name for name, _ in made]
    return PictureSet(torch.stack([crop for _, crop in made]), names, [""] * len(made), names)


class CropBatches(Dataset):
    """Item n: random squares of random crops, half of them mirrored; a function of (seed, n) alone."""

    def __init__(self, pictures: PictureSet, size: Size, seed: int, total: int):
        self.pictures, self.size, self.seed, self.total = pictures, size, seed, total
        self.order = Order(len(pictures), size.batch_size, seed)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, n: int) -> PictureBatch:
        chosen = self.pictures.select(self.order.indices(n).tolist())
        random, crop = generator(self.seed, n), self.size.crop
        rows = []
        for x_CHW in chosen.x_NCHW:
            top, left = torch.randint(0, SIDE - crop + 1, (2,), generator=random).tolist()
            square = x_CHW[:, top : top + crop, left : left + crop]
            rows.append(square.flip(2) if torch.rand((), generator=random) < 0.5 else square)
        return PictureBatch(from_bytes(torch.stack(rows)), chosen.ids, chosen.captions)


# --- cells ----------------------------------------------------------------------------------------------------


def configured(name: str, size: Size, seed: int) -> dict[str, Any]:
    """vq-train's configuration for a cell; only its tokenizer and its learner are used."""
    overrides = ["images=shapes", *size.overrides, *CELLS[name], f"images.size={SIDE}", f"seed={seed}"]
    overrides += ["learner.budget.minutes=0", f"learner.budget.batches={size.batches}"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        usual: Any = OmegaConf.to_container(hydra.compose("vq_train", list(size.overrides)), resolve=False)
        if name == "continuous":  # as wide as the quantizers are
            overrides.append(f"tokenizer.quantizer.dim={usual['tokenizer']['quantizer']['dim']}")
        config: Any = OmegaConf.to_container(hydra.compose("vq_train", overrides), resolve=True)
    return {part: config[part] for part in ("tokenizer", "learner")}


def run_cell(
    name: str,
    size: Size,
    seed: int,
    sets: tuple[PictureSet, PictureSet],
    folder: Path,
    hardware: Hardware,
    extras: list[MakeMeter],
) -> dict[str, Any]:
    """Train and measure one cell; a finished one with the same settings is read back."""
    config = configured(name, size, seed)
    identity = {
        "config": digest(config),
        "size": asdict(size),
        "seed": seed,
        "photos": digest(sets[0].ids + sets[1].ids),
    }
    stored = folder / "result.json"
    if stored.is_file():
        result = json.loads(stored.read_text(encoding="utf-8"))
        if result["identity"] == json.loads(json.dumps(identity)):
            return result
    torch.manual_seed(seed)
    training = build(config["learner"])(tokenizer=build(config["tokenizer"]))
    batches = lambda total: CropBatches(sets[0], size, seed, total)  # noqa: E731
    fit(training, batches, folder, hardware, name, 0, 1.0, identity)
    training.finish([sets[0].select(range(0, len(sets[0]), SETTLED))], 16)
    tokenizer: Any = training.result
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer = ImageTokenizer.from_pretrained(folder / "tokenizer").to(hardware.device)
    heldout, _, _ = measure(tokenizer, [sets[1]], 16, extras, f"{name}: held-out")
    result = {
        "identity": identity,
        "cell": name,
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "batches": training.batches_seen,
        "minutes": training.seconds / 60,
        "codebook_size": tokenizer.codebook_size,
        "heldout": heldout,
    }
    write_json(stored, result)
    return result


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# --- what comes out -------------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]], title: str) -> Table:
    features = next((key for key in results[0]["heldout"] if key.endswith("_kernel")), None)
    columns = [("psnr", "PSNR dB", 2), ("ssim", "SSIM", 4), ("ms_ssim", "MS-SSIM", 4), ("fwd", "FWD", 4)]
    columns += [(features, "kernel", 4)] if features else []
    columns += [("bits", "bits", 0), ("bits_entropy", "entropy", 0)]
    rows = []
    for result in results:
        m = result["heldout"]
        cells = [f"{m[key]:.{digits}f}" if m.get(key) is not None else "-" for key, _, digits in columns]
        used = " ".join(f"{share:.0%}" for share in m.get("codes_used", [])) or "no codes"
        rows.append([result["cell"], f"{result['minutes']:.1f}", *cells, used])
    return Table(title, ["cell", "minutes", *(name for _, name, _ in columns), "codes used per depth"], rows)


def verdict(results: list[dict[str, Any]]) -> str:
    psnr = {result["cell"]: result["heldout"]["psnr"] for result in results}
    if set(psnr) != set(CELLS):
        return "the prediction is about all cells: some were left out"
    values = [psnr[name] for name in CELLS]
    holds = all(a < b for a, b in pairwise(values))
    return (
        "prediction: PSNR rises from q1 to q8 and is highest without codes; "
        f"measured: {', '.join(f'{value:.2f}' for value in values)} dB: {'it holds' if holds else 'it does NOT hold'}"
    )


def sheet(
    names: Sequence[str], heldout: PictureSet, folders: dict[str, Path], device: torch.device
) -> Image.Image:
    """One photo a row: the original, then what each tokenizer makes of it. names: ids of the crops to show."""
    shown = heldout.select([heldout.ids.index(name) for name in names])
    rows = [[to_image(from_bytes(x))] for x in shown.x_NCHW]
    for folder in folders.values():
        tokenizer = ImageTokenizer.from_pretrained(folder / "tokenizer").to(device)
        with torch.no_grad():
            made = next(rebuilt(tokenizer, [shown], len(shown))).made_BCHW
        for row, x_CHW in zip(rows, made, strict=True):
            row.append(to_image(x_CHW))
    titles = ["original", *(name.replace("q", "Q = ") if name[0] == "q" else name for name in folders)]
    return contact_sheet(rows, [titles] * len(rows), tile=SIDE // 2)


def spread(names: Sequence[str], count: int) -> list[str]:
    """`count` of the names, evenly spread."""
    return [names[int(place)] for place in torch.linspace(0, len(names) - 1, min(count, len(names)))]


def feature_meters(device: torch.device) -> list[MakeMeter]:
    """The kernel distance where its weights are installed; the table goes without otherwise."""
    try:
        return extra_meters(["features"], ExtraWeights(), device)
    except ConfigError:
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description="Depth on photographs: Q = 1, 2, 4, 8 and no codes at all.")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="what is spent on a cell (default cpu)")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="default: all of them")
    parser.add_argument(
        "--batches", type=int, help="training batches of each cell, instead of the size's own"
    )
    parser.add_argument("--folder", type=Path, help="photos of your own, instead of the package's")
    parser.add_argument("--cache", type=Path, default=user_cache(), help=f"default {user_cache()}")
    parser.add_argument("--runs", type=Path, help="cells, photos.json, photos.png (default runs/photos-SIZE)")
    record.add_out(parser, __file__)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.batches is not None and asked.batches < 1:
        parser.error("--batches: at least 1")
    try:
        return work(asked)
    except ConfigError as error:
        print(f"photos: {error}", file=sys.stderr)
        return 2


def work(asked: argparse.Namespace) -> int:
    size = SIZES[asked.size]
    size = size if asked.batches is None else Size(asked.batches, size.batch_size, size.crop, size.overrides)
    out = asked.runs or Path("runs", f"photos-{asked.size}")
    if asked.folder is not None and not asked.folder.is_dir():
        raise ConfigError(f"--folder {asked.folder}: there is no such folder")
    folder, package = asked.folder, None
    if folder is None:
        folder = debian_package(PACKAGE, LAND, "70 MB", asked.cache, "name a folder of photos: --folder DIR")
        package = asked.cache / PACKAGE
    sets = read_photos(folder)
    photos = [sorted({name.rpartition("#")[0] for name in each.ids}) for each in sets]
    hardware = detect()
    about = record.machine(torch.get_num_threads(), device=str(hardware))
    print(record.told(about))
    print(
        f"photos: {len(photos[0])} to train on, {len(photos[1])} held out; crops: {len(sets[0])} and {len(sets[1])}"
    )
    extras = feature_meters(hardware.device)
    start, results, folders = time.monotonic(), [], {}
    for name in asked.cells:
        folders[name] = out / name
        results.append(run_cell(name, size, asked.seed, sets, folders[name], hardware, extras))
    free = public_domain(package / COPYRIGHT, photos[1]) if package else set(photos[1])
    names = [name for name in sets[1].ids if name.rpartition("#")[0] in free and name.endswith("#0")]
    shown = spread(names, SHOWN)
    sheet(shown, sets[1], folders, hardware.device).save(out / "photos.png", optimize=True)
    data = {
        "package": PACKAGE if package else None,
        "training": photos[0],
        "heldout": photos[1],
        "shown": shown,
    }
    run = {"size": asked.size, **asdict(size), "seed": asked.seed, "seconds": time.monotonic() - start}
    write_json(out / "photos.json", {"machine": about, "run": run, "cells": results, "data": data})
    title = f"{len(sets[1])} held-out crops, {asked.size} size, {size.batches} batches of {size.batch_size}"
    made, found = table(results, title), verdict(results)
    print(f"\n{made}\n{found}\npictures: {out / 'photos.png'}")
    record.keep(asked.out, __doc__, about, found, [made])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
