"""Parameters that are used several times in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steep.per_example.parts import Outer, Sliced


@dataclass
class Uses(Sliced):
    """One parameter used several times (tied or reused): the uses' gradients are summed before anything is squared."""

    params: tuple[Tensor, ...]
    uses: Sequence[Sliced]

    def __post_init__(self) -> None:
        self.batch = self.uses[0].batch

    def rows(self, rows: slice) -> Tensor:
        return torch.stack([use.rows(rows) for use in self.uses]).sum(0)

    def vjp(self, w: Tensor) -> tuple[Tensor, ...]:
        return (torch.stack([use.vjp(w)[0] for use in self.uses]).sum(0),)

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        return torch.stack([use.jvp(v) for use in self.uses]).sum(0)

    def masked(self, masks: Sequence[Tensor]) -> Uses:
        return replace(self, uses=[use.masked(masks) for use in self.uses])


def combine(uses: Sequence[Sliced]) -> Sliced:
    """One part for all uses of one parameter; uses of one linear map become more positions of it."""
    if len(uses) == 1:
        return uses[0]
    linear = [use for use in uses if isinstance(use, Outer)]
    if len(linear) < len(uses):
        return Uses(uses[0].params[:1], uses)
    few = max(linear, key=lambda use: len(use.a))
    a = [use.a.repeat_interleave(len(few.a) // len(use.a), 0) if len(use.a) < len(few.a) else use.a for use in linear]
    return replace(linear[0], d=torch.cat([u.d for u in linear], 1), a=torch.cat(a, 1))
