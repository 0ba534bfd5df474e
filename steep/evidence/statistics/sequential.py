"""Group-sequential designs: interim analyses that stop an arm once a difference is clear, with 5 % total error.

An analysis of n of N pairs may spend alpha * n / N, less what earlier ones have spent (the linear spending function of
Lan and DeMets 1983), and judges by Holm at what it spends. Why linear: 4 pairs have no p-value below 2 / 2^4 = 0.125
and can spend nothing, whatever the function; at 8 of 16 pairs O'Brien and Fleming's function would leave 0.0056, less
than the smallest p-value of 8 pairs, and Pocock's as many whole p-values as the linear one. What an analysis cannot use
is kept for the next one.

The total error is bounded by the sum of what was spent (union bound), for any dependence of analyses and arms, for
means and for ranks, and whatever made an arm stop. An exact joint distribution of the analyses would give the last one
a tenth more to spend, and does not exist for arms with a diverged run. Arms that were decided count as p = 1 in later
analyses, so the study's other scores, judged at the analysis that stopped an arm, keep the bound too. The interval of
level 1 - alpha of that analysis is a repeated confidence interval (Jennison and Turnbull 1989): it covers in 95 % of
studies, whenever they stopped.

There is no stop for futility: "no evidence" says more after 16 pairs than after 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from steep.evidence.statistics.paired import DECIDED
from steep.evidence.statistics.power import ALPHA
from steep.evidence.study import Comparison

PARTS = (4, 2, 1)  # analyses after a quarter, half and all of the pairs


@dataclass(frozen=True)
class InterimAnalysis:
    """After how many pairs verdicts are read, and what they may spend of the 5 %; 0 if they could decide nothing."""

    pairs: int
    alpha: float


def planned_analyses(pairs: int, methods: int, *, sequential: bool) -> list[InterimAnalysis]:
    """One analysis after all pairs, or a group-sequential design of up to three.

    Args:
        pairs: maximum number of pairs.
        methods: arms judged as one family.

    Example:
        >>> [(analysis.pairs, round(analysis.alpha, 4)) for analysis in planned_analyses(16, 3, sequential=True)]
        [(4, 0), (8, 0.0234), (16, 0.0266)]
    """
    analyses: list[InterimAnalysis] = []
    for part in PARTS if sequential else (1,):
        left = ALPHA / part - sum(analysis.alpha for analysis in analyses)
        if part > 1:
            left = _spendable(pairs // part, methods, left) if _smallest_p(pairs) * methods <= ALPHA / 2 else 0
        analyses.append(InterimAnalysis(pairs // part, left))
    return analyses


def _smallest_p(pairs: int) -> float:
    return 2.0 ** (1 - pairs)


def _spendable(pairs: int, methods: int, alpha: float) -> float:
    """The whole p-values within alpha; none if Holm's first step could not be made with them."""
    steps = int(alpha / _smallest_p(pairs))
    return steps * _smallest_p(pairs) if steps >= methods else 0


def stopping_points(
    analyses: Sequence[InterimAnalysis],
    arms: Iterable[str],
    judged: Callable[[InterimAnalysis, list[str]], Mapping[str, Comparison]],
) -> dict[str, InterimAnalysis]:
    """For each arm the analysis at which it stopped: the one that decided it, or the last.

    Args:
        analyses: as planned; those that can decide nothing are skipped.
        arms: the family.
        judged: makes the pairs of an analysis for the remaining arms, and returns their verdicts.
    """
    going, stopped_at = list(arms), dict[str, InterimAnalysis]()
    for analysis in analyses:
        if not analysis.alpha:
            continue
        verdicts = judged(analysis, going)
        stopped_at |= {arm: analysis for arm in going if analysis is analyses[-1] or verdicts[arm].verdict in DECIDED}
        going = [arm for arm in going if arm not in stopped_at]
        if not going:
            break
    return stopped_at
