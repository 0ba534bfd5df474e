"""Conjugate gradients (Hestenes and Stiefel, 1952), preconditioned, for symmetric positive definite matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steep.linalg._vectors import MatVec
from steep.utils.validation import check_ranges, require_tensors


class Solution(NamedTuple):
    """What `cg` found.

    Args:
        x: the solution, (n,).
        iterations: products with the matrix, not counting the one with `x0`.
        residual: ``|b - A x|`` as the recurrence has it.
        converged: whether it is small enough.
        indefinite: a direction of no positive curvature was met; `x` is the solution before it.
    """

    x: Tensor
    iterations: int
    residual: float
    converged: bool
    indefinite: bool


def cg(
    matvec: MatVec,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    damping: float = 0.0,
    preconditioner: MatVec | None = None,
) -> Solution:
    """Solve ``(A + damping I) x = b``.

    Args:
        matvec: product with A.
        b: right-hand side, (n,).
        x0: where to start; zero by default.
        rtol, atol: done when ``|b - A x| <= max(rtol |b|, atol)``, both >= 0. 1e-5 is SciPy's default.
        max_iter: products at most, >= 1; 10 n by default, as in SciPy.
        damping: added to the diagonal, >= 0.
        preconditioner: product with an approximate inverse of A, symmetric and positive definite.

    Raises:
        ValueError: arguments out of range, or a right-hand side that is no vector.

    Example:
        >>> import torch
        >>> solution = cg(lambda v: torch.tensor([2.0, 4.0]) * v, torch.ones(2))
        >>> solution.x, solution.iterations, solution.converged
        (tensor([0.5000, 0.2500]), 2, True)
    """
    require_tensors(b=b, x0=x0)
    max_iter = 10 * b.numel() if max_iter is None else max_iter
    ranges = {"rtol": "[0, inf)", "atol": "[0, inf)", "damping": "[0, inf)", "max_iter": "[1, inf)"}
    check_ranges({"rtol": rtol, "atol": atol, "damping": damping, "max_iter": max_iter}, ranges)
    if b.ndim != 1:
        raise ValueError(f"b must be a vector, got shape {tuple(b.shape)}")
    precondition = preconditioner or torch.clone
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b.clone() if x0 is None else b - matvec(x) - damping * x
    # relative to b and not to the first residual, as in SciPy: a good x0 ends it sooner
    goal = max(rtol * float(b.norm()), atol)
    p = z = precondition(r)
    rz, size, done, indefinite = r @ z, float(r.norm()), 0, False
    while size > goal and done < max_iter:
        ap = matvec(p) + damping * p
        curvature, done = p @ ap, done + 1
        indefinite = not curvature > 0  # also where it is NaN
        if indefinite:
            break
        step = rz / curvature
        x, r = x + step * p, r - step * ap
        z = precondition(r)
        before, rz, size = rz, r @ z, float(r.norm())
        p = z + (rz / before) * p
    return Solution(x, done, size, size <= goal, indefinite)
