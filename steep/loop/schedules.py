"""Builds a recipe's learning-rate schedule, handing it the length of the run where it asks for one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from steep.recipe import Run
from steep.utils.signatures import required_arguments

LENGTHS = ("total_steps", "T_max", "total_iters", "T_0")  # what torch's schedules call their length


def build_schedule(factory: Callable[..., Any], optimizer: Optimizer, run: Run) -> Any:
    """The schedule over the optimizer.

    A function is called as ``factory(optimizer, total_steps)``. A class of torch's, or a `functools.partial` of one,
    gets the length under its own name, if it has one: by place, `ExponentialLR` would take it for its decay.

    Raises:
        TypeError: a class that lacks other arguments, or that is not stepped once per optimizer step.
        ValueError: it asks for the length of a run that is limited by seconds only.
    """
    kind = factory.func if isinstance(factory, partial) else factory
    if not (isinstance(kind, type) and issubclass(kind, LRScheduler)):
        return factory(optimizer, run.total_steps)
    if issubclass(kind, ReduceLROnPlateau):
        raise TypeError(
            "scheduler=ReduceLROnPlateau follows a validation score; a recipe's schedule is stepped once per optimizer "
            "step without one. Use a schedule over steps, e.g. scheduler=torch.optim.lr_scheduler.CosineAnnealingLR"
        )
    parameters = inspect.signature(factory).parameters
    length = next((name for name in LENGTHS if name in parameters), None)
    if length is None or _given(factory, length):
        _check_complete(kind, factory, {"optimizer"})
        return factory(optimizer)
    _check_complete(kind, factory, {"optimizer", length})
    return factory(optimizer, **{length: run.total_steps})


def _given(factory: Callable[..., Any], name: str) -> bool:
    return isinstance(factory, partial) and name in factory.keywords


def _check_complete(kind: type, factory: Callable[..., Any], known: set[str]) -> None:
    missing = [name for name in required_arguments(factory) if name not in known]
    if missing:
        given = ", ".join(f"{name}=..." for name in missing)
        raise TypeError(
            f"scheduler={kind.__name__} lacks {', '.join(missing)}: "
            f"write scheduler=functools.partial({kind.__name__}, {given})"
        )
