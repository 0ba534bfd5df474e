"""The rows of a Jacobian, held as the parts of the model's layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steep.per_example._joined import common, cross, stacked
from steep.per_example.parts import Part, height


class Rows:
    """The rows of a Jacobian (B x P): one gradient per example, held in factored form.

    Where the engine was given several losses per example, (B, R), B is the number of all of them here, and row b R + r
    is that of ``losses[b, r]``: results can be viewed as (B, R), and weights of that shape must be flattened.

    Args:
        names: the parameters that train, with their names.
        parts: the layers' shares of the columns; a parameter belongs to one part at most.
    """

    def __init__(self, names: dict[Tensor, str], parts: Sequence[Part]):
        self.names, self.parts = names, parts
        self.params = tuple(names)

    @staticmethod
    def stack(passes: Sequence[Rows]) -> Rows:
        """The rows of several passes as those of one batch, in the order of the passes.

        Nothing is copied, and the Gram matrix is made a block of two passes at a time. So a batch that is too large
        for one forward can be given in pieces:

            >>> from steep.backward.sven import Sven
            >>> model = torch.nn.Linear(3, 1)
            >>> rule, x, y = Sven(model), torch.randn(4, 3), torch.randn(4)
            >>> residuals = [model(part).squeeze(1) - target for part, target in zip(x.split(2), y.split(2))]
            >>> rows = Rows.stack([rule.engine.rows(part) for part in residuals])
            >>> rows.backward(rule.solve(rows.gram(), torch.cat(residuals).detach().double()))

        The last line is Sven's step for its default options, ready for the optimizer.

        Raises:
            ValueError: no passes, or passes whose parameters differ.
        """
        if not passes:
            raise ValueError("stack needs the rows of at least one pass")
        for other in passes[1:]:
            _check_same(passes[0], other)
        return Rows(passes[0].names, stacked([rows.parts for rows in passes]))

    def gram(self, other: Rows | None = None) -> Tensor:
        """Inner products of the rows, ``J Jᵀ``, (B, B), float64.

        Args:
            other: rows of another batch or pass for ``J J'ᵀ``, (B, B'); with the same parameters in the same order.

        Raises:
            ValueError: `other` has other parameters.
        """
        if other is None:
            return sum(part.gram() for part in self.parts)  # type: ignore[return-value]
        _check_same(self, other)
        found = self.params[0].new_zeros(len(self), len(other), dtype=torch.float64)
        return sum((cross(a, b) for a, b in common(self.parts, other.parts) if a and b), start=found)

    def norms(self) -> Tensor:
        """Euclidean norms of the rows, (B,), float64."""
        return torch.stack([part.squares() for part in self.parts]).sum(0).sqrt()

    def __len__(self) -> int:
        return self.parts[0].batch

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

    def mean(self) -> tuple[Tensor | None, ...]:
        """Mean of the rows: a tensor per parameter, `None` for unused ones."""
        return self.vjp(self.params[0].new_full((len(self),), 1 / len(self), dtype=torch.float64))

    def variance(self, *, unbiased: bool = True) -> tuple[Tensor | None, ...]:
        """Variances of the columns: a tensor per parameter, `None` for unused ones; NaN for one row, if `unbiased`."""
        return self.columnwise(lambda j: j.var(0, correction=int(unbiased)))

    def per_layer(self) -> dict[str, Rows]:
        """The rows' shares of each layer, by its name in the model: Gram matrices, norms and so on of their own."""
        return self._by(lambda name: name.rpartition(".")[0])

    def per_parameter(self) -> dict[str, Rows]:
        """The rows' shares of each parameter, by its name."""
        return self._by(lambda name: name)

    def _by(self, key: Callable[[str], str]) -> dict[str, Rows]:
        groups: defaultdict[str, list[Part]] = defaultdict(list)
        for part in self.parts:
            whole = len({key(self.names[p]) for p in part.params}) == 1
            for piece in [part] if whole else part.split():
                groups[key(self.names[piece.params[0]])].append(piece)
        named = {
            k: {p: name for p, name in self.names.items() if key(name) == k} for k in map(key, self.names.values())
        }
        return {k: Rows(names, groups[k]) for k, names in named.items() if k in groups}

    def backward(self, w: Tensor) -> None:
        """Add ``Jᵀ w`` to the parameters' ``.grad`` as a backward pass does: gradient hooks and reducers run."""
        self.fill(lambda: self.vjp(w))

    def fill(self, gradients: Callable[[], Sequence[Tensor | None]]) -> None:
        """Add gradients of one's own making, a tensor per parameter, to ``.grad`` as a backward pass does."""
        with torch.enable_grad():  # a rule may be called under no_grad, where nothing would be accumulated
            _Fill.apply(gradients, *self.params).backward()

    def lasting(self) -> Rows:
        """The same rows, which a later step of the parameters does not touch: what autograd would compute is computed.

        That takes as many numbers as there are rows, times the parameters of layers without a closed form.
        """
        return Rows(self.names, [one for part in self.parts for one in part.lasting()])

    def restrict(self, fraction: float, generator: torch.Generator) -> Rows:
        """The same with a random share of each layer's output neurons (and their biases) kept and zeros elsewhere."""
        # by layer and height, so that a neuron's weights and its bias are kept or dropped together
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


def _check_same(rows: Rows, other: Rows) -> None:
    if len(rows.params) == len(other.params) and all(p is q for p, q in zip(rows.params, other.params, strict=True)):
        return
    unlike = [
        name for p, name in (*rows.names.items(), *other.names.items()) if p not in rows.names or p not in other.names
    ]
    what = (
        f"only one of them has {', '.join(unlike[:5])}{', ...' if unlike[5:] else ''}"
        if unlike
        else "their order differs"
    )
    raise ValueError(f"both passes must be over the same parameters of one model, but {what}")
