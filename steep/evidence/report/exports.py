"""A study as Markdown for a note, and as CSV for another program."""

from __future__ import annotations

import csv as csv_format
import html
import io
from collections.abc import Sequence

from steep.evidence.report import rows
from steep.evidence.report.reproduce import command, first_commands
from steep.evidence.report.sentences import headline, sentences
from steep.evidence.report.table import all_cells, notes
from steep.evidence.report.wording import settings
from steep.evidence.study import CONTROL, RunRecord, Study


def markdown(study: Study) -> str:
    """Verdicts, table, settings and the commands that repeat them, for a note or a pull request."""
    arms = rows.ranked(study)
    lines = [line for arm in arms for _, _, line in first_commands(arm, study.source)[:1]]
    chosen = [[arm.name, settings(arm.hyper)] for arm in arms if arm.name != CONTROL]
    parts = [
        f"# {_plain(study.recipe)}: {_plain(headline(study))}",
        "\n".join(f"- {_plain(sentence)}" for sentence in sentences(study)),
        _table(study) if arms else "",
        "\n".join(f"- {_plain(note)}" for note in notes(study)),
        f"{len(study.seeds)} paired seeds. Settings after tuning:",
        _pipes(["arm", "settings"], chosen),
        "To repeat the study, or the first run of each row:" if study.command or study.source else "",
        _code("\n".join(filter(None, [study.command, *lines]))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(study: Study) -> str:
    found = all_cells(study)
    return _pipes(list(found[0]), [list(row.values()) for row in found])


def _plain(text: str) -> str:
    """Text on one line, without anything that Markdown would interpret."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "\\`")


def _pipes(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def csv(study: Study) -> str:
    """Every run, one line each, with its final scores and the command that repeats it."""
    plain = ["role", "seed", "split_seed", "lr_scale", "outcome", "message", "steps", "examples", "seconds"]
    plain += ["cpu_seconds", "peak_memory", "key"]
    buffer = io.StringIO()
    lines = csv_format.writer(buffer, lineterminator="\n")
    final = [f"{kind}_{name}" for kind in ("val", "test") for name in study.metrics]
    lines.writerow(["arm", "methods", *plain, *final, "command"])
    for arm, run in rows.all_runs(study):
        scores = [found.get(name, "") for found in (run.val, run.test) for name in study.metrics]
        values = [getattr(run, name) for name in plain]
        lines.writerow([arm.name, _methods(run), *values, *scores, command(run, study.source)])
    return buffer.getvalue()


def _methods(run: RunRecord) -> str:
    return " + ".join(f"{name}({settings(hyper) if hyper else ''})" for name, hyper in run.methods)
