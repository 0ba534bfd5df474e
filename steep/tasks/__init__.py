"""Ready recipes on real data and on the papers' own problems.

A task's file defines a `Task`; nothing registers it: `tasks()` walks this package. Data are loaded when a recipe's
`data` factory runs, so listing the tasks loads none.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from steep.method import UnknownName
from steep.recipe import Recipe
from steep.utils.validation import nearest


@dataclass(frozen=True)
class Task:
    """A ready recipe.

    Args:
        name: as on the command line.
        summary: data, model and what is measured, in one sentence.
        build: makes the recipe; its keyword arguments scale the task.
        variants: what may follow the name after a colon; handed to `build` as its first argument.
        data: where the data are from, and their licence.
    """

    name: str
    summary: str
    build: Callable[..., Recipe]
    variants: tuple[str, ...] = ()
    data: str = "Computed when the task is built; no licence is needed."

    @property
    def names(self) -> tuple[str, ...]:
        """The name alone, and with each variant."""
        return (self.name, *(f"{self.name}:{variant}" for variant in self.variants))


@cache
def tasks() -> dict[str, Task]:
    """Every task, by name, in the order of the modules.

    Raises:
        ValueError: two tasks with one name.
    """
    found: dict[str, Task] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for task in (value for value in vars(module).values() if isinstance(value, Task)):
            if found.setdefault(task.name, task) is not task:
                raise ValueError(f"two tasks share the name {task.name!r}")
    return found


def task(name: str, **options: Any) -> Recipe:
    """The recipe of that name.

    Args:
        name: a task, or a task and its variant: ``"digits"``, ``"uci:yacht"``.
        options: keyword arguments of the task's `build`, e.g. ``examples=1000``.

    Raises:
        UnknownName: no such task; the message names the nearest ones.

    Example:
        >>> from steep.tasks import task
        >>> task("polynomial", examples=1000).name
        'polynomial'
    """
    names = [known for task in tasks().values() for known in task.names]
    if name not in names:
        raise UnknownName(f"unknown task {name!r}{nearest(name, names)}")
    stem, _, variant = name.partition(":")
    return tasks()[stem].build(*([variant] if variant else []), **options)
