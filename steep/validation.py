"""One way to refuse a value: name the argument, the value and what is allowed."""

from __future__ import annotations

from typing import Any


def require(name: str, value: Any, valid: bool, allowed: str) -> None:
    """Raise `ValueError` unless `valid`.

    Example:
        >>> require("lr", -1.0, False, "positive")
        Traceback (most recent call last):
        ValueError: lr=-1.0 must be positive
    """
    if not valid:
        raise ValueError(f"{name}={value!r} must be {allowed}")
