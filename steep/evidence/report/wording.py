"""Numbers in words: changes of a score, intervals, p-values.

A comparison's differences are signed so that positive is better; here, a *change* is of the score itself, so that
positive is higher. For relative scores it is a change of the logarithm, given in per cent or, from tenfold on, as a
factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from steep.evidence.study import Comparison


def change(c: Comparison, higher: bool) -> tuple[float, float, float]:
    """Estimate and 95 % bounds of the change of the score, bounds in ascending order."""
    return (c.estimate, c.low, c.high) if higher else (-c.estimate, -c.high, -c.low)


def _tenfold(c: Comparison) -> bool:
    return c.relative and abs(c.estimate) >= math.log(10)


def _fraction(log_change: float) -> float:
    return math.expm1(log_change) if log_change < 700 else math.inf


def _percent(fraction: float) -> str:
    """A size in per cent with the digits that matter: 0.04, 0.4, 5.2, 41, 99.7."""
    size = 100 * abs(fraction)
    return f"{size:.1f}" if 0.1 <= size < 9.95 or 99 < size < 100 else f"{size:.0f}" if size >= 0.1 else f"{size:.1g}"


def _size(value: float, c: Comparison) -> str:
    """The size of a change without direction or unit."""
    if not c.relative:
        return f"{abs(value):.2g}"
    return f"{math.exp(min(abs(value), 700)):.3g}" if _tenfold(c) else _percent(_fraction(value))


def _unit(c: Comparison) -> str:
    return "" if not c.relative else " times" if _tenfold(c) else " %"


def _direction(value: float) -> str:
    return "higher" if value > 0 else "lower"


def worded(c: Comparison, higher: bool) -> str:
    """The estimate in words: "41 % lower"."""
    value = change(c, higher)[0]
    return f"{_size(value, c)}{_unit(c)} {_direction(value)}" if value else "unchanged"


def interval(c: Comparison, higher: bool) -> str:
    """The interval in words: "35 to 47 %", or "12 % lower to 5 % higher" where it spans zero."""
    value, *bounds = change(c, higher)
    if min(bounds) * max(bounds) > 0 and bounds[0] * value > 0 and _bounded(c):
        return " to ".join(_size(bound, c) for bound in sorted(bounds, key=abs)) + _unit(c)
    return " to ".join(_bound(bound, c) for bound in bounds)


def _bound(value: float, c: Comparison) -> str:
    if not math.isfinite(value):  # a run that diverged counts as infinitely bad
        return "unbounded"
    return f"{_size(value, c)}{_unit(c)} {_direction(value)}" if value else "0"


def detectable(c: Comparison, higher: bool) -> str:
    """The smallest improvement that the study could detect: "12 %"."""
    value = c.mde if higher else -c.mde
    return f"{_percent(_fraction(value))} %" if c.relative else f"{c.mde:.2g}"


def compact(c: Comparison, higher: bool) -> str:
    """Estimate and interval for a table: "−41 % [−47, −35]"."""

    def signed(value: float) -> str:
        signs = "÷×" if _tenfold(c) else "−+"
        return f"{signs[value > 0] if value else ''}{_size(value, c) if math.isfinite(value) else '∞'}"

    if not math.isfinite(c.estimate):
        return "undefined"
    value, low, high = change(c, higher)
    percent = " %" if _unit(c) == " %" else ""
    bounds = f" [{signed(low)}, {signed(high)}]" if math.isfinite(low) or math.isfinite(high) else ""
    return f"{signed(value)}{percent}{bounds}"


def _bounded(c: Comparison) -> bool:
    return math.isfinite(c.low) and math.isfinite(c.high)


def significance(p: float) -> str:
    """A p-value: "0.016", "< 0.001"."""
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def equation(p: float) -> str:
    """The same after "p": "= 0.016", "< 0.001"."""
    return significance(p) if p < 0.001 else f"= {significance(p)}"


def number(value: float | None) -> str:
    """A measured value with four digits, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:#.4g}".rstrip(".")


def settings(values: Mapping[str, Any]) -> str:
    """Hyper-parameters on one line: "rank=64, rtol=0.001"."""
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()) or "–"
