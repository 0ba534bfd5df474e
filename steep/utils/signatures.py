"""What a callable asks of its caller."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments without a default, in order; ``*args`` and ``**kwargs`` require nothing.

    Example:
        >>> required_arguments(lambda model, rank=None, *, steps: None)
        ['model', 'steps']
    """
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
