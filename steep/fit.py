"""Runs a recipe: build its parts, step until the budget ends, score on held-out data."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from accelerate.tracking import GeneralTracker
from torch import nn

from steep.loop.checks import check_arguments
from steep.loop.console import bar, interrupts
from steep.loop.measure import PeakMemory
from steep.loop.saver import Saver
from steep.loop.tracking import Log, as_log, logged
from steep.loop.training import History, NonFinite, Training, accelerator
from steep.recipe import COSTS, Recipe
from steep.utils.randomness import isolated
from steep.utils.threads import alone

EVALUATIONS = 25  # points on a curve, where the horizon is known


@dataclass
class Result:
    """A finished run.

    `steps` are of the budget: optimizer steps (``len(history.losses)``), unless a method changes the size of batches.
    `val` and `test` map "loss" and the metric's name to their final values. `seconds` and `cpu_seconds` are of
    training alone, `preparation_seconds` (CPU) of building its parts, `other_seconds` (CPU) of evaluating and saving.
    `peak_memory` is in bytes, `None` where it cannot be known; `horizon` the steps the budget stood for, or `None`.
    """

    model: nn.Module
    history: History
    val: dict[str, float]
    test: dict[str, float]
    steps: int
    examples: int
    seconds: float
    cpu_seconds: float
    preparation_seconds: float
    other_seconds: float
    peak_memory: int | None
    horizon: int | None


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
    save_every: float = 0.0,
    progress: bool | None = None,
    log: str | GeneralTracker | Log | None = None,
) -> Result:
    """Run a recipe.

    Two runs with the same arguments are equal bit for bit (on one machine, on CPU), and so is a run that was
    stopped and goes on from its checkpoint. What data, model and loss draw from the default generators of torch, NumPy
    and Python depends on `seed` alone; the generators are left as they were.

    Args:
        recipe: what to run.
        seed: initialisation, data order and everything a method draws.
        split_seed: the data split; `seed` unless given.
        checkpoint: file to go on from if it exists, and to save to at every evaluation.
        device: `None` for the accelerator where there is one, or "cpu".
        precision: "no", "bf16" or "fp16" (mixed precision through Accelerate).
        accumulate: forward and backward each batch in this many parts, to save memory.
        evaluate_every: steps between evaluations; by default 25 evaluations over the run.
        save_every: seconds between checkpoints, at least; by default one at every evaluation.
        progress: show a progress bar; by default on a terminal.
        log: "tensorboard", "wandb", "mlflow" or another of Accelerate's trackers; a `Log` also says where.

    Raises:
        NonFinite: a loss was NaN or infinite; names the step, the examples and the last good checkpoint.
        UnmetRequirement: a method needs something the recipe lacks.
        CheckpointError: the checkpoint is truncated, of another model or of a newer version.
        Interrupted: Ctrl-C; the message says how to go on.
        RuntimeError: another thread of this process is running `fit`.

    Example:
        >>> import steep
        >>> result = steep.fit(steep.task("digits").replace(budget=steep.Budget(epochs=1)), progress=False)
        >>> 0 < result.test["accuracy"] <= 1
        True
    """
    check_arguments(recipe, seed, split_seed, accumulate, evaluate_every, save_every)
    log = as_log(log)
    hardware = accelerator(device, precision, **(log.accelerate() if log else {}))
    with alone(), isolated(seed, "model"):
        memory = PeakMemory(hardware.device)
        training = Training(recipe, seed, seed if split_seed is None else split_seed, hardware, accumulate)
        training.check()
        saver = Saver(training, Path(checkpoint) if checkpoint is not None else None, save_every)
        saver.resume()
        with closing(training):
            _train(training, saver, evaluate_every, sys.stderr.isatty() if progress is None else progress, log)
            return _result(training, memory)


def _train(training: Training, saver: Saver, every: int | None, progress: bool, log: Log | None) -> None:
    """Step until the budget ends, evaluating, saving and minding Ctrl-C on the way."""
    horizon = training.run.horizon
    every = every or (max(1, horizon // EVALUATIONS) if horizon else training.run.steps_per_epoch)
    with interrupts() as interrupted, bar(training, progress) as shown, logged(training, log, shown) as show:
        training.stopwatch.start()
        while not training.finished():
            try:
                training.advance()
            except NonFinite as error:
                raise NonFinite(f"{error}. {saver.way_back()}") from None
            if training.due(every) and not training.finished():
                show(training.record())
                saver.save_if_due()
            if interrupted():
                saver.stop()
        if not training.history.evaluations or training.history.evaluations[-1]["step"] != training.step:
            show(training.record())
        saver.save()


def _result(training: Training, memory: PeakMemory) -> Result:
    val = {key: value for key, value in training.end().items() if key not in COSTS}
    test = training.evaluate(training.run.data.test) if training.run.data.test is not None else val
    seconds, cpu_seconds = training.stopwatch.read()
    return Result(
        model=training.model,
        history=training.history,
        val=val,
        test=test,
        steps=training.elapsed,
        examples=training.examples,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        preparation_seconds=training.preparation_seconds,
        other_seconds=training.stopwatch.paused,
        peak_memory=memory.read(),
        horizon=training.run.horizon,
    )
