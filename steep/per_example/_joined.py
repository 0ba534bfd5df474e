"""Parts of several passes together: their inner products with each other, and their rows one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from steep.per_example.parts import Dense, Part, Sliced


class Joined(Sliced):
    """The rows of several parts of the same parameters, of any kinds, one part's after the other's; none is copied."""

    def __init__(self, parts: Sequence[Part]):
        self.parts: list[Part] = [one for part in parts for one in (part.parts if isinstance(part, Joined) else [part])]
        self.params, self.batch = parts[0].params, sum(part.batch for part in parts)

    @property
    def chunk(self) -> int:
        return max(part.chunk for part in self.parts if isinstance(part, Sliced))

    def rows(self, rows: slice) -> Tensor:
        return torch.cat([part.rows(rows) for part in self.parts if isinstance(part, Sliced)])

    def gram(self) -> Tensor:
        gram, spans = self._zeros(self.batch, self.batch), list(self._spans())
        for k, (left, here) in enumerate(spans):
            gram[here, here] = left.gram()
            for right, there in spans[:k]:
                gram[here, there] = cross(left, right)
                gram[there, here] = gram[here, there].T
        return gram

    def squares(self) -> Tensor:
        return torch.cat([part.squares() for part in self.parts])

    def vjp(self, w: Tensor) -> tuple[Tensor, ...]:
        found = [part.vjp(w[span]) for part, span in self._spans()]
        return tuple(sum(pieces[1:], start=pieces[0]) for pieces in zip(*found, strict=True))

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.jvp(v) for part in self.parts])

    def columnwise(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return tuple(Sliced.columnwise(piece, f)[0] for piece in self.split())

    def masked(self, masks: Sequence[Tensor]) -> Joined:
        return Joined([part.masked(masks) for part in self.parts])

    def split(self) -> Sequence[Joined]:
        return [Joined(pieces) for pieces in zip(*(part.split() for part in self.parts), strict=True)]

    def lasting(self) -> Sequence[Joined]:
        found = [part.lasting() for part in self.parts]
        if all(len(pieces) == 1 for pieces in found):
            return [Joined([piece for (piece,) in found])]
        return [Joined([piece for part in one.parts for piece in part.lasting()]) for one in self.split()]

    def _spans(self) -> Iterator[tuple[Part, slice]]:
        start = 0
        for part in self.parts:
            yield part, slice(start, start + part.batch)
            start += part.batch


def cross(left: Part, right: Part) -> Tensor:
    """Inner products of the gradients of two parts of the same parameters, (B, B'), float64."""
    if isinstance(left, Joined):
        return torch.cat([cross(part, right) for part in left.parts])
    if isinstance(right, Joined):
        return torch.cat([cross(left, part) for part in right.parts], 1)
    if type(left) is type(right):
        return left.cross(right)
    # such as a layer left to autograd in one of the passes only
    return sum(_explicit(*pair) for pair in zip(left.split(), right.split(), strict=True))  # type: ignore[return-value]


def _explicit(left: Sliced, right: Sliced) -> Tensor:
    """Inner products of parts of one parameter whose kinds differ."""
    longest = max(left, right, key=lambda part: part.chunk)
    total = torch.zeros(left.batch, right.batch, dtype=torch.float64, device=left.params[0].device)
    for rows in longest.slices(max(left.batch, right.batch)):
        a, b = (part.rows(rows).flatten(1).double() for part in (left, right))
        total.addmm_(a, b.T)
    return total


def common(*passes: Sequence[Part]) -> list[tuple[Part | None, ...]]:
    """Parts of the same parameters from each pass; `None` for parameters that a pass did not use.

    Parts that have no counterpart with just the same parameters are split.
    """
    whole: set[tuple[Tensor, ...]] = set.intersection(*({part.params for part in parts} for parts in passes))
    found = [
        {piece.params: piece for part in parts for piece in ([part] if part.params in whole else part.split())}
        for parts in passes
    ]
    every = dict.fromkeys(params for pieces in found for params in pieces)
    return [tuple(pieces.get(params) for pieces in found) for params in every]


def stacked(passes: Sequence[Sequence[Part]]) -> list[Part]:
    """The parts of several passes, one pass after the other."""
    sizes = [parts[0].batch for parts in passes]
    joined: list[Part] = []
    for group in common(*passes):
        (params,) = {part.params for part in group if part is not None}
        joined.append(Joined([part or _zeros(params[0], size) for part, size in zip(group, sizes, strict=True)]))
    return joined


def _zeros(p: Tensor, size: int) -> Dense:
    """Gradients of a parameter that a pass did not use."""
    return Dense((p,), p.new_zeros(()).expand(size, *p.shape))
