"""Gradients by automatic differentiation: of layers without a rule, of broadcast values, and of everything else."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call, vjp, vmap

from steep.per_example.autodiff import Blocks

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
    # the layer runs again whenever a block is asked for, and must then still be what it was
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
        # several losses per example: consecutive rows of `grad` share the example's inputs
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
