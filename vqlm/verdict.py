"""Does a claim hold? A figure of several runs against what the claim says of it, with the spread that the seeds show.

It does not know what was measured, nor how: numbers in, a word out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Literal

Verdict = Literal["holds", "fails", "too small to tell here"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "fails"
UNCLEAR: Verdict = "too small to tell here"
CONFIDENCE = 0.95  # of each of the two ends by itself

# Student's t at 95 % for 1 to 9 degrees of freedom; an expansion is exact enough from there on.
FEW = (6.3138, 2.9200, 2.3534, 2.1318, 2.0150, 1.9432, 1.8946, 1.8595, 1.8331)


@dataclass(frozen=True)
class Comparison:
    """What a claim says of one figure: of a cell by itself, or of a cell beside another one.

    figure, cell: names of the experiment. than: another cell; the difference `cell` - `than` is judged, seed by seed,
    and with ratio=True the quotient; None: the figure itself. least, most: one of them, where the claim holds.
    """

    figure: str
    cell: str
    than: str | None = None
    ratio: bool = False
    least: float | None = None
    most: float | None = None

    def __post_init__(self) -> None:
        if (self.least is None) == (self.most is None):
            raise ValueError(f"least={self.least}, most={self.most}: give one of them")
        if self.ratio and self.than is None:
            raise ValueError("ratio=True: name the cell to divide by as `than`")

    def values(self, figures: Mapping[str, Mapping[str, Sequence[float]]]) -> list[float]:
        """The number that is judged, for each seed. figures: figure → cell → a value for each seed."""
        own = figures[self.figure][self.cell]
        if self.than is None:
            return list(own)
        pairs = zip(own, figures[self.figure][self.than], strict=True)
        if not self.ratio:
            return [a - b for a, b in pairs]
        if not all(figures[self.figure][self.than]):
            raise ValueError(f"{self.figure} of {self.than} is 0: there is no ratio to it")
        return [a / b for a, b in pairs]

    def judge(self, values: Sequence[float]) -> Judgement:
        """Holds (or fails) if the mean lies on that side of the bar by more than the seeds' spread explains."""
        mean, reach = fmean(values), error(values)
        if reach is None:
            return Judgement(None, mean, None, UNCLEAR)
        low, high = mean - reach, mean + reach
        if self.least is not None:
            verdict = HOLDS if low >= self.least else FAILS if high < self.least else UNCLEAR
        else:
            assert self.most is not None
            verdict = HOLDS if high <= self.most else FAILS if low > self.most else UNCLEAR
        return Judgement(low, mean, high, verdict)


@dataclass(frozen=True)
class Judgement:
    """low, high: each end of the mean is passed with 5 % probability; None where one seed shows no spread."""

    low: float | None
    mean: float
    high: float | None
    verdict: Verdict


def error(values: Sequence[float]) -> float | None:
    """How far the mean may be from the true one: Student's t times the standard error. None for one value."""
    if len(values) < 2:
        return None
    return quantile(len(values) - 1) * stdev(values) / len(values) ** 0.5


def quantile(freedom: int) -> float:
    """Student's t that 95 % stay below. From 10 degrees of freedom on: Abramowitz and Stegun, 26.7.5."""
    if freedom <= len(FEW):
        return FEW[freedom - 1]
    z = NormalDist().inv_cdf(CONFIDENCE)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """A claim fails with any of its parts, and holds with all of them."""
    if not verdicts:
        return UNCLEAR
    if FAILS in verdicts:
        return FAILS
    return HOLDS if set(verdicts) == {HOLDS} else UNCLEAR
