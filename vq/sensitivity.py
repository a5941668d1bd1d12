"""What distances between sets of pictures respond to: climbed ladders of harm, and sets that are told apart.

    views     what a distance looks at: pixels, features of a trained network, features of an untrained one
    METRICS   distances of two sets, each over one view; PSNR and SSIM, of pairs, stand beside them
    climb     ladders of harm → each metric on each rung, and how far that is above what chance gives
    flagged   real and made pictures, drawn in small sets → how often a distance ranks a made set above a real one

The units of two metrics do not compare. What does: by how many deviations of its *floor* a distance rises, the floor
being the distance between two halves of the harmless pictures, over random divisions. That is its *sensitivity*: how
easily harm is seen in so many pictures. It rises from what the same pictures give without harm, so that the chance of
the division cancels, and a rise of less than one deviation can be read, though no one else would notice it.

A distance knows where its reference ends and noise begins only for its own number of pictures: values of sets of other
sizes do not compare, and a Fréchet distance of fewer pictures than features is far above 0 with no harm at all. Only
what rises above the floor is read here.

It knows neither files nor commands, nor where pictures come from.

Shape suffixes: N n pictures of a set, C = 3 channels, H W pixels, F features.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vq.distortions import distort
from vq.features import EfficientNetLite0, load_features, random_features
from vq.metrics import SSIM_WINDOW, frechet_distance, frechet_wavelet_distance, kernel_distance, psnr, ssim
from vqlm.batches import generator
from vqlm.progress import bar

PIXELS, TRAINED, UNTRAINED = "pixels", EfficientNetLite0.name, "random"


class Metric(NamedTuple):
    """A distance between two sets, from what `view` makes of them: rows (N, …), (M, …)."""

    view: str
    distance: Callable[[Tensor, Tensor], float]


METRICS = {
    "fwd": Metric(PIXELS, frechet_wavelet_distance),
    **{f"{view}_frechet": Metric(view, frechet_distance) for view in (TRAINED, UNTRAINED)},
    **{f"{view}_kernel": Metric(view, kernel_distance) for view in (TRAINED, UNTRAINED)},
}
RIVALS = [name for name in METRICS if name != "fwd"]
# Of pairs; as something that grows with harm: mean squared error, and 1 − SSIM.
PAIRS: dict[str, Callable[[float], float]] = {
    "psnr": lambda dB: 10 ** (-dB / 10),
    "ssim": lambda value: 1 - value,
}
SAME_HARM = ("noise", "low", "high")  # what is added does not depend on the picture it is added to
LEAST = 1e-3  # deviations: less is nothing
SEEN = 0.5  # deviations, on the mean over rungs: below, a figure is chance
FLOOR = 16  # divisions into halves: their deviation is known to a fifth


class Views:
    """Pictures float (N, 3, H, W) in [-1, 1], on the CPU → rows of each view, on the CPU.

    net_side: pixels to which pictures are enlarged for the networks, made for 224. seed: of the untrained one.

    Attributes:
        seconds: of each view, for one picture, on the mean.

    Raises:
        ConfigError: the trained network's package is not installed.
    """

    def __init__(self, net_side: int, device: torch.device, seed: int, batch_size: int = 32):
        self.nets = {TRAINED: load_features(), UNTRAINED: random_features(seed)}
        for net in self.nets.values():
            net.to(device).side = net_side
        self.device, self.batch_size = device, batch_size
        self._seconds: dict[str, float] = defaultdict(float)
        self._pictures = 0

    @property
    def seconds(self) -> dict[str, float]:
        return {PIXELS: 0.0, **{view: self._seconds[view] / max(1, self._pictures) for view in self.nets}}

    @torch.no_grad()
    def __call__(self, x_NCHW: Tensor) -> dict[str, Tensor]:
        rows = {PIXELS: x_NCHW}
        for view, net in self.nets.items():
            started = time.perf_counter()
            parts = [net.pooled(x.to(self.device)).cpu() for x in x_NCHW.split(self.batch_size)]
            self._seconds[view] += time.perf_counter() - started
            rows[view] = torch.cat(parts)
        self._pictures += len(x_NCHW)
        return rows


def distances(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """Each of METRICS between two sets, given as rows of each view."""
    return {name: metric.distance(a[metric.view], b[metric.view]) for name, metric in METRICS.items()}


def chosen(rows: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
    return {view: each[places] for view, each in rows.items()}


# --- ladders --------------------------------------------------------------------------------------------------


def climb(
    views: Views, reference_NCHW: Tensor, own_NCHW: Tensor, ladders: Mapping[str, Sequence[float]], seed: int
) -> dict[str, Any]:
    """Harm `own` in steps, and measure it against `reference`: other pictures of the same kind, which stay as they are.

    ladders: distortion → strengths, rising. Both sets float (N, 3, H, W) in [-1, 1], of one size and number.

    Returns:
        floor: of each metric, mean and deviation over FLOOR divisions of the two sets taken together.
        ladder: distortion → rungs: strength, and each of METRICS. The first one is harmless; the others have psnr and
            ssim too, of the harmed pictures and their own originals (None where they are not defined), and
            sensitivity: of each of METRICS and PAIRS.
        monotone: of each metric, the share of the ladders in which it rises with every rung.
        seconds: of each of METRICS, for one set: its pictures' features, and the distance.
    """
    reference, own = views(reference_NCHW), views(own_NCHW)
    floor = floor_of(reference, own, seed)
    start = distances(reference, own)
    ladder: dict[str, list[dict[str, Any]]] = {}
    rungs = [(name, strength) for name, strengths in ladders.items() for strength in strengths]
    with bar(len(rungs), "climbing", "rungs") as shown:
        for number, (name, strength) in enumerate(rungs):
            harmed_NCHW = distort(name, own_NCHW, strength, generator(seed, number))
            rung: dict[str, Any] = {"strength": strength, **distances(reference, views(harmed_NCHW))}
            rung |= {"psnr": _finite(psnr(own_NCHW, harmed_NCHW)), "ssim": _ssim(own_NCHW, harmed_NCHW)}
            rung["sensitivity"] = sensitivity(rung, start, floor)
            ladder.setdefault(name, [{"strength": 0.0, **start}]).append(rung)
            shown.update()
    return {
        "floor": floor,
        "ladder": ladder,
        "monotone": monotone(ladder),
        "seconds": seconds(views, reference, own),
    }


def floor_of(a: Mapping[str, Tensor], b: Mapping[str, Tensor], seed: int) -> dict[str, dict[str, float]]:
    together = {view: torch.cat([a[view], b[view]]) for view in a}
    count, half = len(together[PIXELS]), len(a[PIXELS])
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(FLOOR):
        order = torch.randperm(count, generator=generator(seed, 1000 + number))
        halves = chosen(together, order[:half]), chosen(together, order[half:])
        for name, value in distances(*halves).items():
            found[name].append(value)
    return {name: {"mean": fmean(values), "deviation": stdev(values)} for name, values in found.items()}


def sensitivity(
    rung: Mapping[str, Any], start: Mapping[str, float], floor: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Deviations of the floor by which each distance rises. PAIRS have no floor: the harm itself."""
    found = {name: (rung[name] - start[name]) / floor[name]["deviation"] for name in METRICS}
    return found | {name: harm(rung[name]) for name, harm in PAIRS.items() if rung[name] is not None}


def monotone(ladder: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Ladders on which PSNR or SSIM has no number (a picture that is not touched has an infinite PSNR) do not count."""

    def climbed(rungs: Sequence[Mapping[str, Any]], name: str) -> list[float | None]:
        if name in METRICS:
            return [rung[name] for rung in rungs]
        return [0.0, *(rung["sensitivity"].get(name) for rung in rungs[1:])]

    found = {}
    for name in [*METRICS, *PAIRS]:
        paths = [climbed(rungs, name) for rungs in ladder.values()]
        known = [[step for step in path if step is not None] for path in paths if None not in path]
        if known:
            found[name] = fmean(all(a < b for a, b in pairwise(path)) for path in known)
    return found


def seconds(views: Views, reference: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, float]:
    """What one more set costs each metric: the features of its pictures, and the distance (the best of three). FWD's
    includes the reference's packets, which could be kept; those of the networks are, so it is FWD that loses by this.
    """
    found = {}
    for name, metric in METRICS.items():
        took = []
        for _ in range(3):
            started = time.perf_counter()
            metric.distance(reference[metric.view], own[metric.view])
            took.append(time.perf_counter() - started)
        found[name] = min(took) + views.seconds[metric.view] * len(own[PIXELS])
    return found


def _ssim(a: Tensor, b: Tensor) -> float | None:
    return ssim(a, b) if min(a.shape[2:]) >= SSIM_WINDOW else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- what is read from ladders --------------------------------------------------------------------------------

Ladders = Mapping[str, Sequence[Mapping[str, Any]]]


def total(rungs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of each metric: the sum over a ladder's rungs of its sensitivity, what falls counting 0, and at least LEAST."""
    above = [rung["sensitivity"] for rung in rungs[1:]]
    names = [name for name in (*METRICS, *PAIRS) if above and all(name in each for each in above)]
    return {name: max(LEAST, sum(max(0.0, each[name]) for each in above)) for name in names}


def quotients(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: a[name] / b[name] for name in a if name in b}


def band_sensitivity(ladder: Ladders) -> dict[str, dict[str, float]]:
    """What noise of high frequencies is to a metric, beside noise of low ones: of the same strengths, so of one energy.

    high_over_low: by how much more it rises, over all rungs. For PSNR 1 by construction: it is blind to frequency.
    low, high: deviations of the floor by which it rises, mean over the rungs: how easily such noise is seen at all. (A
    metric may mind high frequencies more than low ones and see neither.) Empty without the two ladders.
    """
    low, high = ladder.get("low", []), ladder.get("high", [])
    if len(high) < 2 or [rung["strength"] for rung in low] != [rung["strength"] for rung in high]:
        return {"high_over_low": {}, "low": {}, "high": {}}
    rungs, sums = len(high) - 1, (total(low), total(high))
    means = [{name: each[name] / rungs for name in METRICS} for each in sums]
    return {"high_over_low": quotients(sums[1], sums[0]), "low": means[0], "high": means[1]}


def bias(ladder: Ladders, beside: Ladders) -> dict[str, dict[str, float]]:
    """How differently a metric takes the same harm in two kinds of pictures, such as emoji (`ladder`) and photographs
    (`beside`, of the same rungs).

    That a metric was trained on photographs cannot be read from a number. What can: noise that is added is the same
    signal whatever it is added to, so a metric without a domain of its own would see it as easily in one as in the
    other. It is no proof: what hides noise also lies in the pictures (a fine texture hides fine noise from every
    metric). How much that is shows in FWD and in the untrained network: they have no training set, so by how far they
    are from 1 is no bias of a training set.

    Returns:
        ratio: sensitivity here / there, of each ladder of what is added (SAME_HARM); their geometric mean.
        off: max(ratio, 1 / ratio), so that 1 is best.
        spread: e^deviation of the logarithm of such ratios over all ladders: 1 where all kinds of harm keep their
            proportions, however easily harm is seen. Harm that is another harm there moves it too: hue means nothing
            to grey.
    """
    ratios = {name: quotients(total(rungs), total(beside[name])) for name, rungs in ladder.items()}
    same = [ratios[name] for name in SAME_HARM if name in ratios]
    ratio = {name: math.exp(fmean(_logarithms(same, name))) for name in _common(same)}
    every = _common(list(ratios.values())) if len(ratios) > 1 else []
    return {
        "ratio": ratio,
        "off": {name: max(value, 1 / value) for name, value in ratio.items()},
        "spread": {name: math.exp(stdev(_logarithms(list(ratios.values()), name))) for name in every},
    }


def _common(ratios: Sequence[Mapping[str, float]]) -> list[str]:
    """Metrics that each of the ladders has a number for."""
    return [name for name in (*METRICS, *PAIRS) if ratios and all(name in each for each in ratios)]


def _logarithms(ratios: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [math.log(each[name]) for each in ratios]


def fwd_against(metrics: Mapping[str, Any], rivals: Sequence[str]) -> dict[str, Any]:
    """FWD beside the best of some other distances: quotients of high_over_low and of high (`band_sensitivity`; above 1:
    FWD is more sensitive), of seconds (below 1: it is faster) and of bias (off; below 1: it is nearer to none);
    differences of monotone and of each auc (above 0: it is better). None where there is no such figure.

    For high_over_low, those that see noise of neither band (below SEEN) are passed over: a quotient of two chances.
    """
    bands = metrics["band_sensitivity"]
    seeing = [name for name in rivals if all(bands[band].get(name, 0) >= SEEN for band in ("low", "high"))]

    def quotient(
        values: Mapping[str, float], best: Callable[[list[float]], float], others: Sequence[str] = rivals
    ) -> float | None:
        own = values.get("fwd")
        return own / best([values[name] for name in others]) if own is not None else None

    def lead(values: Mapping[str, float]) -> float | None:
        own = values.get("fwd")
        return own - max(values[name] for name in rivals) if own is not None else None

    return {
        "high_over_low": quotient(bands["high_over_low"], max, seeing or rivals),
        "high": quotient(bands["high"], max),
        "seconds": quotient(metrics["seconds"], min),
        "bias": quotient(metrics.get("bias", {}).get("off", {}), min),
        "monotone": lead(metrics["monotone"]),
        "auc": {size: lead(values) for size, values in metrics.get("roc", {}).items()},
    }


# --- real or made ---------------------------------------------------------------------------------------------


def flagged(
    reference: Mapping[str, Tensor],
    real: Mapping[str, Tensor],
    made: Mapping[str, Tensor],
    set_size: int,
    sets: int,
    seed: int,
) -> tuple[dict[str, float], dict[str, tuple[list[float], list[float]]]]:
    """Can a metric tell made pictures from real ones? `sets` sets of `set_size` pictures are drawn of each (no picture
    twice in a set), and scored by their distance to `reference`, other real pictures.

    An area below 1/2 is no slip of signs: a Fréchet distance of a small set is mostly the chance of its draw, which is
    smaller where pictures vary less, so that smoothed ones can lie nearer to the reference than real ones do.

    Returns the area under the ROC curve of each of METRICS, and the scores behind it: of real and of made sets.
    """
    scores: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in METRICS}
    for kind, rows in enumerate((real, made)):
        for number in range(sets):
            places = torch.randperm(len(rows[PIXELS]), generator=generator(seed, 2000 + 2 * number + kind))
            for name, value in distances(reference, chosen(rows, places[:set_size])).items():
                scores[name][kind].append(value)
    return {name: area_under_roc(*each) for name, each in scores.items()}, scores


def area_under_roc(negatives: Sequence[float], positives: Sequence[float]) -> float:
    """How often a positive scores above a negative, ties counting half: Mann and Whitney's U over its largest value."""
    a, b = torch.tensor(negatives).double(), torch.tensor(positives).double()
    above = (b[:, None] > a).double() + (b[:, None] == a).double() / 2
    return float(above.mean())
