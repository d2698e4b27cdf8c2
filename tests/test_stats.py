"""The statistics themselves, on simulated studies where the truth is known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as reference

from fromzero import stats

DRAWS = 10_000


def differences(n, mean=0.0, sd=1.0, seed=0, draws=DRAWS):
    return np.random.default_rng(seed).normal(mean, sd, (draws, n))


def test_the_sign_flip_test_counts_every_pattern():
    d = np.array([0.3, -0.1, 0.4, 0.2, 0.05, 0.6])
    sums = [abs(np.dot(signs, d)) for signs in itertools.product((-1, 1), repeat=6)]
    expected = np.mean([s >= abs(d.sum()) - 1e-12 for s in sums])
    assert stats.sign_flip_p(d) == pytest.approx(expected)
    assert stats.sign_flip_p(np.abs(d)) == pytest.approx(2 / 2**6)
    found = reference.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert stats.sign_flip_p(d) == pytest.approx(found.pvalue)


@pytest.mark.parametrize(("k", "n"), [(0, 2), (0, 1000), (1, 1), (37, 64), (9, 10), (10_000, 10_000), (8_765, 10_000)])
def test_an_accuracys_interval_is_wilsons(k, n):
    found = stats.wilson_interval(k / n, n)
    assert found == pytest.approx(tuple(reference.binomtest(k, n).proportion_ci(method="wilson")), abs=1e-6)
    assert 0 <= found[0] < found[1] <= 1


def test_two_networks_on_images_are_compared_by_where_they_differ():
    first, second = np.zeros(100, bool), np.zeros(100, bool)
    first[:60], second[:50], second[60:63] = True, True, True  # only the first: 10; only the second: 3
    found = stats.compare_on_images(first, second)
    assert (found.only_first, found.only_second) == (10, 3)
    assert found.difference.mean == pytest.approx(-0.07)
    as_or_more_uneven = [k for k in range(14) if abs(k - 6.5) >= 3.5]
    assert found.p == pytest.approx(sum(math.comb(13, k) for k in as_or_more_uneven) / 2**13)
    assert stats.compare_on_images(first, first).p == 1
    with pytest.raises(ValueError, match="equally long"):
        stats.compare_on_images(first, second[1:])


@pytest.mark.parametrize(("n", "both", "only_first", "only_second"), [(40, 0.8, 0.1, 0.05), (500, 0.9, 0.03, 0.03)])
def test_the_interval_of_two_networks_covers_what_is_true(n, both, only_first, only_second):
    rng = np.random.default_rng(1)
    shares = [both, only_first, only_second, 1 - both - only_first - only_second]
    kinds = rng.choice(4, (4000, n), p=shares)
    found = [stats.compare_on_images((k == 0) | (k == 1), (k == 0) | (k == 2)).difference for k in kinds]
    covered = np.mean([low <= only_second - only_first <= high for _, low, high in found])
    assert 0.94 <= covered <= 0.985


def test_no_difference_at_all_is_no_evidence():
    assert stats.sign_flip_p(np.zeros(8)) == 1
    same = stats.compare([0.5] * 8, [0.5] * 8)
    assert same.p == 1
    assert same.effect == 0
    assert stats.verdict(same.n, same.p, same.favourable) == "undecided"
    assert math.isnan(same.correlation)
    assert math.isnan(stats.correlation([0.10104529616724739] * 6, range(6)))


def test_beyond_sixteen_pairs_patterns_are_drawn_and_said_to_be():
    rng = np.random.default_rng(3)
    d = rng.normal(0.45, 1, 17)
    exact = np.mean([abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-12 for signs in itertools.product((-1, 1), repeat=17)])
    assert stats.sign_flip_p(d) == pytest.approx(exact, abs=0.005)
    assert stats.sign_flip_p(np.full(40, 1.0)) == pytest.approx(1e-5)
    assert not stats.compare(d, np.zeros(17)).exact
    assert stats.compare(d[:16], np.zeros(16)).exact


@pytest.mark.parametrize("n", [7, 8, 10, 12])
def test_a_against_a_finds_something_in_four_to_six_percent(n):
    draws = DRAWS if n < 12 else 4000
    assert 0.04 <= (stats.sign_flip_p(differences(n, draws=draws)) <= 0.05).mean() <= 0.06


def test_six_pairs_are_stricter_because_p_comes_in_steps():
    assert (stats.sign_flip_p(differences(6)) <= 0.05).mean() == pytest.approx(2 / 64, abs=0.005)


def test_a_against_a_with_several_arms_is_wrong_somewhere_in_five_percent_at_most():
    p = stats.sign_flip_p(differences(8 * 3).reshape(DRAWS, 3, 8))
    assert (p <= 0.05).any(axis=1).mean() > 0.1  # without correction
    adjusted = np.apply_along_axis(stats.holm, 1, p)
    assert (adjusted <= 0.05).any(axis=1).mean() <= 0.055


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_fewer_than_six_pairs_always_read_undecided(n):
    rng = np.random.default_rng(n)
    for shift in (0.0, 1.0, 100.0):
        for row in rng.normal(shift, 1, (200, n)):
            found = stats.compare(row, np.zeros(n))
            assert stats.verdict(found.n, found.p, found.favourable) == "undecided"
    assert stats.verdict(5, 0.0, True) == "undecided"


@pytest.mark.parametrize(("n", "level"), [(6, 0.05), (8, 0.05), (11, 0.05 / 20), (12, 0.05), (14, 0.05)])
def test_a_planted_difference_is_found_as_often_as_predicted(n, level):
    draws = DRAWS if n < 11 else 2000
    smallest = stats.detectable_effect(n, level)
    for effect, expected in ((smallest, 0.8), (smallest / 2, stats.power(smallest / 2, n, level))):
        p = stats.sign_flip_p(differences(n, 0.25 * effect, 0.25, seed=7, draws=draws))
        assert (p <= level).mean() == pytest.approx(expected, abs=0.05)


def test_a_planted_difference_is_supported_and_its_opposite_contradicted():
    rng = np.random.default_rng(5)
    effect = stats.detectable_effect(8)
    against = rng.normal(0.8, 0.01, (500, 8))
    arm = against + rng.normal(effect * 0.01, 0.01, (500, 8))
    verdicts = {direction: [] for direction in ("higher", "lower", "different")}
    for a, b in zip(arm, against, strict=True):
        for direction, found in verdicts.items():
            one = stats.compare(a, b, direction)
            found.append(stats.verdict(one.n, one.p, one.favourable))
    assert verdicts["higher"].count("supported") / 500 == pytest.approx(0.8, abs=0.05)
    assert verdicts["lower"].count("contradicted") == verdicts["higher"].count("supported")
    assert verdicts["different"].count("supported") == verdicts["higher"].count("supported")
    assert verdicts["different"].count("contradicted") == 0


def test_intervals_cover_what_they_promise():
    for n in (6, 8, 20):
        low, high = stats.t_intervals(differences(n, mean=0.3))
        assert 0.94 <= ((low <= 0.3) & (high >= 0.3)).mean() <= 0.96
    one = stats.t_interval([0.1, 0.2, 0.4])
    expected = reference.ttest_1samp([0.1, 0.2, 0.4], 0).confidence_interval()
    assert one == pytest.approx((0.7 / 3, expected.low, expected.high))


def test_the_interval_over_seeds_and_images_covers_new_seeds_and_new_images():
    """Each simulated study has its own images: the interval over seeds alone misses the truth, the other covers it."""
    rng = np.random.default_rng(2)
    seeds, images, truth = 6, 400, 0.03
    covered, covered_by_seeds_alone = [], []
    for _ in range(1500):
        # On most images the arms are alike; a few are new to one of them or lost to it, whatever the seed.
        gain = rng.choice([0.0, 0.9, -0.8], images, p=[0.91, 0.06, 0.03])  # mean 0.03
        base = np.select([gain > 0, gain < 0], [0.05, 0.9], 0.7)
        shift = rng.normal(0, 0.01, (2, seeds, 1))
        arm = rng.random((seeds, images)) < base + gain + shift[0]
        against = rng.random((seeds, images)) < base + shift[1]
        found = stats.seeds_and_images_interval(arm, against)
        covered.append(found.low <= truth <= found.high)
        alone = stats.t_interval(arm.mean(1) - against.mean(1))
        covered_by_seeds_alone.append(alone.low <= truth <= alone.high)
        assert found.mean == pytest.approx(alone.mean)
        assert found.high - found.low >= alone.high - alone.low - 1e-12
    assert 0.94 <= np.mean(covered) <= 0.97
    assert np.mean(covered_by_seeds_alone) < 0.9


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([0.02]) == pytest.approx([0.02])


def test_margins():
    rng = np.random.default_rng(4)
    against = rng.normal(0.8, 0.002, 8)
    arm = against - 0.001 + rng.normal(0, 0.0005, 8)  # a little lower for certain

    def says(direction, margin):
        found = stats.compare(arm, against, direction, margin)
        return stats.verdict(found.n, found.p, found.favourable)

    assert says("higher", 0.0) == "contradicted"
    assert says("higher", 0.01) == "supported"  # not lower by more than a point
    assert says("lower", 0.0) == "supported"
    assert says("different", 0.0) == "supported"
    assert says("different", 0.01) == "contradicted"  # not different by a point


def test_the_runs_that_the_reference_asks_for():
    """Runs an arm to see a difference at 80 % power, as published for unpaired arms: pairs without correlation have
    √2 the deviation of a run and need as many (published from the normal distribution: a few less)."""
    for sd, gap, runs in ((0.15, 0.1, 36), (0.25, 0.1, 99), (0.25, 0.2, 25)):
        assert runs <= stats.pairs_needed(gap / (sd * math.sqrt(2)), stats.LEVEL, 10_000) <= runs + 3
    assert stats.pairs_needed(0.0, stats.LEVEL, 10_000) is None
    assert stats.pairs_needed(1e-4, stats.LEVEL, 10_000) is None
    assert stats.pairs_needed(math.inf, stats.LEVEL, 10_000) is None  # of pairs that are all equal
    assert stats.pairs_needed(50.0, stats.LEVEL, 10_000) == stats.FEWEST_PAIRS


def test_too_few_pairs_for_the_number_of_comparisons():
    assert [stats.fewest_pairs(m) for m in (1, 2, 3, 4, 6, 7, 15)] == [6, 7, 7, 8, 8, 9, 10]
    assert stats.detectable_effect(5) == math.inf
    assert stats.detectable_effect(6, 0.05 / 2) == math.inf
    assert stats.detectable_effect(7, 0.05 / 3) < math.inf


def test_the_simulated_and_the_computed_power_meet():
    for effect in (0.3, 0.8, 1.1):
        computed = reference.nct.sf(reference.t.ppf(0.975, 9), 9, effect * math.sqrt(10))
        assert stats.power(effect, 10) == pytest.approx(computed, abs=0.03)


def test_what_pairing_buys():
    rng = np.random.default_rng(1)
    common, own = rng.normal(0, 1, 4000), rng.normal(0, 1, (2, 4000))
    a, b = 2 * common + own[0], 2 * common + own[1]
    r = stats.correlation(a, b)
    assert r == pytest.approx(0.8, abs=0.03)
    assert (a - b).std() == pytest.approx(a.std() * math.sqrt(2 * (1 - r)), rel=0.05)
    assert stats.compare(a[:12], b[:12]).correlation == pytest.approx(np.corrcoef(a[:12], b[:12])[0, 1])


def test_what_is_no_pair():
    for arm, against in (([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([[1.0, 2.0]], [[1.0, 2.0]])):
        with pytest.raises(ValueError, match="two equally long rows"):
            stats.compare(arm, against)
