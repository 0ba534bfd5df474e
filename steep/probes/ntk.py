"""The neural tangent kernel: how much a gradient step on one example moves the model's output at another. While the
kernel stays what it is, training by squared errors is a linear equation, whose solution is known at every time.

    Θ(x, x') = J(x) J(x')ᵀ                          J: the C outputs by the parameters, (C, P); Θ(x, x') is (C, C)
    cost  1/(2N) sum_i |f(x_i) - y_i|²              K = Θ(X, X) / N = U diag(λ) Uᵀ
    f_t(x) = f_0(x) - Θ(x, X) α_t                   α_t = U diag(q_t(λ)) Uᵀ (f_0(X) - y) / N
    gradient flow for a time t                      q_t(λ) = (1 - exp(-t λ)) / λ
    k steps of gradient descent                     q_k(λ) = (1 - (1 - lr λ)^k) / λ

Each error along an eigenvector of K decays at its own rate λ. In the NTK parametrisation (`NTKMLP`: all weights from
N(0, 1), divided by the root of the layer's inputs when used) the kernel at the start tends to a fixed one as the layers
get wider, and does not move in training:

    Σ¹ = x·x' / n + β²,   Σ' = E[σ(u) σ(v)] + β²,   Θ¹ = Σ¹,   Θ' = Θ E[σ'(u) σ'(v)] + Σ'        (u, v) ~ N(0, Σ)

Jacot, Gabriel and Hongler: Neural Tangent Kernel (arXiv 1806.07572). β = 0.1 and a learning rate of 1 are what its
experiments use, in that parametrisation; in PyTorch's own the kernel grows with the width. No official code exists.

What differs, and why:
- The model is looked at in evaluation mode: with dropout or batch statistics there is no function to have a kernel.
- The kernel is the engine's Gram matrix, in float64: in float32 a kernel of some hundred examples is not definite.
- Directions in which K is zero up to rounding do not move; without that, t = inf would divide by zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import skip_init

from steep.loop.modes import evaluating
from steep.method import Method, Paper
from steep.per_example import PerExample
from steep.utils.validation import check_ranges, require

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

Activation = Callable[[Tensor], Tensor]
Dual = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

ROUNDING = 1e-14
"""Eigenvalues below this share of the largest, times their number, are rounding errors of a float64 kernel."""


# ---- the kernel of a model


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
    if not len(x) or (x2 is not None and not len(x2)):
        raise ValueError("there must be at least one input, of each argument")
    if x2 is not None and x.shape[1:] != x2.shape[1:]:
        raise ValueError(f"x and x2 must hold inputs of one shape, got {tuple(x.shape[1:])} and {tuple(x2.shape[1:])}")


def _trace(engine: PerExample, *f: Tensor) -> Tensor:
    columns = zip(*(outputs.unbind(1) for outputs in f), strict=True)
    return torch.stack([_gram(engine, column) for column in columns]).mean(0)


def _full(engine: PerExample, *f: Tensor) -> Tensor:
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
    """Compare the kernels of one model at two moments of a training, on the same inputs.

    Raises:
        ValueError: kernels of different shapes, or a first one that is zero.

    Example:
        >>> kernel_drift(torch.eye(2), 1.5 * torch.eye(2)).distance
        0.5
    """
    if before.shape != after.shape:
        raise ValueError(f"both kernels must have one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    a, b = before.double().flatten(), after.double().flatten()
    require("norm of the first kernel", float(a.norm()), bool(a.norm() > 0), "positive")
    cosine = a @ b / (a.norm() * b.norm()) if b.norm() > 0 else torch.zeros(())
    return Drift(float((b - a).norm() / a.norm()), float(cosine))


# ---- training with a kernel that stays as it is


@dataclass(frozen=True)
class KernelFlow:
    """Training by squared errors with a fixed kernel, solved; made by `kernel_flow`.

    Args:
        kernel: Θ of the training inputs, (n, n) or (n, n, C, C).
        rates: eigenvalues of K, ascending: errors along `modes` decay as ``exp(-rate t)``.
        modes: eigenvectors of K, as columns.
        targets, start: y and f_0 of the training inputs, (n,) or (n, C).
    """

    kernel: Tensor
    rates: Tensor
    modes: Tensor
    targets: Tensor
    start: Tensor

    @property
    def largest_lr(self) -> float:
        """Gradient descent diverges from this learning rate on: two over the largest rate."""
        return 2 / float(self.rates[-1])

    def at(self, time: float, cross: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """Outputs after gradient flow for a time (>= 0; `math.inf` interpolates as far as the kernel can).

        Args:
            time: in learning rate times steps.
            cross: Θ between other inputs and the training inputs, (m, n) or (m, n, C, C), to predict there.
            start: f_0 of those inputs; zero by default.
        """
        require("time", time, time >= 0, "at least 0")
        return self._outputs(-torch.expm1(-time * self.rates), time, cross, start)

    def after(self, steps: int, lr: float, cross: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """Outputs after steps of gradient descent; `cross` and `start` as in `at`."""
        check_ranges({"steps": steps, "lr": lr}, {"steps": "[0, inf)", "lr": "(0, inf)"})
        z = lr * self.rates
        learnt = torch.where(z < 0.5, -torch.expm1(steps * torch.log1p(-z)), 1 - (1 - z) ** steps)
        return self._outputs(learnt, steps * lr, cross, start)

    def _outputs(self, learnt: Tensor, time: float, cross: Tensor | None, start: Tensor | None) -> Tensor:
        """``start - cross α``; `learnt` is the share of the error along each mode that is gone."""
        moves = self.rates > ROUNDING * len(self.rates) * self.rates[-1]
        still = 0.0 if math.isinf(time) else time
        q = torch.where(moves, learnt / torch.where(moves, self.rates, 1.0), still)
        error = (self.start - self.targets).reshape(len(self.modes), -1)
        alpha = self.modes @ (q[:, None] * (self.modes.T @ error)) / len(self.targets)
        start = self.start if cross is None else start
        moved = (_matrix(self.kernel if cross is None else cross) @ alpha).reshape(-1, *self.targets.shape[1:])
        return -moved if start is None else start.double() - moved


def kernel_flow(kernel: Tensor, targets: Tensor, start: Tensor | None = None) -> KernelFlow:
    """Solve the training of ``1/(2N) sum |f(x_i) - y_i|²`` with a fixed kernel.

    For the loss ``mean((f - y)²)`` over N examples and C outputs, multiply learning rates by 2 / C.

    Args:
        kernel: Θ(X, X), (n, n), the same for every output, or (n, n, C, C); symmetric.
        targets: y, (n,) or (n, C).
        start: f_0(X), shaped as the targets; zero by default.

    Raises:
        ValueError: shapes that do not fit, or numbers that are not finite.

    Example:
        >>> flow = kernel_flow(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), targets=torch.ones(2))
        >>> flow.after(1, lr=0.5), flow.at(math.inf)
        (tensor([0.5000, 1.0000], dtype=torch.float64), tensor([1., 1.], dtype=torch.float64))
    """
    start = torch.zeros_like(targets) if start is None else start
    _check_flow(kernel, targets, start)
    matrix = _matrix(kernel)
    rates, modes = torch.linalg.eigh((matrix + matrix.T) / 2 / len(targets))
    return KernelFlow(kernel.double(), rates.clamp(min=0), modes, targets.double(), start.double())


def _matrix(kernel: Tensor) -> Tensor:
    """(n, m, C, C) as (n C, m C)."""
    k = kernel.double()
    return k if k.ndim == 2 else k.transpose(1, 2).reshape(k.shape[0] * k.shape[2], -1)


def _check_flow(kernel: Tensor, targets: Tensor, start: Tensor) -> None:
    n, outputs = len(targets), math.prod(targets.shape[1:])
    if kernel.shape not in ((n, n), (n, n, outputs, outputs)) or targets.ndim > 2 or n == 0:
        raise ValueError(
            f"kernel must be (n, n) or (n, n, C, C) for targets (n,) or (n, C) with n > 0, got {tuple(kernel.shape)} "
            f"and {tuple(targets.shape)}"
        )
    if start.shape != targets.shape:
        raise ValueError(f"start must have the shape of targets, got {tuple(start.shape)} and {tuple(targets.shape)}")
    for name, value in (("kernel", kernel), ("targets", targets), ("start", start)):
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite")


@dataclass(frozen=True)
class Linearised:
    """What a model becomes if it is trained as its tangent at the start; made by `linearised`.

    Args:
        model: a copy of the model at the start.
        x: training inputs.
        flow: its solved training.
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
        model: looked at as it is now; later changes do not matter.
        x: training inputs, (n, ...).
        targets: (n, C), or (n,) for one output.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> line = linearised(torch.nn.Linear(2, 1), x, torch.tensor([3.0, 5.0]))
        >>> line.at(math.inf, torch.tensor([[1.0, 1.0]])).round(decimals=4)
        tensor([[4.]], dtype=torch.float64)
    """
    start = _outputs(model, x)
    y = targets.reshape(len(targets), -1)
    return Linearised(copy.deepcopy(model), x, kernel_flow(empirical_ntk(model, x), y, start))


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    with evaluating(model):
        return model(x).reshape(len(x), -1).double()


# ---- the limit of wide networks


@dataclass(frozen=True)
class InfiniteKernels:
    """Kernels of an infinitely wide network, float64, (n, m).

    Args:
        nngp: covariance of its outputs at initialisation.
        ntk: its tangent kernel, the same at all times and for each output.
    """

    nngp: Tensor
    ntk: Tensor


def infinite_ntk(
    x: Tensor,
    x2: Tensor | None = None,
    *,
    depth: int,
    activation: str | Activation = "relu",
    bias_std: float = 0.1,
    nodes: int = 64,
) -> InfiniteKernels:
    """The kernels that `NTKMLP` tends to as its hidden layers get wider.

    Args:
        x: inputs, (n, d).
        x2: inputs of the second argument, (m, d); `None` for `x` itself.
        depth: linear layers, >= 1; one less is the number of hidden layers.
        activation: "relu" and "erf" by their closed forms; any function of a tensor, element by element, by
            Gauss-Hermite quadrature, which wants it smooth.
        bias_std: β, the factor of the biases, at least 0. 0.1 is the paper's.
        nodes: of the quadrature, in each of two dimensions.

    Raises:
        ValueError: arguments out of range, an unknown activation, or inputs that do not fit.

    Example:
        >>> x = torch.tensor([[1.0, 1.0]])
        >>> infinite_ntk(x, depth=1, bias_std=0.0).ntk
        tensor([[1.]], dtype=torch.float64)
    """
    check_ranges(
        {"depth": depth, "bias_std": bias_std, "nodes": nodes},
        {"depth": "[1, inf)", "bias_std": "[0, inf)", "nodes": "[2, inf)"},
    )
    x2 = x if x2 is None else x2
    if x.ndim != 2 or x2.ndim != 2 or x.shape[1] != x2.shape[1] or x.shape[1] == 0:
        raise ValueError(f"inputs must be (n, d) and (m, d) with d > 0, got {tuple(x.shape)} and {tuple(x2.shape)}")
    x, x2, variance = x.double(), x2.double(), bias_std**2
    dual = _dual(activation, nodes)
    cross = x @ x2.T / x.shape[1] + variance
    own, other = (z.square().mean(1) + variance for z in (x, x2))
    theta = cross
    for _ in range(depth - 1):
        values, slopes = dual(cross, own[:, None], other[None])
        own, other = (dual(d, d, d)[0] + variance for d in (own, other))
        cross = values + variance
        theta = theta * slopes + cross
    return InfiniteKernels(cross, theta)


def _dual(activation: str | Activation, nodes: int) -> Dual:
    """From the entries of a covariance to E[σ(u) σ(v)] and E[σ'(u) σ'(v)]."""
    if callable(activation):
        return lambda k, a, b: _quadrature(activation, nodes, k, a, b)
    require("activation", activation, activation in ("relu", "erf"), "'relu', 'erf' or a function")
    return _relu if activation == "relu" else _erf


def _relu(k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    size = (a * b).sqrt()
    u = torch.where(size > 0, k / size, 0.0).clamp(-1, 1)  # rounding lifts it above 1, where arccos is NaN
    angle = math.pi - u.arccos()
    return size * ((1 - u.square()).sqrt() + u * angle) / (2 * math.pi), angle / (2 * math.pi)


def _erf(k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    square = (1 + 2 * a) * (1 + 2 * b)
    return 2 / math.pi * (2 * k / square.sqrt()).asin(), 4 / math.pi / (square - 4 * k.square()).sqrt()


def _quadrature(activation: Activation, nodes: int, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """u = √a z and v = √b (ρ z + √(1 - ρ²) z'), with z and z' independent and standard normal."""
    points, weights = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(nodes))
    weights = weights / weights.sum()
    size = (a * b).sqrt()
    rho = torch.where(size > 0, k / size, 0.0).clamp(-1, 1)
    second = torch.zeros(2, *k.shape, dtype=torch.float64)
    for z, w in zip(points, weights, strict=True):
        v = b.sqrt()[..., None] * (rho[..., None] * z + (1 - rho.square()).sqrt()[..., None] * points)
        inner = torch.stack(_with_slope(activation, v)) @ weights
        second += w * torch.stack(_with_slope(activation, (a.sqrt() * z).expand(k.shape))) * inner
    return second[0], second[1]


def _with_slope(activation: Activation, u: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = u.detach().clone().requires_grad_()
        value = activation(leaf)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


class NTKMLP(nn.Module):
    """A fully connected network in the NTK parametrisation: ``z' = W a / √inputs + β b``, all W and b from N(0, 1).

    Args:
        widths: inputs, hidden layers, outputs; at least two.
        activation: between the layers.
        bias_std: β, at least 0. 0.1 is the paper's.
        generator: of the initial numbers; torch's default by default.

    Example:
        >>> NTKMLP([2, 512, 1])(torch.zeros(5, 2)).shape
        torch.Size([5, 1])
    """

    def __init__(
        self,
        widths: Iterable[int],
        activation: Activation = torch.relu,
        bias_std: float = 0.1,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        check_ranges({"bias_std": bias_std}, {"bias_std": "[0, inf)"})
        sizes = list(pairwise(widths))
        require("number of widths", len(sizes) + bool(sizes), len(sizes) > 0, "at least 2")
        self.activation, self.bias_std = activation, bias_std
        self.layers = nn.ModuleList(skip_init(nn.Linear, i, o, bias=False) for i, o in sizes)
        self.biases = nn.ParameterList(torch.empty(o) for _, o in sizes)
        for p in self.parameters():
            nn.init.normal_(p, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for k, (layer, bias) in enumerate(zip(self.layers, self.biases, strict=True)):
            x = layer((self.activation(x) if k else x) / math.sqrt(x.shape[1])) + self.bias_std * bias
        return x


method = Method(
    id="ntk",
    paper=Paper(
        "Neural Tangent Kernel: Convergence and Generalization in Neural Networks", arxiv="1806.07572", year=2018
    ),
    changes="probes",
    make=empirical_ntk,
    formula="Theta(x, x') = J(x) J(x')^T;  f_t(x) = f_0(x) - Theta(x, X) Theta^-1 (1 - exp(-t Theta / N)) (f_0(X) - y)",
)
