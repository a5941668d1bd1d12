"""How many codes of a codebook are used, how evenly, and at what PSNR? Ours, the library's replacement, and others.

    python benchmarks/codebook_use.py                          # the OpenMoji drawings, about 25 minutes on 2 cores
    python benchmarks/codebook_use.py --images photos          # landscapes, fetched once (70 MB), in tiles of 64 px
    python benchmarks/codebook_use.py --images DIR             # a folder of photos of your own
    python benchmarks/codebook_use.py --sizes 1024 4096 --methods ours library

Prediction, to be held against the table that it prints, wherever there are ten times as many patches as codes: ours
uses 100 % of the codes on the training pictures and at least 99 % on held-out ones, its perplexity is at least
0.6 K, and no other method has a higher held-out PSNR. On OpenMoji perplexity fails: 59 % of its patches of 4x4 pixels
are plain white, and codes that tell white from white would be wasted.

Every cell (method and K) is the same small convolutional net (64 px, f = 4: 256 patches a picture), trained from the
same weights on the same batches; only the quantizer and what replaces its codes differ. A share of 0.2 of the concepts
(photos) is held out. Budgets are in batches, so a slow or busy machine does not change the results. Cells that are
already in --runs are not run again: the script can be stopped and goes on.

    ours      ResidualQuantizer of depth 1, CodebookReset with its defaults
    library   the same quantizer, whose unused codes the library replaces: its own `expire_codes_`, called after each
              batch as its VectorQuantize calls it, threshold_ema_dead_code=2, decay 0.99
    ema       the same quantizer, nothing replaced
    simvq     SimVQ       fsq   FSQ, the levels nearest to K       ibq   IBQ, where its N×K matrices fit

Legend: N vectors of a batch, D latent width, K codebook size, B batch, h w grid, Q = 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import record
import torch
from PIL import Image
from record import Table
from torch import Tensor

from vq.backbones.conv import ConvDecoder, ConvEncoder
from vq.batches import NoAugment, PictureBatches
from vq.codebook import CodebookReset, NoReset
from vq.data import ImageData, ImageFolder, OpenMoji, Picture, PictureSet
from vq.images import from_bytes
from vq.learner import TokenizerLearner
from vq.losses import Loss
from vq.losses.codes import Codes
from vq.losses.reconstruction import Squared
from vq.metrics import CodeUse, psnr
from vq.photos import LAND, PACKAGE
from vq.quantizers import Quantizer
from vq.quantizers.ibq import IndexBackpropagationQuantizer
from vq.quantizers.library import FiniteScalarQuantizer, SimVQQuantizer
from vq.quantizers.nearest import nearest_codes
from vq.quantizers.residual import ResidualQuantizer
from vq.tokenizer import ImageTokenizer
from vqlm.fetch import debian_package, user_cache
from vqlm.files import write_json
from vqlm.hardware import Hardware, detect
from vqlm.training import Budget, fit

SIZE, PATCH, D, CHANNELS = 64, 4, 16, 64
PATCHES = (SIZE // PATCH) ** 2  # of a picture
MOST_PICTURES = 5000  # of a folder, evenly chosen: about as many patches as OpenMoji has
MOST_BYTES = 6e9  # of IBQ's N×K matrices
LEVELS = {1024: [8, 5, 5, 5], 4096: [7, 5, 5, 5, 5], 16384: [8, 8, 8, 6, 5], 65536: [8, 8, 8, 5, 5, 5]}
ENOUGH, USE, EVEN = (
    10,
    0.99,
    0.6,
)  # the bar: patches for each code, share of codes used held out, perplexity / K


class LibraryReset(NoReset):
    """The library's own replacement on the library's own buffers; its other steps are those of ResidualQuantizer."""

    def observe(self, quantizer: Any, z_BDhw: Tensor, *_: Any) -> list[int]:
        book = quantizer._book(0)
        book.threshold_ema_dead_code = book.reset_cluster_size = 2
        book.has_dead_code_replacement = True
        expired = int((book.cluster_size < 2).sum())
        book.expire_codes_(quantizer.start(z_BDhw)[None])
        return [expired]


@dataclass(frozen=True)
class Method:
    """quantizer: K → the quantizer; weights: of the losses that it gives."""

    quantizer: Callable[[int], Quantizer]
    weights: dict[str, float] = field(default_factory=dict)
    reset: Callable[[], Any] = NoReset


EMA = {"commitment": 0.25}
METHODS = {
    "ours": Method(lambda K: ResidualQuantizer(D, K), EMA, CodebookReset),
    "library": Method(lambda K: ResidualQuantizer(D, K), EMA, LibraryReset),
    "ema": Method(lambda K: ResidualQuantizer(D, K), EMA),
    "simvq": Method(lambda K: SimVQQuantizer(D, K), {"codebook": 1.0, "commitment": 0.25}),
    "fsq": Method(lambda K: FiniteScalarQuantizer(D, LEVELS[K])),
    "ibq": Method(
        lambda K: IndexBackpropagationQuantizer(D, K),
        {"soft": 1.0, "commitment": 1.0, "codebook": 0.25, "entropy": 0.05},
    ),
}


# --- pictures -----------------------------------------------------------------------------------------------------


class Tiles:
    """A folder's pictures cut into squares of SIZE pixels; those of one photo are one concept, held out together."""

    def __init__(self, folder: str):
        self.folder = ImageFolder(folder)
        self.name = self.folder.name
        self.open = lru_cache(maxsize=8)(lambda load: load())  # the tiles of a photo come one after another

    def pictures(self, size: int = SIZE) -> list[Picture]:
        found = [tile for picture in self.folder.pictures() for tile in self._tiles(picture)]
        return found[:: max(1, math.ceil(len(found) / MOST_PICTURES))]

    def _tiles(self, picture: Picture) -> Iterator[Picture]:
        width, height = self.open(picture.load).size
        for y in range(0, height - SIZE + 1, SIZE):
            for x in range(0, width - SIZE + 1, SIZE):
                box = (x, y, x + SIZE, y + SIZE)
                yield Picture(f"{picture.id}@{x},{y}", "", picture.id, partial(self._cut, picture.load, box))

    def _cut(self, load: Callable[[], Image.Image], box: tuple[int, int, int, int]) -> Image.Image:
        return self.open(load).crop(box)


def read(images: str) -> tuple[PictureSet, PictureSet]:
    if images == "photos":
        images = str(
            debian_package(PACKAGE, LAND, "70 MB", user_cache(), "name a folder of photos: --images DIR")
        )
    data = ImageData(OpenMoji() if images == "openmoji" else Tiles(images), SIZE, holdout=0.2)
    data.setup()
    return data.train, data.heldout


# --- a cell -------------------------------------------------------------------------------------------------------


def run_cell(
    name: str,
    K: int,
    train: PictureSet,
    heldout: PictureSet,
    batches: int,
    batch_size: int,
    hardware: Hardware,
) -> dict[str, Any]:
    method = METHODS[name]
    torch.manual_seed(0)
    parts = {"channels": [CHANNELS], "latent_dim": D, "blocks": 1, "patch": PATCH}
    encoder, decoder = ConvEncoder(**parts), ConvDecoder(**parts)  # before the quantizer: equal in all cells
    tokenizer = ImageTokenizer(encoder, method.quantizer(K), decoder, SIZE)
    reset = method.reset()
    losses: dict[str, Loss] = {"squared": Squared()}
    losses |= {term: Codes(term, weight) for term, weight in method.weights.items()}
    learner = TokenizerLearner(
        tokenizer,
        losses,
        reset,
        partial(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0),
        Budget(batches=batches, warmup=min(30, batches // 4), cooldown=0.7),
    )
    replaced = count_replacements(reset)
    seconds = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:
        fit(
            learner,
            lambda total: PictureBatches(train, batch_size, 0, NoAugment(), total),
            folder,
            hardware,
            f"{name}, K = {K}",
            checkpoint_minutes=1e6,
        )
    seconds.append(time.perf_counter())
    learner.finish([train], batch_size)
    seconds.append(time.perf_counter())
    measured: Any = learner.result.eval()
    found = {
        "method": name,
        "K": measured.codebook_size,
        "asked": K,
        "train": use(measured, train, hardware),
        "heldout": use(measured, heldout, hardware, with_psnr=True),
        "replaced_per_batch": sum(map(sum, replaced)) / batches,
    }
    seconds.append(time.perf_counter())
    names = ("train_s", "finish_s", "measure_s")
    return found | {n: end - start for n, (start, end) in zip(names, pairwise(seconds), strict=True)}


def count_replacements(reset: Any) -> list[list[int]]:
    """What `observe` will return at each call."""
    found: list[list[int]] = []
    observe = reset.observe

    def counted(*arguments: Any) -> list[int]:
        found.append(observe(*arguments))
        return found[-1]

    reset.observe = counted
    return found


@torch.no_grad()
def use(
    tokenizer: ImageTokenizer, pictures: PictureSet, hardware: Hardware, with_psnr: bool = False
) -> dict[str, Any]:
    """Patches, share of codes used, perplexity; PSNR: mean over pictures."""
    counted, ratios = CodeUse(1, tokenizer.codebook_size), []
    for x_NCHW in pictures.x_NCHW.split(32):
        x_BCHW = from_bytes(x_NCHW).to(hardware.device, memory_format=torch.channels_last)
        codes_BhwQ = codes_of(tokenizer.quantizer, tokenizer.encoder(x_BCHW).float())
        counted.update(codes_BhwQ)
        if with_psnr:
            ratios += [psnr(x_BCHW, tokenizer.decode(codes_BhwQ)) * len(x_BCHW)]
    found = counted.result()
    described = {
        "patches": len(pictures) * PATCHES,
        "used": found["used"][0],
        "perplexity": found["perplexity"][0],
    }
    return described | ({"psnr": sum(ratios) / len(pictures)} if with_psnr else {})


def codes_of(quantizer: Any, z_BDhw: Tensor) -> Tensor:
    """Codes (B,h,w,1), without the N×K distances that the library's SimVQ builds."""
    if not isinstance(quantizer, SimVQQuantizer):
        return quantizer(z_BDhw).codes_BhwQ
    B, _, h, w = z_BDhw.shape
    x_ND = z_BDhw.permute(0, 2, 3, 1).reshape(-1, D)
    return nearest_codes(x_ND, quantizer.vq.codebook.float()).reshape(B, h, w, 1)


# --- all cells ----------------------------------------------------------------------------------------------------


def too_large(name: str, K: int, batch_size: int) -> bool:
    """IBQ holds some six matrices of N×K float32 while it trains."""
    return name == "ibq" and 6 * 4 * batch_size * PATCHES * K > MOST_BYTES


def table(cells: list[dict[str, Any]], title: str) -> Table:
    rows = []
    for cell in sorted(cells, key=lambda c: (c["asked"], list(METHODS).index(c["method"]))):
        train, held, K = cell["train"], cell["heldout"], cell["K"]
        minutes = (cell["train_s"] + cell["finish_s"] + cell["measure_s"]) / 60
        patches = [f"{train['patches'] / K:.1f}", f"{held['patches'] / K:.1f}"]
        use = [
            f"{train['used']:.2%}",
            f"{held['used']:.2%}",
            f"{held['perplexity'] / K:.3f}",
            f"{held['psnr']:.2f}",
        ]
        rows.append(
            [
                f"K = {K}, {cell['method']}",
                *patches,
                *use,
                f"{cell['replaced_per_batch']:.1f}",
                f"{minutes:.1f}",
            ]
        )
    columns = [
        "",
        "patches/K, train",
        "held out",
        "use, train",
        "held out",
        "perplexity/K, held out",
        "PSNR, held out",
    ]
    return Table(title, [*columns, "replaced a batch", "minutes"], rows)


def verdict(cells: list[dict[str, Any]]) -> str:
    """The bar against each cell of ours."""
    lines = []
    for cell in (each for each in cells if each["method"] == "ours"):
        train, held, K = cell["train"], cell["heldout"], cell["K"]
        others = [c["heldout"]["psnr"] for c in cells if c["asked"] == cell["asked"] and c is not cell]
        checks = {
            "100 % on training pictures": (train["patches"] >= ENOUGH * K, train["used"] == 1),
            f"{USE:.0%} held out": (held["patches"] >= ENOUGH * K, held["used"] >= USE),
            f"perplexity {EVEN} K": (held["patches"] >= ENOUGH * K, held["perplexity"] >= EVEN * K),
            "PSNR of the best other": (bool(others), held["psnr"] >= max(others, default=0)),
        }
        said = [
            f"{what}: {('yes' if holds else 'NO') if applies else 'does not apply'}"
            for what, (applies, holds) in checks.items()
        ]
        lines.append(f"K = {K}: " + ", ".join(said))
    return "; ".join(lines)


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, Callable[[dict[str, Any]], float]] = {
        "share of codes used, held out": lambda c: c["heldout"]["used"],
        "perplexity / K, held out": lambda c: c["heldout"]["perplexity"] / c["K"],
        "PSNR, held out (dB)": lambda c: c["heldout"]["psnr"],
    }
    figure, grid = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4))
    for axes, (title, value) in zip(grid, panels.items(), strict=True):
        for name in METHODS:
            mine = sorted((c for c in cells if c["method"] == name), key=lambda c: c["K"])
            if mine:
                axes.plot([c["K"] for c in mine], [value(c) for c in mine], marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("K")
        axes.set_title(title, fontsize=10)
    grid[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description="Use of codes: ours, the library's replacement, and others.")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--batches", type=int, default=200, help="of training, for each cell (default 200)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures (default 16)")
    parser.add_argument("--images", default="openmoji", help="openmoji, photos, or a folder of photos")
    runs = Path("runs/codebook_use")
    parser.add_argument(
        "--runs", type=Path, default=runs, help=f"keeps cells.json and use.png (default {runs})"
    )
    record.add_out(parser, __file__)
    asked = parser.parse_args()
    if min(asked.batches, asked.batch_size) < 1:
        parser.error("--batches and --batch-size: at least 1")
    images = asked.images if asked.images in ("openmoji", "photos") else Path(asked.images).resolve().name
    settings = {"images": images, "batches": asked.batches, "batch_size": asked.batch_size}
    target = asked.runs / "cells.json"
    cells: list[dict[str, Any]] = json.loads(target.read_text())["cells"] if target.exists() else []
    wanted = [(name, K) for K in asked.sizes for name in asked.methods]
    done = {(c["method"], c["asked"]) for c in cells if c["settings"] == settings}
    if len(done) < len(cells):
        parser.error(f"{target} holds cells of other settings than {settings}: name another --runs")
    hardware = detect()
    about = record.machine(torch.get_num_threads(), "vector-quantize-pytorch", device=str(hardware))
    print(f"{record.told(about)}, {settings}", flush=True)
    train, heldout = read(asked.images) if set(wanted) - done else (None, None)
    for name, K in wanted:
        if (name, K) in done or train is None or heldout is None:
            continue
        if too_large(name, K, asked.batch_size):
            print(f"{name} at K = {K} is left out: its matrices do not fit in memory", file=sys.stderr)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # use is what the table says
            cell = run_cell(name, K, train, heldout, asked.batches, asked.batch_size, hardware)
        cells.append(cell | {"settings": settings})
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, {"hardware": str(hardware), "cells": cells})
    made, found = (
        table(cells, f"{images}, {asked.batches} batches of {asked.batch_size} pictures"),
        verdict(cells),
    )
    print(f"\n{made}\n\n{found}")
    plot(cells, asked.runs / "use.png")
    record.keep(asked.out, __doc__, about, found, [made])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
