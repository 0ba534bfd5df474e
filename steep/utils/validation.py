"""Refuse a value in one way everywhere: name the argument, the value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

Ranges = Mapping[str, str | tuple[str, ...]]  # by name: an interval, or one per entry


def require(name: str, value: Any, valid: bool, allowed: str) -> None:
    """Raise `ValueError` unless `valid`.

    Example:
        >>> require("lr", -1.0, False, "positive")
        Traceback (most recent call last):
        ValueError: lr=-1.0 must be positive
    """
    if not valid:
        raise ValueError(f"{name}={value!r} must be {allowed}")


def require_whole(name: str, value: Any, least: int) -> None:
    """Raise `ValueError` unless `value` is a whole number of at least `least`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    require(name, value, whole and value >= least, f"a whole number of at least {least}")


def require_tensors(**values: Any) -> None:
    """Raise `TypeError` for the first of `values` that is no tensor; `None` stands for an argument left out.

    Example:
        >>> require_tensors(x=[1.0, 2.0])
        Traceback (most recent call last):
        TypeError: x is a list, not a tensor: use torch.as_tensor(x)
    """
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, not a tensor: use torch.as_tensor({name})")


def check_ranges(group: Mapping[str, Any], ranges: Ranges) -> None:
    """Raise `ValueError` for the first hyper-parameter of `group` outside its interval, e.g. ``{"lr": "[0, inf)"}``."""
    for name, allowed in ranges.items():
        value = group[name]
        if isinstance(allowed, str):
            _check_interval(name, value, allowed)
        elif not isinstance(value, Sequence) or len(value) != len(allowed):
            raise ValueError(f"{name}={value!r} must be {len(allowed)} numbers in {', '.join(allowed)}")
        else:
            for i, interval in enumerate(allowed):
                _check_interval(f"{name}[{i}]", value[i], interval)


def _check_interval(name: str, value: Any, allowed: str) -> None:
    low, high = map(float, allowed[1:-1].split(","))
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}={value!r} must be a number in {allowed}") from None
    inside = low < number < high or (number == low and allowed[0] == "[") or (number == high and allowed[-1] == "]")
    if not inside:
        raise ValueError(f"{name}={value!r} must lie in {allowed}")


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"``, or what there is when nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; there is: {', '.join(known) or 'nothing'}"
