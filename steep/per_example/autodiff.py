"""Parts that only automatic differentiation knows: layers without a rule, broadcast values, and everything else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call, vjp, vmap

from steep.per_example.parts import CHUNK, Dense, Part, Sliced, height

COLUMNS = 2**22
"""Elements of whole columns that are put together at a time, from rows that must be computed again for each."""


@dataclass
class Blocks(Part):
    """A part whose gradients are computed for a block of examples at a time.

    Where the blocks do not fit into `CHUNK` elements at once, they are computed again for each pair of blocks.

    Args:
        block: per-example gradients of a range of examples, (n, *shape) for each parameter.
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
        old = self.masks or [torch.ones_like(mask) for mask in masks]
        return replace(self, masks=[mask * o.to(mask) for mask, o in zip(masks, old, strict=True)])

    def split(self) -> Sequence[Sliced]:
        return [OfBlocks(self, k) for k in range(len(self.params))]

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


class OfBlocks(Sliced):
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

    def masked(self, masks: Sequence[Tensor]) -> OfBlocks:
        own = self.params[0]
        every = [masks[0] if p is own else p.new_ones(height(p)) for p in self.whole.params]
        return OfBlocks(self.whole.masked(every), self.k)


Found = Sequence[Tensor | None]


def gradients(
    output: Tensor | GradientEdge, params: Sequence[Tensor], cotangent: Tensor, *, batched: bool
) -> list[Tensor]:
    """`torch.autograd.grad` with zeros for unused parameters; `batched`: for each entry of `cotangent`."""
    if not batched:
        found: Found = torch.autograd.grad(output, params, cotangent, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, params, strict=True)]
    found = for_each(output, params, cotangent)
    return [p.new_zeros(len(cotangent), *p.shape) if g is None else g for g, p in zip(found, params, strict=True)]


def for_each(
    output: Tensor | GradientEdge, inputs: Sequence[Tensor] | Sequence[GradientEdge], cotangents: Tensor
) -> Found:
    """`torch.autograd.grad` for each of the cotangents, together if it can be; `None` for what is not reached."""
    try:
        with unbatched_operations_allowed():
            return torch.autograd.grad(
                output, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
    except RuntimeError:  # an operation that vmap cannot batch
        singles = [torch.autograd.grad(output, inputs, one, retain_graph=True, allow_unused=True) for one in cotangents]
        every = [filled(one) for one in zip(*singles, strict=True)]
        return [torch.stack(one) if one else None for one in every]


def filled(found: Found) -> list[Tensor]:
    """Gradients of one input, with zeros where it was not reached; none at all if it never was."""
    some = next((g for g in found if g is not None), None)
    return [] if some is None else [torch.zeros_like(some) if g is None else g for g in found]


@contextmanager
def unbatched_operations_allowed() -> Iterator[None]:
    """Silence `vmap` about operations that it loops over: the user cannot change them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*batching rule")
        yield


def through_losses(losses: Tensor, params: tuple[Tensor, ...]) -> Blocks:
    """Parameters used in any way at all: as many backwards through the losses as there are of them."""
    losses = losses.flatten()

    def block(examples: range) -> Sequence[Tensor]:
        one_hot = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)[examples.start : examples.stop]
        return gradients(losses, params, one_hot, batched=True)

    return Blocks(params, len(losses), block, lambda w: gradients(losses, params, w.to(losses), batched=False))


def through_broadcast(edge: GradientEdge, params: tuple[Tensor, ...], grad: Tensor) -> Blocks:
    """Parameters behind a value that all examples share, such as position embeddings.

    Args:
        edge: where the value was computed.
        grad: gradient of each row's own copy of it, (B, *shape of the value).
    """

    def block(examples: range) -> Sequence[Tensor]:
        return gradients(edge, params, grad[examples.start : examples.stop], batched=True)

    def pull(w: Tensor) -> Sequence[Tensor]:
        return gradients(edge, params, torch.tensordot(w.to(grad), grad, 1), batched=False)

    return Blocks(params, len(grad), block, pull)


def local(layer: nn.Module, inputs: dict[Any, Any], grad: Tensor, batch: int) -> Blocks:
    """A layer without a rule, differentiated one example at a time; `vjp` forbids it to change its buffers.

    Args:
        inputs: by position or name; tensors whose first dimension is the batch hold one entry per example.
        grad: gradients of the (first) output: one for each example, or several one after the other.
        batch: number of examples.
    """
    params = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    before = [p._version for p in params.values()]
    batched = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.ndim and len(v) == batch}

    def call(values: dict[str, Tensor], example: dict[Any, Tensor]) -> Tensor:
        given = {k: example[k][None] if k in example else v for k, v in inputs.items()}
        args = tuple(v for k, v in given.items() if isinstance(k, int))
        return first(functional_call(layer, values, args, {k: v for k, v in given.items() if isinstance(k, str)}))

    def pull(example: dict[Any, Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
        (found,) = vjp(lambda values: call(values, example), params)[1](cotangent[None])
        return tuple(found.values())

    def block(examples: range) -> Sequence[Tensor]:
        if before != [p._version for p in params.values()]:
            raise RuntimeError(f"a parameter of a {type(layer).__name__} was changed while its rows were still in use")
        chosen = slice(examples.start, examples.stop)
        its = (
            chosen
            if batch == len(grad)
            else torch.arange(chosen.start, chosen.stop, device=grad.device) // (len(grad) // batch)
        )
        with unbatched_operations_allowed(), torch.enable_grad():  # some kernels keep nothing for a backward without
            return vmap(pull)({k: v[its] for k, v in batched.items()}, grad[chosen])

    return Blocks(tuple(p for p in layer.parameters() if p.requires_grad), len(grad), block)


def first(output: Any) -> Any:
    """The output whose gradient is followed: the first of several (attention also returns its weights)."""
    return output[0] if isinstance(output, tuple) and output else output
