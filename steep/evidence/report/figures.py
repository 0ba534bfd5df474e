"""What a report draws: axes, forest rows, strips of points and learning curves, as plain numbers for the template."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steep.evidence.report import table
from steep.evidence.statistics.paired import band, paired_time_to_target
from steep.evidence.study import ArmResult, Comparison, RunRecord, Study

Array = NDArray[np.float64]

# Okabe and Ito's colours without yellow and black, which fade on paper and on a dark screen; then the same dashed
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "9px,4px", "3px,3px")
NEUTRAL = "#808080"
SHOWN = 4  # methods whose curves are visible at first
POINTS = 40  # of a curve whose runs were not evaluated at the same places
BY = {"step": "optimizer steps", "examples": "training examples", "seconds": "seconds of training"}


# Axes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A horizontal axis as wide as its box: positions are in per cent. Ticks are (position, label)."""

    low: float
    high: float
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()

    def at(self, value: float) -> float:
        low, high, value = (math.log(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value))
        return round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 2)

    def beyond(self, value: float) -> int:
        """-1 or 1 for a value left or right of the axis, else 0."""
        return (value > self.high) - (value < self.low)

    def marked(self, ticks: Iterable[tuple[float, str]]) -> Axis:
        """The same with ticks (value, label)."""
        return Axis(self.low, self.high, self.log, tuple((self.at(value), label) for value, label in ticks))


def nice(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers in [low, high], in steps of 1, 2 or 5 times a power of ten."""
    unit = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(s for s in (unit, 2 * unit, 5 * unit, 10 * unit) if high // s - math.ceil(low / s) + 1 <= most)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def nice_log(low: float, high: float) -> list[float]:
    """Round numbers in [low, high] for a logarithmic axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [v for k in powers for m in (1, 2, 5) if low <= (v := m * 10.0**k) <= high]
    if len(fine) < 2:
        return nice(low, high)
    sparse = len(powers) // 6 + 1
    return fine if len(fine) <= 6 else [10.0**k for k in powers if k % sparse == 0 and low <= 10.0**k <= high]


def value_axis(values: Iterable[float], *, log: bool) -> Axis:
    """An axis for measured values: from zero, or logarithmic from the smallest."""
    finite = [v for v in values if math.isfinite(v)] or [1.0]
    log = log and min(finite) > 0
    low, high = (min(finite) / 1.1, max(finite) * 1.1) if log else (min(0.0, *finite), max(finite) * 1.05 or 1.0)
    return Axis(low, high, log).marked((v, f"{v:g}") for v in (nice_log if log else nice)(low, high))


# Forest -------------------------------------------------------------------------------------------------------------


def forest(study: Study) -> dict[str, Any]:
    """Intervals of every arm's difference at equal steps and at equal time, on one axis."""
    higher = study.metrics.get(study.primary, False)
    arms = [(arm, table.comparisons(arm, study.primary)) for arm in table.ranked(study)[1:]]
    comparisons = [c for _, found in arms for c in found.values()]
    axis = _forest_axis(comparisons, higher)
    return {
        "axis": axis,
        "zero": axis.at(0),
        "relative": any(c.relative for c in comparisons),
        "rows": [
            {
                "name": arm.name,
                "control": arm.name == table.CONTROL,
                "strips": [_strip(arm, when, c, higher, axis) for when, c in found.items()],
            }
            for arm, found in arms
            if found
        ],
    }


def _forest_axis(comparisons: Sequence[Comparison], higher: bool) -> Axis:
    """Wide enough for the intervals; those that are far worse than most are long are cut off, and end in arrows."""
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


def spaced(axis: Axis, ticks: Sequence[tuple[float, str]], gap: float = 14.0) -> list[tuple[float, str]]:
    """Ticks at least `gap` per cent of the axis apart, so that labels do not overlap; zero and what is near it stay."""
    kept: list[tuple[float, str]] = []
    for tick in sorted(ticks, key=lambda tick: abs(tick[0])):
        if all(abs(axis.at(tick[0]) - axis.at(other)) >= gap for other, _ in kept):
            kept.append(tick)
    return sorted(kept)


def _signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{abs(value):g}" if value else "0"


def _strip(arm: ArmResult, when: str, c: Comparison, higher: bool, axis: Axis) -> dict[str, Any]:
    """One interval with its estimate, its pairs and the zone of differences too small to be seen, as positions."""
    value, low, high = table.change(c, higher)
    known = math.isfinite(c.estimate) and (math.isfinite(c.low) or math.isfinite(c.high))
    dots = [d if higher else -d for d in c.differences]
    return {
        "when": when,
        "verdict": table.verdict(arm, c),
        "text": table.compact(c, higher),
        "mid": axis.at(value) if math.isfinite(value) and not axis.beyond(value) else None,
        "ends": [axis.at(low), axis.at(high)] if known else None,
        "beyond": [side for end in (low, high) if known and (side := axis.beyond(end))],
        "unseen": [axis.at(-c.mde), axis.at(c.mde)] if math.isfinite(c.mde) else None,
        "dots": [axis.at(d) for d in dots if not axis.beyond(d)],
    }


# Strips of points ---------------------------------------------------------------------------------------------------


def times_to_target(study: Study) -> dict[str, Any]:
    """When each arm's validation loss reached the baseline's final median, one point for each seed."""
    arms = [arm for arm in table.ranked(study) if arm.time_to_target]
    axis = value_axis([t for arm in arms for t in arm.time_to_target if t is not None], log=False)
    rows = [_times(arm, study, axis) for arm in arms]
    return {"axis": axis, "rows": rows, "steps": any(row["fewer"] for row in rows), "family": any(map(_raced, arms))}


def _times(arm: ArmResult, study: Study, axis: Axis) -> dict[str, Any]:
    times, base = [math.inf if t is None else t for t in arm.time_to_target], study.arms[0].time_to_target
    middle, reached, raced = median_low(times), [t for t in times if math.isfinite(t)], dict(_raced(arm))
    if arm is not study.arms[0] and not raced:
        raced["seconds"] = paired_time_to_target(arm.time_to_target, base[: len(times)])
    return {
        "name": arm.name,
        "control": arm.name == table.CONTROL,
        "dots": [axis.at(t) for t in reached],
        "mid": axis.at(middle) if math.isfinite(middle) else None,
        "median": f"{middle:.3g} s" if math.isfinite(middle) else "not reached",
        "reached": f"{len(reached)} of {len(times)}",
        "sooner": _sooner(raced.get("seconds")),
        "fewer": _sooner(raced.get("steps")),
    }


def _raced(arm: ArmResult) -> Mapping[str, Comparison]:
    """Steps and seconds to target against the baseline's, methods judged as a family, where the study holds them."""
    return arm.to_target


def _sooner(c: Comparison | None) -> str:
    return "" if c is None else f"{c.won} of {len(c.differences)} (p {table.equation(c.p_holm)})"


def tuning(study: Study) -> dict[str, Any]:
    """The validation score of every tuning trial, on one axis; what was chosen for each arm is marked."""
    arms = [arm for arm in table.ranked(study) if arm.trials]
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
    """Hyper-parameters under the names that `Arm.hyper` has for them."""
    prefix = "{}." if len(run.methods) > 1 else ""
    named = {prefix.format(id) + name: value for id, hyper in run.methods for name, value in hyper.items()}
    return {**named, "lr_scale": run.lr_scale}


# Curves -------------------------------------------------------------------------------------------------------------


def curves(study: Study) -> dict[str, Any]:
    """Every arm's curves, by what is drawn ("loss", the metric, "ratio") and against what."""
    arms = [arm for arm in table.ranked(study) if any(run.curve for run in arm.runs)]
    scores = [score for score in study.metrics if any(score in e for a in arms for r in a.runs for e in r.curve[:1])]
    positive = all(e.get("loss", 1) > 0 for a in arms for r in (*a.runs, *a.equal_time) for e in r.curve)
    ratio = positive and "loss" in scores and len(arms) > 1
    titles = {score: f"validation {score}" for score in scores}
    return {
        "arms": [_drawn(arm, study, scores, ratio) for arm in arms],
        "y": titles | ({"ratio": "validation loss as a multiple of the baseline’s"} if ratio else {}),
        "x": BY,
        "log": positive,
        "target": study.target_loss,
    }


def styles(study: Study) -> dict[str, dict[str, Any]]:
    """Colour, dash and first visibility of every arm: grey for the baseline and its control."""
    names = [arm.name for arm in table.methods(study)]
    analyses = {
        name: {"colour": COLOURS[i % 6], "dash": DASHES[i // 6 % 3], "shown": i < SHOWN} for i, name in enumerate(names)
    }
    first = {arm.name: {"colour": NEUTRAL, "dash": "", "shown": True} for arm in study.arms[:1]}
    return first | analyses | {table.CONTROL: {"colour": NEUTRAL, "dash": DASHES[2], "shown": False}}


def _drawn(arm: ArmResult, study: Study, scores: Sequence[str], ratio: bool) -> dict[str, Any]:
    def runs(of: ArmResult, by: str) -> Sequence[RunRecord]:
        return dict(table.kinds(of)).get({"seconds": "equal time", "examples": "equal examples"}.get(by, ""), of.runs)

    series = {s: {by: _quartiles(runs(arm, by), by, s, study.metrics[s]) for by in BY} for s in scores}
    if ratio:
        base = study.arms[0]
        series["ratio"] = {by: _ratio(runs(arm, by), base.runs, by) if arm is not base else None for by in BY}
    return {"name": arm.name, "series": series} | styles(study)[arm.name]


def _curve(run: RunRecord, by: str, score: str) -> tuple[Array, Array]:
    points = [(entry[by], entry[score]) for entry in run.curve if by in entry and score in entry]
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    return x, y


def _grid(xs: Sequence[Array]) -> Array:
    """Where the runs were evaluated, if all at the same places; else an even grid up to their median end."""
    if all(np.array_equal(x, xs[0]) for x in xs):
        return xs[0]
    start, end = max(x[0] for x in xs), median(x[-1] for x in xs)
    return np.linspace(start, max(start, end), POINTS)


def _quartiles(runs: Sequence[RunRecord], by: str, score: str, higher: bool) -> dict[str, Any] | None:
    """Median and quartiles over the seeds; a run that left no curve counts as worst."""
    found = [curve for run in runs if len((curve := _curve(run, by, score))[0])]
    if not found:
        return None
    grid, huge = _grid([x for x, _ in found]), -1e300 if higher else 1e300
    rows = [np.nan_to_num(np.interp(grid, x, y), nan=huge, posinf=1e300, neginf=-1e300) for x, y in found]
    rows += [np.full(len(grid), huge)] * (len(runs) - len(rows))
    low, mid, high = np.quantile(rows, [0.25, 0.5, 0.75], axis=0)
    return _series(grid, *(np.where(np.abs(v) < 1e200, v, np.nan) for v in (mid, low, high)))


def _ratio(runs: Sequence[RunRecord], baseline: Sequence[RunRecord], by: str) -> dict[str, Any] | None:
    """Loss over the baseline's on the same split: estimate and 95 % interval over the pairs.

    Where one of the two has ended its last value stands.
    """
    by_split = {run.split_seed: curve for run in baseline if len((curve := _curve(run, by, "loss"))[0])}
    pairs = [(_curve(run, by, "loss"), by_split[run.split_seed]) for run in runs if run.split_seed in by_split]
    found = [(own, base) for own, base in pairs if len(own[0])]
    if not found:
        return None
    grid = _grid([x for (x, _), _ in found])
    gains = [np.interp(grid, xb, np.log(yb)) - np.interp(grid, x, np.log(y)) for (x, y), (xb, yb) in found]
    gains += [np.full(len(grid), -np.inf)] * (len(pairs) - len(found))
    with np.errstate(over="ignore"):
        mid, low, high = (np.exp(-v) for v in band(np.where(np.isnan(gains), -np.inf, gains)))
    return _series(grid, mid, high, low)


def _series(x: Array, mid: Array, low: Array, high: Array) -> dict[str, Any]:
    """Rounded lists for JSON, up to where the middle, and the band, are finite."""

    def upto(*rows: Array) -> int:
        bad = ~np.isfinite(rows).all(0)
        return int(bad.argmax()) if bad.any() else len(x)

    def short(values: Array, n: int) -> list[float]:
        return [float(f"{v:.5g}") for v in values[:n]]

    line, filled = upto(mid), upto(mid, low, high)
    return {"x": short(x, line), "mid": short(mid, line), "low": short(low, filled), "high": short(high, filled)}
