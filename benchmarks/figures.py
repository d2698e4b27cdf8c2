"""Medians, ratios pair by pair, shares of a ceiling, targets and verdicts. Pure functions of measured numbers."""

import math
import statistics
from typing import NamedTuple

FALLS_SHORT = "FALLS SHORT"


class Spread(NamedTuple):
    """The median of repeated measurements, the lowest and the highest."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values):
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form=",.0f"):
        if self.lowest == self.highest:
            return f"{self.median:{form}}"
        return f"{self.median:{form}} ({self.lowest:{form}}–{self.highest:{form}})"


def ratios(ours, theirs):
    """ours / theirs for each pair: the n-th of both are of one round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


class Verdict(NamedTuple):
    """A measured figure beside its target. `at_least` says which side of the target is good; the target itself is
    good. The median decides; the spread is shown."""

    what: str
    measured: Spread
    target: float
    unit: str
    at_least: bool
    form: str = ".2f"

    @property
    def met(self):
        if not math.isfinite(self.measured.median):
            return False
        return self.measured.median >= self.target if self.at_least else self.measured.median <= self.target

    @property
    def word(self):
        return "met" if self.met else FALLS_SHORT

    def line(self):
        bound, unit = "at least" if self.at_least else "at most", f" {self.unit}" if self.unit else ""
        return f"{self.what}: {self.measured.text(self.form)}{unit}, target {bound} {self.target:g}: {self.word}"


def images_per_second_at(gigaflops, flop_per_image):
    """The images a second that a rate of computing (GFLOP/s) would allow if nothing else cost time."""
    return gigaflops * 1e9 / flop_per_image


def epoch_seconds(images_per_second):
    """The time that an epoch of CIFAR-10, 50,000 images, takes at a rate of training."""
    return 50_000 / images_per_second


def unevenness(seconds_of_images):
    """Seconds that equally many steps take with the most images over those with the fewest, from lists of blocks taken
    in turn: the median of their pairs, 1 when time is linear in images."""
    fewest, most = (seconds_of_images[pick(seconds_of_images, key=int)] for pick in (min, max))
    return statistics.median(a / b for a, b in zip(most, fewest, strict=True))
