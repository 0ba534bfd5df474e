"""A study as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from steep.evidence.report.rows import (
    NOTHING,
    comparisons,
    cost_ratio,
    kinds,
    median_test,
    ranked,
    score_names,
    verdict,
)
from steep.evidence.report.sentences import sentence, statement
from steep.evidence.report.wording import compact, number, significance
from steep.evidence.study import CONTROL, ArmResult, Study

STYLES = {"helps": "green", "hurts": "red", NOTHING: "yellow", "too few seeds": "yellow"}
ASCII = str.maketrans({"×": "x", "÷": "/", "−": "-", "–": "-", "∞": "inf"})


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
        "CPU": cost_ratio(arm, study, lambda run: run.total_cpu_seconds),
        "memory": cost_ratio(arm, study, lambda run: run.peak_memory),
    }


def all_cells(study: Study) -> list[dict[str, str]]:
    """The rows of every arm, best first."""
    return [cells(arm, study) for arm in ranked(study)]


def _other_examples(study: Study) -> bool:
    """Whether any arm sees another number of examples than the baseline in as many steps."""
    return any("equal examples" in dict(kinds(arm)) for arm in study.arms)


def notes(study: Study) -> Iterator[str]:
    """What a reader of the table must also know."""
    yield from study.warnings
    for arm in study.arms:
        if arm.did_nothing:
            yield f"{arm.name} {sentence(statement(arm, study))}"
    for name, reason in study.left_out.items():
        yield f"left out: {name} ({reason})"


@dataclass(frozen=True)
class _StudyTable:
    """The table and its notes. Where the terminal is narrow, columns are left out, those of costs first."""

    study: Study

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        def text(content: str, style: str = "") -> Text:
            return Text(content.translate(ASCII) if options.ascii_only else content, style=style)

        rows = all_cells(self.study)
        headings, gap = _fitting(rows, options.max_width)
        table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
        for heading in headings:
            justify: JustifyMethod = "left" if heading == "arm" or heading.startswith("equal") else "right"
            table.add_column(text(_stacked(heading)), justify=justify, no_wrap=heading != "arm", vertical="bottom")
        for row in rows:
            style = "dim" if row["arm"] == CONTROL else None
            table.add_row(*(text(row[h], STYLES.get(row[h], "")) for h in headings), style=style)
        yield table
        if rows and len(headings) < len(rows[0]):
            absent = ", ".join(h for h in rows[0] if h not in headings)
            yield text(f"Left out at this width: {absent} (see --json, or a wider terminal).", "dim")
        yield from (Padding(text(f"- {note}"), (0, 0), expand=False) for note in notes(self.study))


def _stacked(heading: str) -> str:
    return heading.replace(" ", "\n", 1)


def _fitting(rows: list[dict[str, str]], width: int) -> tuple[list[str], int]:
    """The headings that fit and the gap between columns; costs are dropped first, verdicts at equal time last."""
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
    return _StudyTable(study)
