"""The neural tangent kernel: how much a gradient step on one example moves the model's output at another. While the
kernel does not change, training by squared errors is a linear equation, whose solution is known at every time.

    Θ(x, x') = J(x) J(x')ᵀ                          J: the C outputs by the parameters, (C, P); Θ(x, x') is (C, C)
    cost  1/(2N) sum_i |f(x_i) - y_i|²              K = Θ(X, X) / N = U diag(λ) Uᵀ
    f_t(x) = f_0(x) - Θ(x, X) α_t                   α_t = U diag(q_t(λ)) Uᵀ (f_0(X) - y) / N
    gradient flow for a time t                      q_t(λ) = (1 - exp(-t λ)) / λ
    k steps of gradient descent                     q_k(λ) = (1 - (1 - lr λ)^k) / λ

Each error along an eigenvector of K decays at its own rate λ. In the NTK parametrisation (`NTKMLP`: all weights from
N(0, 1), divided by the root of the layer's inputs when used) the kernel at the start tends to a fixed one as the layers
get wider, and does not change during training:

    Σ¹ = x·x' / n + β²,   Σ' = E[σ(u) σ(v)] + β²,   Θ¹ = Σ¹,   Θ' = Θ E[σ'(u) σ'(v)] + Σ'        (u, v) ~ N(0, Σ)

Jacot, Gabriel and Hongler: Neural Tangent Kernel (arXiv 1806.07572). β = 0.1 and a learning rate of 1 are what its
experiments use, in that parametrisation; in PyTorch's own the kernel grows with the width. No official code exists.

What differs, and why:
- The model is evaluated in evaluation mode: with dropout or batch statistics it is no fixed function of its input.
- The kernel is the engine's Gram matrix, in float64: in float32 a kernel of some hundred examples is not definite.
- Directions in which K is zero up to rounding do not move; without that, t = inf would divide by zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steep.loop.modes import evaluating
from steep.method import Method, Paper
from steep.per_example import PerExample
from steep.probes._kernel_flow import KernelFlow, kernel_flow
from steep.probes._wide_networks import NTKMLP, InfiniteKernels, infinite_ntk
from steep.utils.validation import require, require_tensors

__all__ = [
    "NTKMLP",
    "Drift",
    "InfiniteKernels",
    "KernelFlow",
    "Linearised",
    "empirical_ntk",
    "infinite_ntk",
    "kernel_drift",
    "kernel_flow",
    "kernel_product",
    "linearised",
]


def empirical_ntk(model: nn.Module, x: Tensor, x2: Tensor | None = None, *, outputs: str = "full") -> Tensor:
    """The kernel of a model as it is: inner products of its outputs' gradients, over all parameters that train.

    Nothing of the model changes: mode, gradients, hooks.

    Args:
        model: from inputs (n, ...) to outputs (n,) or (n, ...), which are flattened to (n, C).
        x: inputs, (n, ...).
        x2: inputs of the second argument, (m, ...); `None` for `x` itself.
        outputs: "full" keeps all pairs of outputs; "trace" averages over equal ones, in C kernels of (n, m).

    Returns:
        float64, (n, m, C, C), or (n, m) for the trace.

    Raises:
        ValueError: no inputs, inputs of different shapes, a kernel that is not finite, or nothing that trains.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> empirical_ntk(torch.nn.Linear(2, 1, bias=False), x, outputs="trace")
        tensor([[1., 1.],
                [1., 5.]], dtype=torch.float64)
    """
    require("outputs", outputs, outputs in ("full", "trace"), "'full' or 'trace'")
    _check_inputs(x, x2)
    engine = PerExample(model)
    try:
        with evaluating(model), torch.enable_grad():
            f = [model(inputs).reshape(len(inputs), -1) for inputs in (x, x2) if inputs is not None]
            kernel = _full(engine, *f) if outputs == "full" else _trace(engine, *f)
    finally:
        engine.remove()
    if not kernel.isfinite().all():
        raise ValueError("the kernel is not finite: the model's outputs or their gradients are not, at these inputs")
    return kernel


def _check_inputs(x: Tensor, x2: Tensor | None) -> None:
    require_tensors(x=x, x2=x2)
    if not len(x) or (x2 is not None and not len(x2)):
        raise ValueError("there must be at least one input, of each argument")
    if x2 is not None and x.shape[1:] != x2.shape[1:]:
        raise ValueError(f"x and x2 must hold inputs of one shape, got {tuple(x.shape[1:])} and {tuple(x2.shape[1:])}")


def _trace(engine: PerExample, *f: Tensor) -> Tensor:
    columns = zip(*(outputs.unbind(1) for outputs in f), strict=True)
    return torch.stack([_gram(engine, column) for column in columns]).mean(0)


def _full(engine: PerExample, *f: Tensor) -> Tensor:
    # rows come example by example, outputs within them: (n, C, m, C) to (n, m, C, C)
    return _gram(engine, f).view(*f[0].shape, *f[-1].shape).transpose(1, 2)


def _gram(engine: PerExample, losses: Sequence[Tensor]) -> Tensor:
    rows, *other = (engine.rows(each, retain_graph=True) for each in losses)
    return rows.gram(*other)


def kernel_product(model: nn.Module, x: Tensor, x2: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The product ``v -> Θ(x, x2) v`` of the full kernel, for kernels too large to hold.

    The graphs of both forwards live as long as the product.

    Args:
        model, x, x2: as for `empirical_ntk`.

    Returns:
        a function from v, shaped as the outputs at `x2`, to the shape of the outputs at `x`.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    # fused attention has no second derivative
    with evaluating(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        here, there = model(x), model(x if x2 is None else x2)
        u = torch.zeros_like(here, requires_grad=True)  # Jᵀ u is linear in u: its derivative by u, times w, is J w
        pulled = torch.autograd.grad(here, params, u, create_graph=True, materialize_grads=True)

    def product(v: Tensor) -> Tensor:
        w = torch.autograd.grad(there, params, v.to(there).view_as(there), retain_graph=True, materialize_grads=True)
        return torch.autograd.grad(pulled, u, w, retain_graph=True)[0]

    return product


@dataclass(frozen=True)
class Drift:
    """How far a kernel has moved.

    Args:
        distance: ``|Θ' - Θ| / |Θ|`` (Frobenius); 0 where training is linear.
        alignment: cosine of the angle between the two, <= 1; 1 where only the size has changed.
    """

    distance: float
    alignment: float


def kernel_drift(before: Tensor, after: Tensor) -> Drift:
    """Compare the kernels of one model at two moments of a training run, on the same inputs.

    Raises:
        ValueError: kernels of different shapes, or a first one that is zero.

    Example:
        >>> kernel_drift(torch.eye(2), 1.5 * torch.eye(2)).distance
        0.5
    """
    require_tensors(before=before, after=after)
    if before.shape != after.shape:
        raise ValueError(f"both kernels must have one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    a, b = before.double().flatten(), after.double().flatten()
    require("norm of the first kernel", float(a.norm()), bool(a.norm() > 0), "positive")
    cosine = a @ b / (a.norm() * b.norm()) if b.norm() > 0 else torch.zeros(())
    return Drift(float((b - a).norm() / a.norm()), float(cosine))


@dataclass(frozen=True)
class Linearised:
    """What a model becomes if it is trained as its tangent at the start; made by `linearised`.

    Args:
        model: a copy of the model at the start.
        x: training inputs.
        flow: the solution of its training.
    """

    model: nn.Module
    x: Tensor
    flow: KernelFlow

    def at(self, time: float, x: Tensor | None = None) -> Tensor:
        """Outputs after gradient flow for a time, at the training inputs or at others, (n, C)."""
        return self.flow.at(time, *self._elsewhere(x))

    def after(self, steps: int, lr: float, x: Tensor | None = None) -> Tensor:
        """Outputs after steps of gradient descent, at the training inputs or at others, (n, C)."""
        return self.flow.after(steps, lr, *self._elsewhere(x))

    def _elsewhere(self, x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if x is None else (empirical_ntk(self.model, x, self.x), _outputs(self.model, x))


def linearised(model: nn.Module, x: Tensor, targets: Tensor) -> Linearised:
    """Predict the training of a model by squared errors, taking its kernel for constant.

    Exact for a model that is linear in its parameters, and the better the wider a network is.

    Args:
        model: copied as it is now; later changes do not matter.
        x: training inputs, (n, ...).
        targets: (n, C), or (n,) for one output.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> line = linearised(torch.nn.Linear(2, 1), x, torch.tensor([3.0, 5.0]))
        >>> line.at(float("inf"), torch.tensor([[1.0, 1.0]])).round(decimals=4)
        tensor([[4.]], dtype=torch.float64)
    """
    start = _outputs(model, x)
    y = targets.reshape(len(targets), -1)
    # predictions at other inputs are made later, with the model as it is now
    return Linearised(copy.deepcopy(model), x, kernel_flow(empirical_ntk(model, x), y, start))


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    with evaluating(model):
        return model(x).reshape(len(x), -1).double()


method = Method(
    id="ntk",
    paper=Paper(
        "Neural Tangent Kernel: Convergence and Generalization in Neural Networks", arxiv="1806.07572", year=2018
    ),
    changes="probes",
    good_for={"insight"},
    make=empirical_ntk,
    formula="Theta(x, x') = J(x) J(x')^T;  f_t(x) = f_0(x) - Theta(x, X) Theta^-1 (1 - exp(-t Theta / N)) (f_0(X) - y)",
)
