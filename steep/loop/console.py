"""The terminal of a run: its progress bar, and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from steep.loop.training import Training
from steep.recipe import COSTS


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, read between two steps; a second one stops at once."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    if not ours:  # signals belong to the main thread, and whoever ignores them (nohup) means it
        yield lambda: False
        return
    requested: list[int] = []

    def note(number: int, frame: Any) -> None:
        requested.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(requested)
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def bar(training: Training, visible: bool) -> Iterator[Callable[[dict[str, float]], None]]:
    """A progress bar with the latest scores; yields the function that updates it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not visible, transient=True) as bar:
        task = bar.add_task(training.recipe.name, total=training.run.horizon, completed=training.elapsed)

        def show(entry: dict[str, float]) -> None:
            scores = "  ".join(f"{k} {v:.4g}" for k, v in entry.items() if k not in COSTS)
            bar.update(task, completed=training.elapsed, description=f"{training.recipe.name}  {scores}")

        yield show
