"""Training and evaluation mode: the one place where either is set, for everything that a run owns.

The rule: a module is in training mode exactly when its gradients are wanted. It holds for the model and for the modules
among loss, score, rule and attached parts alike; a loss with dropout or a running mean would otherwise be reported, or
changed, by the held-out data. Optimizers with modes of their own (schedule-free ones) follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from steep.loop.eval_weights import eval_weights


def start_training(parts: Sequence[Any]) -> None:
    """Put the modules among `parts` into training mode, each by its own `train()`.

    A model that arrives in evaluation mode, as pretrained ones do, would be trained without its dropout. What a user
    keeps in evaluation mode stays there: by an overridden `train()`, or layer by layer in a model in training mode.
    """
    for part in filter(_has_modes, parts):
        part.train()
    for module in _modules(parts):
        kept = [inner for inner in module.modules() if not inner.training] if module.training else []
        module.train()
        for inner in kept:
            inner.training = False


@contextmanager
def evaluating(model: nn.Module, parts: Iterable[Any] = ()) -> Iterator[None]:
    """Evaluation mode and evaluation weights, no gradients; every module's own mode is restored.

    Args:
        model: what is evaluated.
        parts: what else the run owns; of these, modules change their mode, and all give their evaluation weights.
    """
    parts = [part for part in parts if part is not None]
    modules = _modules([model, *parts])
    # module by module: some layers of a model in training mode may be in evaluation mode on purpose
    training = [inner for module in modules for inner in module.modules() if inner.training]
    with ExitStack() as stack, torch.no_grad():
        for part in parts:
            stack.enter_context(_own_mode(part))
            stack.enter_context(eval_weights(part))
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            for inner in training:
                inner.training = True


def _modules(parts: Iterable[Any]) -> list[nn.Module]:
    return [part for part in parts if isinstance(part, nn.Module)]


def _has_modes(part: Any) -> bool:
    return isinstance(part, torch.optim.Optimizer) and hasattr(part, "eval") and hasattr(part, "train")


@contextmanager
def _own_mode(part: Any) -> Iterator[None]:
    """Evaluation mode of an optimizer that has one: ``eval()`` and ``train()``, as schedule-free optimizers do."""
    if not _has_modes(part):
        yield
        return
    part.eval()
    try:
        yield
    finally:
        part.train()
