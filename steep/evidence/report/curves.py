"""Learning curves of a study, as plain numbers for the report's script."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steep.evidence.report import rows
from steep.evidence.statistics.paired import band
from steep.evidence.study import CONTROL, ArmResult, RunRecord, Study

Array = NDArray[np.float64]

# Okabe and Ito's colours without yellow and black, which fade on paper and on a dark screen; then the same dashed
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "9px,4px", "3px,3px")
NEUTRAL = "#808080"
SHOWN = 4  # methods whose curves are visible at first
POINTS = 40  # of a curve whose runs were not evaluated at the same places
BY = {"step": "optimizer steps", "examples": "training examples", "seconds": "seconds of training"}


def curves(study: Study) -> dict[str, Any]:
    """Every arm's curves, by what is drawn ("loss", the metric, "ratio") and against what."""
    arms = [arm for arm in rows.ranked(study) if any(run.curve for run in arm.runs)]
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
    """Colour, dash and initial visibility of every arm; baseline and control are grey."""
    names = [arm.name for arm in rows.methods(study)]
    own = {
        name: {"colour": COLOURS[i % 6], "dash": DASHES[i // 6 % 3], "shown": i < SHOWN} for i, name in enumerate(names)
    }
    first = {arm.name: {"colour": NEUTRAL, "dash": "", "shown": True} for arm in study.arms[:1]}
    return first | own | {CONTROL: {"colour": NEUTRAL, "dash": DASHES[2], "shown": False}}


def _drawn(arm: ArmResult, study: Study, scores: Sequence[str], ratio: bool) -> dict[str, Any]:
    def runs(of: ArmResult, by: str) -> Sequence[RunRecord]:
        return dict(rows.kinds(of)).get({"seconds": "equal time", "examples": "equal examples"}.get(by, ""), of.runs)

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
    values = [np.nan_to_num(np.interp(grid, x, y), nan=huge, posinf=1e300, neginf=-1e300) for x, y in found]
    values += [np.full(len(grid), huge)] * (len(runs) - len(values))
    low, mid, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)  # 1e300, as infinities would become NaN here
    return _series(grid, *(np.where(np.abs(v) < 1e200, v, np.nan) for v in (mid, low, high)))


def _ratio(runs: Sequence[RunRecord], baseline: Sequence[RunRecord], by: str) -> dict[str, Any] | None:
    """Loss over the baseline's on the same split: estimate and 95 % interval over the pairs.

    Beyond the end of a run, its last value is used.
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
