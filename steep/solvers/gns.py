"""Newton's method with any approximation H of the Hessian, made safe by a multiple of the gradient's norm: λ = |g| / γ.
γ, the length over which H tells how the gradient changes, is found by doubling and halving, and so need not be known.

    at x (d,), with |h|² = hᵀ B h and |g|² = gᵀ B^-1 g for gradients:
    d = -(H(x) + λ B)^-1 g,  λ = |g| / γ                                    Cholesky, float64
    accept x + d if f(x) - f(x + d) >= |g(x + d)|² / (8 λ): then γ = 2 γ; else γ = γ / 2, and again

With H = 0 that is gradient descent with steps of length γ; with the exact Hessian of a quadratic every trial is
accepted, λ falls, and the method becomes Newton's.

Semenov, Jaggi, Doikov: Gradient-Normalized Smoothness for Optimization with Approximate Hessians (arXiv 2506.13710).
The test, the factor of two, γ = 1 at the start and 40 trials are those of the authors' code.

What differs, and why:
- Where no trial is accepted the authors' code takes the last one; here it ends, since then rounding decides.
- A matrix H + λ B without Cholesky factor, or a loss that is not finite, is a trial that failed, where theirs stops.
- Their small constants, added to γ and below it, are left out; γ stays positive without.
- It is a function and no `torch.optim.Optimizer`: it needs second derivatives, which a closure that has called
  ``backward()`` can no longer give, and a loss that is the same at every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steep.method import Method, Paper
from steep.utils.validation import Ranges, check_ranges, require_tensors

_Function = Callable[[Tensor], Tensor]

_RANGES: Ranges = {"gamma": "(0, inf)", "tol": "[0, inf)", "steps": "[0, inf)"}
_TRIALS = 40


@dataclass(frozen=True)
class Minimum:
    """Where the search ended.

    Args:
        x: the point, (d,), float64.
        losses: f at the start and after each step.
        grad_norm: dual norm of the gradient at `x`.
        gamma: as it is now, to go on from.
        trials: factorizations that each step took.
        converged: whether `grad_norm` <= tol. If not: the steps were used up, or no trial was accepted.
    """

    x: Tensor
    losses: tuple[float, ...]
    grad_norm: float
    gamma: float
    trials: tuple[int, ...]
    converged: bool


def minimize(
    loss: _Function,
    x: Tensor,
    hessian: _Function | None = None,
    *,
    gamma: float = 1.0,
    metric: Tensor | None = None,
    tol: float = 1e-8,
    steps: int = 1000,
) -> Minimum:
    """Minimise a smooth function by Newton steps that the gradient's norm regularises, with the exact Hessian or an
    approximation of it.

    Args:
        loss: from a vector (d,), float64, to a number; differentiable (twice without `hessian`), and the same at every
            call.
        x: where to start, (d,); taken to float64.
        hessian: from x to a symmetric matrix (d, d), such as `empirical_fisher`; `None` for the exact Hessian. One that
            is not positive semidefinite costs further trials.
        gamma: the first γ, > 0, in units of ``|x|``. 1 is the authors'.
        metric: B, positive definite, (d, d); the identity by default.
        tol: stop where the dual norm of the gradient is at most this, >= 0.
        steps: accepted steps at most, >= 0.

    Raises:
        ValueError: arguments out of range; a loss or matrix of another shape, or a loss that differs between two calls.

    Paper: arXiv 2506.13710.

    Example:
        >>> found = minimize(lambda x: (x - 1).square().sum() + (x - 1).pow(4).sum(), torch.zeros(3))
        >>> found.converged, bool((found.x - 1).abs().max() < 1e-7)
        (True, True)
    """
    check_ranges({"gamma": gamma, "tol": tol, "steps": steps}, _RANGES)
    x = _vector(x)
    b = torch.eye(len(x), dtype=x.dtype, device=x.device) if metric is None else metric.to(x)
    root = _root(b, len(x))
    curvature = torch.func.hessian(loss) if hessian is None else hessian
    f, g = _value_and_gradient(loss, x)
    # a trial may fail; a start may not, since there is no earlier point to go back to
    if not math.isfinite(f):
        raise ValueError(f"loss is {f} at the start: choose x where it is finite")
    if f != float(loss(x)):
        raise ValueError("loss differs between two calls at the same point: switch off dropout, take the full batch")
    losses, trials, size = [f], list[int](), _dual_norm(root, g)
    while size > tol and len(trials) < steps:
        h = _matrix(curvature(x), len(x))  # once for all trials from this point
        for halvings in range(_TRIALS):
            weight = 2.0**halvings * size / gamma
            found = _step(loss, x, g, h + weight * b)
            if found and f - found[1] >= _dual_norm(root, found[2]) ** 2 / (8 * weight):
                break
        else:  # no trial was accepted: from here on, rounding would decide
            break
        x, f, g = found
        # the powers of two are exact, so that doubling and halving leave no drift in gamma
        gamma, size = 2 * gamma / 2.0**halvings, _dual_norm(root, g)
        losses.append(f)
        trials.append(halvings + 1)
    return Minimum(x, tuple(losses), size, gamma, tuple(trials), size <= tol)


def empirical_fisher(losses: _Function) -> _Function:
    """The mean of g gᵀ over the examples, as a function of x, from a function of x to their losses (n,)."""

    def matrix(x: Tensor) -> Tensor:
        rows: Tensor = torch.func.jacrev(losses)(x)
        return rows.T @ rows / len(rows)

    return matrix


def zero(x: Tensor) -> Tensor:
    """H = 0: gradient descent with a search for the length of the step."""
    return x.new_zeros(len(x), len(x))


def _step(loss: _Function, x: Tensor, g: Tensor, system: Tensor) -> tuple[Tensor, float, Tensor] | None:
    """Point, loss and gradient after a trial; `None` if the system is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(system)  # fails where H has a direction of negative curvature
    if failed:
        return None
    new = x - torch.cholesky_solve(g[:, None], factor).squeeze(1)
    return new, *_value_and_gradient(loss, new)


def _value_and_gradient(loss: _Function, x: Tensor) -> tuple[float, Tensor]:
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        value = loss(point)
        if value.ndim:
            raise ValueError(f"loss must return a number, got shape {tuple(value.shape)}")
        (g,) = torch.autograd.grad(value, point)
    return float(value.detach()), g


def _dual_norm(root: Tensor, g: Tensor) -> float:
    return float(torch.linalg.solve_triangular(root, g[:, None], upper=False).norm())


def _vector(x: Tensor) -> Tensor:
    require_tensors(x=x)
    if x.ndim != 1 or len(x) == 0 or not x.isfinite().all():
        raise ValueError(f"x must be a finite vector, got shape {tuple(x.shape)}: flatten parameters into one")
    return x.detach().double().clone()


def _matrix(h: Tensor, d: int) -> Tensor:
    if h.shape != (d, d):
        raise ValueError(f"hessian must return a matrix ({d}, {d}), got shape {tuple(h.shape)}")
    return h.detach().double()


def _root(b: Tensor, d: int) -> Tensor:
    root, failed = torch.linalg.cholesky_ex(b) if b.shape == (d, d) else (b, torch.ones(()))
    if failed or not torch.allclose(b, b.T):
        raise ValueError(f"metric must be a symmetric positive definite matrix ({d}, {d}), got shape {tuple(b.shape)}")
    return root


method = Method(
    id="gns",
    paper=Paper(
        "Gradient-Normalized Smoothness for Optimization with Approximate Hessians", arxiv="2506.13710", year=2025
    ),
    changes="solvers",
    good_for={"faster"},
    make=minimize,
    formula="d = -(H + |g|/gamma B)^-1 g;  gamma doubles if f - f_new >= gamma |g_new|^2 / (8 |g|), else halves",
)
