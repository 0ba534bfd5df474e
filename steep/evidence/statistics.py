"""Whether one arm is better than another over paired seeds: exact test, matching interval, Holm, detectable effect.

The runs of a pair share split, initialisation and data order. If the method changes nothing, the two are exchangeable,
so their difference d_i is symmetric about zero whatever the noise (skewed, heavy-tailed, different from seed to seed).
The tests assume no more; the intervals, that the method shifts this symmetric difference. Test and interval are read
off one pool of values that straddle the true difference in known proportions:

- subset means (Hartigan 1969): the 2^n - 1 means of the nonempty subsets of d cut the line into 2^n intervals, each
  holding the true difference with probability 2^-n. Counting the means beyond zero is the two-sided sign-flip test of
  the mean (Fisher 1935); the k-th from either end are an interval of coverage exactly 1 - 2k / 2^n. Beyond 16 pairs:
  random subsets and their complements, for which the theorem holds as well, so that p = (b + 1) / (m + 1)
  where b of m random sign flips reach the mean.
- Walsh averages (d_i + d_j) / 2, i <= j (Hodges and Lehmann 1963): counting those beyond zero is Wilcoxon's signed-rank
  test. Used where a difference is infinite (a diverged run) and for times to target: only order counts, so that such
  runs are censored, never dropped. Flipping signs does not change which are infinite: the choice keeps the test exact.

A value of exactly zero, or of +inf against -inf, counts against the verdict, so that ties never make the test liberal:
breaking them by vanishing symmetric noise gives an exact test whose p is at most this one. The interval excludes zero
if and only if p <= 1 - level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import nct, t

from steep.evidence.study import Comparison

Array = NDArray[np.float64]

ALPHA = 0.05
FEWEST_SEEDS = 6  # 2 / 2^5 > 0.05: five pairs can never show anything
_EXACT_UP_TO = 16
_SIMULATED_UP_TO = 12
_TIE = 1e-9  # a sum smaller than this share of its terms' sizes is zero up to rounding


class _Pool(NamedTuple):
    """Values around the true difference, and `tail[c]`: the two-sided p-value when c of them lie beyond it."""

    values: Array
    tail: Array

    def p(self) -> float:
        # NaN (+inf against -inf) is neither, and so counts on both sides
        beyond = min(np.sum(~(self.values > 0)), np.sum(~(self.values < 0)))
        return float(self.tail[beyond])

    def interval(self, alpha: float) -> tuple[float, float]:
        k = int(np.sum(self.tail <= alpha))
        return (_smallest(self.values, k), -_smallest(-self.values, k)) if k else (-np.inf, np.inf)


def _smallest(values: Array, k: int) -> float:
    return float(np.partition(np.where(np.isnan(values), -np.inf, values), k - 1)[k - 1])


@lru_cache(maxsize=4)
def _random_subsets(n: int) -> Array:
    """Nonempty subsets without the last pair, one row of zeros and ones each; complements come by subtraction."""
    drawn = np.random.default_rng(n).integers(0, 2, (2 ** (_EXACT_UP_TO - 1) - 1, n)).astype(float)
    drawn[:, -1] = 0
    return drawn[drawn.any(axis=1)]


def _subset_sums(d: Array) -> Array:
    """Over all nonempty subsets, or over random ones where they are too many."""
    if len(d) > _EXACT_UP_TO:
        part = _random_subsets(len(d)) @ d
        return np.concatenate([part, d.sum() - part, [d.sum()]])
    sums = np.zeros(2 ** len(d))
    for i, value in enumerate(d):
        np.add(sums[: 2**i], value, out=sums[2**i : 2 ** (i + 1)])
    return sums[1:]


@lru_cache(maxsize=4)
def _subset_sizes_and_tail(n: int) -> tuple[Array, Array]:
    sizes = _subset_sums(np.ones(n))
    return sizes, np.minimum(1, 2 * np.arange(1, len(sizes) + 2) / (len(sizes) + 1))


def _subset_means(d: Array) -> _Pool:
    """Of finite differences."""
    sums = _subset_sums(d)
    sums[np.abs(sums) <= _TIE * _subset_sums(np.abs(d))] = 0
    sizes, tail = _subset_sizes_and_tail(len(d))
    return _Pool(sums / sizes, tail)


@lru_cache(maxsize=16)
def _signed_rank_tail(n: int) -> Array:
    """Two-sided p-values of Wilcoxon's statistic: subsets of {1, ..., n} by their sum."""
    ways = np.ones(1)
    for rank in range(1, n + 1):
        ways = np.pad(ways, (0, rank)) / 2 + np.pad(ways, (rank, 0)) / 2
    return np.minimum(1, 2 * np.cumsum(ways))


def _walsh_averages(d: Array) -> _Pool:
    i, j = np.triu_indices(len(d))
    with np.errstate(invalid="ignore"):
        values = (d[i] + d[j]) / 2
    size = np.abs(d[i]) + np.abs(d[j])
    values[(np.abs(values) <= _TIE * size) & np.isfinite(size)] = 0
    return _Pool(values, _signed_rank_tail(len(d)))


def _checked(differences: ArrayLike) -> Array:
    d = np.asarray(differences, dtype=float)
    if d.ndim != 1 or not d.size or np.isnan(d).any():
        raise ValueError(
            f"differences must be one number or infinity per pair of seeds, at least one, got {differences!r}"
        )
    return d


def _in_unit_interval(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must be in (0, 1), got {value!r}")


def _pool(d: Array) -> _Pool:
    return _subset_means(d) if np.isfinite(d).all() else _walsh_averages(d)


def _pairs(arm: Sequence[float | None], baseline: Sequence[float | None]) -> tuple[Array, Array]:
    if len(arm) != len(baseline) or not len(arm):
        raise ValueError(
            f"arm and baseline must have one value per seed, at least one, got {len(arm)} and {len(baseline)}"
        )
    return np.array(arm, dtype=float), np.array(baseline, dtype=float)  # None becomes NaN


def differences(
    arm: Sequence[float | None],
    baseline: Sequence[float | None],
    *,
    higher_is_better: bool = False,
    relative: bool = False,
) -> Array:
    """Paired differences `(n,)`, positive where the arm is better.

    Args:
        arm, baseline: final scores, one per seed, in the same order; None, NaN or infinite where the run diverged.
        higher_is_better: accuracies rather than losses.
        relative: differences of logarithms: 0.1 reads "loss exp(-0.1) times the baseline's".

    Returns:
        -inf where only the arm diverged, +inf where only the baseline did, 0 where both did.

    Raises:
        ValueError: different or zero numbers of seeds; a score that is not positive, with `relative`.

    Example:
        >>> differences([0.5, None, 1.0], [1.0, 1.0, None])
        array([ 0.5, -inf,  inf])
    """
    a, b = _pairs(arm, baseline)
    ran_a, ran_b = np.isfinite(a), np.isfinite(b)
    if relative:
        scores = np.concatenate([a[ran_a], b[ran_b]])
        if np.any(scores <= 0):
            raise ValueError(f"scores must be > 0 for relative differences, got {scores.min()}")
        a, b = np.log(np.where(ran_a, a, 1)), np.log(np.where(ran_b, b, 1))
    both = ran_a & ran_b
    better, worse = (a, b) if higher_is_better else (b, a)
    gain = np.subtract(better, worse, where=both, out=np.zeros(len(a)))
    outcome = np.where(ran_a == ran_b, 0, np.where(ran_a, np.inf, -np.inf))
    return np.where(both, gain, outcome)


def sign_flip_p(differences: ArrayLike) -> float:
    """Two-sided p-value of "the arm changes nothing": sign-flip test of the mean, of signed ranks if any is infinite.

    Exact for up to 16 pairs; beyond, and only for the mean, from 32 767 random sign flips with a fixed seed.

    Example:
        >>> sign_flip_p([0.3, 0.1, 0.2, 0.4, 0.2, 0.1])
        0.03125
    """
    return _pool(_checked(differences)).p()


def interval(differences: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The differences that the test of `sign_flip_p` would not reject at 1 - level; (-inf, inf) for too few pairs.

    Endpoints may be infinite where runs diverged: (inf, inf) if the baseline alone diverged on every seed.

    Example:
        >>> interval([3, 1, 2, 4, 2, 1])
        (1.0, 4.0)
    """
    _in_unit_interval(level=level)
    return _pool(_checked(differences)).interval(1 - level)


def estimate(differences: ArrayLike) -> float:
    """Mean difference; the Hodges-Lehmann estimate (median Walsh average) if any is infinite."""
    d = _checked(differences)
    return float(d.mean()) if np.isfinite(d).all() else _hodges_lehmann(d)


def _hodges_lehmann(d: Array) -> float:
    return float(np.median(np.nan_to_num(_walsh_averages(d).values, nan=0, posinf=np.inf, neginf=-np.inf)))


def band(differences: ArrayLike, level: float = 0.95) -> tuple[Array, Array, Array]:
    """Pointwise estimate, low and high `(points,)` of paired difference curves `(n, points)`."""
    points = [(estimate(d), *interval(d, level)) for d in np.asarray(differences, dtype=float).T]
    middle, low, high = np.array(points).reshape(-1, 3).T
    return middle, low, high


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted over a family (Holm 1979), in the order given.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p_values must be in [0, 1], got {p_values!r}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def seeds_needed(methods: int, alpha: float = ALPHA) -> int:
    """Fewest pairs, and never fewer than 6, with which one of `methods` arms can be shown to differ after Holm.

    Example:
        >>> seeds_needed(1), seeds_needed(6), seeds_needed(10)
        (6, 8, 9)
    """
    _in_unit_interval(alpha=alpha)
    if methods < 1:
        raise ValueError(f"methods must be >= 1, got {methods!r}")
    n = FEWEST_SEEDS
    while methods * 2 / 2**n > alpha:
        n += 1
    return n


def minimum_detectable_effect(sd: float, n: int, alpha: float = ALPHA, power: float = 0.8) -> float:
    """Smallest true difference that the sign-flip test finds with the given power, under Gaussian noise of this sd.

    With few pairs not the t-test's: at a small alpha the exact test needs nearly all signs to agree, and has 62 % power
    where the noncentral t promises 80 (6 pairs, alpha 0.05). A study rejects when its lower bound exceeds zero, and
    adding an effect moves the bound by just that much: up to 12 pairs, the answer is the `power` quantile of minus the
    lower bound over 2000 simulated studies without effect (fixed seed; standard error of the power: 1 point). Beyond,
    the powers differ by at most 3 points for families of up to 10 arms, and the noncentral t is solved.

    Args:
        sd: of the paired differences. Plugging in an estimate from n pairs carries its error: 27 % with 8 pairs.
        n: number of pairs.
        alpha: two-sided; for m arms Holm's first step, alpha / m.

    Returns:
        In the unit of sd. Infinite if no outcome of n pairs could reach alpha, or if sd is infinite.
    """
    _in_unit_interval(alpha=alpha, power=power)
    if not sd >= 0 or n < 1:
        raise ValueError(f"sd must be >= 0 and n >= 1, got {sd!r} and {n!r}")
    effect = _standard_effect(n, alpha, power)
    return sd * effect if np.isfinite(effect) else np.inf


@lru_cache(maxsize=64)
def _standard_effect(n: int, alpha: float, power: float) -> float:
    if _subset_sizes_and_tail(n)[1][0] > alpha:
        return np.inf
    if n > _SIMULATED_UP_TO:
        critical, df = t.isf(alpha / 2, n - 1), n - 1
        return float(brentq(lambda effect: nct.sf(critical, df, effect * n**0.5) - power, 0, 100))
    noise = np.random.default_rng(0).standard_normal((1000, n))
    low, high = np.array([_subset_means(d).interval(alpha) for d in noise]).T
    return float(np.quantile([-low, high], power))  # high: the same study with every sign turned


def compare(
    arm: Sequence[float | None],
    baseline: Sequence[float | None],
    *,
    score: str = "loss",
    higher_is_better: bool = False,
    relative: bool = False,
) -> Comparison:
    """An arm's final scores against the baseline's, judged alone; for several arms follow with `adjust`.

    Arguments as for `differences`. A diverged run leaves no standard deviation: the detectable effect is then infinite.

    Example:
        >>> compare([0.7, 0.5, 0.6, 0.8, 0.6, 0.5], [0.9, 0.6, 0.7, 0.9, 0.9, 0.6]).verdict
        'helps'
    """
    d = differences(arm, baseline, higher_is_better=higher_is_better, relative=relative)
    return _describe(score, relative, d, _pool(d), estimate(d))


def paired_time_to_target(arm: Sequence[float | None], baseline: Sequence[float | None]) -> Comparison:
    """Times until the target was reached, compared by signed ranks of log(baseline / arm): 0.69 reads "twice as fast".

    None (never reached) is an infinite time: a loss against any time, a draw against another None. This holds
    whenever the run was cut off: an arm that ended, its budget spent, before the baseline reached the target has lost.

    Args:
        arm, baseline: seconds (or steps), one per seed, >= 0; None where the target was never reached.
    """
    a, b = (np.where(np.isnan(times), np.inf, times) for times in _pairs(arm, baseline))
    if min(a.min(), b.min()) < 0:
        raise ValueError(f"times must be >= 0, got {min(a.min(), b.min())}")
    with np.errstate(divide="ignore", invalid="ignore"):
        d = np.where(a == b, 0, np.log(b) - np.log(a))
    return _describe("time to target", True, d, _walsh_averages(d), _hodges_lehmann(d))


def _describe(score: str, relative: bool, d: Array, pool: _Pool, middle: float) -> Comparison:
    low, high = pool.interval(ALPHA)
    p, won = pool.p(), int(np.sum(d > 0))
    alone = Comparison(score, relative, tuple(d.tolist()), middle, low, high, p, p, np.inf, won, "")
    return _judge(alone, p, ALPHA)


def _judge(comparison: Comparison, p_holm: float, alpha: float) -> Comparison:
    d = np.asarray(comparison.differences)
    sd = float(d.std(ddof=1)) if len(d) > 1 and np.isfinite(d).all() else np.inf
    mde = minimum_detectable_effect(sd, len(d), alpha)
    return dataclasses.replace(comparison, p_holm=p_holm, mde=mde, verdict=_verdict(comparison, p_holm))


def _verdict(comparison: Comparison, p_holm: float) -> str:
    if len(comparison.differences) < FEWEST_SEEDS:
        return "too few seeds"
    if p_holm > ALPHA:
        return "no evidence"
    return "helps" if comparison.estimate > 0 else "hurts"


def adjust(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The same comparisons judged as one family: Holm's p, verdicts, and effects detectable at its first step.

    Pass the arms whose verdicts will be read together, on one score. The A/A control is not one of them.
    """
    p_holm = holm([c.p for c in comparisons.values()])
    alpha = ALPHA / max(1, len(comparisons))
    return {name: _judge(c, p, alpha) for (name, c), p in zip(comparisons.items(), p_holm, strict=True)}
