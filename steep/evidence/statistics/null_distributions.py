"""The numbers that tests and intervals of paired differences are read off, and how many of them may lie beyond zero.

Values that straddle the true difference in known proportions:

- subset means (Hartigan 1969): the 2^n - 1 means of the nonempty subsets of d cut the line into 2^n intervals, each
  holding the true difference with probability 2^-n. Counting the means beyond zero is the two-sided sign-flip test of
  the mean (Fisher 1935); the k-th from either end are an interval of coverage exactly 1 - 2k / 2^n. Beyond 16 pairs:
  random subsets and their complements, for which the theorem holds as well, so that p = (b + 1) / (m + 1)
  where b of m random sign flips reach the mean.
- Walsh averages (d_i + d_j) / 2, i <= j (Hodges and Lehmann 1963): counting those beyond zero is Wilcoxon's signed-rank
  test. Only order counts, so that infinite differences are welcome.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_EXACT_UP_TO = 16
_TIE = 1e-9  # a sum smaller than this share of its terms' sizes is zero up to rounding


class NullDistribution(NamedTuple):
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
def subset_sizes_and_tail(n: int) -> tuple[Array, Array]:
    sizes = _subset_sums(np.ones(n))
    return sizes, np.minimum(1, 2 * np.arange(1, len(sizes) + 2) / (len(sizes) + 1))


def subset_means(d: Array) -> NullDistribution:
    """Of finite differences."""
    sums = _subset_sums(d)
    sums[np.abs(sums) <= _TIE * _subset_sums(np.abs(d))] = 0
    sizes, tail = subset_sizes_and_tail(len(d))
    return NullDistribution(sums / sizes, tail)


@lru_cache(maxsize=16)
def _signed_rank_tail(n: int) -> Array:
    """Two-sided p-values of Wilcoxon's statistic: subsets of {1, ..., n} by their sum."""
    ways = np.ones(1)
    for rank in range(1, n + 1):
        ways = np.pad(ways, (0, rank)) / 2 + np.pad(ways, (rank, 0)) / 2
    return np.minimum(1, 2 * np.cumsum(ways))


def walsh_averages(d: Array) -> NullDistribution:
    i, j = np.triu_indices(len(d))
    with np.errstate(invalid="ignore"):
        values = (d[i] + d[j]) / 2
    size = np.abs(d[i]) + np.abs(d[j])
    values[(np.abs(values) <= _TIE * size) & np.isfinite(size)] = 0
    return NullDistribution(values, _signed_rank_tail(len(d)))
