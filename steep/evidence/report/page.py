"""A finished study as files to keep: one self-contained HTML page, Markdown for a note, CSV for another program."""

from __future__ import annotations

import base64
import csv as csv_format
import gzip
import hashlib
import html as markup
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError
from plotly.offline import get_plotlyjs

from steep.evidence.report import figures, table
from steep.evidence.report.reproduce import command
from steep.evidence.study import ArmResult, RunRecord, Study
from steep.utils.files import write_atomic

HERE = Path(__file__).parent
LARGEST_PNG = 32 * 1024  # bytes; larger pictures are embedded as WebP of at most PIXELS a side
PIXELS = 384
ORDER = ("helps", "hurts", "no evidence", "too few seeds", table.NOTHING, "not compared")


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
    """The page: needs no network and no other file.

    Args:
        study: what was found.
        store_dir: where the paths of its pictures begin.
    """
    files = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    files.filters |= {"settings": settings, "number": table.number, "thin": thin, "capital": capital}
    return files.get_template("report.html").render(
        study=study,
        headline=headline(study),
        best=best(study),
        glance=glance(study),
        verdicts=[(arm, table.said_of(arm, study)) for arm in table.ranked(study)[1:]],
        rows=[(arm, table.cells(arm, study)) for arm in table.ranked(study)],
        unfinished=[(a, n) for a in study.arms if (n := sum(run.outcome != "finished" for run in a.runs))],
        forest=figures.forest(study),
        curves=figures.curves(study),
        styles=figures.styles(study),
        times=figures.times_to_target(study),
        costs=[(arm, costs(arm, study)) for arm in table.ranked(study)],
        tuning=figures.tuning(study),
        runs=list(_runs(study)),
        arms=table.ranked(study),
        target=picture(Path(store_dir), study.target_picture),
        pictures=list(pictures(study, Path(store_dir))),
        environment=environment(study),
        control=table.CONTROL,
        again=[(arm, again(arm, study)) for arm in table.ranked(study)],
        kinds=table.kinds,
        css=_source("report.css"),
        js=_source("report.js"),
        scripts=[_fingerprint(_source("report.js")), _fingerprint(get_plotlyjs())],
        plotly=compressed_plotly(),
    )


def _source(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))


@cache
def _fingerprint(script: str) -> Markup:
    """What a page's security policy calls a script that may run; no other may."""
    return Markup("'sha256-{}'").format(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())


@cache
def compressed_plotly() -> str:
    """Plotly's script, 1.5 MB instead of 5; the browser inflates it."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def headline(study: Study) -> str:
    """The conclusion in one sentence: "Of 5 methods, 2 help, 1 hurts and 2 show no evidence of a difference"."""
    arms = table.methods(study)
    if not arms:
        return "No method was compared"
    verdicts = Counter(table.verdict(arm, arm.scores.get(study.primary)) for arm in arms)
    phrases = {
        "helps": ("helps", "help"),
        "hurts": ("hurts", "hurt"),
        "no evidence": ("shows no evidence of a difference", "show no evidence of a difference"),
        "too few seeds": ("has too few seeds for a verdict", "have too few seeds for a verdict"),
        table.NOTHING: ("did nothing", "did nothing"),
        "": ("could not be compared", "could not be compared"),
    }
    found = [(n, phrases[name][n > 1]) for name in phrases if (n := verdicts[name])]
    if len(arms) == 1:
        return f"{arms[0].name} {found[0][1]}"
    clauses = [f"{n} {phrase}" for n, phrase in found]
    if len(clauses) == 1:
        return f"All {len(arms)} methods {found[0][1]}" if found[0][0] > 1 else clauses[0]
    return f"Of {len(arms)} methods, {', '.join(clauses[:-1])} and {clauses[-1]}"


def best(study: Study) -> tuple[ArmResult, str] | None:
    """The method that helps most, and what it gains at which cost; `None` where none helps."""
    arm = next((a for a in table.methods(study) if _verdict(a, study) == "helps"), None)
    if arm is None:
        return None
    said, c, price = table.said_of(arm, study), arm.scores[study.primary], _price(arm, study)
    sure = f" (95 % interval {table.interval(c, study.metrics[c.score])})" if math.isfinite(c.estimate) else ""
    later = f"; {said.at_equal_time}" if said.at_equal_time else ""
    return arm, f"{said.finding}{sure}{price} at equal steps{later}"


def _price(arm: ArmResult, study: Study) -> str:
    ratio = table.cost_ratio(arm, study, lambda run: run.cpu_seconds)
    return f", for {ratio} the CPU time," if ratio != "–" else ""


def _verdict(arm: ArmResult, study: Study) -> str:
    return table.verdict(arm, arm.scores.get(study.primary)) or "not compared"


def glance(study: Study) -> list[tuple[str, list[tuple[str, str]]]]:
    """Per verdict, the methods that have it, from best to worst, each with its change in a word."""
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in ORDER}
    for arm in table.methods(study):
        found[_verdict(arm, study)].append((arm.name, _change(arm, study)))
    return [(verdict, arms) for verdict, arms in found.items() if arms]


def _change(arm: ArmResult, study: Study) -> str:
    """An arm's change, and what is judged otherwise than at equal steps: "−41 % (equal time: no evidence)"."""
    found = table.comparisons(arm, study.primary)
    c = found.pop("equal steps", None)
    if c is None or arm.did_nothing:
        return ""
    other = ", ".join(f"{kind}: {o.verdict}" for kind, o in found.items() if o.verdict != c.verdict)
    return table.compact(c, study.metrics[c.score]).partition(" [")[0] + (f" ({other})" if other else "")


def again(arm: ArmResult, study: Study) -> list[tuple[str, RunRecord, str]]:
    """The first of each kind of an arm's runs, and how to repeat it."""
    return [(kind, runs[0], line) for kind, runs in table.kinds(arm) if (line := command(runs[0], study.source))]


def settings(values: Mapping[str, Any]) -> str:
    """Hyper-parameters on one line: "rank=64, rtol=0.001"."""
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()) or "–"


def thin(text: str) -> str:
    """Keep numbers and their per cent signs on one line."""
    return text.replace(" %", "\u202f%")


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def grouped(value: float) -> str:
    """Three digits, or all with thousands apart: "0.0281", "1.4", "16 000"."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}".replace(",", "\u202f")


def costs(arm: ArmResult, study: Study) -> dict[str, str]:
    """What an arm costs, medians over the finished runs, by heading."""

    def value(of: Any, scale: float = 1.0) -> str:
        found = table.cost(arm, of)
        return "–" if found is None else grouped(found * scale)

    prepared = any(_preparation(run) for other in study.arms for run in other.runs)
    return {
        "seconds": value(lambda run: run.seconds),
        "× baseline": table.cost_ratio(arm, study, lambda run: run.seconds),
        "CPU seconds": value(lambda run: run.cpu_seconds),
        **({"preparation, CPU s": value(_preparation)} if prepared else {}),
        "ms per step": value(lambda run: run.seconds / run.steps if run.steps else None, 1000),
        "steps": value(lambda run: run.steps),
        "examples": value(lambda run: run.examples),
        "peak memory, MB": value(lambda run: run.peak_memory, 1e-6),
        "memory × baseline": table.cost_ratio(arm, study, lambda run: run.peak_memory),
    }


def _preparation(run: RunRecord) -> float:
    """CPU seconds before the first step, where they were measured."""
    return run.preparation_seconds


def environment(study: Study) -> dict[str, str]:
    """Versions and hardware of the runs; several values where they differ."""
    found: dict[str, set[str]] = {}
    for _, run in _runs(study):
        for key, value in {**run.versions, **run.hardware}.items():
            if value is not None:
                found.setdefault(key, set()).add(str(value))
    return {key: ", ".join(sorted(values)) for key, values in found.items()}


# Pictures -----------------------------------------------------------------------------------------------------------


def pictures(study: Study, store: Path) -> Iterator[tuple[ArmResult, RunRecord, str | None]]:
    """Of every arm that draws: the run whose test score is the median, and its picture."""
    for arm in table.ranked(study):
        drawn = [run for run in arm.runs if run.picture and study.primary in run.test]
        if drawn:
            run = sorted(drawn, key=lambda run: run.test[study.primary])[(len(drawn) - 1) // 2]
            yield arm, run, picture(store, run.picture)


def picture(store: Path, name: str | None) -> str | None:
    """A picture of the store as a data URI, large ones made smaller; `None` if it is missing or no picture."""
    path = store / name if name else None
    if path is None or not path.resolve().is_relative_to(store.resolve()):
        return None
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format or ""
            if kind != "PNG" or len(data) > LARGEST_PNG:
                kind, data = "WEBP", _smaller(image)
    except (OSError, UnidentifiedImageError):
        return None
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


def _smaller(image: Image.Image) -> bytes:
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((PIXELS, PIXELS))
    small.save(buffer, "WEBP", quality=90)
    return buffer.getvalue()


# Markdown and CSV ---------------------------------------------------------------------------------------------------


def markdown(study: Study) -> str:
    """Verdicts, table, settings and how to repeat them, for a note or a pull request."""
    rows = [table.cells(arm, study) for arm in table.ranked(study)]
    lines = [line for arm in table.ranked(study) for _, _, line in again(arm, study)[:1]]
    chosen = [[arm.name, settings(arm.hyper)] for arm in table.ranked(study) if arm.name != table.CONTROL]
    parts = [
        f"# {_plain(study.recipe)}: {_plain(headline(study))}",
        "\n".join(f"- {_plain(sentence)}" for sentence in table.sentences(study)),
        _pipes(list(rows[0]), [list(row.values()) for row in rows]) if rows else "",
        "\n".join(f"- {_plain(note)}" for note in table.notes(study)),
        f"{len(study.seeds)} paired seeds. Settings after tuning:",
        _pipes(["arm", "settings"], chosen),
        "The study again, and the first run of each row:" if study.command or study.source else "",
        _code("\n".join(filter(None, [study.command, *lines]))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown takes for text, on one line."""
    return markup.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "\\`")


def _pipes(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def _runs(study: Study) -> Iterator[tuple[ArmResult, RunRecord]]:
    for arm in study.arms:
        yield from ((arm, run) for runs in (arm.trials, *dict(table.kinds(arm)).values()) for run in runs)


def csv(study: Study) -> str:
    """Every run, one line each, with its final scores and the command that repeats it."""
    plain = ["role", "seed", "split_seed", "lr_scale", "outcome", "message", "steps", "examples", "seconds"]
    plain += ["cpu_seconds", "peak_memory", "key"]
    buffer = io.StringIO()
    lines = csv_format.writer(buffer, lineterminator="\n")
    final = [f"{kind}_{name}" for kind in ("val", "test") for name in study.metrics]
    lines.writerow(["arm", "methods", *plain, *final, "command"])
    for arm, run in _runs(study):
        scores = [found.get(name, "") for found in (run.val, run.test) for name in study.metrics]
        values = [getattr(run, name) for name in plain]
        lines.writerow([arm.name, _methods(run), *values, *scores, command(run, study.source)])
    return buffer.getvalue()


def _methods(run: RunRecord) -> str:
    return " + ".join(f"{name}({settings(hyper) if hyper else ''})" for name, hyper in run.methods)
