"""The command line: ``steep list | show | fit | compare | runs | report | claims``."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import torch
import typer
from rich.console import Console
from rich.table import Table

import steep
from steep.loop.training import RunError
from steep.method import Choice, Method, Range
from steep.tasks import tasks

if TYPE_CHECKING:
    from steep.evidence.study import RunRecord

P = ParamSpec("P")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Published training methods, and whether they help on your model.",
)
out = Console()

Log = Annotated[str | None, typer.Option(help="tensorboard, wandb, mlflow or another of Accelerate's trackers")]
RECIPE = "a task (see `steep list tasks`), file.py:recipe or package.module:recipe"
Recipe = Annotated[str, typer.Argument(help=RECIPE)]


def _plainly(command: Callable[P, None]) -> Callable[P, None]:
    """End a command with one line and exit code 2 on an expected error, and with 130 on Ctrl-C."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except steep.Interrupted as stop:
            _end(str(stop), 130)
        except KeyboardInterrupt:
            _end("Stopped. Finished runs are kept; rerun the same command to resume.", 130)
        except (KeyError, ValueError, TypeError, OSError, ArithmeticError, RunError) as error:
            _end(f"steep: {error}", 2)

    return run


def _end(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


@app.command("list")
@_plainly
def list_(what: Annotated[str, typer.Argument(help="methods or tasks")] = "methods") -> None:
    """List methods, or tasks."""
    if what not in ("methods", "tasks"):
        raise typer.BadParameter(f"{what!r} must be methods or tasks")
    table = Table(box=None, header_style="bold")
    for column in ("id", "changes", "what it does") if what == "methods" else ("task", "what it is"):
        table.add_column(column, no_wrap=not column.startswith("what"))
    if what == "methods":
        for method in steep.methods().values():
            table.add_row(method.id, method.changes, method.summary)
    else:
        for task in tasks().values():
            names = f" ({', '.join(task.variants)})" if task.variants else ""
            table.add_row(task.name + (":NAME" if task.variants else ""), task.summary + names)
    out.print(table)


@app.command()
@_plainly
def show(method: Annotated[str, typer.Argument(help="a method's id")]) -> None:
    """Show a method: what it does, formula, hyper-parameters, requirements, paper."""
    entry = steep.method(method)
    out.print(f"[bold]{entry.id}[/bold]  (changes: {entry.changes})\n", highlight=False)
    print(inspect.getdoc(sys.modules[entry.make.__module__]) or entry.summary, end="\n\n")
    out.print(_hyper_table(entry))
    if entry.requires:
        what = [steep.requires.REQUIREMENTS[name].what for name in sorted(entry.requires)]
        out.print("\nrequires  " + "\n          ".join(what), markup=False)
    paper = entry.paper
    year = f" ({paper.year})" if paper.year else ""
    out.print(f"\npaper     {paper.title}{year}\n          {paper.link or ''}", highlight=False, markup=False)


def _hyper_table(method: Method) -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("hyper-parameter", "default", "tuned over"):
        table.add_column(column)
    for name, default in method.hyper.items():
        table.add_row(name, repr(default), range_text(method.search_space.get(name)))
    return table


def range_text(values: Range | Choice | None) -> str:
    """A search range in words: "0.0001 to 0.1 (log)"."""
    if values is None:
        return ""
    if isinstance(values, Choice):
        return ", ".join(map(repr, values.options))
    return f"{values.low:g} to {values.high:g}{' (log)' if values.log else ''}"


@app.command()
@_plainly
def fit(
    recipe: Recipe,
    method: Annotated[
        list[str] | None, typer.Option(help="a method's id; repeat the option to combine methods")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="hyper-parameter: name=value or id.name=value")
    ] = None,
    seed: int = 0,
    split_seed: Annotated[
        int | None, typer.Option(help="seed of the data split; the same as --seed by default")
    ] = None,
    epochs: float | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    lr_scale: Annotated[float, typer.Option(help="factor on the learning rate of the recipe's own optimizer")] = 1.0,
    checkpoint: Annotated[Path | None, typer.Option(help="file to save to, and to resume from if it exists")] = None,
    device: Annotated[str | None, typer.Option(help="cpu; by default the accelerator, if there is one")] = None,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16")] = "no",
    accumulate: Annotated[int, typer.Option(help="number of parts to split each batch into, to save memory")] = 1,
    threads: Annotated[int | None, typer.Option(help="threads of torch; the runs of `steep compare` use 1")] = None,
    log: Log = None,
    json_: Annotated[bool, typer.Option("--json", help="print the result as JSON, with all digits")] = False,
) -> None:
    """Train a recipe once, with or without methods."""
    from steep.evidence.runs.jobs import arm_recipe
    from steep.evidence.runs.source import load_recipe

    if threads is not None:
        torch.set_num_threads(threads)
    ids = method or []
    hyper = _hyper(set_ or [], ids)
    loaded = load_recipe(recipe)
    limited = any(limit is not None for limit in (epochs, steps, seconds))
    budget = steep.Budget(epochs, steps, seconds) if limited else loaded.budget
    settings = {"lr_scale": lr_scale} | {f"{id}.{k}": v for id in ids for k, v in hyper[id].items()}
    result = steep.fit(
        arm_recipe(loaded, {}, tuple((id, hyper[id]) for id in ids), lr_scale, budget),
        seed=seed,
        split_seed=split_seed,
        checkpoint=checkpoint,
        device=device,
        precision=precision,
        accumulate=accumulate,
        log=steep.Log(log, config=settings) if log else None,
    )
    print(_as_json(result) if json_ else _in_words(loaded.name, result))


def _in_words(name: str, result: steep.Result) -> str:
    scores = "  ".join(f"test {name} {value:.4g}" for name, value in result.test.items())
    return f"{name}: {scores}  ({result.steps} steps, {result.seconds:.1f} s)"


def _as_json(result: steep.Result) -> str:
    names = ("val", "test", "steps", "examples", "seconds", "cpu_seconds", "peak_memory")
    return json.dumps({name: getattr(result, name) for name in names})


def _hyper(settings: Iterable[str], methods: list[str]) -> dict[str, dict[str, Any]]:
    """``name=value`` pairs by method; a name without a method's id needs exactly one method."""
    found: dict[str, dict[str, Any]] = {id: {} for id in methods}
    for setting in settings:
        name, equals, text = setting.partition("=")
        id, _, key = name.rpartition(".")
        id = id or (methods[0] if len(methods) == 1 else "")
        if not equals or id not in found:
            raise ValueError(f"--set {setting!r}: write name=value for one --method, or id.name=value for several")
        found[id][key] = _value(text)
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@app.command()
@_plainly
def compare(
    recipe: Annotated[str | None, typer.Argument(help=RECIPE, show_default=False)] = None,
    methods: Annotated[
        list[str] | None, typer.Option("--methods", "-m", help="ids ('a+b' joins two), or 'all'")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(help="further ids after --methods", show_default=False)] = None,
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
    log: Log = None,
    storage: Annotated[
        str | None,
        typer.Option(help="share the study among machines: postgresql://USER@HOST/DATABASE, or sqlite:///FILE on one"),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="resume the comparison that was started with this --out")] = None,
) -> None:
    """Compare methods with a recipe: equal tuning, paired seeds, verdicts.

    You can stop at any time; rerun the same command to resume.
    """
    from steep.evidence.compare import compare as run
    from steep.evidence.report.sentences import sentences
    from steep.evidence.report.table import render
    from steep.evidence.runs.shared import without_passwords

    if resume is not None:
        return _resume(resume)
    if recipe is None or not methods:
        raise ValueError("give a recipe and --methods, or --resume DIR")
    ids = [*methods, *(more or [])]
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
    out.print(render(study))
    for sentence in sentences(study):
        out.print(sentence, highlight=False, markup=False)
    print(f"report: {out_ / 'report.html'}")


def _resume(directory: Path) -> None:
    """Run the command that started a comparison again."""
    from steep.evidence.runs.store import open_store

    command = open_store(directory).command()
    print(command, file=sys.stderr)
    sys.argv = shlex.split(command)
    app()


@app.command()
@_plainly
def runs(
    directory: Annotated[Path, typer.Argument(help="the --out of a compare, finished or not")] = Path("steep-compare"),
    arm: Annotated[str | None, typer.Option(help="only this arm")] = None,
    role: Annotated[
        str | None, typer.Option(help="only tune, confirm, aa-control, equal-time or equal-examples")
    ] = None,
    outcome: Annotated[str | None, typer.Option(help="only finished or diverged")] = None,
    seed: Annotated[int | None, typer.Option(help="only this seed")] = None,
    json_: Annotated[bool, typer.Option("--json", help="one JSON object per line, with all fields")] = False,
) -> None:
    """List the runs that a comparison has finished so far."""
    from steep.evidence.runs.store import open_store

    wanted = {k: v for k, v in {"arm": arm, "role": role, "outcome": outcome, "seed": seed}.items() if v is not None}
    found = [r for r in open_store(directory).records() if all(getattr(r, k) == v for k, v in wanted.items())]
    found.sort(key=lambda r: (r.role, r.seed, r.arm))
    if json_:
        for record in found:
            print(json.dumps(record.to_json()))
    else:
        out.print(_runs_table(found))


def _runs_table(records: Iterable[RunRecord]) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in ("arm", "role", "seed", "settings", "outcome", "steps", "val loss", "test loss", "CPU s", "key"):
        table.add_column(heading)
    for r in records:
        settings = [f"{id}.{k}={v:.4g}" for id, hyper in r.methods for k, v in hyper.items() if isinstance(v, float)]
        losses = [f"{scores['loss']:.4g}" if "loss" in scores else "–" for scores in (r.val, r.test)]
        scale = [f"lr_scale={r.lr_scale:.4g}"] if r.lr_scale != 1 else []
        row = [r.arm, r.role, str(r.seed), " ".join([*scale, *settings]), r.outcome, str(r.steps), *losses]
        table.add_row(*row, f"{r.cpu_seconds:.1f}", r.key[:8])
    return table


@app.command()
@_plainly
def claims(
    ids: Annotated[list[str] | None, typer.Argument(help="methods; all by default", show_default=False)] = None,
    folder: Annotated[Path, typer.Option("--claims", help="folder of claims")] = Path("claims"),
    ledger: Annotated[
        Path | None, typer.Option(help="folder of their outcomes (default: ledger, beside --claims)")
    ] = None,
    out_: Annotated[Path, typer.Option("--out", help="folder that keeps runs, to resume from")] = Path("out/claims"),
    smoke: Annotated[bool, typer.Option("--smoke", help="run each as small as possible and keep nothing")] = False,
    list_: Annotated[bool, typer.Option("--list", help="only show outcomes, and whether the code has changed")] = False,
    workers: Annotated[int, typer.Option(help="processes of one thread each")] = 1,
) -> None:
    """Run the claims that are new or whose code has changed, and show all verdicts."""
    from steep.evidence.claims import ledger as entries

    place = ledger or folder.parent / "ledger"
    chosen = entries.choose(entries.load_claims(folder), ids or [])
    for claim, path in chosen:
        if smoke:
            print(f"{claim.id}: {', '.join(entries.smoke(claim)) or claim.reason}", flush=True)
        elif not list_ and entries.state(claim, path, entries.read(place, claim.id)) != "current":
            print(f"{claim.id}: running", file=sys.stderr, flush=True)
            entries.write(entries.run(claim, path, out_, workers=workers), place)
    if not smoke:
        found = [(claim, path, entries.read(place, claim.id)) for claim, path in chosen]
        out.print(_claims_table([(claim, entry, entries.state(claim, path, entry)) for claim, path, entry in found]))


@app.command()
@_plainly
def report(
    directory: Annotated[Path, typer.Argument(help="the --out of a finished compare")] = Path("steep-compare"),
) -> None:
    """Print the table of a finished comparison again, and rewrite its report."""
    from steep.evidence.report import page
    from steep.evidence.report.table import render
    from steep.evidence.runs.store import open_store

    study = open_store(directory).study()
    out.print(render(study))
    print(f"report: {page.write(study, directory)}")


def _claims_table(rows: Iterable[tuple[Any, Any, str]]) -> Table:
    from steep.evidence.claims.verdicts import numbers

    table = Table(box=None, header_style="bold")
    for column in ("claim", "state", "verdict", "what was measured"):
        table.add_column(column, no_wrap=column in ("claim", "state"))
    for claim, entry, state in rows:
        table.add_row(
            claim.id, state, entry.verdict if entry else "", "" if entry and entry.quantities else claim.reason
        )
        for result in entry.quantities if entry else ():
            table.add_row("", "", result.verdict, f"{result.quantity.name}: {numbers(result)}")
    return table


def main() -> None:
    """Entry point of the command ``steep``."""
    app()
