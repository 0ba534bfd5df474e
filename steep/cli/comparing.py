"""``steep compare`` and what shows its outcome: ``steep resume``, ``steep runs`` and ``steep report``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steep.cli._app import (
    RECIPE,
    JsonOption,
    LogOption,
    command,
    complete_methods,
    complete_tasks,
    main,
    out,
    show_table,
)

if TYPE_CHECKING:
    from steep.evidence.study import RunRecord, Study

ROLES = ("tune", "confirm", "aa-control", "equal-time", "equal-examples")


@command()
def compare(
    recipe: Annotated[
        str | None, typer.Argument(help=RECIPE, show_default=False, autocompletion=complete_tasks)
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "-m",
            help="ids, ID:NAME=VALUE to fix a hyper-parameter, FILE.py:NAME for your own, ID+ID to join two; or all",
            autocompletion=complete_methods,
        ),
    ] = None,
    more: Annotated[
        list[str] | None, typer.Argument(help="further methods after --methods", show_default=False)
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="choose trials and seeds that fit into this time")] = None,
    seeds: Annotated[int | None, typer.Option(help="paired confirmation seeds (default: 8)")] = None,
    trials: Annotated[int | None, typer.Option(help="tuning trials per arm (default: 8)")] = None,
    workers: Annotated[int | None, typer.Option(help="processes of one thread each (default: one per core)")] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="analyse after a quarter, half and all of 16 seeds; decided arms stop")
    ] = False,
    score: Annotated[
        str, typer.Option(help="the score that verdicts are about: loss, or the recipe's metric")
    ] = "loss",
    out_: Annotated[Path, typer.Option("--out", help="directory for runs and report")] = Path("steep-compare"),
    log: LogOption = None,
    storage: Annotated[
        str | None,
        typer.Option(help="share the study among machines: postgresql://USER@HOST/DATABASE, or sqlite:///FILE on one"),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="resume the comparison that was started with this --out")] = None,
    json_: JsonOption = False,
) -> None:
    """Compare methods with a recipe: equal tuning, paired seeds, verdicts.

    You can stop at any time; rerun the same command to resume.
    """
    if resume is not None:
        return _resume(resume)
    if recipe is None or not methods:
        raise ValueError("give a recipe and --methods, or --resume DIR")
    ids = [*methods, *(more or [])]
    print(f"Comparing {' '.join(ids)} on {recipe}; runs and report: {out_}", file=sys.stderr, flush=True)
    # after the first line, as the libraries take seconds to load
    from steep.evidence.compare import compare as run
    from steep.evidence.runs.shared import without_passwords

    study = run(
        recipe,
        "all" if ids == ["all"] else ids,
        minutes=minutes,
        seeds=seeds,
        trials=trials,
        workers=workers,
        out=out_,
        score=score,
        sequential=sequential,
        command=shlex.join(["steep", *without_passwords(sys.argv[1:])]),
        log=log,
        storage=storage,
    )
    _show(study, out_, json_)


def _show(study: Study, directory: Path, as_json: bool) -> None:
    """The table, the verdicts in sentences, and where the report is."""
    from steep.evidence.report.sentences import sentences
    from steep.evidence.report.table import all_cells, render

    if as_json:
        return show_table(all_cells(study), True)
    out.print(render(study))
    for sentence in sentences(study):
        out.print(sentence, highlight=False, markup=False)
    print(f"report: {directory / 'report.html'}")


@command()
def resume(directory: Annotated[Path, typer.Argument(help="the --out of a compare")] = Path("steep-compare")) -> None:
    """Go on with a comparison that was stopped, by the command that started it."""
    _resume(directory)


def _resume(directory: Path) -> None:
    """Run the command that started a comparison again."""
    from steep.evidence.runs.store import open_store

    command = open_store(directory).command()
    print(command, file=sys.stderr)
    sys.argv = shlex.split(command)
    main()


@command()
def runs(
    directory: Annotated[Path, typer.Argument(help="the --out of a compare, finished or not")] = Path("steep-compare"),
    arm: Annotated[str | None, typer.Option(help="only this arm")] = None,
    role: Annotated[str | None, typer.Option(help=f"only {', '.join(ROLES[:-1])} or {ROLES[-1]}")] = None,
    outcome: Annotated[str | None, typer.Option(help="only finished or diverged")] = None,
    seed: Annotated[int | None, typer.Option(help="only this seed")] = None,
    json_: Annotated[bool, typer.Option("--json", help="one JSON object per line, with all fields")] = False,
) -> None:
    """List the runs that a comparison has finished so far."""
    from steep.evidence.runs.store import open_store

    wanted = {k: v for k, v in {"arm": arm, "role": role, "outcome": outcome, "seed": seed}.items() if v is not None}
    records = list(open_store(directory).records())
    known = {"arm": {r.arm for r in records}, "role": ROLES, "outcome": ("finished", "diverged")}
    for name in known.keys() & wanted.keys():
        if wanted[name] not in known[name]:
            raise ValueError(f"--{name} {wanted[name]!r} is none of {', '.join(sorted(known[name]))}")
    found = [r for r in records if all(getattr(r, k) == v for k, v in wanted.items())]
    found.sort(key=lambda r: (r.role, r.seed, r.arm))
    if json_:
        for record in found:
            print(json.dumps(record.to_json()))
    else:
        show_table(list(_run_rows(found)), False, "arm", "settings")


def _run_rows(records: Iterable[RunRecord]) -> Iterable[dict[str, Any]]:
    for r in records:
        prefix = len(r.methods) > 1
        chosen = {f"{id}.{k}" if prefix else k: v for id, hyper in r.methods for k, v in hyper.items()}
        scale = {"lr_scale": r.lr_scale} if r.lr_scale != 1 else {}
        settings = " ".join(f"{k}={v:.4g}" for k, v in (scale | chosen).items() if isinstance(v, float))
        scores = [f"{scores['loss']:.4g}" if "loss" in scores else "diverged" for scores in (r.val, r.test)]
        start = {"arm": r.arm, "role": r.role, "seed": r.seed, "settings": settings, "steps": r.steps}
        yield start | {"val loss": scores[0], "test": scores[1], "CPU s": f"{r.cpu_seconds:.1f}", "key": r.key[:6]}


@command()
def report(
    directory: Annotated[Path, typer.Argument(help="the --out of a finished compare")] = Path("steep-compare"),
    json_: JsonOption = False,
) -> None:
    """Print the table of a finished comparison again, and rewrite its report."""
    from steep.evidence.report import page
    from steep.evidence.runs.store import open_store

    study = open_store(directory).study()
    page.write(study, directory)
    _show(study, directory, json_)
