"""Extreme eigenvalues, and the whole spectrum's shape, of a symmetric matrix from its products (Lanczos, 1950).

    A Q ≈ Q T,   T = Qᵀ A Q  (k x k, tridiagonal),   T = S Θ Sᵀ;   Ritz values Θ, vectors Q S, weights S[0]²

From a random start, ``sum_i weights_i f(Θ_i)`` estimates ``tr f(A) / n``: the Ritz values with their weights, averaged
over starts, are the spectral density (stochastic Lanczos quadrature: Ubaru, Chen and Saad, 2017; Ghorbani et al., arXiv
1901.10159). The basis is kept, and every product is orthogonalized against it twice: without that, rounding makes
copies of converged eigenvalues.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steep.linalg._hutchinson import rademacher
from steep.linalg._vectors import MatVec
from steep.utils.validation import check_ranges


class Ritz(NamedTuple):
    """Approximate eigenpairs, ascending; fewer than asked for where the start spans no larger invariant subspace.

    Args:
        values: (k,), float64.
        vectors: (n, k), orthonormal.
        weights: share of the starting vector along each, (k,), summing to one; float64.
        residuals: ``|A u - θ u|`` of each pair, (k,), float64; the eigenvalue nearest to θ is no farther away.
    """

    values: Tensor
    vectors: Tensor
    weights: Tensor
    residuals: Tensor


class Spectrum(NamedTuple):
    """Points and weights of a spectral density, (probes * k,) in float64; the weights sum to one."""

    values: Tensor
    weights: Tensor


def lanczos(
    matvec: MatVec,
    n: int,
    k: int,
    generator: torch.Generator,
    *,
    start: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Ritz:
    """Ritz pairs of a symmetric n x n matrix after k products.

    Args:
        matvec: product with the matrix.
        k: products to spend, >= 1; at most n are used. Holds k vectors of n numbers.
        generator: of the starting vector's signs.
        start: the starting vector instead, (n,).
        dtype: of the vectors; torch's default.

    Example:
        >>> import torch
        >>> d = torch.tensor([1.0, 2.0, 5.0])
        >>> lanczos(lambda v: d * v, 3, 3, torch.Generator()).values.float()
        tensor([1.0000, 2.0000, 5.0000])
    """
    check_ranges({"k": k, "n": n}, {"k": "[1, inf)", "n": "[1, inf)"})
    q = rademacher(n, generator, dtype=dtype) if start is None else start
    if not q.norm() > 0:
        raise ValueError("the starting vector of lanczos must not be zero")
    basis = q.new_empty(min(k, n), n)
    diagonal, beside = [], []
    q = q / q.norm()
    for j in range(len(basis)):
        basis[j] = q
        w = matvec(q)
        diagonal.append(float(w.double() @ q.double()))
        for _ in range(2):  # one pass leaves rounding errors that matter where little of w is left
            w = w - basis[: j + 1].T @ (basis[: j + 1] @ w)
        beside.append(float(w.norm()))
        # the basis spans an invariant subspace: going on would normalize rounding errors
        if not beside[-1] > _negligible(diagonal, beside, w):
            break
        q = w / beside[-1]
    return _ritz(diagonal, beside, basis[: len(diagonal)])


def _negligible(diagonal: list[float], beside: list[float], w: Tensor) -> float:
    """What is left of a product when it lies in the basis' span, up to rounding."""
    size = max(map(abs, (*diagonal, *beside[:-1])))
    return 10 * len(w) ** 0.5 * torch.finfo(w.dtype).eps * size


def _ritz(diagonal: list[float], beside: list[float], basis: Tensor) -> Ritz:
    t = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[:-1], dtype=torch.float64)
    t += torch.diag(off, 1) + torch.diag(off, -1)
    values, s = torch.linalg.eigh(t)  # a small matrix: on the CPU, whatever the device of the vectors
    s, values = s.to(basis.device), values.to(basis.device)
    return Ritz(values, basis.T @ s.to(basis), s[0].square(), beside[-1] * s[-1].abs())


class Eigenpairs(NamedTuple):
    """Eigenpairs, by falling size of the eigenvalue.

    Args:
        values: (k,), float64, with their signs.
        vectors: (n, k), orthonormal.
        residuals: ``|A u - θ u|`` of each pair, (k,), float64.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def outermost(
    matvec: MatVec, n: int, k: int, products: int, generator: torch.Generator, *, dtype: torch.dtype | None = None
) -> Eigenpairs:
    """The k eigenvalues of a symmetric n x n matrix that are largest in size, each as often as it occurs.

    This is band Lanczos: from one starting vector, Lanczos finds one eigenvector for every distinct eigenvalue; from k
    of them, up to k.

    Args:
        matvec: product with the matrix.
        k: pairs, in [1, n].
        products: to spend, >= k; at most n are used. Holds as many vectors of n numbers, and k more.
        generator: of the starting vectors.
        dtype: of the vectors; torch's default.

    Example:
        >>> d = torch.tensor([1.0, -3.0, 5.0, 5.0])
        >>> outermost(lambda v: d * v, 4, 3, 4, torch.Generator()).values.round().tolist()
        [5.0, 5.0, -3.0]
    """
    check_ranges({"k": k, "products": products}, {"k": f"[1, {n}]", "products": f"[{k}, inf)"})
    products = min(products, n)
    basis = _Basis(rademacher(n, generator, dtype=dtype).new_empty(min(products + k, n), n))
    while basis.count < k:
        basis.add(rademacher(n, generator, dtype=dtype), 1e-6 * n**0.5)
    projected, size = torch.zeros(len(basis.rows), products, dtype=torch.float64), 0.0  # basis A basisᵀ
    for j in range(products):
        while basis.count <= j:  # the basis spans an invariant subspace: the rest is orthogonal to it
            basis.add(rademacher(n, generator, dtype=dtype), 1e-6 * n**0.5)
        w = matvec(basis.rows[j])
        size = max(size, float(w.norm()))
        basis.add(w, 10 * n**0.5 * torch.finfo(w.dtype).eps * size)
        projected[: basis.count, j] = (basis.rows[: basis.count] @ w).double().cpu()
    return _largest(projected, basis.rows, k)


class _Basis:
    """Orthonormal rows, filled one after the other."""

    def __init__(self, rows: Tensor):
        self.rows, self.count = rows, 0

    def add(self, v: Tensor, negligible: float = 0.0) -> None:
        """Add what `v` has outside the span, unless that is no longer than `negligible`, or the basis is whole."""
        q = self.rows[: self.count]
        for _ in range(2):  # one pass leaves rounding errors that matter where little of v is left
            v = v - q.T @ (q @ v)
        if self.count < len(self.rows) and v.norm() > negligible:
            self.rows[self.count] = v / v.norm()
            self.count += 1


def _largest(projected: Tensor, basis: Tensor, k: int) -> Eigenpairs:
    m = projected.shape[1]
    values, s = torch.linalg.eigh((projected[:m] + projected[:m].T) / 2)
    top = values.abs().argsort(descending=True)[:k]
    values, s = values[top].to(basis.device), s[:, top]
    residuals = (projected[m:] @ s).norm(dim=0).to(basis.device)
    return Eigenpairs(values, basis[:m].T @ s.to(basis), residuals)


def spectrum(
    matvec: MatVec, n: int, k: int, probes: int, generator: torch.Generator, *, dtype: torch.dtype | None = None
) -> Spectrum:
    """The spectral density of a symmetric n x n matrix, by stochastic Lanczos quadrature.

    ``(weights * f(values)).sum()`` estimates the mean of f over the eigenvalues.

    Args:
        k: products for each starting vector; 80 to 100 resolve the spectra of networks (arXiv 1901.10159).
        probes: starting vectors, >= 1; 10 in that paper.
    """
    check_ranges({"probes": probes}, {"probes": "[1, inf)"})
    runs = [lanczos(matvec, n, k, generator, dtype=dtype) for _ in range(probes)]
    return Spectrum(torch.cat([run.values for run in runs]), torch.cat([run.weights for run in runs]) / probes)


def density(found: Spectrum, grid: Tensor, width: float) -> Tensor:
    """The density on a grid, each point of the spectrum blurred to a normal curve of this standard deviation (> 0)."""
    check_ranges({"width": width}, {"width": "(0, inf)"})
    distance = (grid.double()[:, None] - found.values) / width
    bumps = (-distance.square() / 2).exp() / (width * (2 * torch.pi) ** 0.5)
    return bumps @ found.weights
