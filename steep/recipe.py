"""A training run as a value: `Recipe`, a frozen dataclass with one factory per component."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steep.batches import logits
from steep.splits import Data
from steep.utils.signatures import check_takes
from steep.utils.validation import check_ranges, nearest, require_whole

T = TypeVar("T")


class Rule(Protocol):
    """A backward rule: takes the vector of losses, fills ``.grad`` (adding to what is there), never steps.

    One that declares the need "indices" has its attribute `indices` set to a batch's before the forward pass.
    """

    def __call__(self, losses: Tensor, *, scale: float = 1.0) -> None: ...


class Mean:
    """The ordinary rule: the gradient of the mean loss. Accepts a 0-d loss of the whole batch too."""

    def __init__(self, model: nn.Module | None = None):
        pass

    def __call__(self, losses: Tensor, *, scale: float = 1.0) -> None:
        mean = losses.mean()
        (mean if scale == 1.0 else mean * scale).backward()


@dataclass(frozen=True)
class Budget:
    """How long to train: the first limit that is reached ends the run.

    Args:
        epochs: passes over the training data (may be a fraction).
        steps: optimizer steps, or rounds where the recipe has `rounds` of its own.
        seconds: of training, evaluation not counted. Alone it gives schedules no horizon.
    """

    epochs: float | None = None
    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        limits = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if all(v is None for v in limits.values()):
            raise ValueError("a budget needs a limit: epochs, steps or seconds")
        if self.steps is not None:
            require_whole("budget steps", self.steps, 1)
        for name, value in limits.items():
            if value is not None:
                check_ranges({f"budget {name}": value}, {f"budget {name}": "(0, inf)"})

    def total_steps(self, steps_per_epoch: int) -> int | None:
        """Steps until the budget ends, or `None` when only seconds limit it."""
        by_epochs = math.ceil(self.epochs * steps_per_epoch) if self.epochs is not None else None
        return min((n for n in (by_epochs, self.steps) if n is not None), default=None)


COSTS = ("step", "examples", "seconds", "cpu_seconds")  # what an evaluation holds beside its scores
RESERVED = ("loss", *COSTS)


@dataclass(frozen=True)
class Metric:
    """How every arm is scored beside the loss: a number per example, averaged over held-out data.

    Args:
        name: shown in tables; not one of `RESERVED`.
        function: ``function(output, target) -> (B,)``.
        higher_is_better: the direction of verdicts.

    Raises:
        ValueError: a reserved name.
    """

    name: str
    function: Callable[[Any, Any], Tensor]
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if self.name in RESERVED:
            raise ValueError(
                f"a metric must not be called {self.name!r}, which steep reports itself: choose another name"
            )


def _accuracy(output: Any, target: Tensor) -> Tensor:
    """1 where the largest output is at the target class, else 0; shape (B,) (positions are averaged)."""
    hit = (logits(output).argmax(-1) == target).float()
    return hit.flatten(1).mean(1) if hit.ndim > 1 else hit


accuracy = Metric("accuracy", _accuracy)


@dataclass(frozen=True)
class EarlyStopping:
    """Ends a run once a validation score has stopped improving, and goes back to the weights of its best evaluation.

    The score is looked at on evaluations of its own, so that `fit(evaluate_every=)` changes nothing.

    Args:
        patience: looks in a row without an improvement, after which the run ends.
        min_delta: a smaller improvement counts as none, in the score's own unit.
        score: "loss" or the name of the recipe's metric.
        every: optimizer steps (or rounds) between two looks; an epoch by default.
        restore_best: end with the model, loss, optimizer and attached parts as they were at the best look.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> import steep
        >>> recipe = steep.task("digits").replace(early_stopping=EarlyStopping(patience=3, score="accuracy"))
    """

    patience: int = 5
    min_delta: float = 0.0
    score: str = "loss"
    every: int | None = None
    restore_best: bool = True

    def __post_init__(self) -> None:
        require_whole("patience", self.patience, 1)
        check_ranges({"min_delta": self.min_delta}, {"min_delta": "[0, inf)"})
        if self.every is not None:
            require_whole("every", self.every, 1)


@dataclass
class Run:
    """What is known only once a run has started; every `deferred` part of the recipe receives it.

    Pass a part that must be stepped and saved with the run to `attach`. `model` is set once it is built, for losses
    that look at it.
    """

    data: Data
    seed: int
    steps_per_epoch: int
    horizon: int | None
    generator: torch.Generator
    parts: list[Any] = field(default_factory=list)
    model: nn.Module | None = None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, the horizon of every schedule.

        Raises:
            ValueError: the budget is in seconds only.
        """
        if self.horizon is None:
            raise ValueError("a schedule needs a horizon: give the budget steps or epochs beside seconds")
        return self.horizon

    @property
    def epochs(self) -> int:
        """Epochs of the whole run, the last one perhaps incomplete."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def attach(self, part: T) -> T:
        """Have `fit` call ``part.step()`` after each optimizer step and save ``part.state_dict()``."""
        self.parts.append(part)
        return part


class deferred:
    """A recipe's `model`, `loss`, `score` or `backward` that is built when a run starts, from its `Run`.

    Example:
        >>> from torch import nn
        >>> import steep
        >>> wide = steep.deferred(lambda run: nn.Linear(4, run.data.num_examples))
    """

    def __init__(self, build: Callable[[Run], Any]):
        self.build = build


CALLS = {  # how each part of a recipe that is a function is called
    "data": "generator",
    "model": "",
    "loss": "output, target",
    "score": "output, target",
    "optimizer": "parameters",
    "backward": "model",
    "rounds": "model, run, local_step",
}


@dataclass(frozen=True)
class Recipe:
    """A training run as a value. A method is a function from recipe to recipe.

    Args:
        data: ``data(generator) -> Data``: the loaders of one random split.
        model: ``model() -> nn.Module``, initialised from torch's generator (seeded by `fit`); or `deferred`.
        loss: ``loss(output, target) -> (B,)``, one number per example; or `deferred`. A module is copied per run.
        optimizer: ``optimizer(parameters) -> Optimizer``.
        scheduler: ``scheduler(optimizer, total_steps)``, stepped once per optimizer step; or a class of torch's
            such as `CosineAnnealingLR`, which gets the number of steps under its own name for it.
        backward: ``backward(model) -> Rule``; or `deferred`.
        rounds: an outer loop of the recipe's own, ``rounds(model, run, local_step) -> iterator``, each item the
            losses of one round; ``local_step(model, batch)`` returns a batch's losses. Plain epochs where it is `None`.
        metric: scores held-out data beside the loss.
        budget: how long to train.
        score: the loss by which held-out data are scored; the recipe's own `loss` unless a method replaced that.
        max_grad_norm: before each step, gradients are scaled down to this norm over all parameters, if it is larger.
        groups: options of the optimizer by role (see `steep.param_groups`) or by pattern of parameters' names, and
            "lr_scale", a factor on its rate: ``{"norm": {"weight_decay": 0}, "encoder.*": {"lr_scale": 0.1}}``.
        early_stopping: ends a run before its budget; see `EarlyStopping`.
        picture: ``picture(model) -> (H, W, 3)`` in [0, 1], shown in reports; ``picture(None)`` is the target.
        name: shown in reports.
    """

    data: Callable[[torch.Generator], Data]
    model: Callable[[], nn.Module] | deferred
    loss: Callable[..., Tensor] | deferred
    optimizer: Callable[[Iterable[Any]], Optimizer]
    scheduler: Callable[[Optimizer, int], Any] | None = None
    backward: Callable[[nn.Module], Rule] | deferred = Mean
    rounds: Callable[[nn.Module, Run, Callable[..., Tensor]], Iterator[Tensor]] | None = None
    metric: Metric | None = None
    budget: Budget = Budget(epochs=10)
    score: Callable[..., Tensor] | deferred | None = None
    max_grad_norm: float | None = None
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    early_stopping: EarlyStopping | None = None
    picture: Callable[[nn.Module | None], Tensor] | None = None
    name: str = "recipe"

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Module):
            raise TypeError(
                "Recipe.model must be a factory, so that every run starts afresh: model=lambda: MyModel(...)"
            )
        if isinstance(self.loss, type):
            raise TypeError(
                f"Recipe.loss={self.loss.__name__} is a class: write loss={self.loss.__name__}(reduction='none'), or a "
                "function (output, target) -> (B,)"
            )
        for name, arguments in CALLS.items():
            value = getattr(self, name)
            late = isinstance(value, deferred) and name in ("model", "loss", "score", "backward")
            if not late and not (value is None and name in ("score", "rounds")):
                check_takes(f"Recipe.{name}", value, arguments)
        if self.scheduler is not None and not callable(self.scheduler):
            raise TypeError(
                f"Recipe.scheduler must be a function (optimizer, total_steps) or a class of torch's, got "
                f"{self.scheduler!r}: scheduler=torch.optim.lr_scheduler.CosineAnnealingLR"
            )
        if not isinstance(self.budget, Budget):
            raise TypeError(f"Recipe.budget must be a steep.Budget, got {self.budget!r}: steep.Budget(epochs=10)")
        if self.metric is not None and not isinstance(self.metric, Metric):
            raise TypeError(
                f"Recipe.metric must be a steep.Metric, got {self.metric!r}: metric=steep.Metric('name', function)"
            )

        self._check_steps()

    def _check_steps(self) -> None:
        if self.max_grad_norm is not None:
            check_ranges({"max_grad_norm": self.max_grad_norm}, {"max_grad_norm": "(0, inf)"})
        if not (isinstance(self.groups, Mapping) and all(isinstance(g, Mapping) for g in self.groups.values())):
            raise TypeError(
                f"Recipe.groups={self.groups!r} must map roles or patterns to options, as in "
                "{'bias': {'weight_decay': 0}}"
            )
        idle = [name for name in ("max_grad_norm", "groups") if getattr(self, name)]
        if self.rounds is not None and idle:
            raise ValueError(
                f"the recipe has rounds, which make their own optimizer steps, so its {' and '.join(idle)} would have "
                f"no effect: leave {'them' if len(idle) > 1 else 'it'} out with recipe.replace"
            )
        stopping = self.early_stopping
        if stopping is None:
            return
        if not isinstance(stopping, EarlyStopping):
            raise TypeError(f"Recipe.early_stopping={stopping!r} must be a steep.EarlyStopping")
        known = ["loss", *([self.metric.name] if self.metric else [])]
        if stopping.score not in known:
            raise ValueError(
                f"early_stopping follows {stopping.score!r}, but the recipe is scored by {', '.join(known)}"
            )

    def replace(self, **changes: Any) -> Recipe:
        """A copy with other parts.

        Raises:
            TypeError: a part that recipes do not have.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise TypeError(f"a recipe has no part {name!r}{nearest(name, known)}")
        return dataclasses.replace(self, **changes)

    def build(self, part: str, run: Run) -> Any:
        """Build `model`, `loss`, `score` or the factory `backward`: by factory, `deferred`, or as a module's copy."""
        value = getattr(self, part)
        if isinstance(value, deferred):
            return value.build(run)
        if part == "model":
            return value()
        # a module may keep state (a memory, a running mean), which must not pass from one run to the next
        return copy.deepcopy(value) if isinstance(value, nn.Module) else value


def compose(recipe: Recipe, methods: Sequence[tuple[Any, dict[str, Any]]]) -> Recipe:
    """Apply methods, each with its hyper-parameters, from left to right.

    Raises:
        ValueError: two methods replace the same component and the later one does not wrap the earlier.
    """
    taken: dict[str, str] = {}
    for method, hyper in methods:
        if method.changes in taken and not method.wraps:
            raise ValueError(
                f"{taken[method.changes]!r} and {method.id!r} both replace the recipe's {method.changes}: "
                "use one of them"
            )
        taken[method.changes] = method.id
        recipe = method(recipe, **hyper)
    return recipe
