"""Parts of the per-example Jacobian J (B x P), one per layer, that are worked with but never stored whole.

A part stands for the B gradients of one layer's parameters. Closed forms hold what a backward pass leaves
behind (layer inputs `a`, output gradients `d`) and rebuild the gradients a slice of rows at a time, at most
`CHUNK` elements; a *row* is an index of the parameter's first dimension (an output neuron, a channel, a
token). All sums over parameters are accumulated in float64: the Gram matrix squares the condition number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steep.per_example._products import kernel, matmul, pairwise_is_cheaper

CHUNK = 2**16
"""Elements of an explicit slice of per-example gradients: half a MiB in float64, so that it stays in a core's cache."""


class Part(ABC):
    """What the engine asks of a part. `B` is the number of examples; weights `w` have shape (B,)."""

    params: tuple[Tensor, ...]
    batch: int

    @abstractmethod
    def gram(self) -> Tensor:
        """Inner products of the per-example gradients, (B, B), float64."""

    @abstractmethod
    def cross(self, other: Any) -> Tensor:
        """Inner products with the gradients of another part of the same kind and parameters, (B, B'), float64."""

    @abstractmethod
    def squares(self) -> Tensor:
        """Their squared norms, (B,), float64."""

    @abstractmethod
    def vjp(self, w: Tensor) -> tuple[Tensor, ...]:
        """Their sum weighted by `w`, one tensor per parameter."""

    @abstractmethod
    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """Their inner products with `v` (one tensor per parameter), (B,), float64."""

    @abstractmethod
    def columnwise(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """What `f` makes of each parameter's column, one tensor per parameter; (B, n) to (n,), some at a time."""

    @abstractmethod
    def masked(self, masks: Sequence[Tensor]) -> Part:
        """The same part with rows set to zero; one 0/1 vector per parameter."""

    @abstractmethod
    def split(self) -> Sequence[Sliced]:
        """Parts of one parameter each."""

    @abstractmethod
    def lasting(self) -> Sequence[Part]:
        """Parts of the same gradients that remain what they are when the parameters are changed in place."""


def height(p: Tensor) -> int:
    """Number of rows of a parameter; a 0-d parameter has one."""
    return p.shape[0] if p.ndim else 1


class Sliced(Part):
    """A part of one parameter that gives its gradients a slice of rows at a time; the algebra follows from that.

    A closed form of one's own needs only `params`, `batch`, `rows` and `masked`.
    """

    @abstractmethod
    def rows(self, rows: slice) -> Tensor:
        """Per-example gradients of these rows of the parameter, (B, number of rows, elements of a row)."""

    @abstractmethod
    def masked(self, masks: Sequence[Tensor]) -> Sliced:
        """The same part with rows set to zero."""

    @property
    def height(self) -> int:
        return height(self.params[0])

    @property
    def width(self) -> int:
        return self.params[0].numel() // height(self.params[0])

    @property
    def chunk(self) -> int:
        """Elements of a slice."""
        return CHUNK

    def slices(self, batch: int | None = None) -> Iterator[slice]:
        """Slices of the parameter's rows, short enough for a `batch` other than the own."""
        step = max(1, self.chunk // ((batch or self.batch) * self.width))
        return (slice(start, min(start + step, self.height)) for start in range(0, self.height, step))

    def columns(self, batch: int | None = None) -> Iterator[Tensor]:
        """All columns of J, some at a time and in any order, (B, n); none is wider than the first.

        Of two parts of one kind and parameter, the pieces for the same `batch` are the same columns.
        """
        return (self.rows(rows).flatten(1) for rows in self.slices(batch))

    def gram(self) -> Tensor:
        total, buffer = self._zeros(self.batch, self.batch), None
        for j in self.columns():
            buffer = torch.empty_like(j, dtype=torch.float64) if buffer is None else buffer  # fresh memory is slow
            wide = buffer[:, : j.shape[1]].copy_(j)
            total.addmm_(wide, wide.T)
        return total

    def cross(self, other: Any) -> Tensor:
        batch, total = max(self.batch, other.batch), self._zeros(self.batch, other.batch)
        for left, right in zip(self.columns(batch), other.columns(batch), strict=True):
            total.addmm_(left.double(), right.double().T)
        return total

    def squares(self) -> Tensor:
        return sum((j.double().square().sum(1) for j in self.columns()), self._zeros(self.batch))

    def vjp(self, w: Tensor) -> tuple[Tensor, ...]:
        slices = [torch.tensordot(w.to(j), j, 1) for j in map(self.rows, self.slices())]
        return (torch.cat(slices).view(self.params[0].shape),)

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        matrix = v[0].reshape(height(v[0]), -1)  # slices are of rows, and a 0-d parameter has one
        return sum(
            ((self.rows(rows) * matrix[rows]).sum((1, 2)).double() for rows in self.slices()), self._zeros(self.batch)
        )

    def columnwise(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat([f(self.rows(rows).flatten(1)) for rows in self.slices()]).view(self.params[0].shape),)

    def split(self) -> Sequence[Sliced]:
        return (self,)

    def lasting(self) -> Sequence[Sliced]:
        return (self,)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.params[0].device)


@dataclass
class Dense(Sliced):
    """Gradients small enough to hold: biases, norms' scales, early convolutions. `j` is ``(B, *shape)``."""

    params: tuple[Tensor, ...]
    j: Tensor

    def __post_init__(self) -> None:
        self.batch = len(self.j)
        self.j = self.j.reshape(self.batch, self.height, -1)

    def rows(self, rows: slice) -> Tensor:
        return self.j[:, rows]

    def masked(self, masks: Sequence[Tensor]) -> Dense:
        return Dense(self.params, self.j * masks[0].to(self.j)[:, None])


@dataclass
class Outer(Sliced):
    """A linear map's weight, and its bias with it: gradients ``sum_t d_t a_t^T`` over T positions.

    Args:
        params: ``(weight,)`` or ``(weight, bias)``.
        d: gradients of the outputs, (B, T, o).
        a: inputs, (B, T, i); or fewer, (B / R, T, i), of which each belongs to R consecutive rows.
    """

    params: tuple[Tensor, ...]
    d: Tensor
    a: Tensor

    def __post_init__(self) -> None:
        size, self.positions, self.outputs = self.d.shape
        examples = len(self.a)
        self.batch = max(size, examples)
        self.share = self.batch // examples  # R, the number of rows with the same inputs
        self.has_bias = len(self.params) == 2

    @property
    def height(self) -> int:
        return self.outputs

    @property
    def width(self) -> int:
        return self.a.shape[2]

    def rows(self, rows: slice) -> Tensor:
        return matmul(self.d[:, :, rows].mT, self.a)

    def gram(self) -> Tensor:
        if self._pairwise_is_cheaper(self):
            return self._pairwise(self)
        if self.has_bias:
            return sum(part.gram() for part in self.split())  # type: ignore[return-value]
        return super().gram() if self.height >= self.width else self._transposed().gram()

    def cross(self, other: Outer) -> Tensor:
        if self._pairwise_is_cheaper(other):
            return self._pairwise(other)
        if self.has_bias:
            return sum(mine.cross(its) for mine, its in zip(self.split(), other.split(), strict=True))  # type: ignore[return-value]
        return super().cross(other) if self.height >= self.width else self._transposed().cross(other._transposed())

    def _transposed(self) -> Outer:
        """Transposing leaves inner products as they are; fewer, longer slices copy less."""
        return Outer(self.params, self.a, self.d)

    def _pairwise_is_cheaper(self, other: Outer) -> bool:
        positions, batch = max(self.positions, other.positions), min(self.batch, other.batch)
        return pairwise_is_cheaper(positions, self.height, self.width, batch, self.share * other.share)

    def _pairwise(self, other: Outer) -> Tensor:
        """``(A A^T + 1) * (D D^T)`` over pairs of positions, summed over each pair of examples."""
        step = max(1, CHUNK // (self.share * self.positions * other.positions * other.batch))
        # some examples at a time: all pairs of positions at once would be (B T)² numbers
        return torch.cat([self._pairs(slice(k, k + step), other) for k in range(0, len(self.a), step)])

    def _pairs(self, chosen: slice, other: Outer) -> Tensor:
        inputs = kernel(self.a, other.a, chosen)
        inputs = inputs.add_(1) if self.has_bias else inputs  # a bias is the weight of an input that is 1
        pairs = kernel(self.d, other.d, slice(chosen.start * self.share, chosen.stop * self.share))
        if self.share * other.share == 1:
            pairs.mul_(inputs)
        else:
            apart = (len(self.a[chosen]), self.share, self.positions, len(other.a), other.share, other.positions)
            pairs.view(apart).mul_(inputs.view(apart[0], 1, apart[2], apart[3], 1, apart[5]))
        if self.positions == other.positions == 1:
            return pairs
        return pairs.view(-1, self.positions, other.batch, other.positions).sum((1, 3))

    def squares(self) -> Tensor:
        # with one position, |d aᵀ|² = |d|² |a|²: no gradient is needed
        if self.positions > 1:
            return super().squares() + (self._bias().squares() if self.has_bias else 0)
        a, d = (t.double().square().sum((1, 2)) for t in (self.a, self.d))
        return ((a + self.has_bias)[:, None] * d.view(len(a), -1)).flatten()

    def vjp(self, w: Tensor) -> tuple[Tensor, ...]:
        d = self.d * w.to(self.d)[:, None, None]
        d = (d if self.share == 1 else d.unflatten(0, (len(self.a), -1)).sum(1)).flatten(0, 1)
        weight = (d.T @ self.a.flatten(0, 1)).view(self.params[0].shape)
        return (weight, d.sum(0)) if self.has_bias else (weight,)

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        moved = self.a @ v[0].flatten(1).T
        moved = moved + v[1] if self.has_bias else moved
        return (moved[:, None] * self.d.unflatten(0, (len(self.a), -1))).sum((2, 3)).flatten().double()

    def columnwise(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        weight = super().columnwise(f)
        return (*weight, *self._bias().columnwise(f)) if self.has_bias else weight

    def masked(self, masks: Sequence[Tensor]) -> Outer:
        return replace(self, d=self.d * masks[0].to(self.d))

    def split(self) -> Sequence[Sliced]:
        return (replace(self, params=self.params[:1]), self._bias()) if self.has_bias else (self,)

    def _bias(self) -> Dense:
        return Dense((self.params[1],), self.d.sum(1))
