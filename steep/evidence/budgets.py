"""How many steps an arm needs to train as long as the baseline, or to see as many examples.

Ratios are taken between runs of the same seed, then their median over the seeds: runs of a seed follow each other, so a
machine that is slow for a while is slow for both. Time is CPU seconds, which other programs hardly change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from steep.evidence.study import RunRecord

SAME = 0.05  # arms within 5 % of the baseline's time, or examples, need no runs of their own

StepRule = Callable[[RunRecord, RunRecord], float | None]


def at_equal_time(arm: RunRecord, baseline: RunRecord) -> float | None:
    """Steps of the arm in the baseline's CPU seconds; its preparation counts as time."""
    if not (arm.cpu_seconds and baseline.cpu_seconds):
        return None  # diverged
    left = baseline.total_cpu_seconds - arm.preparation_seconds
    return arm.steps * left / arm.cpu_seconds


def at_equal_examples(arm: RunRecord, baseline: RunRecord) -> float | None:
    """Steps in which the arm sees as many examples as the baseline; every forward pass counts."""
    return arm.steps * baseline.examples / arm.examples if arm.examples and baseline.examples else None


def steps_for(rule: StepRule, runs: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> int | None:
    """Steps that make an arm equal to the baseline, at least 1; `None` if its runs already are, or if none finished.

    Args:
        rule: `at_equal_time` or `at_equal_examples`.
        runs, baseline: of the same seeds in the same order; further runs of the baseline are ignored.
    """
    pairs = [(rule(a, b), a.steps) for a, b in zip(runs, baseline, strict=False)]
    known = [(steps, own) for steps, own in pairs if steps is not None]
    if not known:
        return None
    ratio = median(steps / own for steps, own in known)
    return max(1, round(ratio * known[0][1])) if abs(ratio - 1) > SAME else None
