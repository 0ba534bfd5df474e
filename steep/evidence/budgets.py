"""How many steps make an arm's training as long, or see as many examples, as the baseline's.

All numbers are medians over the seeds of what runs of one seed say of each other: they were made one after the other,
so that a machine which is slow for a while is slow for both. Time is CPU seconds, which other programs hardly change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from steep.evidence.study import RunRecord

SAME = 0.05  # arms within 5 % of the baseline's time, or examples, need no runs of their own

Fitting = Callable[[RunRecord, RunRecord], float | None]


def in_its_time(arm: RunRecord, baseline: RunRecord) -> float | None:
    """Steps of the arm in the baseline's CPU seconds; what the arm prepares beforehand counts."""
    if not (arm.cpu_seconds and baseline.cpu_seconds):
        return None  # diverged
    left = baseline.preparation_seconds + baseline.cpu_seconds - arm.preparation_seconds
    return arm.steps * left / arm.cpu_seconds


def on_its_examples(arm: RunRecord, baseline: RunRecord) -> float | None:
    """Steps of the arm in which it sees as many examples as the baseline did; each forward pass counts."""
    return arm.steps * baseline.examples / arm.examples if arm.examples and baseline.examples else None


def steps_for(fitting: Fitting, runs: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> int | None:
    """Steps that make an arm equal to the baseline, at least 1; `None` where its runs are so already, or none finished.

    Args:
        fitting: `in_its_time` or `on_its_examples`.
        runs, baseline: of the same seeds in the same order; further ones of the baseline are not looked at.
    """
    pairs = [(fitting(a, b), a.steps) for a, b in zip(runs, baseline, strict=False)]
    known = [(steps, own) for steps, own in pairs if steps is not None]
    if not known:
        return None
    ratio = median(steps / own for steps, own in known)
    return max(1, round(ratio * known[0][1])) if abs(ratio - 1) > SAME else None
