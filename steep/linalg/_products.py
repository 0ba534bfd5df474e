"""Products with curvature matrices that are never formed: Hessian, generalized Gauss-Newton, Fisher.

    H v = d/dθ (∇L·v)                        two backwards over the graph of the gradient
    G v = Jᵀ (∇²L (J v))                     J: outputs by θ; ∇²L: the loss by the outputs (positive where L is convex)
    F v = Jᵀ (J v) / B                       J: the B losses by θ

`hessian`, `ggn` and `fisher` evaluate the function once and return the product, which can then be called with any
number of vectors; `hvp`, `ggn_vp` and `fisher_vp` do both. Functions take a dict of parameters by name, as in
``torch.func.functional_call(model, params, (x,))``, and are evaluated at the values in `params`.

J v is found by differentiating ``uᵀ J`` with respect to u, which needs a second backward but no forward-mode rule:
those are missing for many operations. Fused attention has no second derivative, so attention is computed by its
formula here.

Not taken from curvlinops, which has the same products and more (K-FAC, inverses): its operators want a module, a
criterion and a list of batches, and its vectors are flat; a function of parameters covers every loss, and is shorter
than an adapter. The tests compare the two where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from steep.linalg._vectors import Product, Tensors

Function = Callable[[Tensors], Tensor]


def hvp(loss_fn: Function, params: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> Tensors:
    """The Hessian of `loss_fn` at `params` times `v`.

    Args:
        loss_fn: from parameters by name to a number.
        v: a tensor for each parameter.

    Example:
        >>> import torch
        >>> hvp(lambda p: (p["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])}, {"w": torch.ones(2)})
        {'w': tensor([ 6., 12.])}
    """
    return hessian(loss_fn, params)(v)


def ggn_vp(
    model_fn: Function, loss_fn: Callable[[Tensor], Tensor], params: Mapping[str, Tensor], v: Mapping[str, Tensor]
) -> Tensors:
    """The generalized Gauss-Newton matrix of ``loss_fn(model_fn(params))`` times `v`; see `ggn`."""
    return ggn(model_fn, loss_fn, params)(v)


def fisher_vp(losses_fn: Function, params: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> Tensors:
    """The mean over the examples of ``g (g·v)``; see `fisher`."""
    return fisher(losses_fn, params)(v)


def hessian(loss_fn: Function, params: Mapping[str, Tensor]) -> Product:
    """The product with the Hessian of `loss_fn` at `params`, for any number of vectors.

    Args:
        loss_fn: from parameters by name to a number.
    """
    at = _leaves(params)
    with _twice_differentiable():
        gradient = _gradient(_number(loss_fn(at)), list(at.values()), create_graph=True)
    return lambda v: _named(at, _gradient(gradient, list(at.values()), _vectors(at, v)))


def ggn(model_fn: Function, loss_fn: Callable[[Tensor], Tensor], params: Mapping[str, Tensor]) -> Product:
    """The product with the generalized Gauss-Newton matrix ``Jᵀ ∇²L J`` at `params`.

    For a softmax with cross-entropy, or squared errors over two, it is the Fisher matrix of the model's distribution.

    Args:
        model_fn: from parameters by name to the outputs, of any shape.
        loss_fn: from the outputs to a number.
    """
    at = _leaves(params)
    with _twice_differentiable():
        outputs = model_fn(at)
        # cut from the model, so that ∇²L is the Hessian by the outputs alone
        out = outputs.detach().requires_grad_()
        slope = _gradient(_number(loss_fn(out)), [out], create_graph=True)
    push, pull = _jacobian(outputs, list(at.values()))
    return lambda v: _named(at, pull(_gradient(slope, [out], [push(_vectors(at, v))])[0]))


def fisher(losses_fn: Function, params: Mapping[str, Tensor]) -> Product:
    """The product with ``Jᵀ J / B``, the mean over the examples of the outer products of their gradients.

    This is the empirical Fisher matrix where the losses are those of the data's targets, and a Monte Carlo estimate of
    the Fisher matrix where the targets were drawn from the model's own distribution.

    Args:
        losses_fn: from parameters by name to the negative log-likelihoods, one per example, shape (B,).

    Raises:
        ValueError: losses that are no vector.
    """
    at = _leaves(params)
    with _twice_differentiable():
        losses = losses_fn(at)
    if losses.ndim != 1 or len(losses) == 0:
        raise ValueError(f"losses_fn must return one loss per example, shape (B,), got {tuple(losses.shape)}")
    push, pull = _jacobian(losses, list(at.values()))
    return lambda v: _named(at, pull(push(_vectors(at, v)) / len(losses)))


def _jacobian(outputs: Tensor, at: Sequence[Tensor]) -> tuple[Callable[..., Tensor], Callable[..., list[Tensor]]]:
    """``v -> J v`` and ``u -> Jᵀ u``."""
    u = torch.zeros_like(outputs, requires_grad=True)
    rows = _gradient(outputs, at, [u], create_graph=True)
    return lambda v: _gradient(rows, [u], v)[0], lambda w: _gradient(outputs, at, [w])


def _gradient(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """`torch.autograd.grad` that keeps the graph, with zeros where nothing depends on an input."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    cotangents = [torch.ones_like(o) for o in outputs] if cotangents is None else cotangents
    # autograd raises for an output that is constant, such as the gradient of a linear loss; its derivative is zero
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(i) for i in inputs]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        inputs,
        [c for _, c in pairs],
        retain_graph=True,
        create_graph=create_graph,
        materialize_grads=True,
    )
    return list(found)


def _leaves(params: Mapping[str, Tensor]) -> Tensors:
    # leaves of their own: the caller's parameters may be frozen, or part of another graph
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def _named(at: Tensors, tensors: Sequence[Tensor]) -> Tensors:
    return dict(zip(at, tensors, strict=True))


def _vectors(at: Tensors, v: Mapping[str, Tensor]) -> list[Tensor]:
    if at.keys() != v.keys():
        raise ValueError(f"v must have the names of params; only in one of them: {sorted(at.keys() ^ v.keys())[:5]}")
    return [v[name].to(p).view(p.shape) for name, p in at.items()]


def _number(loss: Tensor) -> Tensor:
    if loss.ndim:
        raise ValueError(f"loss_fn must return a number, got shape {tuple(loss.shape)}: reduce it, e.g. .mean()")
    return loss


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield
