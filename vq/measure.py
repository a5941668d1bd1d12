"""A tokenizer and sets of pictures in, numbers and a few reconstructions out. Batch by batch: no set is held twice.

Meters see originals and reconstructions go by, and say at the end what they come to. A metric that the pictures do
not allow (SSIM of tiny ones, the distance of a single one) is None. The formulas are in vq/metrics.py; which pictures
are meant, and what is done with the numbers, is not known here.

Shape suffixes: B pictures, C = 3 channels, H W pixels, h w grid, Q codes per cell, K codes in the book, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vq.data import PictureSet
from vq.features import EfficientNetLite0, load_features
from vq.images import from_bytes, to_bytes
from vq.losses.perceptual import load_lpips
from vq.metrics import (
    MS_SSIM_SIDE,
    SSIM_WINDOW,
    CodeUse,
    FrechetWavelet,
    entropy_bits,
    frechet_distance,
    grid_bits,
    kernel_distance,
    ms_ssim,
    psnr,
    ssim,
)
from vq.tokenizer import ImageTokenizer
from vqlm.errors import ConfigError
from vqlm.progress import bar

Extra = Literal["features", "lpips", "rfid"]
INCEPTION_FILE = (
    "name the file weights-inception-2015-12-05-6726825d.pth as weights.inception=FILE; "
    "without a name torch-fidelity downloads it"
)


@dataclass(frozen=True)
class ExtraWeights:
    """Where networks are whose weights no package ships.

    inception: for rfid, FID's file of weights; None: torch-fidelity downloads it. lpips: which network. lpips_backbone,
    lpips_heads: as for the loss `vq.losses.perceptual.LPIPS`.
    """

    inception: str | None = None
    lpips: Literal["vgg", "alex"] = "vgg"
    lpips_backbone: str | None = None
    lpips_heads: str | None = None


@dataclass(frozen=True)
class Rebuilt:
    """A batch and what a tokenizer makes of it: pictures float in [-1, 1], on the CPU."""

    real_BCHW: Tensor
    made_BCHW: Tensor
    codes_BhwQ: Tensor | None  # None: a continuous tokenizer
    names: list[str]  # a caption, or an id, for each


class Meter(Protocol):
    def update(self, batch: Rebuilt) -> None: ...

    def result(self) -> dict[str, Any]:
        """Numbers, as JSON holds them."""
        ...


MakeMeter = Callable[[Sequence[PictureSet]], Meter]  # given what will be measured


@torch.no_grad()
def measure(
    tokenizer: ImageTokenizer,
    sets: Sequence[PictureSet],
    batch_size: int,
    extras: Sequence[MakeMeter] = (),
    label: str = "the",
) -> tuple[dict[str, Any], Examples, Tensor | None]:
    """Metrics over all pictures of `sets` (which may differ in shape), some pairs to look at, and how often each code
    was drawn: (Q, K), None for a continuous tokenizer. `extras` make meters beside the usual ones. ValueError on no
    picture at all.
    """
    count = sum(map(len, sets))
    if not count:
        raise ValueError("there is no picture to measure")
    codes = CodeMeter(tokenizer.depth, tokenizer.codebook_size) if tokenizer.depth else None
    examples = Examples(count)
    meters: list[Meter] = [*picture_meters(sets), *(make(sets) for make in extras)]
    meters += [examples] if codes is None else [examples, codes]
    with bar(count, f"measuring {label} pictures", "pictures") as shown:
        for batch in rebuilt(tokenizer, sets, batch_size):
            for meter in meters:
                meter.update(batch)
            shown.update(len(batch.names))
    metrics = {"pictures": count}
    for meter in meters:
        metrics |= meter.result()
    return metrics, examples, codes.use.counts_QK if codes else None


def rebuilt(tokenizer: ImageTokenizer, sets: Sequence[PictureSet], batch_size: int) -> Iterator[Rebuilt]:
    """Every picture through the tokenizer, in order: through its codes, as a store keeps them, where it has codes."""
    device = next(tokenizer.parameters()).device
    for pictures in sets:
        names = [caption or id_ for caption, id_ in zip(pictures.captions, pictures.ids, strict=True)]
        for start in range(0, len(pictures), batch_size):
            real = from_bytes(pictures.x_NCHW[start : start + batch_size])
            codes = tokenizer.encode(real.to(device)) if tokenizer.depth else None
            made = tokenizer.decode(codes) if codes is not None else _autoencode(tokenizer, real.to(device))
            yield Rebuilt(real, made.cpu(), codes, names[start : start + batch_size])


def _autoencode(tokenizer: ImageTokenizer, x_BCHW: Tensor) -> Tensor:
    tokenizer.eval()
    return tokenizer(x_BCHW).x_BCHW.clamp(-1, 1)


# --- meters: pictures in pairs, and sets of them --------------------------------------------------------------


def picture_meters(sets: Sequence[PictureSet]) -> list[Meter]:
    """Those that need no weights: PSNR, SSIM, MS-SSIM, FWD."""
    smallest = smallest_side(sets)
    pairs = (("psnr", psnr, 1), ("ssim", ssim, SSIM_WINDOW), ("ms_ssim", ms_ssim, MS_SSIM_SIDE))
    meters: list[Meter] = [PairMeter(name, by if smallest >= side else None) for name, by, side in pairs]
    return [*meters, WaveletMeter(sets)]


def smallest_side(sets: Sequence[PictureSet]) -> int:
    return min(min(each.x_NCHW.shape[2:]) for each in sets)


class PairMeter:
    """Mean over pictures of a metric of pairs. metric: None where it is not defined for these pictures."""

    def __init__(self, name: str, metric: Callable[[Tensor, Tensor], float] | None):
        self.name, self.metric = name, metric
        self.total, self.count = 0.0, 0

    def update(self, batch: Rebuilt) -> None:
        if self.metric is not None:
            self.total += self.metric(batch.real_BCHW, batch.made_BCHW) * len(batch.names)
        self.count += len(batch.names)

    def result(self) -> dict[str, Any]:
        return {self.name: None if self.metric is None else finite(self.total / self.count)}


class WaveletMeter:
    """The Fréchet Wavelet Distance, for which all pictures must be of one shape: of several shapes with even sides, the
    one with most pictures counts, and the result says which and how many."""

    def __init__(self, sets: Sequence[PictureSet]):
        even = [each for each in sets if not any(side % 2 for side in each.x_NCHW.shape[2:])]
        most = max(even, key=len, default=None)
        self.shape = tuple(most.x_NCHW.shape[2:]) if most is not None and len(most) > 1 else None
        self.real, self.made = FrechetWavelet(), FrechetWavelet()

    def update(self, batch: Rebuilt) -> None:
        if tuple(batch.real_BCHW.shape[2:]) == self.shape:
            self.real.update(batch.real_BCHW)
            self.made.update(batch.made_BCHW)

    def result(self) -> dict[str, Any]:
        if self.shape is None:
            return {"fwd": None}
        facts = {"fwd_level": self.real.level, "fwd_pictures": self.real.count, "fwd_shape": list(self.shape)}
        return {"fwd": finite(self.real.distance(self.made)), **facts}


class FeatureMeter:
    """Kernel and Fréchet distance of a feature network's vectors, under its name. The Fréchet distance is None unless
    there are more pictures than features: below, it measures how few they are."""

    def __init__(self, net: EfficientNetLite0):
        self.net = net
        self.vectors: tuple[list[Tensor], list[Tensor]] = ([], [])

    def update(self, batch: Rebuilt) -> None:
        device = next(self.net.parameters()).device
        for vectors, x_BCHW in zip(self.vectors, (batch.real_BCHW, batch.made_BCHW), strict=True):
            vectors.append(self.net.pooled(x_BCHW.to(device)).cpu())

    def result(self) -> dict[str, Any]:
        real_NF, made_NF = (torch.cat(each) for each in self.vectors)
        count, width = real_NF.shape
        kernel = kernel_distance(real_NF, made_NF) if count > 1 else None
        frechet = frechet_distance(real_NF, made_NF) if count > width else None
        return {f"{self.net.name}_kernel": kernel, f"{self.net.name}_frechet": frechet}


class InceptionMeter:
    """rFID: the Fréchet distance of FID's own Inception network (Heusel et al., arXiv 1706.08500). Biased upwards below
    some 10,000 pictures; published values are usually over 50,000. metric: from `inception_distance`."""

    def __init__(self, metric: Any):
        metric.reset()
        self.metric, self.count = metric, 0

    def update(self, batch: Rebuilt) -> None:
        for x_BCHW, real in ((batch.real_BCHW, True), (batch.made_BCHW, False)):
            self.metric.update(to_bytes(x_BCHW).to(self.metric.device), real=real)
        self.count += len(batch.names)

    def result(self) -> dict[str, Any]:
        return {"rfid": finite(float(self.metric.compute())) if self.count > 1 else None}


def extra_meters(names: Sequence[Extra], weights: ExtraWeights, device: torch.device) -> list[MakeMeter]:
    """What makes the meters that need weights from elsewhere. The weights are loaded now, so that what is missing is
    said before data is read.

    Raises:
        ConfigError: a package or a file is missing.
    """
    makers: dict[str, Callable[[], MakeMeter]] = {
        "features": lambda: _feature_meters(device),
        "lpips": lambda: _lpips_meters(weights, device),
        "rfid": lambda: _inception_meters(weights, device),
    }
    return [makers[name]() for name in dict.fromkeys(names)]


def _feature_meters(device: torch.device) -> MakeMeter:
    net = load_features().to(device)
    return lambda _: FeatureMeter(net)


def _lpips_meters(weights: ExtraWeights, device: torch.device) -> MakeMeter:
    try:
        net = load_lpips(weights.lpips, weights.lpips_backbone, weights.lpips_heads).to(device)
    except ConfigError as error:
        raise ConfigError(f"{error} (here as weights.lpips_backbone and weights.lpips_heads)") from error

    def distance(a_BCHW: Tensor, b_BCHW: Tensor) -> float:
        return float(net(a_BCHW.to(device), b_BCHW.to(device)).mean())

    def make(sets: Sequence[PictureSet]) -> Meter:
        fits = smallest_side(sets) >= net.trunk.smallest
        return PairMeter(f"lpips_{weights.lpips}", distance if fits else None)

    return make


def _inception_meters(weights: ExtraWeights, device: torch.device) -> MakeMeter:
    metric = inception_distance(weights.inception).to(device)
    return lambda _: InceptionMeter(metric)


def inception_distance(weights: str | None) -> Any:
    """torchmetrics' FrechetInceptionDistance over uint8 pictures, resized as FID's TensorFlow code did (`antialias`
    would be another resizing, whose values do not compare with published ones)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    if weights is not None and not Path(weights).is_file():
        raise ConfigError(f"weights.inception={weights}: there is no such file; {INCEPTION_FILE}")
    try:
        return FrechetInceptionDistance(2048, feature_extractor_weights_path=weights, antialias=False)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"extra=[rfid] needs FID's Inception network: pip install torch-fidelity, and {INCEPTION_FILE}. "
            "extra=[features] needs neither, but has a name of its own: it does not compare with a published rFID"
        ) from error
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"weights.inception={weights}: no weights of Inception ({str(error).splitlines()[0]}); {INCEPTION_FILE}"
        ) from error


# --- meters: codes, and pictures to look at -------------------------------------------------------------------


class CodeMeter:
    """How codes are used, and how many bits a picture's codes take."""

    def __init__(self, depth: int, codebook_size: int):
        self.use = CodeUse(depth, codebook_size)
        self.pictures = self.cells = self.pixels = 0

    def update(self, batch: Rebuilt) -> None:
        assert batch.codes_BhwQ is not None
        self.use.update(batch.codes_BhwQ)
        self.pictures += len(batch.names)
        self.cells += batch.codes_BhwQ.shape[:3].numel()
        self.pixels += batch.real_BCHW[:, 0].numel()

    def result(self) -> dict[str, Any]:
        use: dict[str, Any] = self.use.result()
        depth, size = self.use.counts_QK.shape
        bits = grid_bits(1, self.cells, depth, size)
        return {
            "bits": bits / self.pictures,
            "bits_entropy": entropy_bits(1, self.cells, use["perplexity"]) / self.pictures,
            "bits_per_pixel": bits / self.pixels,
            "codes_used": use["used"],
            "codes_dead": use["dead"],
            "perplexity": use["perplexity"],
        }


class Examples:
    """Some pictures with their reconstructions, spread evenly over all that go by.

    pairs: an original and its reconstruction, float (3, H, W), with the picture's name.
    """

    def __init__(self, count: int, kept: int = 20):
        self.places = {int(place) for place in torch.linspace(0, count - 1, min(kept, count))}
        self.pairs: list[tuple[Tensor, Tensor, str]] = []
        self.seen = 0

    def update(self, batch: Rebuilt) -> None:
        for row, name in enumerate(batch.names):
            if self.seen + row in self.places:
                # Copies: a row of a batch would keep the whole batch.
                self.pairs.append((batch.real_BCHW[row].clone(), batch.made_BCHW[row].clone(), name))
        self.seen += len(batch.names)

    def result(self) -> dict[str, Any]:
        return {}


def finite(value: float) -> float | None:
    """A number that JSON can hold: None for infinity (identical pictures)."""
    return value if math.isfinite(value) else None
