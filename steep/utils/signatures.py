"""What a callable asks of its caller."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def check_takes(name: str, function: Any, arguments: str) -> None:
    """Raise `TypeError` unless `function` can be called with the arguments of that list, e.g. ``"output, target"``.

    Example:
        >>> check_takes("data", lambda: None, "generator")
        Traceback (most recent call last):
        TypeError: data must be a function data(generator), got one that takes no argument
    """
    call = f"{name.rpartition('.')[2]}({arguments})"
    if not callable(function):
        raise TypeError(f"{name} must be a factory (a callable), {call}, got {function!r}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*arguments.split(", ")) if arguments else signature.bind()
    except TypeError:
        takes = ", ".join(signature.parameters) or "no argument"
        raise TypeError(f"{name} must be a function {call}, got one that takes {takes}") from None


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments without a default, in order; ``*args`` and ``**kwargs`` require nothing.

    Example:
        >>> required_arguments(lambda model, rank=None, *, steps: None)
        ['model', 'steps']
    """
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
