"""From the parts of one pass to its rows: a parameter that was used several times becomes one part."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steep.per_example._gradients import through_losses
from steep.per_example.parts import Outer, Part, Sliced
from steep.per_example.rows import Rows


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
    # uses may share their inputs among the losses of an example to different degrees: take the least shared
    few = max(linear, key=lambda use: len(use.a))
    a = [use.a.repeat_interleave(len(few.a) // len(use.a), 0) if len(use.a) < len(few.a) else use.a for use in linear]
    return replace(linear[0], d=torch.cat([u.d for u in linear], 1), a=torch.cat(a, 1))


def assemble(parts: Sequence[Part], names: dict[Tensor, str], outside: set[Tensor], losses: Tensor) -> Rows:
    """Sum the uses of each parameter, and give the parameters in `outside` to autograd."""
    uses = Counter(p for part in parts for p in part.params)
    shared = outside | {p for p, count in uses.items() if count > 1}
    # a weight and its bias stay one part unless one of them is used elsewhere as well, or left to autograd
    split = [piece for part in parts for piece in (part.split() if shared & set(part.params) else (part,))]
    groups: defaultdict[Tensor, list[Any]] = defaultdict(list)
    for piece in split:
        if not outside & set(piece.params):
            groups[piece.params[0]].append(piece)
    joined: list[Part] = [group[0] if len(group) == 1 else combine(group) for group in groups.values()]
    left = tuple(p for p in names if p in outside)
    return Rows(names, [*joined, through_losses(losses, left)] if left else joined)
