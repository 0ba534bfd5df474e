"""The statistics against brute force over all signs, against SciPy, and against their own promises in simulation."""

from __future__ import annotations

import importlib.util
import json
import math
from itertools import chain, combinations, combinations_with_replacement, pairwise, product
from pathlib import Path
from statistics import fmean, median

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from steep.evidence.statistics.paired import (
    adjust,
    band,
    compare,
    differences,
    estimate,
    holm,
    interval,
    paired_time_to_target,
    sign_flip_p,
)
from steep.evidence.statistics.power import minimum_detectable_effect, seeds_needed

INF = math.inf
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)

whole = st.integers(-8, 8).map(float)  # small and whole: plenty of exact ties and zeros, no rounding
finite = st.lists(whole, min_size=1, max_size=9)
with_infinite = st.lists(st.one_of(whole, st.sampled_from([INF, -INF])), min_size=1, max_size=9)
some_infinite = with_infinite.filter(lambda d: any(map(math.isinf, d)))


# Oracles, written without the code under test.


def brute_force_p(d):
    observed = abs(sum(d))
    signed = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in product((1, -1), repeat=len(d))]
    return sum(t >= observed for t in signed) / len(signed)


def brute_force_subset_means(d):
    return sorted(fmean(s) for s in chain.from_iterable(combinations(d, k) for k in range(1, len(d) + 1)))


def brute_force_walsh(d):
    return [(x + y) / 2 for x, y in combinations_with_replacement(d, 2)]


def brute_force_rank_p(d):
    """Every Walsh average that is zero or undecided is given to the weaker side."""
    walsh, n = brute_force_walsh(d), len(d)
    weaker = min(sum(not w > 0 for w in walsh), sum(not w < 0 for w in walsh))
    sums = [sum(r for r, s in enumerate(signs, 1) if s) for signs in product((0, 1), repeat=n)]
    return min(1.0, 2 * sum(w <= weaker for w in sums) / 2**n)


# Differences.


def test_differences_are_positive_where_the_arm_is_better():
    arm, baseline = [0.5, 0.75], [0.25, 1.0]
    np.testing.assert_array_equal(differences(arm, baseline), [-0.25, 0.25])
    np.testing.assert_array_equal(differences(arm, baseline, higher_is_better=True), [0.25, -0.25])


def test_relative_differences_are_of_logarithms():
    arm, baseline = [0.5, 3.0], [1.0, 1.0]
    np.testing.assert_allclose(differences(arm, baseline, relative=True), [math.log(2), -math.log(3)])
    np.testing.assert_allclose(
        differences(arm, baseline, relative=True, higher_is_better=True), [-math.log(2), math.log(3)]
    )


@pytest.mark.parametrize("lost", [None, math.nan, INF, -INF])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("higher_is_better", [False, True])
def test_diverged_runs_are_censored_never_dropped(lost, relative, higher_is_better):
    d = differences(
        [lost, 2.0, lost, 2.0], [2.0, lost, lost, 2.0], relative=relative, higher_is_better=higher_is_better
    )
    np.testing.assert_array_equal(d, [-INF, INF, 0, 0])
    assert not np.signbit(d[2:]).any()


@pytest.mark.parametrize("score", [0.0, -0.25])
def test_relative_differences_refuse_scores_that_are_not_positive(score):
    with pytest.raises(ValueError, match=f"scores must be > 0 for relative differences, got {score}"):
        differences([1.0, score], [1.0, 1.0], relative=True)
    with pytest.raises(ValueError, match=f"got {score}"):
        differences([1.0, None], [1.0, score], relative=True)


@pytest.mark.parametrize(("arm", "baseline"), [([1.0], [1.0, 2.0]), ([], [])])
def test_differences_refuse_unpaired_scores(arm, baseline):
    with pytest.raises(ValueError, match=f"got {len(arm)} and {len(baseline)}"):
        differences(arm, baseline)


# The test.


@given(finite)
def test_p_is_that_of_all_sign_flips_of_the_mean(d):
    assert sign_flip_p(d) == brute_force_p(d)


def test_p_agrees_with_scipys_permutation_test():
    rng = np.random.default_rng(1)
    for n in (3, 6, 9, 12):
        d = rng.standard_normal(n) + 0.4
        theirs = scipy.stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert sign_flip_p(d) == pytest.approx(theirs.pvalue, abs=1e-12)


@pytest.mark.parametrize(("n", "p"), [(1, 1.0), (2, 0.5), (5, 0.0625), (6, 0.03125), (8, 0.0078125), (16, 2 / 65536)])
def test_smallest_p(n, p):
    d = np.linspace(1, 2, n)
    assert sign_flip_p(d) == sign_flip_p(-d) == sign_flip_p([*d[1:], INF]) == sign_flip_p(np.full(n, -INF)) == p


@pytest.mark.parametrize("n", [1, 6, 16, 20])
def test_no_difference_at_all_is_no_evidence(n):
    assert sign_flip_p(np.zeros(n)) == 1
    assert interval(np.zeros(max(n, 6))) == (0, 0)
    verdict = compare([1.0] * n, [1.0] * n).verdict
    assert verdict == ("too few seeds" if n < 6 else "no evidence")


def test_ties_survive_rounding():
    d = [0.1, 0.2, -0.3, 0.4, 0.5, -0.6]  # 0.1 + 0.2 - 0.3 = 5.6e-17
    assert sign_flip_p(d) == brute_force_p([1, 2, -3, 4, 5, -6])
    assert sign_flip_p([*d, INF, INF]) == brute_force_rank_p([1, 2, -3, 4, 5, -6, INF, INF])


def test_a_huge_difference_does_not_round_the_others_away():
    small = [0.1, 0.2, 0.15, 0.3, 0.25, 0.1, 0.2]
    assert sign_flip_p([1e13, *small]) == sign_flip_p([1e13, *small, INF]) * 2 == 2 / 256
    assert sign_flip_p([1e9, *small, *small, *small[:3]]) == pytest.approx(1 / 32768, rel=1e-3)


@given(some_infinite)
def test_p_with_diverged_runs_is_that_of_signed_ranks(d):
    assert sign_flip_p(d) == brute_force_rank_p(d)


def test_p_with_diverged_runs_agrees_with_scipys_wilcoxon():
    rng = np.random.default_rng(2)
    for n in (4, 6, 9, 12):
        d = rng.standard_normal(n) + 0.3
        for lost in (INF, -INF):
            ranked = np.append(d, math.copysign(1e3, lost))
            theirs = scipy.stats.wilcoxon(ranked, method="exact").pvalue
            assert sign_flip_p([*d, lost]) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 2, 3, 4, 5, 6, 7, 8),
        (0, 0, 1, 1, 1, 2, 2, 3),
        (1, 1, 1, 1, 1, 1, 1, 1),
        (1, 2, 3, 4, 5, 6, 7, INF),
        (0, 1, 1, 2, 2, 3, INF, INF),
        (0, 0, 0, 1, INF, INF, INF, INF),
        (INF,) * 8,
    ],
)
def test_exactly_valid_given_the_sizes(sizes):
    """Under the null all signs are equally likely: p must be stochastically no smaller than uniform, ties or not."""
    p = np.array([sign_flip_p(np.copysign(sizes, signs)) for signs in product((1, -1), repeat=8)])
    attained = np.unique(p)
    assert all(np.mean(p <= a) <= a for a in attained)
    if len(set(sizes)) == 8 and 0 not in sizes:  # and no larger, where nothing ties
        assert all(np.mean(p <= a) == a for a in attained)


def test_one_divergence_of_the_arm_is_held_against_it():
    wins = np.linspace(1, 2, 7)
    assert sign_flip_p([*wins, INF]) < 0.05 < sign_flip_p([*wins, -INF])
    assert sign_flip_p([*wins, 0]) < 0.05  # both diverged


def test_many_pairs_use_random_flips():
    d = np.random.default_rng(3).standard_normal(20) + 0.5
    sums = np.zeros(1)
    for x in d:
        sums = np.concatenate([sums + x, sums - x])
    exact = np.mean(np.abs(sums) >= abs(d.sum()) - 1e-9)
    assert sign_flip_p(d) == sign_flip_p(d) == sign_flip_p(-d)
    assert sign_flip_p(d) == pytest.approx(exact, abs=4 * math.sqrt(exact / 32767))
    assert sign_flip_p(np.arange(1, 31)) == pytest.approx(1 / 32768, rel=1e-3)  # never 0


@pytest.mark.parametrize("d", [[], [1.0, math.nan], [[1.0, 2.0]]])
@pytest.mark.parametrize("function", [sign_flip_p, interval, estimate])
def test_differences_that_are_no_differences_are_refused(function, d):
    with pytest.raises(ValueError, match="differences must be one number or infinity per pair"):
        function(d)


# The interval.


@pytest.mark.parametrize(("n", "k"), [(6, 1), (7, 3), (8, 6), (10, 25)])
def test_interval_ends_at_the_kth_subset_means(n, k):
    d = np.random.default_rng(n).standard_normal(n).tolist()
    means = brute_force_subset_means(d)
    assert interval(d) == pytest.approx((means[k - 1], means[-k]))


@given(with_infinite, st.sampled_from(LEVELS))
def test_interval_excludes_zero_exactly_when_the_test_rejects(d, level):
    low, high = interval(d, level)
    assert low <= high
    assert (low > 0 or high < 0) == (sign_flip_p(d) <= 1 - level)


@given(with_infinite, st.integers(-20, 20).map(lambda i: i / 4 + 1 / 3), st.sampled_from(LEVELS))
def test_interval_is_the_set_of_differences_not_rejected(d, hypothesis, level):
    low, high = interval(d, level)
    near = min(abs(hypothesis - low), abs(hypothesis - high)) < 1e-6  # on the edge rounding decides
    assert near or (low <= hypothesis <= high) == (sign_flip_p(np.array(d) - hypothesis) > 1 - level)


@pytest.mark.parametrize("n", [17, 24])
@pytest.mark.filterwarnings("error")
def test_interval_of_many_pairs_agrees_with_the_test_too(n):
    rng = np.random.default_rng(n)
    rejected = 0
    for shift in np.linspace(0, 1, 12):
        d = rng.standard_normal(n) + shift
        low, high = interval(d)
        rejected += low > 0
        assert (low > 0 or high < 0) == (sign_flip_p(d) <= 0.05)
    assert 0 < rejected < 12


@given(st.lists(st.one_of(whole, st.sampled_from([INF, -INF])), min_size=1, max_size=5))
def test_fewer_than_six_pairs_bound_nothing(d):
    assert interval(d) == (-INF, INF)


def test_interval_with_diverged_runs_may_be_infinite():
    assert interval([INF] * 6) == (INF, INF)
    assert interval([-INF] * 6) == (-INF, -INF)
    assert interval([1, 2, 3, 4, 5, 6, 7, INF]) == (2, INF)  # 1, 1.5, 2, 2: P(W <= 3) = 5 / 256, P(W <= 4) = 7 / 256
    low, high = interval([1, 2, 3, 4, 5, 6, 7, -INF])
    assert low == -INF
    assert 0 < high < 7


shifts = st.integers(-5, 5).map(float)


@given(some_infinite | finite, shifts)
def test_estimate_and_interval_move_with_the_differences(d, shift):
    moved = np.array(d) + shift
    assert interval(moved, 0.8) == pytest.approx(tuple(end + shift for end in interval(d, 0.8)))
    if not any(map(math.isinf, d)) or set(d) & {INF} == set() or set(d) & {-INF} == set():
        assert estimate(moved) == pytest.approx(estimate(d) + shift)


@given(with_infinite, st.floats(1e-6, 1e6))
def test_scale_changes_no_p_and_scales_the_interval(d, scale):
    scaled = np.array(d) * scale
    assert sign_flip_p(scaled) == sign_flip_p(d)
    assert interval(scaled, 0.8) == pytest.approx(tuple(end * scale for end in interval(d, 0.8)))
    assert estimate(scaled) == pytest.approx(estimate(d) * scale)


@given(with_infinite)
def test_turning_all_signs_mirrors_everything(d):
    turned = -np.array(d)
    low, high = interval(d, 0.8)
    assert sign_flip_p(turned) == sign_flip_p(d)
    assert interval(turned, 0.8) == pytest.approx((-high, -low))
    assert estimate(turned) == pytest.approx(-estimate(d))


@given(with_infinite, st.randoms(use_true_random=False))
def test_the_order_of_the_seeds_is_immaterial(d, random):
    shuffled = random.sample(d, len(d))
    assert sign_flip_p(shuffled) == sign_flip_p(d)
    assert interval(shuffled, 0.8) == pytest.approx(interval(d, 0.8))
    assert estimate(shuffled) == pytest.approx(estimate(d))


@given(with_infinite, st.integers(0, 8), st.integers(0, 5))
def test_a_better_run_never_lowers_estimate_or_interval(d, which, gain):
    better = list(d)
    better[which % len(d)] += gain
    assert estimate(better) >= estimate(d) - 1e-9
    assert all(b >= a - 1e-9 for a, b in zip(interval(d, 0.8), interval(better, 0.8), strict=True))


@given(finite)
def test_levels_nest(d):
    intervals = [interval(d, level) for level in LEVELS]
    assert all(wide[0] <= low and high <= wide[1] for (low, high), wide in pairwise(intervals))


@pytest.mark.parametrize("level", [0, 1, 95, -0.5, math.nan])
def test_levels_outside_the_unit_interval_are_refused(level):
    with pytest.raises(ValueError, match=f"level must be in \\(0, 1\\), got {level}"):
        interval([1.0], level)


# The estimate.


@given(finite)
def test_estimate_of_finite_differences_is_their_mean(d):
    assert estimate(d) == pytest.approx(fmean(d))


@given(some_infinite)
def test_estimate_with_diverged_runs_is_the_median_walsh_average(d):
    walsh = [0.0 if math.isnan(w) else w for w in brute_force_walsh(d)]
    assert estimate(d) == median(walsh)


def test_band_is_the_interval_at_every_point():
    curves = np.random.default_rng(4).standard_normal((8, 5)) + np.arange(5)
    curves[3, 2] = -INF
    middle, low, high = band(curves)
    for t in range(5):
        assert (low[t], high[t]) == interval(curves[:, t])
        assert middle[t] == estimate(curves[:, t])
    assert np.all(band(curves, 0.5)[1] >= low)


# Families.


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04, 0.001, 0.02, 0.5]) == pytest.approx([0.08, 0.004, 0.06, 0.5])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.3]) == [0.3]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_stepwise_definition_rejects(p):
    for alpha in (0.01, 0.05, 0.3):
        rejected, left = set(), sorted(range(len(p)), key=p.__getitem__)
        while left and p[left[0]] * len(left) <= alpha:
            rejected.add(left.pop(0))
        assert {i for i, q in enumerate(holm(p)) if q <= alpha} == rejected


@pytest.mark.parametrize("p", [[-0.1], [0.5, 1.5], [math.nan]])
def test_holm_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match="p_values must be in"):
        holm(p)


@pytest.mark.parametrize(
    ("methods", "alpha", "n"), [(1, 0.05, 6), (2, 0.05, 7), (6, 0.05, 8), (7, 0.05, 9), (1, 0.2, 6), (1, 0.01, 8)]
)
def test_seeds_needed(methods, alpha, n):
    assert seeds_needed(methods, alpha) == n


@given(st.integers(1, 300))
def test_seeds_needed_are_enough_and_no_more(methods):
    n = seeds_needed(methods)
    assert methods * 2 / 2**n <= 0.05
    assert n == 6 or methods * 2 / 2 ** (n - 1) > 0.05


def test_seeds_needed_refuses_nonsense():
    with pytest.raises(ValueError, match="methods must be >= 1, got 0"):
        seeds_needed(0)
    with pytest.raises(ValueError, match="alpha must be in"):
        seeds_needed(1, 5.0)


# Comparisons.

BASELINE = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
GAINS = [0.2, 0.3, 0.1, 0.25, 0.15, 0.3, 0.35, 0.2]


def shifted(gains, baseline=BASELINE):
    return [b - g for b, g in zip(baseline, gains, strict=True)]


def test_compare_gathers_the_statistics():
    c = compare(shifted(GAINS), BASELINE, score="val loss")
    d = differences(shifted(GAINS), BASELINE)
    assert (c.score, c.relative, c.won, c.verdict) == ("val loss", False, 8, "helps")
    assert c.differences == tuple(d)
    assert all(type(x) is float for x in (*c.differences, c.estimate, c.low, c.high, c.p, c.p_holm, c.mde))
    assert (c.estimate, c.p, c.p_holm) == (pytest.approx(fmean(GAINS)), 2 / 256, 2 / 256)
    assert (c.low, c.high) == interval(d)
    assert c.mde == pytest.approx(minimum_detectable_effect(np.std(GAINS, ddof=1), 8))


def test_verdicts_have_a_direction():
    worse = shifted([-g for g in GAINS])
    assert compare(worse, BASELINE).verdict == "hurts"
    assert compare(worse, BASELINE, higher_is_better=True).verdict == "helps"
    assert compare(shifted([1, -1] * 4), BASELINE).verdict == "no evidence"
    assert compare(shifted(GAINS), BASELINE, relative=True).relative


def test_too_few_seeds_still_give_numbers():
    c = compare(shifted(GAINS)[:5], BASELINE[:5])
    assert (c.verdict, c.p, c.low, c.high, c.mde) == ("too few seeds", 0.0625, -INF, INF, INF)
    assert c.estimate == pytest.approx(0.2)


def test_a_diverged_arm_hurts_and_a_diverged_baseline_is_beaten():
    c = compare([None] * 6, BASELINE[:6])
    assert (c.verdict, c.estimate, c.low, c.high, c.won, c.mde) == ("hurts", -INF, -INF, -INF, 0, INF)
    assert compare(BASELINE[:6], [None] * 6).verdict == "helps"
    assert compare([None, *shifted(GAINS)[1:]], BASELINE).verdict == "no evidence"
    assert compare([None] * 8, [None] * 8).p == 1


def test_adjust_judges_a_family():
    scores = {"good": shifted(GAINS), "weak": shifted([*GAINS[:7], -0.16]), "null": shifted([1, -1] * 4)}
    alone = {name: compare(arm, BASELINE) for name, arm in scores.items()}
    family = adjust(alone)
    assert list(family) == list(scores)
    assert [c.p_holm for c in family.values()] == pytest.approx(holm([c.p for c in alone.values()]))
    assert [c.verdict for c in alone.values()] == ["helps", "helps", "no evidence"]
    assert [c.verdict for c in family.values()] == ["helps", "no evidence", "no evidence"]
    assert [c.p for c in family.values()] == [c.p for c in alone.values()]
    assert family["good"].mde == minimum_detectable_effect(np.std(alone["good"].differences, ddof=1), 8, 0.05 / 3)
    assert all(family[name].mde > alone[name].mde for name in alone)


def test_adjusting_a_family_of_one_changes_nothing():
    c = compare(shifted(GAINS), BASELINE)
    assert adjust({"only": c}) == {"only": c}
    assert adjust({}) == {}


def test_a_family_too_large_for_its_seeds_cannot_decide():
    family = adjust({str(i): compare(shifted(GAINS), BASELINE) for i in range(7)})
    assert {c.verdict for c in family.values()} == {"no evidence"}
    assert {c.mde for c in family.values()} == {INF}


# Times to target.


def test_times_to_target_are_compared_by_ranks():
    arm, baseline = [1.0, 2.0, 3.0, 4.0, 5.0, None, 7.0], [3.0, 5.0, 9.0, 4.5, None, None, 6.0]
    c = paired_time_to_target(arm, baseline)
    expected = [math.log(3), math.log(2.5), math.log(3), math.log(1.125), INF, 0, math.log(6 / 7)]
    assert c.differences == pytest.approx(expected)
    assert c.p == brute_force_rank_p(expected)
    assert (c.score, c.relative, c.won) == ("time to target", True, 5)


def test_times_to_target_use_ranks_even_where_all_were_reached():
    d = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, -0.65]  # one slow run costs its rank, not its size
    c = paired_time_to_target(np.exp(np.negative(d)), np.ones(8))
    assert c.p == pytest.approx(scipy.stats.wilcoxon(d, method="exact").pvalue)
    assert c.p != pytest.approx(sign_flip_p(d))
    assert c.estimate == pytest.approx(median(brute_force_walsh(d)))
    slower = paired_time_to_target(np.exp(np.negative([*d[:7], -50])), np.ones(8))
    assert slower.p == paired_time_to_target([*np.exp(np.negative(d[:7])), None], np.ones(8)).p


def test_never_reaching_the_target_loses():
    assert paired_time_to_target([None] * 6, [9.0] * 6).verdict == "hurts"
    assert paired_time_to_target([9.0] * 6, [None] * 6).verdict == "helps"
    assert paired_time_to_target([None] * 6, [None] * 6).verdict == "no evidence"
    assert paired_time_to_target([9.0] * 5, [None] * 5).verdict == "too few seeds"


def test_a_target_reached_at_once_is_infinitely_fast():
    assert paired_time_to_target([0.0, 0.0, 1.0], [1.0, 0.0, 0.0]).differences == (INF, 0, -INF)
    with pytest.raises(ValueError, match="times must be >= 0, got -1"):
        paired_time_to_target([1.0, None], [-1.0, 2.0])


# Minimum detectable effect.


@pytest.mark.parametrize(("n", "alpha"), [(6, 0.05), (8, 0.05 / 6), (9, 0.05 / 10)])
def test_mde_where_all_signs_must_agree(n, alpha):
    """P(all n differences positive) = 0.8 has a closed form."""
    exact = scipy.stats.norm.ppf(0.8 ** (1 / n))
    assert minimum_detectable_effect(1, n, alpha) == pytest.approx(exact, rel=0.04)


@pytest.mark.parametrize("n", [16, 20])
def test_mde_of_many_pairs_is_that_of_the_t_test(n):
    critical = scipy.stats.t.isf(0.025, n - 1)
    effect = scipy.optimize.brentq(lambda d: scipy.stats.nct.sf(critical, n - 1, d * math.sqrt(n)) - 0.8, 0.1, 3)
    assert minimum_detectable_effect(1, n) == pytest.approx(effect, rel=1e-9)


@pytest.mark.parametrize(("n", "studies"), [(6, 2000), (8, 2000), (16, 500)])
def test_power_at_the_mde_is_the_promised_one(n, studies):
    noise = np.random.default_rng(n).normal(minimum_detectable_effect(3, n), 3, (studies, n))
    assert np.mean([sign_flip_p(d) <= 0.05 for d in noise]) == pytest.approx(0.8, abs=0.05)


def test_power_at_the_mde_for_a_family_and_for_ranks():
    rng = np.random.default_rng(5)
    family = rng.normal(minimum_detectable_effect(1, 8, 0.05 / 4), 1, (2000, 8))
    assert np.mean([sign_flip_p(d) <= 0.05 / 4 for d in family]) == pytest.approx(0.8, abs=0.05)
    log_ratios = rng.normal(minimum_detectable_effect(1, 8), 1, (2000, 8))
    found = [paired_time_to_target(np.exp(-d), np.ones(8)).verdict == "helps" for d in log_ratios]
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)


def test_mde_scales_and_falls_with_pairs_and_rises_with_power():
    assert minimum_detectable_effect(3, 8) == pytest.approx(3 * minimum_detectable_effect(1, 8))
    effects = [minimum_detectable_effect(1, n) for n in (6, 7, 8, 10, 12)]
    assert effects == sorted(effects, reverse=True)
    assert (
        minimum_detectable_effect(1, 8, power=0.9)
        > minimum_detectable_effect(1, 8)
        > minimum_detectable_effect(1, 8, power=0.5)
    )
    assert minimum_detectable_effect(1, 8, alpha=0.01) > minimum_detectable_effect(1, 8)
    assert minimum_detectable_effect(0, 8) == 0


@pytest.mark.parametrize(("sd", "n", "alpha"), [(1, 5, 0.05), (0, 5, 0.05), (1, 8, 0.05 / 7), (INF, 8, 0.05)])
def test_no_effect_is_large_enough_where_the_test_cannot_reject(sd, n, alpha):
    assert minimum_detectable_effect(sd, n, alpha) == INF


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sd": -1.0, "n": 8}, "sd must be >= 0 and n >= 1, got -1.0 and 8"),
        ({"sd": math.nan, "n": 8}, "got nan"),
        ({"sd": 1.0, "n": 0}, "got 1.0 and 0"),
        ({"sd": 1.0, "n": 8, "alpha": 0}, r"alpha must be in \(0, 1\), got 0"),
        ({"sd": 1.0, "n": 8, "power": 80}, r"power must be in \(0, 1\), got 80"),
    ],
)
def test_mde_refuses_nonsense(arguments, message):
    with pytest.raises(ValueError, match=message):
        minimum_detectable_effect(**arguments)


# Promises kept in simulation. Runs of a pair are exchangeable: their noise may be as skewed as it likes.

RUN_NOISE = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "t(2)": lambda rng, shape: rng.standard_t(2, shape),
    "skewed": lambda rng, shape: rng.exponential(size=shape) ** 2,
    "heteroscedastic": lambda rng, shape: rng.standard_normal(shape) * np.geomspace(0.01, 10, shape[-1]),
}


def three_sigma(rate, studies):
    return 3 * math.sqrt(rate * (1 - rate) / studies)


@pytest.mark.parametrize("noise", RUN_NOISE.values(), ids=RUN_NOISE)
@pytest.mark.parametrize(("n", "attained"), [(6, 2 / 64), (8, 12 / 256)])
def test_false_positives_and_coverage_are_those_promised(noise, n, attained):
    studies, effect = 1000, 2.0
    runs = noise(np.random.default_rng(n), (studies, 2, n)) + np.arange(n)  # a pair shares the effect of its split
    alike = [compare(arm, baseline) for arm, baseline in runs.tolist()]
    false = np.mean([c.verdict in ("helps", "hurts") for c in alike])
    assert abs(false - attained) <= three_sigma(attained, studies)
    shifted_by = [interval(differences(arm - effect, baseline)) for arm, baseline in runs]
    covered = np.mean([low <= effect <= high for low, high in shifted_by])
    assert abs(covered - (1 - attained)) <= three_sigma(attained, studies)


def test_false_verdicts_of_a_family_that_shares_its_baseline():
    rng = np.random.default_rng(6)
    studies, wrong = 600, 0
    for _ in range(studies):
        baseline, *arms = rng.standard_normal((5, 9)).tolist()
        family = adjust({str(i): compare(arm, baseline) for i, arm in enumerate(arms)})
        wrong += any(c.verdict != "no evidence" for c in family.values())
    assert 0.01 < wrong / studies <= 0.05 + three_sigma(0.05, studies)


def test_random_flips_keep_the_level():
    noise = np.random.default_rng(7).standard_t(3, (400, 18))
    false = np.mean([sign_flip_p(d) <= 0.05 for d in noise])
    assert abs(false - 0.05) <= three_sigma(0.05, 400)


def test_the_validity_benchmark_runs():
    path = Path(__file__).parents[2] / "benchmarks" / "validity.py"
    spec = importlib.util.spec_from_file_location("validity", path)
    validity = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(validity)
    results = validity.simulate(studies=4, seeds=[6], seed=0)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert {row["of"] for row in results["false verdicts"] + results["coverage"]} == {4}


@pytest.mark.parametrize(("effect", "pairs"), [(0.5, 34), (0.6, 24), (0.7, 19), (0.8, 15)])
def test_sample_sizes_are_those_of_the_textbooks_for_the_paired_t_test(effect, pairs):
    """Fewest pairs that find this effect with a power of 0.8 at 5 %, two-sided (Cohen, 1988)."""
    assert minimum_detectable_effect(1, pairs) <= effect < minimum_detectable_effect(1, pairs - 1)
