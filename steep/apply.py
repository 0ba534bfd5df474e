"""How a method is applied to a recipe: one function per component, unless the method's entry has its own `apply`.

Hyper-parameters are the caller's. Everything else that a method's constructor requires is filled in by name, with what
is known once a run has started: ``num_examples``, ``total_steps``, ``steps_per_epoch``, ``clients``, ``generator``, the
recipe's own ``loss``, the model's ``head``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from steep.recipe import Recipe, Run, deferred
from steep.roles import last_linear
from steep.utils.signatures import required_arguments
from steep.utils.validation import check_ranges

FACTS: dict[str, Callable[[Recipe, Run], Any]] = {
    "num_examples": lambda recipe, run: run.data.num_examples,
    "total_steps": lambda recipe, run: run.total_steps,
    "steps_per_epoch": lambda recipe, run: run.steps_per_epoch,
    "clients": lambda recipe, run: run.data.clients,
    "generator": lambda recipe, run: run.generator,
    "loss": lambda recipe, run: recipe.build("loss", run),
    "head": lambda recipe, run: _head(run.model),
}


def _head(model: Any) -> nn.Module:
    head = last_linear(model)
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear to be its head: build the loss yourself, in the recipe "
            "loss=steep.deferred(lambda run: ...), with run.model's head"
        )
    return head


def facts(make: Callable[..., Any], recipe: Recipe, run: Run) -> dict[str, Any]:
    """The arguments without a default of a method's constructor that are facts of a run."""
    # what has a default is a hyper-parameter, even under the name of a fact
    return {name: FACTS[name](recipe, run) for name in required_arguments(make) if name in FACTS}


def optimizer(recipe: Recipe, make: Callable[..., Any], **hyper: Any) -> Recipe:
    """``make(parameters, **hyper)`` in the place of the recipe's optimizer."""
    return recipe.replace(optimizer=partial(make, **hyper))


def rule(recipe: Recipe, make: Callable[..., Any], **hyper: Any) -> Recipe:
    """``make(model, **hyper)`` in the place of the mean's gradient."""
    return recipe.replace(backward=partial(make, **hyper))


def loss(recipe: Recipe, make: Callable[..., Any], **hyper: Any) -> Recipe:
    """``make(**facts, **hyper)`` in the place of the recipe's loss, or around it."""
    return recipe.replace(loss=deferred(lambda run: make(**facts(make, recipe, run), **hyper)))


def handle(recipe: Recipe, make: Callable[..., Any], **hyper: Any) -> Recipe:
    """``make(model, **facts, **hyper)`` on the model once it is built; what it returns is attached to the run."""

    def build(run: Run) -> nn.Module:
        model = recipe.build("model", run)
        run.attach(make(model, **facts(make, recipe, run), **hyper))
        return model

    return recipe.replace(model=deferred(build))


def rounds(recipe: Recipe, make: Callable[..., Any], **hyper: Any) -> Recipe:
    """``make(model, local_step=..., **facts, **hyper)`` as the recipe's outer loop."""

    def loop(model: nn.Module, run: Run, local_step: Callable[..., torch.Tensor]) -> Any:
        return make(model, local_step=local_step, **facts(make, recipe, run), **hyper)

    return recipe.replace(rounds=loop)


def sgd(recipe: Recipe, lr: float) -> Recipe:
    """Plain SGD as the recipe's optimizer, for rules that make whole steps; the recipe's schedule stays.

    Clipping and rates by group are left out: either would bend a step that was solved for as a whole.
    """
    check_ranges({"lr": lr}, {"lr": "(0, inf)"})
    return recipe.replace(optimizer=partial(torch.optim.SGD, lr=lr), max_grad_norm=None, groups={})


BY_COMPONENT: dict[str, Callable[..., Recipe]] = {
    "optim": optimizer,
    "backward": rule,
    "losses": loss,
    "models": handle,
    "rounds": rounds,
}
