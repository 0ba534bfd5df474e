"""The weights a method wants to be judged by, where they differ from the ones it trains."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


def eval_weights(part: Any) -> AbstractContextManager[Any]:
    """Put a method's evaluation weights into the model for the length of a ``with`` block.

    `part` is an optimizer, a loss, a rule or a handle. Methods that average or extrapolate weights define
    ``part.eval_weights()``, a context manager that is idempotent, nestable and restores the training weights
    bit for bit; for everything else this does nothing.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> with eval_weights(optimizer):
        ...     pass  # evaluate here
    """
    enter = getattr(part, "eval_weights", None)
    return enter() if enter is not None else nullcontext()
