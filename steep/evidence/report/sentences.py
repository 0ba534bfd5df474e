"""The verdicts of a study in sentences."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from steep.evidence.report.rows import NOTHING, asked_for, ranked, verdict
from steep.evidence.report.wording import detectable, equation, interval, worded
from steep.evidence.study import CONTROL, ArmResult, Comparison, Study


def _lost(c: Comparison) -> str:
    """The runs that did not finish: "2 of 8 runs", or "" where all did."""
    arm, baseline = (sum(d == sign * math.inf for d in c.differences) for sign in (-1, 1))
    whose = [(arm, "runs"), (baseline, "of the baseline's runs")]
    return " and ".join(f"{count} of {len(c.differences)} {which}" for count, which in whose if count)


def _finding(c: Comparison, study: Study) -> str:
    finite = math.isfinite(c.estimate)
    found = [f"test {c.score} {worded(c, study.metrics[c.score])}"] if finite else []
    return ", ".join(found + ([f"{lost} did not finish"] if (lost := _lost(c)) else []))


def _support(c: Comparison, study: Study, control: bool) -> str:
    """What the verdict rests on: interval, seeds, p, and the detectable difference."""
    pairs, worse = len(c.differences), sum(d < 0 for d in c.differences)
    known = math.isfinite(c.estimate) and (math.isfinite(c.low) or math.isfinite(c.high))
    parts = [f"95 % interval {interval(c, study.metrics[c.score])}"] if known else []
    side, count = ("worse", worse) if c.verdict == "hurts" else ("better", c.won)
    parts.append(f"{side} in {count} of {pairs} seeds")
    parts.append(f"p {equation(c.p_holm)}{'' if control else ' after Holm'}")
    if c.verdict == "no evidence":
        parts.append(_resolution(c, study))
    return ", ".join(parts)


def _resolution(c: Comparison, study: Study) -> str:
    if math.isfinite(c.mde):
        return f"detectable: {detectable(c, study.metrics[c.score])} or more"
    return "detectable difference unknown" if _lost(c) else "too few seeds to detect any difference"


def _at_equal_time(c: Comparison, study: Study) -> str:
    if c.verdict == "no evidence":
        return f"no evidence at equal time ({_resolution(c, study)})"
    return f"{c.verdict} at equal time ({_finding(c, study)})"


LEADS = {
    "helps": "helps",
    "hurts": "hurts",
    "no evidence": "shows no evidence of a difference",
    "too few seeds": "has too few seeds for a verdict",
}
CONTROL_LEADS = {
    "no evidence": "(the baseline against itself) shows no difference, as it should",
    "too few seeds": "(the baseline against itself) has too few seeds for a verdict",
}


class Statement(NamedTuple):
    """The verdict on an arm as clauses of a sentence; all but the first may be empty."""

    lead: str
    finding: str = ""
    support: str = ""
    at_equal_time: str = ""


def statement(arm: ArmResult, study: Study) -> Statement:
    """An arm's verdict in words, without its name."""
    c, timed = arm.scores.get(study.primary), arm.scores_at_equal_time.get(study.primary)
    if arm.did_nothing:
        return Statement(NOTHING, "every loss and every score equal the unchanged recipe's bit for bit")
    if c is None:
        return Statement("could not be compared", "no pair of runs")
    lead, control = LEADS[c.verdict], arm.name == CONTROL
    if control:
        alarm = f"(the baseline against itself) {lead}, which it should not: treat the other verdicts with caution"
        lead = CONTROL_LEADS.get(c.verdict, alarm)
    return Statement(
        lead, _finding(c, study), _support(c, study, control), _at_equal_time(timed, study) if timed else ""
    )


def sentences(study: Study) -> list[str]:
    """The study's verdicts in plain language, one sentence for each arm beside the baseline."""
    return [f"{arm.name} {sentence(statement(arm, study))}" for arm in ranked(study)[1:]]


def sentence(words: Statement) -> str:
    """All clauses in one: "helps: test loss 41 % lower (...) at equal steps; ..."."""
    basis = f" ({words.support}) at equal steps" if words.support else ""
    return f"{words.lead}: {words.finding}{basis}" + (f"; {words.at_equal_time}" if words.at_equal_time else "")


def headline(study: Study) -> str:
    """The conclusion about the methods that were asked for: "Of 5 methods, 2 help and 3 show no evidence ..."."""
    arms = asked_for(study)
    if not arms:
        return "No method was compared"
    verdicts = Counter(verdict(arm, arm.scores.get(study.primary)) for arm in arms)
    phrases = {
        "helps": ("helps", "help"),
        "hurts": ("hurts", "hurt"),
        "no evidence": ("shows no evidence of a difference", "show no evidence of a difference"),
        "too few seeds": ("has too few seeds for a verdict", "have too few seeds for a verdict"),
        NOTHING: ("did nothing", "did nothing"),
        "": ("could not be compared", "could not be compared"),
    }
    found = [(n, phrases[name][n > 1]) for name in phrases if (n := verdicts[name])]
    if len(arms) == 1:
        return f"{arms[0].name} {found[0][1]}"
    clauses = [f"{n} {phrase}" for n, phrase in found]
    if len(clauses) == 1:
        return f"{'Both' if len(arms) == 2 else f'All {len(arms)}'} methods {found[0][1]}"
    return f"Of {len(arms)} methods, {', '.join(clauses[:-1])} and {clauses[-1]}"
