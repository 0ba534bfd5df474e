"""Parts that only automatic differentiation knows: their gradients are computed a block of examples at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steep.per_example.parts import CHUNK, Dense, Part, Sliced, height

COLUMNS = 2**22
"""Elements of whole columns that are put together at a time, from rows that must be computed again for each."""


@dataclass
class Blocks(Part):
    """A part whose gradients are computed for a block of examples at a time.

    Where the blocks do not fit into `CHUNK` elements at once, they are computed again for each pair of blocks.

    Args:
        block: per-example gradients of a range of examples, ``(n, *shape)`` for each parameter.
        pull: their sum weighted by `w`, where there is a cheaper way to it than through the blocks.
        masks: rows that count, one 0/1 vector per parameter.
    """

    params: tuple[Tensor, ...]
    batch: int
    block: Callable[[range], Sequence[Tensor]]
    pull: Callable[[Tensor], Sequence[Tensor]] | None = None
    masks: Sequence[Tensor] | None = None

    def gram(self) -> Tensor:
        gram = torch.zeros(self.batch, self.batch, dtype=torch.float64, device=self.params[0].device)
        for rows, left in self._matrices():
            gram[rows.start : rows.stop, rows.start : rows.stop] = left @ left.T
            # recomputed for each pair instead of stored: that is what keeps the memory at two blocks
            for columns, right in self._matrices(before=rows.start):
                products = left @ right.T
                gram[rows.start : rows.stop, columns.start : columns.stop] = products
                gram[columns.start : columns.stop, rows.start : rows.stop] = products.T
        return gram

    def cross(self, other: Blocks) -> Tensor:
        return torch.cat(
            [torch.cat([left @ right.T for _, right in other._matrices()], 1) for _, left in self._matrices()]
        )

    def squares(self) -> Tensor:
        return torch.cat([j.square().sum(1) for _, j in self._matrices()])

    def vjp(self, w: Tensor) -> tuple[Tensor, ...]:
        if self.pull is not None:
            return tuple(t.view(p.shape) for t, p in zip(self._kept(self.pull(w), 0), self.params, strict=True))
        flat = torch.stack([w[e.start : e.stop].to(j) @ j for e, j in self._matrices()]).sum(0)
        pieces = flat.split([p.numel() for p in self.params])
        return tuple(t.to(p.dtype).view(p.shape) for t, p in zip(pieces, self.params, strict=True))

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([t.flatten() for t in v]).double()
        return torch.cat([j @ flat for _, j in self._matrices()])

    def columnwise(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Blocks hold whole rows, which are computed again for each `COLUMNS` elements of columns."""
        total, step = sum(p.numel() for p in self.params), max(1, COLUMNS // self.batch)
        dtype = self.params[0].dtype
        pieces = [
            f(torch.cat([j[:, start : start + step].to(dtype) for _, j in self._matrices()]))
            for start in range(0, total, step)
        ]
        flat = torch.cat(pieces).split([p.numel() for p in self.params])
        return tuple(t.to(p.dtype).view(p.shape) for t, p in zip(flat, self.params, strict=True))

    def masked(self, masks: Sequence[Tensor]) -> Blocks:
        # masks of masks multiply: a part may be restricted more than once
        old = self.masks or [torch.ones_like(mask) for mask in masks]
        return replace(self, masks=[mask * o.to(mask) for mask, o in zip(masks, old, strict=True)])

    def split(self) -> Sequence[Sliced]:
        return [_OfBlocks(self, k) for k in range(len(self.params))]

    def lasting(self) -> Sequence[Part]:
        """The gradients written out, (B, p): they cannot be computed again later."""
        found = zip(*(kept for _, kept in self.blocks()), strict=True)
        return [Dense((p,), torch.cat(pieces)) for p, pieces in zip(self.params, found, strict=True)]

    def _matrices(self, before: int | None = None) -> Iterator[tuple[range, Tensor]]:
        """Blocks of rows of J in float64, up to an example."""
        for examples, kept in self.blocks(before):
            yield examples, torch.cat([t.flatten(1) for t in kept], 1).double()

    def blocks(self, before: int | None = None) -> Iterator[tuple[range, list[Tensor]]]:
        """Gradients of some examples at a time, up to one, (n, rows, elements of a row) for each parameter."""
        end = self.batch if before is None else before
        step = max(1, CHUNK // sum(p.numel() for p in self.params))
        for start in range(0, end, step):
            examples = range(start, min(start + step, end))
            yield examples, self._kept(self.block(examples), 1)

    def _kept(self, tensors: Sequence[Tensor], lead: int) -> list[Tensor]:
        """Tensors (..., *shape) as (..., rows, elements of a row), with the masked rows set to zero."""
        shaped = [t.reshape(*t.shape[:lead], height(p), -1) for t, p in zip(tensors, self.params, strict=True)]
        if self.masks is None:
            return shaped
        return [t * mask.to(t)[:, None] for t, mask in zip(shaped, self.masks, strict=True)]


class _OfBlocks(Sliced):
    """One parameter of `Blocks`, all of which are computed again for each slice of it."""

    def __init__(self, blocks: Blocks, k: int):
        self.whole, self.k = blocks, k
        self.params, self.batch = (blocks.params[k],), blocks.batch

    @property
    def chunk(self) -> int:
        return COLUMNS

    def rows(self, rows: slice) -> Tensor:
        return torch.cat([kept[self.k][:, rows] for _, kept in self.whole.blocks()])

    def vjp(self, w: Tensor) -> tuple[Tensor, ...]:
        return (self.whole.vjp(w)[self.k],)

    def lasting(self) -> Sequence[Sliced]:
        return (Dense(self.params, self.rows(slice(None))),)

    def masked(self, masks: Sequence[Tensor]) -> _OfBlocks:
        own = self.params[0]
        every = [masks[0] if p is own else p.new_ones(height(p)) for p in self.whole.params]
        return _OfBlocks(self.whole.masked(every), self.k)
