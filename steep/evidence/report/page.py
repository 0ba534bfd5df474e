"""The report of a finished study as one self-contained HTML page."""

from __future__ import annotations

import base64
import gzip
import hashlib
import math
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from steep.evidence.report import curves, figures, rows, wording
from steep.evidence.report.exports import csv, markdown
from steep.evidence.report.pictures import picture, pictures
from steep.evidence.report.reproduce import first_commands
from steep.evidence.report.sentences import headline, statement
from steep.evidence.report.table import cells
from steep.evidence.study import CONTROL, ArmResult, Study
from steep.utils.files import write_atomic

HERE = Path(__file__).parent
ORDER = ("helps", "hurts", "no evidence", "too few seeds", rows.NOTHING, "not compared")


def write(study: Study, store_dir: str | Path) -> Path:
    """Write report.html, report.md and report.csv into the store; returns the page's path.

    Raises:
        OSError: the folder cannot be written to; files already there are untouched.
    """
    folder = Path(store_dir)
    write_atomic(folder / "report.md", markdown(study))
    write_atomic(folder / "report.csv", csv(study))
    write_atomic(folder / "report.html", html(study, folder))
    return folder / "report.html"


def html(study: Study, store_dir: str | Path) -> str:
    """The page, which needs no network and no other file.

    Args:
        study: what was found.
        store_dir: the folder that the paths of its pictures are relative to.
    """
    files = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    files.filters |= {"settings": wording.settings, "number": wording.number, "thin": _thin, "capital": _capital}
    return files.get_template("report.html").render(
        study=study,
        headline=headline(study),
        best=_best(study),
        glance=_glance(study),
        verdicts=[(arm, statement(arm, study)) for arm in rows.ranked(study)[1:]],
        rows=[(arm, cells(arm, study)) for arm in rows.ranked(study)],
        unfinished=[(a, n) for a in study.arms if (n := sum(run.outcome != "finished" for run in a.runs))],
        forest=figures.forest(study),
        curves=curves.curves(study),
        times=figures.times_to_target(study),
        costs=[(arm, _costs(arm, study)) for arm in rows.ranked(study)],
        tuning=figures.tuning(study),
        tuned=any(len(arm.trials) > 1 for arm in study.arms),
        arms=rows.ranked(study),
        target=picture(Path(store_dir), study.target_picture),
        pictures=list(pictures(study, Path(store_dir))),
        environment=_environment(study),
        control=CONTROL,
        reproduce=[(arm, first_commands(arm, study.source)) for arm in rows.ranked(study)],
        kinds=rows.kinds,
        css=_source("report.css"),
        js=_source("report.js"),
        scripts=[_fingerprint(_source("report.js")), _fingerprint(get_plotlyjs())],
        plotly=_compressed_plotly(),
    )


def _source(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))


@cache
def _fingerprint(script: str) -> Markup:
    """How the page's security policy names a script that may run; it blocks all others."""
    return Markup("'sha256-{}'").format(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())


@cache
def _compressed_plotly() -> str:
    """Plotly's script, 1.5 MB instead of 5; the browser inflates it."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _best(study: Study) -> tuple[ArmResult, str] | None:
    """The method that helps most, with its gain and cost in words; `None` where none helps."""
    arm = next((a for a in rows.asked_for(study) if _verdict(a, study) == "helps"), None)
    if arm is None:
        return None
    words, c, price = statement(arm, study), arm.scores[study.primary], _price(arm, study)
    sure = f" (95 % interval {wording.interval(c, study.metrics[c.score])})" if math.isfinite(c.estimate) else ""
    later = f"; {words.at_equal_time}" if words.at_equal_time else ""
    return arm, f"{words.finding}{sure}{price} at equal steps{later}"


def _price(arm: ArmResult, study: Study) -> str:
    ratio = rows.cost_ratio(arm, study, lambda run: run.total_cpu_seconds)
    return f", for {ratio} the CPU time," if ratio != "–" else ""


def _verdict(arm: ArmResult, study: Study) -> str:
    return rows.verdict(arm, arm.scores.get(study.primary)) or "not compared"


def _glance(study: Study) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each verdict the methods that have it, from best to worst, each with its change."""
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in ORDER}
    for arm in rows.methods(study):
        found[_verdict(arm, study)].append((arm.name, _change(arm, study)))
    return [(verdict, arms) for verdict, arms in found.items() if arms]


def _change(arm: ArmResult, study: Study) -> str:
    """An arm's change, and every verdict that differs from the one at equal steps: "−41 % (equal time: hurts)"."""
    found = rows.comparisons(arm, study.primary)
    c = found.pop("equal steps", None)
    if c is None or arm.did_nothing:
        return ""
    other = ", ".join(f"{kind}: {o.verdict}" for kind, o in found.items() if o.verdict != c.verdict)
    return wording.compact(c, study.metrics[c.score]).partition(" [")[0] + (f" ({other})" if other else "")


def _thin(text: str) -> str:
    """Keep numbers and their per cent signs on one line."""
    return text.replace(" %", "\u202f%")


def _capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def _grouped(value: float) -> str:
    """Three digits, or all with thousands apart: "0.0281", "1.4", "16 000"."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}".replace(",", "\u202f")


def _costs(arm: ArmResult, study: Study) -> dict[str, str]:
    """What an arm costs, medians over the finished runs, by heading."""

    def value(of: Any, scale: float = 1.0) -> str:
        found = rows.cost(arm, of)
        return "–" if found is None else _grouped(found * scale)

    prepared = any(run.preparation_seconds for other in study.arms for run in other.runs)
    return {
        "seconds": value(lambda run: run.seconds),
        "× baseline": rows.cost_ratio(arm, study, lambda run: run.seconds),
        "CPU seconds": value(lambda run: run.cpu_seconds),
        **({"preparation, CPU s": value(lambda run: run.preparation_seconds)} if prepared else {}),
        "ms per step": value(lambda run: run.seconds / run.steps if run.steps else None, 1000),
        "steps": value(lambda run: run.steps),
        "examples": value(lambda run: run.examples),
        "peak memory, MB": value(lambda run: run.peak_memory, 1e-6),
        "memory × baseline": rows.cost_ratio(arm, study, lambda run: run.peak_memory),
    }


def _environment(study: Study) -> dict[str, str]:
    """Versions and hardware of the runs; several values where they differ."""
    found: dict[str, set[str]] = {}
    for _, run in rows.all_runs(study):
        for key, value in {**run.versions, **run.hardware}.items():
            if value is not None:
                found.setdefault(key, set()).add(str(value))
    return {key: ", ".join(sorted(values)) for key, values in found.items()}
