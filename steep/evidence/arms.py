"""The arms of a comparison before they are run: their methods, what is fixed and what is tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from steep.evidence.study import BASELINE
from steep.method import Choice, Method, Paper, Range, log_uniform
from steep.method import method as by_id
from steep.recipe import Recipe

LR_SCALE = log_uniform(0.1, 10.0)  # factor on the learning rate that the recipe came with

Methods = tuple[tuple[str, Mapping[str, Any]], ...]  # ids (or function names), each with its hyper-parameters
MethodLike = str | tuple[str, Mapping[str, Any]] | Method | Callable[[Recipe], Recipe]


def adamw(*, lr: float = 1e-3, weight_decay: float = 1e-2) -> Callable[[Iterable[Any]], Optimizer]:
    """Torch's fused AdamW, which every study tunes as a reference beside your own recipe."""
    return partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay, fused=True)


ADAMW = Method(
    id="adamw",
    paper=Paper("Decoupled Weight Decay Regularization", arxiv="1711.05101", year=2019),
    changes="optim",
    make=adamw,
    apply=lambda recipe, **hyper: recipe.replace(optimizer=adamw(**hyper)),
    search_space={"lr": log_uniform(1e-4, 1e-1), "weight_decay": log_uniform(1e-5, 1e-1)},
)


def find_method(id: str) -> Method:
    """A method's entry, or that of the fused AdamW which every study tunes as a reference."""
    return ADAMW if id == ADAMW.id else by_id(id)


@dataclass(frozen=True)
class Arm:
    """An arm before it is run: methods with their fixed hyper-parameters, and the ranges of the others.

    Names in `search_space` are hyper-parameters (``id.name`` where several methods are joined), or "lr_scale", the
    factor on the learning rate of the recipe's own optimizer. `own` is the entry of a method from outside steep.
    """

    name: str
    methods: Methods = ()
    search_space: Mapping[str, Range | Choice] = field(default_factory=dict)
    own: Method | None = None

    @property
    def entries(self) -> list[Method]:
        """The entries of the arm's methods, in the order in which they are applied."""
        return [self.own if self.own and self.own.id == id else find_method(id) for id, _ in self.methods]

    def settings(self, chosen: Mapping[str, Any]) -> tuple[Methods, float]:
        """Methods with all their hyper-parameters, and the factor on the learning rate."""
        methods = tuple((id, {**fixed, **self._chosen_for(id, chosen)}) for id, fixed in self.methods)
        return methods, chosen.get("lr_scale", 1.0)

    def defaults(self) -> dict[str, Any]:
        """The published value of everything that is tuned, and 1 for "lr_scale"."""
        published = {self._prefix(method.id) + k: v for method in self.entries for k, v in method.hyper.items()}
        return {name: published.get(name, 1.0) for name in self.search_space}

    def _prefix(self, id: str) -> str:
        return f"{id}." if len(self.methods) > 1 else ""

    def _chosen_for(self, id: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The chosen hyper-parameters of one method, by their names without prefix."""
        names = next((method.hyper for method in self.entries if method.id == id), {})
        return {name: chosen[self._prefix(id) + name] for name in names if self._prefix(id) + name in chosen}


def own_method(method: Method | Callable[[Recipe], Recipe]) -> Method:
    """The entry of a method from outside steep; a plain function gets one without hyper-parameters."""
    if isinstance(method, Method):
        return method
    name = method.__name__
    return Method(id=name, paper=Paper(name), changes="systems", make=method, apply=method)


def make_arm(method: MethodLike) -> Arm:
    """An arm from a method's id ("a+b" joins two), an ``(id, hyper)`` pair, a `Method`, or a function of a recipe.

    Raises:
        UnknownName: no such method.
        TypeError: no such hyper-parameter, or a method that is no arm.
        ValueError: a value of the wrong type or out of range.
    """
    if isinstance(method, (str, tuple)):
        id, fixed = (method, {}) if isinstance(method, str) else (method[0], dict(method[1]))
        arm = Arm(id, tuple((part, _fixed(part, id, fixed)) for part in id.split("+")))
    else:
        own = own_method(method)
        arm = Arm(own.id, ((own.id, {}),), own=own)
    return replace(arm, search_space=_search_space(arm))


def _fixed(part: str, id: str, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The fixed hyper-parameters of one of the methods joined in `id`."""
    by_id(part)  # raises for an unknown method, before anything is trained
    return dict(fixed) if part == id else {k.partition(".")[2]: v for k, v in fixed.items() if k.startswith(part + ".")}


def _search_space(arm: Arm) -> dict[str, Range | Choice]:
    fixed = dict(arm.methods)
    space = {
        arm._prefix(method.id) + name: values
        for method in arm.entries
        for name, values in method.search_space.items()
        if name not in fixed[method.id]
    }
    # a method that sets a learning rate of its own leaves nothing of the recipe's to scale
    own_rate = any(method.changes in ("optim", "rounds") or "lr" in method.hyper for method in arm.entries)
    return space if own_rate else {**space, "lr_scale": LR_SCALE}


def make_arms(recipe: Recipe, methods: Sequence[MethodLike]) -> list[Arm]:
    """Baseline, tuned AdamW (where the recipe's rounds leave the optimizer to it), then the methods.

    Raises:
        ValueError: the same arm twice.
    """
    baseline = Arm(BASELINE, (), {} if recipe.rounds else {"lr_scale": LR_SCALE})
    reference = [] if recipe.rounds else [Arm(ADAMW.id, ((ADAMW.id, {}),), ADAMW.search_space)]
    arms = [baseline, *reference, *(make_arm(m) for m in methods if m != ADAMW.id)]
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"{twice!r} is given twice: give each method once (or join different ones with '+')")
    return arms
