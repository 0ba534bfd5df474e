"""The shell command that repeats one run of a study, bit for bit."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator
from typing import Any

from steep.evidence.report.rows import kinds
from steep.evidence.study import ArmResult, RunRecord


def command(run: RunRecord, source: str) -> str:
    """``steep fit RECIPE --method ID --set name=value ... --seed S``; "" where the recipe has no name."""
    return shlex.join(["steep", "fit", *_arguments(run, source)]) if source else ""


def first_commands(arm: ArmResult, source: str) -> list[tuple[str, RunRecord, str]]:
    """The first of each kind of an arm's runs, and the command that repeats it."""
    return [(kind, runs[0], line) for kind, runs in kinds(arm) if (line := command(runs[0], source))]


def _arguments(run: RunRecord, source: str) -> Iterator[str]:
    yield source
    for id, _ in run.methods:
        yield from ("--method", id)
    for id, hyper in run.methods:
        prefix = f"{id}." if len(run.methods) > 1 else ""
        for name, value in hyper.items():
            yield from ("--set", f"{prefix}{name}={_text(value)}")
    if run.lr_scale != 1.0:
        yield from ("--lr-scale", repr(run.lr_scale))
    for limit, value in run.budget.items():
        if value is not None:
            yield from (f"--{limit}", repr(value))
    yield from ("--seed", str(run.seed))
    if run.split_seed != run.seed:
        yield from ("--split-seed", str(run.split_seed))
    yield from ("--threads", "1")  # as in a study's workers; other numbers of threads round sums differently


def _text(value: Any) -> str:
    """A value as `--set` reads it; a string needs quotes only if it would be read as something else."""
    if not isinstance(value, str):
        return repr(value)
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return repr(value)
