"""What reports read off a study: the order of the arms, medians, costs, and comparisons by kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import median

from steep.evidence.study import CONTROL, ArmResult, Comparison, RunRecord, Study

NOTHING = "did nothing"


def ranked(study: Study) -> list[ArmResult]:
    """The baseline, then the methods from best to worst, then the A/A control."""

    def rank(arm: ArmResult) -> tuple[bool, float]:
        c = arm.scores.get(study.primary)
        return arm.name == CONTROL, math.inf if c is None or math.isnan(c.estimate) else -c.estimate

    return [*study.arms[:1], *sorted(study.arms[1:], key=rank)]


def methods(study: Study) -> list[ArmResult]:
    """The arms that are neither the baseline nor the control, from best to worst."""
    return [arm for arm in ranked(study)[1:] if arm.name != CONTROL]


def asked_for(study: Study) -> list[ArmResult]:
    """The methods that the user asked about, from best to worst."""
    return [arm for arm in methods(study) if arm.name != study.reference]


def median_test(arm: ArmResult, score: str, higher: bool) -> float:
    """Median test score over the seeds; a run that did not finish counts as worst."""
    worst = -math.inf if higher else math.inf
    return median([run.test.get(score, worst) for run in arm.runs] or [math.nan])


def cost(arm: ArmResult, of: Callable[[RunRecord], float | None]) -> float | None:
    """Median of what `of` reads, over the finished runs for which it is known."""
    known = [value for run in arm.runs if run.outcome == "finished" and (value := of(run)) is not None]
    return median(known) if known else None


def cost_ratio(arm: ArmResult, study: Study, of: Callable[[RunRecord], float | None]) -> str:
    """The same as a multiple of the baseline's: "1.8×"."""
    own, base = cost(arm, of), cost(study.arms[0], of)
    return f"{own / base:.3g}×" if own is not None and base else "–"


def kinds(arm: ArmResult) -> list[tuple[str, Sequence[RunRecord]]]:
    """An arm's confirmation runs by what they have in common with the baseline's; kinds without runs are left out."""
    found = [("equal steps", arm.runs), ("equal time", arm.equal_time), ("equal examples", arm.equal_examples)]
    return [(kind, runs) for kind, runs in found if runs]


def comparisons(arm: ArmResult, score: str) -> dict[str, Comparison]:
    """An arm's comparisons of a score, by kind; "equal examples" only where it has runs of its own."""
    examples = arm.scores_at_equal_examples if arm.equal_examples else {}
    by_kind = {"equal steps": arm.scores, "equal time": arm.scores_at_equal_time, "equal examples": examples}
    return {kind: scores[score] for kind, scores in by_kind.items() if score in scores}


def verdict(arm: ArmResult, c: Comparison | None) -> str:
    """One of the four verdicts, "did nothing", or "" where nothing was compared."""
    return NOTHING if arm.did_nothing else c.verdict if c is not None else ""


def score_names(study: Study) -> list[str]:
    """The score that verdicts are about, then the others."""
    return [study.primary, *(name for name in study.metrics if name != study.primary)]


def all_runs(study: Study) -> Iterator[tuple[ArmResult, RunRecord]]:
    """Every run of a study with its arm: tuning trials, then confirmation runs."""
    for arm in study.arms:
        yield from ((arm, run) for runs in (arm.trials, *dict(kinds(arm)).values()) for run in runs)
