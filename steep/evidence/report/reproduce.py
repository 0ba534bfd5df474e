"""One line of the shell that repeats one training of a study, to the last bit."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator
from typing import Any

from steep.evidence.study import RunRecord


def command(run: RunRecord, source: str) -> str:
    """``steep fit RECIPE --method ID --set name=value ... --seed S``; "" where the recipe has no name to call it by."""
    return shlex.join(["steep", "fit", *_arguments(run, source)]) if source else ""


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
    yield from ("--threads", "1")  # as the workers of a study have: other sums round differently


def _text(value: Any) -> str:
    """How `--set` is told a value; texts stand for themselves unless they would be read as something else."""
    if not isinstance(value, str):
        return repr(value)
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return repr(value)
