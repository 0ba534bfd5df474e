"""Logs a run to a tracker: TensorBoard, Weights & Biases, MLflow and others, through Accelerate's trackers.

Nothing is done between two evaluations: at each of them the losses of the steps since the last one are handed over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from steep.loop.training import Training
from steep.recipe import COSTS


@dataclass(frozen=True)
class Log:
    """Where, and under which name, a run is logged.

    Args:
        to: an Accelerate tracker's name ("tensorboard", "wandb", "mlflow", ...) or a `GeneralTracker` of your own.
        directory: where trackers that write files put them; W&B and MLflow also obey their own settings.
        name: the run's; by default the recipe's name and the seed.
        config: what is kept as the run's hyper-parameters, beside seed, budget and the optimizer's own.

    Raises:
        ValueError: there is no such tracker, or its package is not installed.

    Example:
        >>> import steep
        >>> steep.Log("tensorbord")
        Traceback (most recent call last):
        ValueError: log='tensorbord' is no tracker; there is: aim, ..., tensorboard, ...
    """

    to: str | GeneralTracker
    directory: str | os.PathLike[str] = "steep-log"
    name: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.to, GeneralTracker):
            return
        if self.to not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"log={self.to!r} is no tracker; there is: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if self.to in LoggerType.list() and LoggerType(self.to) not in get_available_trackers():
            raise ValueError(f"log={self.to!r} needs a package: pip install {self.to.replace('_', '-')}")

    def accelerate(self) -> dict[str, Any]:
        """The arguments of `Accelerator` that choose this tracker."""
        return {"log_with": self.to, "project_dir": str(self.directory)}

    def start(self, training: Training) -> None:
        """Open the run at the tracker, with its hyper-parameters."""
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        name = self.name or f"{training.recipe.name.replace('/', '-')}-{training.run.seed}"
        own = {"wandb": {"name": name, "dir": str(self.directory)}, "mlflow": {"run_name": name}}
        project = training.recipe.name if self.to in own else name
        training.accelerator.init_trackers(project, _plain({**_settings(training), **self.config}), own)


def as_log(log: str | GeneralTracker | Log | None) -> Log | None:
    """What the argument `log` of `fit` means, checked."""
    return log if log is None or isinstance(log, Log) else Log(log)


@contextmanager
def logged(
    training: Training, log: Log | None, show: Callable[[dict[str, float]], None]
) -> Iterator[Callable[[dict[str, float]], None]]:
    """Log a run while inside; yields what is to be called with each evaluation instead of `show`."""
    if log is None:
        yield show
        return
    losses, sent = training.history.losses, training.step

    def send(scores: Mapping[str, float]) -> None:
        nonlocal sent
        with training.stopwatch.pause():
            for step in range(sent, len(losses)):
                last = scores if step == len(losses) - 1 else {}
                training.accelerator.log({"train/loss": losses[step], **last}, step=step + 1)
        sent = len(losses)

    def evaluated(entry: dict[str, float]) -> None:
        show(entry)
        send(_rates(training) | {f"val/{k}": v for k, v in entry.items() if k not in COSTS})

    log.start(training)
    try:
        yield evaluated
    finally:
        send({})  # a run that diverged or was stopped has losses after its last evaluation
        with training.stopwatch.pause():
            training.accelerator.end_training()


def _rates(training: Training) -> dict[str, float]:
    """The learning rate of the next step, of the first parameter group."""
    rate = training.named["optimizer"].param_groups[0].get("lr")
    return {} if rate is None else {"lr": float(rate)}


def _settings(training: Training) -> dict[str, Any]:
    optimizer = training.named["optimizer"]
    known = {"recipe": training.recipe.name, "seed": training.run.seed, "steps": training.run.horizon}
    return known | {"optimizer": type(optimizer).__name__, **getattr(optimizer, "defaults", {})}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters of the types that every tracker takes."""
    return {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items() if v is not None}
