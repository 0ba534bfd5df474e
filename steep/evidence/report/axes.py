"""Axes of the report's figures: round ticks, and positions in per cent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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


def spaced(axis: Axis, ticks: Sequence[tuple[float, str]], gap: float = 14.0) -> list[tuple[float, str]]:
    """Ticks at least `gap` per cent of the axis apart, so that labels do not overlap; zero and what is near it stay."""
    kept: list[tuple[float, str]] = []
    for tick in sorted(ticks, key=lambda tick: abs(tick[0])):
        if all(abs(axis.at(tick[0]) - axis.at(other)) >= gap for other, _ in kept):
            kept.append(tick)
    return sorted(kept)
