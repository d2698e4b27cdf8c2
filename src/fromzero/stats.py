"""Comparing two ways to train, from pairs of runs that share a seed. Pure functions of numbers; knows no runs.

Differences are arrays whose last axis is the pair; leading axes are independent comparisons, so that a simulation of
ten thousand studies is one call. What decides is the exact sign-flip test (Fisher, "The Design of Experiments", 1935,
section 21): it assumes only that a difference is as likely to have either sign when there is nothing to find.

scipy is imported where it is used: the command line imports this module for every training, and scipy.stats takes about
as long as half of torch.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Direction = Literal["higher", "lower", "different"]
Verdict = Literal["supported", "contradicted", "undecided"]

LEVEL = 0.05  # two-sided
Z = 1.959964  # of the normal distribution, for that level
POWER = 0.8
FEWEST_PAIRS = 6  # below, no p can be 0.05 or less: the smallest is 2 / 2**n
EXACT_PAIRS = 16  # up to here every pattern of signs is tried
FEW_FOR_VALIDATION = 400  # images, by which an accuracy is known to 5 points
DRAWS = 99_999  # patterns drawn beyond that
SIMULATED_PAIRS = 12  # up to here the power is simulated: p has so few values that the t test's would mislead


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


class ImageComparison(NamedTuple):
    """What N images say about the accuracy of two networks, `second - first`.

    difference: its mean and 95 % interval for these networks on other images; only_first, only_second: how many images
    one of them alone has right; p: two-sided, that both are right equally often. It knows nothing of other seeds.
    """

    difference: Interval
    only_first: int
    only_second: int
    p: float


class Comparison(NamedTuple):
    """What n pairs of runs say about `arm - against`.

    difference: mean and t interval over seeds; sd: of the differences; correlation: what pairing by seed bought (0:
    nothing); p: two-sided, of the claim's null hypothesis; exact: whether every pattern of signs was tried;
    favourable: whether the mean lies on the claim's side; effect: distance of the mean from the null, in sd.
    """

    n: int
    difference: Interval
    sd: float
    correlation: float
    p: float
    exact: bool
    favourable: bool
    effect: float


def compare(arm: ArrayLike, against: ArrayLike, direction: Direction = "higher", margin: float = 0.0) -> Comparison:
    """Compare two arms, values (n,) each, paired by position.

    The claim is, for "higher", that arm - against > -margin (a margin above zero makes it "not lower by more than");
    for "lower", that it is < margin; for "different", that its size is > margin. Raises ValueError below two pairs.
    """
    a, b = np.asarray(arm, float), np.asarray(against, float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"expected two equally long rows of at least two values, got {a.shape} and {b.shape}")
    differences = a - b
    match direction:
        case "higher":
            towards_claim = differences + margin
        case "lower":
            towards_claim = margin - differences
        case "different":
            towards_claim = np.copysign(1.0, differences.mean()) * differences - margin
    sd, distance = float(differences.std(ddof=1)), float(towards_claim.mean())
    return Comparison(
        n=len(a),
        difference=t_interval(differences),
        sd=sd,
        correlation=correlation(a, b),
        p=float(sign_flip_p(towards_claim)),
        exact=len(a) <= EXACT_PAIRS,
        favourable=distance > 0,
        effect=abs(distance) / sd if sd > 0 else math.inf if distance else 0.0,
    )


def t_interval(differences: ArrayLike) -> Interval:
    """Student's 95 % interval of the mean of differences (n,)."""
    low, high = t_intervals(differences)
    return Interval(float(np.asarray(differences, float).mean()), float(low), float(high))


def t_intervals(differences: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of Student's 95 % intervals, differences (…, n) → (…)."""
    from scipy import stats

    d = np.asarray(differences, float)
    n = d.shape[-1]
    half = stats.t.ppf(1 - LEVEL / 2, n - 1) * d.std(axis=-1, ddof=1) / math.sqrt(n)
    return d.mean(axis=-1) - half, d.mean(axis=-1) + half


def sign_flip_p(differences: ArrayLike) -> np.ndarray:
    """Two-sided p of the sign-flip test, differences (…, n) → (…): the share of all 2**n patterns of signs that give a
    mean at least as far from zero as the one found. Beyond 16 pairs, of 99,999 patterns drawn from a fixed seed and
    the one found (Phipson and Smyth, 2010), so p is never zero."""
    d = np.asarray(differences, float)
    n = d.shape[-1]
    found = np.abs(d.sum(axis=-1))
    at_least = found - 1e-9 * np.abs(d).sum(axis=-1)  # equal sums differ by rounding
    if n <= EXACT_PAIRS:
        # A pattern and its opposite are equally far, so half of them will do.
        hits, patterns = _hits(d, at_least, _all_signs(n)), 2 ** (n - 1)
        return np.asarray(hits / patterns)
    bits = np.random.Generator(np.random.PCG64(0)).integers(0, 2, (DRAWS, n), dtype=np.int8)
    return np.asarray((1 + _hits(d, at_least, 1.0 - 2.0 * bits)) / (1 + DRAWS))


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` (Wilson, 1927)."""
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * (share * (1 - share) / count + Z * Z / (4 * count * count)) ** 0.5
    return max(centre - half, 0.0), min(centre + half, 1.0)


def widest_error(count: int) -> float:
    """Half of Wilson's interval of a share of `count` where it is widest, at a half."""
    low, high = wilson_interval(0.5, count)
    return (high - low) / 2


def compare_on_images(first: ArrayLike, second: ArrayLike) -> ImageComparison:
    """Compare two networks by whether each of N images was right, (N,) each, in the same order. The p is that of
    McNemar's test (1947), exact; the interval Wald's as adjusted by Bonett and Price (2012) for pairs.
    Raises ValueError without images."""
    from scipy import stats

    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 1:
        raise ValueError(f"expected two equally long rows of outcomes, got {a.shape} and {b.shape}")
    only_first, only_second, n = int((a & ~b).sum()), int((b & ~a).sum()), len(a)
    differing = only_first + only_second
    p = float(stats.binomtest(only_first, differing).pvalue) if differing else 1.0
    ours, theirs = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    centre, half = theirs - ours, Z * math.sqrt((ours + theirs - (theirs - ours) ** 2) / (n + 2))
    mean = (only_second - only_first) / n
    return ImageComparison(
        Interval(mean, max(centre - half, -1.0), min(centre + half, 1.0)), only_first, only_second, p
    )


def holm(p: ArrayLike) -> np.ndarray:
    """p-values adjusted for being several (Holm, 1979), in the order given: below 0.05 there means that the chance of
    even one false positive among them is below 0.05."""
    values = np.asarray(p, float)
    order = np.argsort(values, kind="stable")
    stepped = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted


def verdict(n: int, adjusted_p: float, favourable: bool) -> Verdict:
    """What n pairs say of a claim. Below six pairs it is always undecided."""
    if n < FEWEST_PAIRS or not adjusted_p <= LEVEL:
        return "undecided"
    return "supported" if favourable else "contradicted"


def correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation of two arms over their common seeds; NaN where an arm does not vary. The standard
    deviation of a paired difference is √(2(1 - r)) times that of a run: at r = 0 pairing by seed bought nothing."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    if min(np.ptp(x), np.ptp(y)) < 1e-12:  # of equal values the mean is another by rounding
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def power(effect: float, n: int, level: float = LEVEL) -> float:
    """Chance that the sign-flip test of n normal differences has p ≤ `level`, when their mean is `effect` standard
    deviations from zero. Up to twelve pairs simulated (4,000 studies, fixed seed); beyond, that of the t test, to which
    the sign-flip test is then close, with the noncentral t of Abramowitz and Stegun, 26.7.10.
    Just beyond it is too high where the level is low: 0.80 for 0.77 of 13 pairs at 0.05 / 15."""
    from scipy import stats

    if n <= SIMULATED_PAIRS:
        return float((sign_flip_p(_normal(n) + effect) <= level).mean())
    critical = float(stats.t.ppf(1 - level / 2, n - 1))
    shrunk, spread = critical * (1 - 1 / (4 * (n - 1))), math.sqrt(1 + critical**2 / (2 * (n - 1)))
    shift = effect * math.sqrt(n)
    return float(stats.norm.cdf((shift - shrunk) / spread) + stats.norm.cdf((-shift - shrunk) / spread))


@cache
def detectable_effect(n: int, level: float = LEVEL) -> float:
    """The smallest true difference, in standard deviations of a paired difference, that n pairs find four times out of
    five; infinite where n pairs cannot find anything (2 / 2**n > level)."""
    from scipy import optimize

    if 2.0 ** (1 - n) > level:
        return math.inf
    return float(optimize.bisect(lambda effect: power(effect, n, level) - POWER, 0.0, 50.0, xtol=1e-3))


def pairs_needed(effect: float, level: float, most: int) -> int | None:
    """How many pairs find a true difference of `effect` standard deviations four times out of five; None when more
    than `most` would be needed."""
    if not 0 < effect < math.inf or detectable_effect(most, level) > effect:
        return None
    low, high = 1, most  # low finds it too seldom, high often enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if detectable_effect(middle, level) <= effect else (middle, high)
    return high


def fewest_pairs(comparisons: int) -> int:
    """With how many pairs the smallest p survives Holm's correction for that many comparisons."""
    return next(n for n in range(FEWEST_PAIRS, 64) if comparisons * 2.0 ** (1 - n) <= LEVEL)


def seeds_and_images_interval(arm: ArrayLike, against: ArrayLike) -> Interval:
    """95 % interval of a difference in accuracy for new seeds and new images of the same kind.

    arm, against: whether each image was right, (n seeds, N images) each, same seeds and images in the same order. Seeds
    and images are two crossed random factors; the variance of the mean is put together from their mean squares and the
    degrees of freedom by Satterthwaite (1946). The interval over seeds alone asks what other seeds would give on these
    very images; this one, what they would give on others.
    """
    from scipy import stats

    d = np.asarray(arm, float) - np.asarray(against, float)
    seeds, images = d.shape
    mean = float(d.mean())
    by_seed, by_image = d.mean(axis=1), d.mean(axis=0)
    rest = d - by_seed[:, None] - by_image[None, :] + mean
    parts = (  # variance of the mean that each mean square stands for, with its degrees of freedom
        (float(by_seed.var(ddof=1)) / seeds, seeds - 1),
        (float(by_image.var(ddof=1)) / images, images - 1),
        (-float((rest**2).sum()) / ((seeds - 1) * (images - 1)) / d.size, (seeds - 1) * (images - 1)),
    )
    # Never less than what images or seeds alone would give: the difference of estimates can fall below.
    variance = max(sum(v for v, _ in parts), parts[0][0], parts[1][0])
    freedom = variance**2 / max(sum(v**2 / f for v, f in parts), 1e-300)
    half = float(stats.t.ppf(1 - LEVEL / 2, max(freedom, 1.0))) * math.sqrt(variance)
    half = max(half, t_interval(by_seed).high - mean)  # which has fewer degrees of freedom
    return Interval(mean, mean - half, mean + half)


def _hits(d: np.ndarray, at_least: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """How many of `signs` (patterns, n) bring each of d (…, n) at least that far from zero, a slice at a time."""
    rows = d.reshape(-1, d.shape[-1])
    bounds = at_least.reshape(-1)
    hits = np.empty(len(rows))
    step = max(1, 2**22 // len(signs))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        hits[part] = (np.abs(rows[part] @ signs.T) >= bounds[part, None]).sum(axis=1)
    return hits.reshape(d.shape[:-1])


@cache
def _all_signs(n: int) -> np.ndarray:
    """Every pattern of n signs whose first is +, (2**(n-1), n)."""
    numbers = np.arange(2 ** (n - 1))[:, None]
    return 1.0 - 2.0 * ((numbers >> np.arange(n)) & 1)[:, ::-1]


@cache
def _normal(n: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(1)).normal(size=(4000, n))
