"""The rows of a Jacobian, and how the parts of a model are put together to them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steep.per_example.autodiff import through_losses
from steep.per_example.parts import Part, combine, height


class Rows:
    """The rows of a Jacobian (B x P): one gradient per example, held in factored form.

    Args:
        names: the parameters that train, with their names.
        parts: the layers' shares of the columns; a parameter belongs to one part at most.
    """

    def __init__(self, names: dict[Tensor, str], parts: Sequence[Part]):
        self.names, self.parts = names, parts
        self.params = tuple(names)

    def gram(self) -> Tensor:
        """Inner products of the rows ``J Jᵀ``, (B, B), float64."""
        return sum(part.gram() for part in self.parts)  # type: ignore[return-value]

    def norms(self) -> Tensor:
        """Euclidean norms of the rows, (B,), float64."""
        return torch.stack([part.squares() for part in self.parts]).sum(0).sqrt()

    def vjp(self, w: Tensor) -> tuple[Tensor | None, ...]:
        """The rows' sum weighted by `w` (B,), ``Jᵀ w``: a tensor per parameter, `None` for unused ones."""
        found = {p: g for part in self.parts for p, g in zip(part.params, part.vjp(w), strict=True)}
        return tuple(found.get(p) for p in self.params)

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """The rows' inner products with `v` (a tensor per parameter), ``J v``, (B,), float64."""
        given = dict(zip(self.params, v, strict=True))
        return torch.stack([part.jvp([given[p] for p in part.params]) for part in self.parts]).sum(0)

    def columnwise(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, ...]:
        """What `f` makes of the columns of J, such as their medians, without all of J at once.

        Args:
            f: from some of the columns (B, n), which it must not change, to a number for each (n,).

        Returns:
            a tensor per parameter, `None` for unused ones.
        """
        found = {p: g for part in self.parts for p, g in zip(part.params, part.columnwise(f), strict=True)}
        return tuple(found.get(p) for p in self.params)

    def backward(self, w: Tensor) -> None:
        """Add ``Jᵀ w`` to the parameters' ``.grad`` as a backward pass does: gradient hooks and reducers run."""
        self.fill(lambda: self.vjp(w))

    def fill(self, gradients: Callable[[], Sequence[Tensor | None]]) -> None:
        """Add gradients of one's own making, a tensor per parameter, to ``.grad`` as a backward pass does."""
        with torch.enable_grad():
            _Fill.apply(gradients, *self.params).backward()

    def restrict(self, fraction: float, generator: torch.Generator) -> Rows:
        """The same with a random share of each layer's output neurons (and their biases) kept and zeros elsewhere."""
        masks: dict[tuple[str, int], Tensor] = {}

        def mask(p: Tensor) -> Tensor:
            key = (self.names[p].rpartition(".")[0], height(p))
            if key not in masks:
                kept = torch.randperm(key[1], generator=generator)[: max(1, round(fraction * key[1]))]
                masks[key] = torch.zeros(key[1]).index_fill_(0, kept, 1.0).to(p.device)
            return masks[key]

        return Rows(self.names, [part.masked([mask(p) for p in part.params]) for part in self.parts])


class _Fill(torch.autograd.Function):
    """A number with the given gradients: autograd's own accumulation fills ``.grad``, without a copy of fresh ones."""

    @staticmethod
    def forward(ctx: Any, gradients: Callable[[], Sequence[Tensor | None]], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (None, *ctx.gradients())


def assemble(parts: Sequence[Part], names: dict[Tensor, str], outside: set[Tensor], losses: Tensor) -> Rows:
    """Sum the uses of each parameter, and give the parameters in `outside` to autograd."""
    uses = Counter(p for part in parts for p in part.params)
    shared = outside | {p for p, count in uses.items() if count > 1}
    split = [piece for part in parts for piece in (part.split() if shared & set(part.params) else (part,))]
    groups: defaultdict[Tensor, list[Any]] = defaultdict(list)
    for piece in split:
        if not outside & set(piece.params):
            groups[piece.params[0]].append(piece)
    joined: list[Part] = [group[0] if len(group) == 1 else combine(group) for group in groups.values()]
    left = tuple(p for p in names if p in outside)
    return Rows(names, [*joined, through_losses(losses, left)] if left else joined)
