"""The rule of the verdicts, against intervals known by construction and against the exact test itself."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.evidence.claims import Pairs, Quantity
from steep.evidence.claims.verdicts import VERDICTS, effect, gains, judge, number, numbers, overall

SURE = [0.5] * 8  # all subset means are 0.5: the interval is [0.5, 0.5]
WIDE = [-1.0, 2.0, -1.5, 2.5, -0.5, 1.5]


def pairs(differences):
    """Values whose differences, higher being better, are those."""
    return Pairs(list(differences), [0.0] * len(differences), range(len(differences)))


def points(size=None, null=None, **more):
    return Quantity("accuracy", better="higher", scale="difference", size=size, null=null, **more)


@pytest.mark.parametrize(
    ("differences", "size", "null", "verdict"),
    [
        (SURE, 0.5, None, "reproduced"),  # the size is in the interval
        (SURE, 0.4, None, "reproduced"),  # the interval lies above it
        (SURE, 0.6, None, "same direction"),
        ([-0.5] * 8, 0.4, None, "not reproduced"),
        ([0.0] * 8, 0.4, None, "not reproduced"),  # no gain is possible, the claimed one is not
        (WIDE, 0.4, None, "not testable here"),  # both are possible
        (WIDE, 9.0, None, "not reproduced"),
        (SURE, None, None, "reproduced"),
        (WIDE, None, None, "not reproduced"),
        ([-0.5] * 8, None, None, "not reproduced"),
        ([0.0] * 8, 0.0, -0.1, "reproduced"),  # no worse, within a margin
        ([-0.05] * 8, 0.0, -0.1, "same direction"),  # worse, but within the margin
        ([-0.2] * 8, 0.0, -0.1, "not reproduced"),
        (WIDE, 0.0, -0.1, "not testable here"),
        ([5.0] * 5, 0.5, None, "not testable here"),  # five pairs can show nothing
        ([5.0] * 5, None, None, "not testable here"),
    ],
)
def test_the_rule(differences, size, null, verdict):
    assert judge(points(size, null), pairs(differences)).verdict == verdict


@pytest.mark.parametrize(
    ("differences", "size", "verdict"),
    [
        ([0.5], 0.5, "reproduced"),
        ([0.5, 0.4], 0.5, "same direction"),
        ([0.5, 0.0], 0.5, "not reproduced"),
        ([0.5, 0.1], None, "reproduced"),
        ([0.5, -0.1], None, "not reproduced"),
    ],
)
def test_exact_quantities_must_hold_in_every_case(differences, size, verdict):
    judged = judge(points(size, exact=True), pairs(differences))
    assert judged.verdict == verdict
    assert (judged.low, judged.high, judged.p) == (min(differences), max(differences), None)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-1, 1).map(lambda v: round(v, 3)), min_size=6, max_size=9), st.sampled_from([0.0, 0.05, -0.1])
)
def test_a_direction_is_shown_just_when_the_sign_flip_test_rejects(values, null):
    """The test by brute force over all signs, ties counted against it."""
    d = np.array(values)
    shifted = d - null
    flips = np.array(list(itertools.product((-1, 1), repeat=len(d)))) @ shifted
    p = np.mean(np.abs(flips) >= abs(shifted.sum()) - 1e-9)
    judged = judge(points(null=null, size=9.0), pairs(values))
    shown = judged.verdict in ("reproduced", "same direction")
    if shown:
        assert p <= 0.05 + 1e-12
        assert shifted.mean() > 0
    elif np.abs(shifted).min() > 1e-6 and len(set(np.abs(shifted).round(9))) == len(d):  # without ties: exactly
        assert p > 0.05 or shifted.mean() < 0


def test_ratios_are_factors_of_the_baseline_and_follow_the_direction():
    lower = judge(Quantity("loss", better="lower"), Pairs([0.5] * 6, [1.0] * 6, range(6)))
    higher = judge(Quantity("speed", better="higher"), Pairs([2.0] * 6, [1.0] * 6, range(6)))
    for judged in (lower, higher):
        assert [judged.gain, judged.low, judged.high] == pytest.approx([2.0] * 3)
        assert judged.won == 6
        assert gains(judged) == pytest.approx([2.0] * 6)
        assert judged.verdict == "reproduced"
    assert judge(Quantity("loss", better="lower", size=3.0), lower.pairs).verdict == "same direction"
    assert judge(Quantity("loss", better="higher"), lower.pairs).verdict == "not reproduced"


def test_runs_that_diverged_count_as_worse_than_any_other():
    q = Quantity("loss", better="lower", size=2.0)
    lost = judge(q, Pairs([None] * 6, [1.0] * 6, range(6)))
    assert (lost.verdict, lost.low, lost.high, lost.won) == ("not reproduced", 0.0, 0.0, 0)
    won = judge(q, Pairs([1.0] * 6, [None] * 6, range(6)))
    assert (won.verdict, won.low, won.won) == ("reproduced", math.inf, 6)
    assert gains(won) == [math.inf] * 6


def test_a_claim_is_as_good_as_its_weakest_part():
    parts = {v: judge(points(size), pairs(d)) for v, size, d in CASES}
    assert set(parts) == set(VERDICTS)
    for weakest, verdict in enumerate(VERDICTS):
        assert overall([parts[v] for v in VERDICTS[weakest:]]) == verdict
    assert overall([]) == "not testable here"


CASES = [
    ("reproduced", 0.5, SURE),
    ("same direction", 0.6, SURE),
    ("not testable here", 0.4, WIDE),
    ("not reproduced", 9.0, WIDE),
]


def test_what_was_measured_does_not_depend_on_what_was_claimed():
    for size in (0.1, 0.5, 9.0):
        assert effect(judge(points(size), pairs(SURE))) == "helps"
        assert effect(judge(points(size), pairs([-0.5] * 8))) == "hurts"
        assert effect(judge(points(size), pairs(WIDE))) == "no evidence"
    within_margin = judge(points(0.0, -0.1), pairs([-0.05] * 8))
    assert effect(within_margin) == "hurts"


def test_numbers_are_written_in_the_unit_of_the_claim():
    text = numbers(judge(points(0.4), pairs(SURE)))
    assert text == "+0.5 [+0.5, +0.5], claimed +0.4; better in 8 of 8 pairs"
    margin = numbers(judge(points(0.0, -0.1), pairs([-0.05] * 8)))
    assert "claimed +0, no worse than -0.1; better in 0 of 8 pairs" in margin
    ratio = numbers(judge(Quantity("steps", better="lower", exact=True), Pairs([1.0], [2.0], ["a"])))
    assert ratio == "2× [2×, 2×], claimed: a gain; better in 1 of 1 cases"
    assert number(Quantity("x", better="lower"), 0.123456) == "0.123×"
