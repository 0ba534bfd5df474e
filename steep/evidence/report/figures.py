"""The report's forest plot and strips of points, as plain numbers for the template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median, median_low
from typing import Any

from steep.evidence.report import rows, wording
from steep.evidence.report.axes import Axis, nice, nice_log, spaced, value_axis
from steep.evidence.statistics.paired import paired_time_to_target
from steep.evidence.study import CONTROL, ArmResult, Comparison, RunRecord, Study

# Forest plot ----------------------------------------------------------------------------------------------------------


def forest(study: Study) -> dict[str, Any]:
    """Intervals of every arm's difference at equal steps and at equal time, on one axis."""
    higher = study.metrics.get(study.primary, False)
    arms = [(arm, rows.comparisons(arm, study.primary)) for arm in rows.ranked(study)[1:]]
    comparisons = [c for _, found in arms for c in found.values()]
    axis = _forest_axis(comparisons, higher)
    return {
        "axis": axis,
        "zero": axis.at(0),
        "relative": any(c.relative for c in comparisons),
        "rows": [
            {
                "name": arm.name,
                "control": arm.name == CONTROL,
                "strips": [_strip(arm, when, c, higher, axis) for when, c in found.items()],
            }
            for arm, found in arms
            if found
        ],
    }


def _forest_axis(comparisons: Sequence[Comparison], higher: bool) -> Axis:
    """Wide enough for the intervals. Those that reach far to the worse side are cut off, and end in arrows."""
    ends = [v for c in comparisons for v in (c.estimate, c.low, c.high) if math.isfinite(v)]
    best = max(0.0, *ends) if ends else 0.0
    worst = min(0.0, max(min(ends), -max(best, 10 * median(map(abs, ends))))) if ends else 0.0
    margin = 0.08 * (best - worst) or 0.1
    low, high = (worst, best) if higher else (-best, -worst)
    axis = Axis(low - margin, high + margin)
    return axis.marked(_ratio_ticks(axis) if any(c.relative for c in comparisons) else _difference_ticks(axis))


def _difference_ticks(axis: Axis) -> list[tuple[float, str]]:
    return [(v, _signed(v)) for v in nice(axis.low, axis.high)]


def _ratio_ticks(axis: Axis) -> list[tuple[float, str]]:
    """Ticks of a logarithm, labelled in per cent, or as factors where the axis spans more than eightfold."""
    if axis.high - axis.low < math.log(8):
        percents = nice(100 * math.expm1(axis.low), 100 * math.expm1(axis.high), most=8)
        return spaced(axis, [(math.log1p(p / 100), f"{_signed(p)} %") for p in percents if p > -100])
    factors = nice_log(math.exp(axis.low), math.exp(axis.high))
    return spaced(axis, [(math.log(f), f"×{f:g}" if f > 1 else f"÷{1 / f:g}" if f < 1 else "1") for f in factors])


def _signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{abs(value):g}" if value else "0"


def _strip(arm: ArmResult, when: str, c: Comparison, higher: bool, axis: Axis) -> dict[str, Any]:
    """One interval with its estimate, its pairs and the zone of undetectable differences, as positions."""
    value, low, high = wording.change(c, higher)
    known = math.isfinite(c.estimate) and (math.isfinite(c.low) or math.isfinite(c.high))
    dots = [d if higher else -d for d in c.differences]
    return {
        "when": when,
        "verdict": rows.verdict(arm, c),
        "text": wording.compact(c, higher),
        "mid": axis.at(value) if math.isfinite(value) and not axis.beyond(value) else None,
        "ends": [axis.at(low), axis.at(high)] if known else None,
        "beyond": [side for end in (low, high) if known and (side := axis.beyond(end))],
        "undetectable": [axis.at(-c.mde), axis.at(c.mde)] if math.isfinite(c.mde) else None,
        "dots": [axis.at(d) for d in dots if not axis.beyond(d)],
    }


# Strips of points ---------------------------------------------------------------------------------------------------


def times_to_target(study: Study) -> dict[str, Any]:
    """When each arm's validation loss reached the target, one point for each seed."""
    arms = [arm for arm in rows.ranked(study) if arm.time_to_target]
    axis = value_axis([t for arm in arms for t in arm.time_to_target if t is not None], log=False)
    found = [_times(arm, study, axis) for arm in arms]
    return {
        "axis": axis,
        "rows": found,
        "steps": any(row["fewer"] for row in found),
        "family": any(arm.to_target for arm in arms),
    }


def _times(arm: ArmResult, study: Study, axis: Axis) -> dict[str, Any]:
    times, base = [math.inf if t is None else t for t in arm.time_to_target], study.arms[0].time_to_target
    middle, reached, judged = median_low(times), [t for t in times if math.isfinite(t)], dict(arm.to_target)
    if arm is not study.arms[0] and not judged:  # the control, which is in no family
        judged["seconds"] = paired_time_to_target(arm.time_to_target, base[: len(times)])
    return {
        "name": arm.name,
        "control": arm.name == CONTROL,
        "dots": [axis.at(t) for t in reached],
        "mid": axis.at(middle) if math.isfinite(middle) else None,
        "median": f"{middle:.3g} s" if math.isfinite(middle) else "not reached",
        "reached": f"{len(reached)} of {len(times)}",
        "sooner": _pairs_won(judged.get("seconds")),
        "fewer": _pairs_won(judged.get("steps")),
    }


def _pairs_won(c: Comparison | None) -> str:
    return "" if c is None else f"{c.won} of {len(c.differences)} (p {wording.equation(c.p_holm)})"


def tuning(study: Study) -> dict[str, Any]:
    """The validation score of every tuning trial, on one axis; what was chosen for each arm is marked."""
    arms = [arm for arm in rows.ranked(study) if arm.trials]
    higher = study.metrics.get(study.primary, False)
    values = [run.val[study.primary] for arm in arms for run in arm.trials if study.primary in run.val]
    axis = value_axis(values, log=not higher)
    return {"axis": axis, "rows": [_trials(arm, study.primary, axis) for arm in arms]}


def _trials(arm: ArmResult, score: str, axis: Axis) -> dict[str, Any]:
    values = [run.val.get(score, math.nan) for run in arm.trials]
    chosen = next((i for i, run in enumerate(arm.trials) if arm.hyper.items() <= _settings(run).items()), None)
    value = math.nan if chosen is None else values[chosen]
    return {
        "name": arm.name,
        "dots": [axis.at(v) for v in values if math.isfinite(v)],
        "mid": axis.at(value) if math.isfinite(value) else None,
        "chosen": value,
        "runs": [(run, v, i == chosen) for i, (run, v) in enumerate(zip(arm.trials, values, strict=True))],
    }


def _settings(run: RunRecord) -> dict[str, Any]:
    """Hyper-parameters under the names that `ArmResult.hyper` has for them."""
    prefix = "{}." if len(run.methods) > 1 else ""
    named = {prefix.format(id) + name: value for id, hyper in run.methods for name, value in hyper.items()}
    return {**named, "lr_scale": run.lr_scale}
