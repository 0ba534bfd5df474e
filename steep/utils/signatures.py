"""What a callable asks of its caller."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments without a default, in order.

    Example:
        >>> required_arguments(lambda model, rank=None, *, steps: None)
        ['model', 'steps']
    """
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is inspect.Parameter.empty]
