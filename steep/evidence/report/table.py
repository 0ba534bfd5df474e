"""What a study found, in sentences and in a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from steep.evidence.study import ArmResult, Comparison, RunRecord, Study

CONTROL = "A/A"
NOTHING = "did nothing"
STYLES = {"helps": "green", "hurts": "red", NOTHING: "yellow", "too few seeds": "yellow"}
ASCII = str.maketrans({"×": "x", "÷": "/", "−": "-", "–": "-", "∞": "inf"})


# A comparison's differences are signed so that positive is better; below, a *change* is of the score itself, so that
# positive is higher. Of relative scores it is a change of the logarithm, said in per cent, or from tenfold on in times.


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


def noticeable(c: Comparison, higher: bool) -> str:
    """The smallest improvement the study would have shown: "12 %"."""
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
    """A measured value: four digits, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:#.4g}".rstrip(".")


def ranked(study: Study) -> list[ArmResult]:
    """The baseline, then the methods from best to worst, then the A/A control."""

    def place(arm: ArmResult) -> tuple[bool, float]:
        c = arm.scores.get(study.primary)
        return arm.name == CONTROL, math.inf if c is None or math.isnan(c.estimate) else -c.estimate

    return [*study.arms[:1], *sorted(study.arms[1:], key=place)]


def methods(study: Study) -> list[ArmResult]:
    """The arms that are neither the baseline nor the control, from best to worst."""
    return [arm for arm in ranked(study)[1:] if arm.name != CONTROL]


def median_test(arm: ArmResult, score: str, higher: bool) -> float:
    """Median test score over the seeds; a run that did not finish counts as worst."""
    worst = -math.inf if higher else math.inf
    return median([run.test.get(score, worst) for run in arm.runs] or [math.nan])


def cost(arm: ArmResult, of: Callable[[RunRecord], float | None]) -> float | None:
    """Median over the finished runs of what `of` reads, where it is known."""
    known = [value for run in arm.runs if run.outcome == "finished" and (value := of(run)) is not None]
    return median(known) if known else None


def cost_ratio(arm: ArmResult, study: Study, of: Callable[[RunRecord], float | None]) -> str:
    """The same as a multiple of the baseline's: "1.8×"."""
    own, base = cost(arm, of), cost(study.arms[0], of)
    return f"{own / base:.3g}×" if own is not None and base else "–"


def kinds(arm: ArmResult) -> list[tuple[str, Sequence[RunRecord]]]:
    """An arm's confirmation runs, by what they have as much of as the baseline; kinds without runs are left out."""
    found = [("equal steps", arm.runs), ("equal time", arm.equal_time), ("equal examples", arm.equal_examples)]
    return [(kind, runs) for kind, runs in found if runs]


def comparisons(arm: ArmResult, score: str) -> dict[str, Comparison]:
    """An arm's comparisons of a score, by kind; at equal examples only where that took other runs than equal steps."""
    examples = arm.scores_at_equal_examples if arm.equal_examples else {}
    by_kind = {"equal steps": arm.scores, "equal time": arm.scores_at_equal_time, "equal examples": examples}
    return {kind: scores[score] for kind, scores in by_kind.items() if score in scores}


def verdict(arm: ArmResult, c: Comparison | None) -> str:
    """One of the four verdicts, "did nothing", or "" where nothing was compared."""
    return NOTHING if arm.did_nothing else c.verdict if c is not None else ""


# Sentences ----------------------------------------------------------------------------------------------------------


def _lost(c: Comparison) -> str:
    """Which runs of the pairs did not finish: "2 of 8 runs", or "" where all did."""
    arm, baseline = (sum(d == sign * math.inf for d in c.differences) for sign in (-1, 1))
    whose = [(arm, "runs"), (baseline, "of the baseline's runs")]
    return " and ".join(f"{count} of {len(c.differences)} {which}" for count, which in whose if count)


def _finding(c: Comparison, study: Study) -> str:
    finite = math.isfinite(c.estimate)
    found = [f"test {c.score} {worded(c, study.metrics[c.score])}"] if finite else []
    return ", ".join(found + ([f"{lost} did not finish"] if (lost := _lost(c)) else []))


def _support(c: Comparison, study: Study, control: bool) -> str:
    """What the verdict rests on: interval, seeds, p, and what would have been seen."""
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
        return f"would have seen {noticeable(c, study.metrics[c.score])}"
    return "what it would have seen is unknown" if _lost(c) else "too few seeds to see any difference"


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
    "no evidence": "(the baseline against itself) comes out null, as it should",
    "too few seeds": "(the baseline against itself) has too few seeds for a verdict",
}


class Said(NamedTuple):
    """What is to be said of an arm, in clauses that may be empty but for the first."""

    lead: str
    finding: str = ""
    support: str = ""
    at_equal_time: str = ""


def said_of(arm: ArmResult, study: Study) -> Said:
    """An arm's verdict in words, without its name."""
    c, timed = arm.scores.get(study.primary), arm.scores_at_equal_time.get(study.primary)
    if arm.did_nothing:
        return Said(NOTHING, "with its default settings every loss equals the unchanged recipe's bit for bit")
    if c is None:
        return Said("could not be compared", "no pair of runs")
    lead, control = LEADS[c.verdict], arm.name == CONTROL
    if control:
        alarm = f"(the baseline against itself) {lead}, which it should not: read the other verdicts with care"
        lead = CONTROL_LEADS.get(c.verdict, alarm)
    return Said(lead, _finding(c, study), _support(c, study, control), _at_equal_time(timed, study) if timed else "")


def sentences(study: Study) -> list[str]:
    """The study's verdicts in plain language, one sentence for each arm beside the baseline."""
    return [f"{arm.name} {sentence(said_of(arm, study))}" for arm in ranked(study)[1:]]


def sentence(said: Said) -> str:
    """All clauses in one: "helps: test loss 41 % lower (...) at equal steps; ..."."""
    basis = f" ({said.support}) at equal steps" if said.support else ""
    return f"{said.lead}: {said.finding}{basis}" + (f"; {said.at_equal_time}" if said.at_equal_time else "")


# Table --------------------------------------------------------------------------------------------------------------


def score_names(study: Study) -> list[str]:
    """The score that verdicts are about, then the others."""
    return [study.primary, *(name for name in study.metrics if name != study.primary)]


def cells(arm: ArmResult, study: Study) -> dict[str, str]:
    """An arm's row, by heading; columns from left to right."""
    names = score_names(study)
    found = comparisons(arm, study.primary)
    c, row = found.get("equal steps"), {"arm": arm.name}
    for name in names:
        value = median_test(arm, name, study.metrics[name])
        row[f"test {name}"] = "unfinished" if math.isinf(value) else number(value)
    return row | {
        "difference (95 %)": compact(c, study.metrics[c.score]) if c is not None else "",
        "p (Holm)": significance(c.p_holm) if c is not None else "",
        "equal steps": verdict(arm, c),
        "equal time": verdict(arm, found.get("equal time")),
        **({"equal examples": verdict(arm, found.get("equal examples"))} if _other_examples(study) else {}),
        "CPU": cost_ratio(arm, study, lambda run: run.cpu_seconds),
        "memory": cost_ratio(arm, study, lambda run: run.peak_memory),
    }


def _other_examples(study: Study) -> bool:
    """Whether any arm sees other numbers of examples in its steps."""
    return any("equal examples" in dict(kinds(arm)) for arm in study.arms)


def notes(study: Study) -> Iterator[str]:
    """What a reader of the table must know beside it."""
    yield from study.warnings
    for arm in study.arms:
        if arm.did_nothing:
            yield f"{arm.name} {sentence(said_of(arm, study))}"
    for name, reason in study.left_out.items():
        yield f"left out: {name} ({reason})"


@dataclass(frozen=True)
class _Sheet:
    """The table and its notes; leaves out columns, costs first, where the terminal is narrow."""

    study: Study

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        def text(content: str, style: str = "") -> Text:
            return Text(content.translate(ASCII) if options.ascii_only else content, style=style)

        rows = [cells(arm, self.study) for arm in ranked(self.study)]
        headings, gap = _fitting(rows, options.max_width)
        table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
        for heading in headings:
            justify: JustifyMethod = "left" if heading == "arm" or heading.startswith("equal") else "right"
            table.add_column(text(_stacked(heading)), justify=justify, no_wrap=heading != "arm", vertical="bottom")
        for row in rows:
            style = "dim" if row["arm"] == CONTROL else None
            table.add_row(*(text(row[h], STYLES.get(row[h], "")) for h in headings), style=style)
        yield table
        yield from (Padding(text(f"- {note}"), (0, 0), expand=False) for note in notes(self.study))


def _stacked(heading: str) -> str:
    return heading.replace(" ", "\n", 1)


def _fitting(rows: list[dict[str, str]], width: int) -> tuple[list[str], int]:
    """The headings that fit and the gap between columns; side issues are dropped first, the p-value late."""
    headings = list(rows[0]) if rows else []
    widths = {h: max(len(text) for text in [*(row[h] for row in rows), *_stacked(h).split("\n")]) for h in headings}
    secondary = [h for h in headings[2:] if h.startswith("test ")]
    for dropped in (None, "memory", "CPU", *secondary, "equal examples", "p (Holm)", "equal time"):
        widths.pop(dropped or "", None)
        for gap in (2, 1):
            if sum(widths.values()) + gap * (len(widths) - 1) <= width:
                return list(widths), gap
    return list(widths), 1


def render(study: Study) -> RenderableType:
    """The study as a table: one row for each arm, best first, A/A control last, notes below."""
    return _Sheet(study)
