"""Runs a recipe: build its parts, step until the budget ends, score on held-out data."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from steep import checkpoint as checkpoints
from steep.measure import PeakMemory
from steep.randomness import stream_seed
from steep.recipe import Recipe
from steep.training import History, NonFinite, Training, accelerator

EVALUATIONS = 25  # points on a curve, where the horizon is known


@dataclass
class Result:
    """A finished training.

    `seconds` and `cpu_seconds` are of training alone, `peak_memory` is in bytes (None where it cannot be known),
    `val` and `test` map "loss" and the metric's name to their final values.
    """

    model: nn.Module
    history: History
    val: dict[str, float]
    test: dict[str, float]
    steps: int
    examples: int
    seconds: float
    cpu_seconds: float
    peak_memory: int | None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the training stopped between two steps and left a checkpoint."""


def fit(
    recipe: Recipe,
    *,
    seed: int = 0,
    split_seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | None = None,
    precision: str = "no",
    accumulate: int = 1,
    evaluate_every: int | None = None,
    progress: bool | None = None,
) -> Result:
    """Run a recipe.

    Two runs with the same arguments are equal bit for bit (on one machine, on CPU), and so is a run that was
    stopped and goes on from its checkpoint. Torch's global generator is left as it was.

    Args:
        recipe: what to run.
        seed: initialisation, data order and everything a method draws.
        split_seed: the data split; `seed` unless given.
        checkpoint: file to go on from if it exists, and to save to at every evaluation.
        device: `None` for the accelerator where there is one, or "cpu".
        precision: "no", "bf16" or "fp16" (mixed precision through Accelerate).
        accumulate: forward and backward each batch in this many parts, to save memory.
        evaluate_every: steps between evaluations; by default 25 evaluations over the training.
        progress: show a progress bar; by default on a terminal.

    Raises:
        NonFinite: a loss was NaN or infinite; names the step, the examples and the last good checkpoint.
        UnmetNeed: a method needs something the recipe lacks.
        CheckpointError: the checkpoint is truncated, of another model or of a newer version.
        Interrupted: Ctrl-C; the message says how to go on.

    Example:
        >>> import steep
        >>> result = steep.fit(steep.task("digits").replace(budget=steep.Budget(epochs=1)), progress=False)
        >>> 0 < result.test["accuracy"] <= 1
        True
    """
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate} must be at least 1")
    hardware = accelerator(device, precision)
    with torch.random.fork_rng():
        torch.manual_seed(stream_seed(seed, "model"))
        memory = PeakMemory(hardware.device)
        training = Training(recipe, seed, seed if split_seed is None else split_seed, hardware, accumulate)
        training.check()
        path = Path(checkpoint) if checkpoint is not None else None
        if path is not None and path.exists():
            training.load_state_dict(checkpoints.load(path), path)
        _train(training, path, evaluate_every, sys.stderr.isatty() if progress is None else progress)
        return _result(training, memory)


def _train(training: Training, path: Path | None, every: int | None, progress: bool) -> None:
    """Step until the budget ends, evaluating, saving and minding Ctrl-C on the way."""
    every = every or _interval(training.run.horizon, training.run.steps_per_epoch)
    with _interrupts() as interrupted, _bar(training, progress) as show:
        training.stopwatch.start()
        while not training.finished():
            try:
                training.advance()
            except NonFinite as error:
                raise NonFinite(f"{error}. {_way_back(path)}") from None
            if training.step % every == 0 and not training.finished():
                show(training.record())
                if path is not None:
                    _save(training, path)
            if interrupted():
                _stop(training, path)
        if not training.history.evaluations or training.history.evaluations[-1]["step"] != training.step:
            show(training.record())
        if path is not None:
            _save(training, path)


def _interval(horizon: int | None, steps_per_epoch: int) -> int:
    return max(1, horizon // EVALUATIONS) if horizon else steps_per_epoch


def _save(training: Training, path: Path) -> None:
    """Save, unless a parameter is not finite: the file then keeps the last good state."""
    if all(p.isfinite().all() for p in training.model.parameters()):
        with training.stopwatch.pause():
            checkpoints.save(path, training.state_dict())


def _stop(training: Training, path: Path | None) -> None:
    path = path or Path("steep-interrupted.pt")
    checkpoints.save(path, training.state_dict())
    raise Interrupted(f"stopped after step {training.step}; go on with fit(recipe, ..., checkpoint={str(path)!r})")


def _way_back(path: Path | None) -> str:
    if path is None:
        return "No checkpoint was kept; pass fit(..., checkpoint=PATH) to keep one"
    return f"The last finite checkpoint is {path}" if path.exists() else "It happened before the first checkpoint"


def _result(training: Training, memory: PeakMemory) -> Result:
    data, last = training.run.data, training.history.evaluations[-1]
    val = {key: value for key, value in last.items() if key not in ("step", "examples", "seconds", "cpu_seconds")}
    test = training.evaluate(data.test) if data.test is not None else val
    costs = (training.step, training.examples, *training.stopwatch.read(), memory.read())
    return Result(training.model, training.history, val, test, *costs)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, read between two steps; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
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
def _bar(training: Training, visible: bool) -> Iterator[Callable[[dict[str, float]], None]]:
    """A progress bar with the latest scores; yields the function that updates it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not visible, transient=True) as bar:
        task = bar.add_task(training.recipe.name, total=training.run.horizon, completed=training.step)

        def show(entry: dict[str, float]) -> None:
            scores = "  ".join(
                f"{k} {v:.4g}" for k, v in entry.items() if k not in ("examples", "seconds", "cpu_seconds", "step")
            )
            bar.update(task, completed=training.step, description=f"{training.recipe.name}  {scores}")

        yield show
