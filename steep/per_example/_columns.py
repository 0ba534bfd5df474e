"""Losses of several outputs per example, (B, R): R sets of B gradients become one part of B R rows, row b R + r.

What the outputs of an example share is held once: the inputs of a linear map and of a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from steep.per_example._embedding import Lookup
from steep.per_example.convolution import Patches
from steep.per_example.parts import Dense, Outer, Part, Sliced


class Interleaved(Sliced):
    """Parts of one parameter, one for each of the outputs, of any kinds."""

    def __init__(self, columns: Sequence[Sliced]):
        self.of_outputs, self.params = columns, columns[0].params
        self.batch = len(columns) * columns[0].batch

    @property
    def chunk(self) -> int:
        return max(column.chunk for column in self.of_outputs)

    def rows(self, rows: slice) -> Tensor:
        return torch.stack([column.rows(rows) for column in self.of_outputs], 1).flatten(0, 1)

    def masked(self, masks: Sequence[Tensor]) -> Interleaved:
        return Interleaved([column.masked(masks) for column in self.of_outputs])

    def lasting(self) -> Sequence[Sliced]:
        return [Interleaved([one for column in self.of_outputs for one in column.lasting()])]


@singledispatch
def interleaved(first: Part, columns: Sequence[Any]) -> Sequence[Part]:
    """The rows of `columns`, parts of the same parameters for each of R outputs; `first` is the first of them."""
    return [Interleaved(pieces) for pieces in zip(*(column.split() for column in columns), strict=True)]


@interleaved.register
def _(first: Dense, columns: Sequence[Dense]) -> Sequence[Part]:
    return [Dense(first.params, interleave([column.j for column in columns], first.batch))]


@interleaved.register
def _(first: Outer, columns: Sequence[Outer]) -> Sequence[Part]:
    d = interleave([column.d for column in columns], first.batch)
    return [replace(first, d=d, a=shared([column.a for column in columns], first.batch))]


@interleaved.register
def _(first: Patches, columns: Sequence[Patches]) -> Sequence[Part]:
    grad = interleave([column.grad for column in columns], first.batch)
    x = shared([column.x for column in columns], first.batch)
    return [replace(first, x=x, grad=grad, batch=len(columns) * first.batch)]


@interleaved.register
def _(first: Lookup, columns: Sequence[Lookup]) -> Sequence[Part]:
    d, tokens = (interleave([getattr(column, name) for column in columns], first.batch) for name in ("d", "tokens"))
    return [replace(first, d=d, tokens=tokens)]


def interleave(columns: Sequence[Tensor], batch: int) -> Tensor:
    """R tensors (B k, ...) as one (B R k, ...), the outputs of an example one after the other."""
    if len(columns) == 1:
        return columns[0]
    return torch.stack([column.unflatten(0, (batch, -1)) for column in columns], 1).flatten(0, 2)


def shared(columns: Sequence[Tensor], batch: int) -> Tensor:
    """The one tensor that all columns hold; interleaved if they differ."""
    first = columns[0]
    return first if all(_same(first, other) for other in columns[1:]) else interleave(columns, batch)


def _same(a: Tensor, b: Tensor) -> bool:
    # the same memory as a rule; other memory with equal values where each column has its own padded copy of the inputs
    place = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    return place or torch.equal(a, b)
