"""Whether one arm is better than another over paired seeds: exact test, matching interval, Holm, verdict.

The runs of a pair share split, initialisation and data order. If the method changes nothing, the two are exchangeable,
so their difference d_i is symmetric about zero whatever the noise (skewed, heavy-tailed, different from seed to seed).
The tests assume no more; the intervals, that the method shifts this symmetric difference. Test and interval are read
off one null distribution (`null_distributions`): subset means, which is the sign-flip test of the mean, or where a
difference is infinite (a diverged run) and for times to target Walsh averages, which is Wilcoxon's signed-rank test:
only order counts, so that such runs are censored, never dropped. Flipping signs does not change which are infinite:
the choice keeps the test exact.

A value of exactly zero, or of +inf against -inf, counts against the verdict, so that ties never make the test liberal:
breaking them by vanishing symmetric noise gives an exact test whose p is at most this one. The interval excludes zero
if and only if p <= 1 - level.

What is compared is two ways to train with their tuned settings. The luck of tuning is not in the noise of the seeds,
and so not in p.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from steep.evidence.statistics.null_distributions import Array, NullDistribution, subset_means, walsh_averages
from steep.evidence.statistics.power import ALPHA, FEWEST_SEEDS, in_unit_interval, minimum_detectable_effect
from steep.evidence.study import Comparison

DECIDED = ("helps", "hurts")


def _checked(differences: ArrayLike) -> Array:
    d = np.asarray(differences, dtype=float)
    if d.ndim != 1 or not d.size or np.isnan(d).any():
        raise ValueError(
            f"differences must be one number or infinity per pair of seeds, at least one, got {differences!r}"
        )
    return d


def _null(d: Array) -> NullDistribution:
    return subset_means(d) if np.isfinite(d).all() else walsh_averages(d)


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
    return _null(_checked(differences)).p()


def interval(differences: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The differences that the test of `sign_flip_p` would not reject at 1 - level; (-inf, inf) for too few pairs.

    Endpoints may be infinite where runs diverged: (inf, inf) if the baseline alone diverged on every seed.

    Example:
        >>> interval([3, 1, 2, 4, 2, 1])
        (1.0, 4.0)
    """
    in_unit_interval(level=level)
    return _null(_checked(differences)).interval(1 - level)


def estimate(differences: ArrayLike) -> float:
    """Mean difference; the Hodges-Lehmann estimate (median Walsh average) if any is infinite."""
    d = _checked(differences)
    return float(d.mean()) if np.isfinite(d).all() else _hodges_lehmann(d)


def _hodges_lehmann(d: Array) -> float:
    return float(np.median(np.nan_to_num(walsh_averages(d).values, nan=0, posinf=np.inf, neginf=-np.inf)))


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


def compare(
    arm: Sequence[float | None],
    baseline: Sequence[float | None],
    *,
    score: str = "loss",
    higher_is_better: bool = False,
    relative: bool = False,
    alpha: float = ALPHA,
) -> Comparison:
    """An arm's final scores against the baseline's, judged alone; for several arms follow with `adjust`.

    Arguments as for `differences`. A diverged run leaves no standard deviation: the detectable effect is then infinite.

    Args:
        alpha: what this analysis may spend of the 5 %; the interval is of level 1 - alpha.

    Example:
        >>> compare([0.7, 0.5, 0.6, 0.8, 0.6, 0.5], [0.9, 0.6, 0.7, 0.9, 0.9, 0.6]).verdict
        'helps'
    """
    d = differences(arm, baseline, higher_is_better=higher_is_better, relative=relative)
    return _describe(score, relative, d, _null(d), estimate(d), alpha)


def paired_time_to_target(
    arm: Sequence[float | None],
    baseline: Sequence[float | None],
    *,
    score: str = "time to target",
    alpha: float = ALPHA,
) -> Comparison:
    """Times until the target was reached, compared by signed ranks of log(baseline / arm): 0.69 reads "twice as fast".

    None (never reached) is an infinite time: a loss against any time, a draw against another None. This holds
    whenever the run was cut off: an arm that ended, its budget spent, before the baseline reached the target has lost.

    Args:
        arm, baseline: seconds (or steps), one per seed, >= 0; None where the target was never reached.
        score: what the times are, for the report.
        alpha: as for `compare`.
    """
    a, b = (np.where(np.isnan(times), np.inf, times) for times in _pairs(arm, baseline))
    if min(a.min(), b.min()) < 0:
        raise ValueError(f"times must be >= 0, got {min(a.min(), b.min())}")
    with np.errstate(divide="ignore", invalid="ignore"):
        d = np.where(a == b, 0, np.log(b) - np.log(a))
    return _describe(score, True, d, walsh_averages(d), _hodges_lehmann(d), alpha)


def _describe(score: str, relative: bool, d: Array, null: NullDistribution, middle: float, alpha: float) -> Comparison:
    in_unit_interval(alpha=alpha)
    low, high = null.interval(alpha)
    p, won = null.p(), int(np.sum(d > 0))
    alone = Comparison(score, relative, tuple(d.tolist()), middle, low, high, p, p, np.inf, won, "", alpha)
    return _judge(alone, p, family=1)


def _judge(comparison: Comparison, p_holm: float, family: int) -> Comparison:
    """With p on the scale of the whole 5 %: where only a share of it may be spent, p is larger by as much."""
    d = np.asarray(comparison.differences)
    sd = float(d.std(ddof=1)) if len(d) > 1 and np.isfinite(d).all() else np.inf
    mde = minimum_detectable_effect(sd, len(d), comparison.alpha / family)
    scaled = min(1.0, p_holm * (ALPHA / comparison.alpha))
    return dataclasses.replace(comparison, p_holm=scaled, mde=mde, verdict=_verdict(comparison, p_holm))


def _verdict(comparison: Comparison, p_holm: float) -> str:
    if len(comparison.differences) < FEWEST_SEEDS:
        return "too few seeds"
    if p_holm > comparison.alpha:
        return "no evidence"
    return "helps" if comparison.estimate > 0 else "hurts"


def adjust(comparisons: Mapping[str, Comparison], family: int | None = None) -> dict[str, Comparison]:
    """The same comparisons judged as one family: Holm's p, verdicts, and effects detectable at its first step.

    Pass the arms whose verdicts will be read together, on one score and at one analysis. The A/A control is not one of
    them.

    Args:
        family: number of arms that the family has in all. Those that are not passed count as p = 1: they were decided
            at an earlier analysis, or are judged at a later one. By default, the arms passed.
    """
    family = max(1, len(comparisons) if family is None else family)
    absent = family - len(comparisons)
    if absent < 0:
        raise ValueError(f"family must be at least the {len(comparisons)} comparisons given, got {family}")
    p_holm = holm([*(c.p for c in comparisons.values()), *[1.0] * absent])[: len(comparisons)]
    return {name: _judge(c, p, family) for (name, c), p in zip(comparisons.items(), p_holm, strict=True)}
