"""The verdict on a claim: gain, interval and verdict of each quantity, and the verdict of the claim as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from steep.evidence.claims.claim import Pairs, Quantity
from steep.evidence.statistics.paired import ALPHA, differences, estimate, interval, sign_flip_p

VERDICTS = ("not reproduced", "not testable here", "same direction", "reproduced")  # weakest first


@dataclass(frozen=True)
class QuantityResult:
    """A quantity with its measured values, the numbers computed from them, and the verdict.

    Args:
        gain, low, high: mean gain and its exact 95 % interval (smallest and largest for exact quantities), positive
            or above 1 where the method is better.
        p: of the exact sign-flip test against the quantity's null; `None` for exact quantities.
        won: cases in which the method was better than the baseline.
    """

    quantity: Quantity
    pairs: Pairs
    gain: float
    low: float
    high: float
    p: float | None
    won: int
    verdict: str


def judge(quantity: Quantity, pairs: Pairs) -> QuantityResult:
    """Numbers and verdict of one quantity.

    With the 95 % interval [low, high] of the gain, and the claimed size:

    - reproduced: low > null and high >= size. The direction is shown, and the size is inside or below the interval:
      the data do not speak against it. An interval need not lie above the size: that would ask for more than the claim.
    - same direction: low > null, but high < size. There is a gain, and it is smaller than claimed.
    - not testable here: low <= null and high >= size. So few or so noisy runs that no gain and the claimed one are
      both possible; calling that a failure would blame the method for our scale.
    - not reproduced: low <= null and high < size. The claimed gain is excluded, none is not. Where only a
      direction is claimed: the direction is not shown (with fewer than 6 pairs it never could be: not testable here).

    The interval inverts the exact paired test, so "low > null" is that test at 5 % (two-sided). Exact quantities have
    no noise: reproduced if every case has the claimed size, same direction if every case exceeds the null, else not.

    Example:
        >>> judge(Quantity("loss", better="lower", size=1.1), Pairs([0.5] * 6, [1.0] * 6, range(6))).verdict
        'reproduced'
    """
    ratio = quantity.scale == "ratio"
    d = differences(pairs.method, pairs.baseline, higher_is_better=quantity.better == "higher", relative=ratio)
    null = math.log(quantity.nothing) if ratio else quantity.nothing
    low, high = (float(d.min()), float(d.max())) if quantity.exact else interval(d, 1 - ALPHA)
    p = None if quantity.exact else sign_flip_p(d - null)
    gain, low, high = (_gain(v, ratio) for v in (estimate(d), low, high))
    return QuantityResult(quantity, pairs, gain, low, high, p, int((d > 0).sum()), _verdict(quantity, low, high))


def _gain(value: float, ratio: bool) -> float:
    """A difference as a gain: the exponential of one of logarithms, infinite beyond what a float holds."""
    if not ratio:
        return float(value)
    return math.exp(value) if value < 700 else math.inf


def _verdict(quantity: Quantity, low: float, high: float) -> str:
    shown = low > quantity.nothing
    size = quantity.size
    if size is None:  # only a direction is claimed: any gain will do, and only an endless interval leaves it open
        size = quantity.nothing if shown else math.inf
    reaches = (low if quantity.exact else high) >= size
    if shown:
        return "reproduced" if reaches else "same direction"
    return "not testable here" if reaches else "not reproduced"


def overall(judged: Sequence[QuantityResult]) -> str:
    """Verdict of a claim: that of its weakest quantity, since it claims them all; nothing measured is not testable."""
    return min((j.verdict for j in judged), key=VERDICTS.index, default="not testable here")


def number(quantity: Quantity, gain: float) -> str:
    """A gain as it is read: a factor, or a signed difference.

    Example:
        >>> number(Quantity("loss", better="lower"), 1.5), number(Quantity("a", "higher", scale="difference"), 0.01)
        ('1.5×', '+0.01')
    """
    return f"{gain:.3g}×" if quantity.scale == "ratio" else f"{gain:+.3g}"


def numbers(judged: QuantityResult) -> str:
    """A judged quantity's numbers in a line: gain, interval, what was claimed, and how many cases."""
    q, cases = judged.quantity, judged.pairs.cases
    low, high = number(q, judged.low), number(q, judged.high)
    size = f"claimed {number(q, q.size)}" if q.size is not None else "claimed: a gain"
    margin = f", no worse than {number(q, q.nothing)}" if q.null is not None else ""
    kind = "cases" if q.exact else "pairs"
    return f"{number(q, judged.gain)} [{low}, {high}], {size}{margin}; better in {judged.won} of {len(cases)} {kind}"


def effect(judged: QuantityResult) -> str:
    """What was measured, whatever was claimed: "helps", "hurts" or "no evidence", from the same interval."""
    none = float(judged.quantity.scale == "ratio")
    if judged.low > none:
        return "helps"
    return "hurts" if judged.high < none else "no evidence"


def gains(judged: QuantityResult) -> list[float]:
    """The gain of every case, in the unit of `number`; infinite where only one of a pair diverged."""
    ratio = judged.quantity.scale == "ratio"
    higher = judged.quantity.better == "higher"
    d = differences(judged.pairs.method, judged.pairs.baseline, higher_is_better=higher, relative=ratio)
    return [_gain(v, ratio) for v in d]
