"""``steep list``, ``steep show`` and ``steep claims``: what there is, and what is known about it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

import steep
from steep.cli._app import JsonOption, command, complete_methods, out, show_table
from steep.method import PACKAGES, PURPOSES, Choice, Method, Range
from steep.requires import REQUIREMENTS
from steep.tasks import tasks
from steep.utils.validation import nearest


@command("list")
def list_(
    what: Annotated[str, typer.Argument(help="methods or tasks")] = "methods",
    search: Annotated[str, typer.Option(help="only where all these words occur in id, summary or paper")] = "",
    changes: Annotated[
        str | None, typer.Option(help="only methods that change this: optim, losses, models ...")
    ] = None,
    good_for: Annotated[str | None, typer.Option("--for", help=f"only methods for this: {', '.join(PURPOSES)}")] = None,
    requires: Annotated[str | None, typer.Option(help="only methods that require this: indices, classes ...")] = None,
    json_: JsonOption = False,
) -> None:
    """List methods, or tasks."""
    if what not in ("methods", "tasks"):
        raise typer.BadParameter(f"{what!r} must be methods or tasks")
    for option, value, known in (
        ("--changes", changes, PACKAGES),
        ("--for", good_for, PURPOSES),
        ("--requires", requires, REQUIREMENTS),
    ):
        if value is not None and value not in known:
            raise ValueError(f"{option} {value!r} is unknown{nearest(value, known)}")
        if value is not None and what == "tasks":
            raise ValueError(f"{option} is about methods: leave it out for tasks")
    if what == "tasks":
        show_table([row for row in _task_rows() if _matches(search, row.values())], json_, "what it is")
        return
    found = [
        method
        for method in steep.methods().values()
        if changes in (None, method.changes)
        and (good_for is None or good_for in method.good_for)
        and (requires is None or requires in method.requires)
        and _matches(search, (method.id, method.changes, method.summary, method.paper.title))
    ]
    rows: list[dict[str, Any]] = [{"id": m.id, "changes": m.changes, "what it does": m.summary} for m in found]
    if json_:
        more = [
            {
                "good for": sorted(m.good_for),
                "requires": sorted(m.requires),
                "paper": m.paper.title,
                "link": m.paper.link,
            }
            for m in found
        ]
        rows = [row | extra for row, extra in zip(rows, more, strict=True)]
    show_table(rows, json_, "what it does")


def _task_rows() -> list[dict[str, Any]]:
    names = {task: f" ({', '.join(task.variants)})" if task.variants else "" for task in tasks().values()}
    return [
        {"task": task.name + (":NAME" if task.variants else ""), "what it is": task.summary + variants}
        for task, variants in names.items()
    ]


def _matches(search: str, texts: Iterable[str]) -> bool:
    text = " ".join(texts).lower()
    return all(word in text for word in search.lower().split())


@command()
def show(
    method: Annotated[str, typer.Argument(help="a method's id", autocompletion=complete_methods)],
    json_: JsonOption = False,
) -> None:
    """Show a method: what it does, formula, hyper-parameters, requirements, evidence, paper."""
    entry = steep.method(method)
    measured = _measured(entry)
    hyper = [
        {"hyper-parameter": name, "default": repr(default), "tuned over": range_text(entry.search_space.get(name))}
        for name, default in entry.hyper.items()
    ]
    requires = [REQUIREMENTS[name].what for name in sorted(entry.requires)]
    if json_:
        about = {"id": entry.id, "changes": entry.changes, "summary": entry.summary, "formula": entry.formula}
        paper = {"paper": entry.paper.title, "year": entry.paper.year, "link": entry.paper.link}
        show_table([about | {"hyper": hyper, "requires": requires, "measured": measured} | paper], True)
        return
    out.print(f"[bold]{entry.id}[/bold]  (changes: {entry.changes})\n", highlight=False)
    print(inspect.getdoc(sys.modules[entry.make.__module__]) or entry.summary, end="\n\n")
    if hyper:
        show_table(hyper, False)
    if example := _example(entry):
        print(f"\n{example}")
    year = f" ({entry.paper.year})" if entry.paper.year else ""
    sections = {
        "requires": requires,
        "measured": [measured] if measured else [],
        "try it": [f"steep compare {_task_for(entry)} --methods {entry.id} --minutes 5"] if entry.is_arm else [],
        "paper": [f"{entry.paper.title}{year}", entry.paper.link or ""],
    }
    for title, lines in sections.items():
        for i, line in enumerate(lines):
            out.print(f"{'' if i else title:9} {line}", highlight=False, markup=False, soft_wrap=True)


def _example(method: Method) -> str:
    """The example of a method's docstring, without the prompts."""
    _, _, block = (inspect.getdoc(method.make) or "").partition("Example:\n")
    lines = [line.strip() for line in block.splitlines()]
    code = [line[4:] for line in lines if line.startswith((">>> ", "... "))]
    return "\n".join(f"    {line}" for line in code)


def _task_for(method: Method) -> str:
    """A bundled task that has what the method requires."""
    from steep.evidence.arms import make_arm
    from steep.evidence.fitting import misfits

    bundled = ("digits", "digits-image", "digits-federated", "two-bit")
    arm = make_arm(method.id)
    return next((name for name in bundled if not misfits(steep.task(name), {}, [arm])), "my_training.py:recipe")


def _measured(method: Method) -> str:
    """What the ledger of a checkout says of a method's claim; "" where there is none."""
    from steep.evidence.claims import ledger

    root = next((r for r in (Path(), Path(steep.__file__).parents[1]) if (r / "ledger").is_dir()), None)
    path = root / "claims" / f"{method.id.replace('-', '_')}.py" if root else None
    if root is None or path is None or not path.is_file():
        return ""
    claim, path = ledger.load_claims(path.parent)[method.id]
    entry = ledger.read(root / "ledger", method.id)
    if entry is None or ledger.state(claim, path, entry) != "current":
        return f"not with this version of the code (steep claims {method.id} does it)"
    return f"{entry.verdict} ({entry.date[:10]}; steep claims {method.id} --list shows the figures)"


def range_text(values: Range | Choice | None) -> str:
    """A search range in words: "0.0001 to 0.1 (log)"."""
    if values is None:
        return ""
    if isinstance(values, Choice):
        return ", ".join(map(repr, values.options))
    return f"{values.low:g} to {values.high:g}{' (log)' if values.log else ''}"


@command()
def claims(
    ids: Annotated[list[str] | None, typer.Argument(help="methods; all by default", show_default=False)] = None,
    folder: Annotated[Path, typer.Option("--claims", help="folder of claims")] = Path("claims"),
    ledger: Annotated[
        Path | None, typer.Option(help="folder of their outcomes (default: ledger, beside --claims)")
    ] = None,
    out_: Annotated[Path, typer.Option("--out", help="folder that keeps runs, to resume from")] = Path("out/claims"),
    smoke: Annotated[bool, typer.Option("--smoke", help="run each as small as possible and keep nothing")] = False,
    list_: Annotated[bool, typer.Option("--list", help="only show outcomes, and whether the code has changed")] = False,
    workers: Annotated[int, typer.Option(help="processes of one thread each", min=1)] = 1,
    json_: JsonOption = False,
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
        rows = [(claim, entry, entries.state(claim, path, entry)) for claim, path, entry in found]
        show_table([row for given in rows for row in _claim_rows(*given)], json_, "what was measured")


def _claim_rows(claim: Any, entry: Any, state: str) -> Iterable[dict[str, str]]:
    from steep.evidence.claims.verdicts import numbers

    headings = ("claim", "state", "verdict", "what was measured")
    measured = bool(entry and entry.quantities)
    yield dict(
        zip(headings, (claim.id, state, entry.verdict if entry else "", "" if measured else claim.reason), strict=True)
    )
    for result in entry.quantities if entry else ():
        line = ("", "", result.verdict, f"{result.quantity.name}: {numbers(result)}")
        yield dict(zip(headings, line, strict=True))
