"""The Hessian of a model's loss: its outermost eigenvalues, its trace, and the shape of its spectrum."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steep.linalg import (
    Estimate,
    MatVec,
    Spectrum,
    density,
    flatten,
    hessian,
    hutchinson_trace,
    lanczos,
    on_vectors,
    outermost,
    unflatten,
)
from steep.loop.modes import evaluating
from steep.probes._pictures import figure
from steep.probes._weights import Loss, mean_loss, snapshot
from steep.utils.validation import check_ranges, require


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues of the Hessian that are largest in size, with their sign.

    Args:
        values: (k,), by falling size, float64.
        directions: eigenvectors of length 1, by parameter name.
        residuals: ``|H u - λ u|``, (k,): no eigenvalue is farther from λ than that. Large ones want more steps.
    """

    values: Tensor
    directions: tuple[dict[str, Tensor], ...]
    residuals: Tensor


def top_eigenpairs(
    model: nn.Module, loss: Loss, generator: torch.Generator, *, k: int = 2, steps: int = 100
) -> Eigenpairs:
    """The k outermost eigenvalues of the Hessian, each as often as it occurs, and directions for `landscape`.

    Args:
        model, loss: as for `landscape`; all parameters that train count.
        generator: of the k starting vectors.
        k: pairs, in [1, number of parameters].
        steps: products with the Hessian, >= k; as many vectors are held.
    """
    check_ranges({"k": k, "steps": steps}, {"k": "[1, inf)", "steps": f"[{k}, inf)"})
    weights = snapshot(model)
    matvec, n, dtype = _hessian(model, loss)
    require("k", k, k <= n, f"at most the number of parameters, {n}")
    found = outermost(matvec, n, k, steps, generator, dtype=dtype)
    directions = tuple(unflatten(vector, weights) for vector in found.vectors.T)
    return Eigenpairs(found.values, directions, found.residuals)


def hessian_trace(model: nn.Module, loss: Loss, generator: torch.Generator, *, samples: int = 100) -> Estimate:
    """The Hessian's trace and its standard error, from products with random signs; arguments as of `top_eigenpairs`."""
    matvec, n, dtype = _hessian(model, loss)
    return hutchinson_trace(matvec, n, samples, generator, dtype=dtype)


@dataclass(frozen=True)
class Criteria:
    """What the spectrum says about the fit; both grow where accuracy falls.

    Args:
        r_e: mean over the runs of ``|λ_min / λ_max|``.
        k_h: mean over the runs of the negative part over the positive part; infinite without a positive part.
        negative: share of negative eigenvalues. The paper's follow-up: above one half, do not trust the other two.
    """

    r_e: float
    k_h: float
    negative: float


@dataclass(frozen=True)
class HessianSpectrum:
    """Nodes and weights of the Hessian's spectral density, one `steep.linalg.Spectrum` per run."""

    runs: tuple[Spectrum, ...]

    @property
    def mean(self) -> Spectrum:
        """All runs as one spectrum."""
        values, weights = (torch.cat(parts) for parts in zip(*self.runs, strict=True))
        return Spectrum(values, weights / len(self.runs))

    def criteria(self, n: float = 0.5) -> Criteria:
        """r_e and K_h.

        Args:
            n: power of K_h, in (0, 1). 0.5 is the paper's.
        """
        check_ranges({"n": n}, {"n": "(0, 1)"})
        values, weights = self.mean
        ratios = [float((run.values.min() / run.values.max()).abs()) for run in self.runs]
        parts = [_negative_over_positive(run, n) for run in self.runs]
        return Criteria(sum(ratios) / len(ratios), sum(parts) / len(parts), float(weights[values < 0].sum()))

    def draw(self, axis: Any, *, bins: int = 2000, width: float | None = None) -> None:
        """Draw the density on a matplotlib axis, with a logarithmic scale.

        Args:
            bins: points of the curve.
            width: standard deviation of the bump that each node is drawn as; ``sqrt(1e-5 max(1, range))`` by default.
        """
        low, high = (float(f(self.mean.values)) for f in (torch.min, torch.max))
        width = math.sqrt(1e-5 * max(1.0, high - low)) if width is None else width
        grid = torch.linspace(low - 5 * width, high + 5 * width, bins, dtype=torch.float64)
        axis.semilogy(grid, density(self.mean, grid, width) + 1e-10)  # the logarithm of an empty stretch
        axis.set(xlabel="eigenvalue", ylabel="density", ylim=(1e-6, None))

    def picture(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """A matplotlib figure, written to `path` if given; options as of `draw`."""
        return figure(lambda axis: self.draw(axis, **options), path)


def _negative_over_positive(run: Spectrum, n: float) -> float:
    sizes = (run.values * run.weights).abs() ** n
    positive = float(sizes[run.values > 0].sum())
    if positive == 0:
        warnings.warn("no eigenvalue is positive: k_h is infinite", stacklevel=3)
        return math.inf
    return float(sizes[run.values < 0].sum()) / positive


def hessian_spectrum(
    model: nn.Module, loss: Loss, generator: torch.Generator, *, steps: int = 100, runs: int = 1
) -> HessianSpectrum:
    """The Hessian's spectral density, by stochastic Lanczos quadrature.

    Args:
        model, loss: as for `landscape`; all parameters that train count.
        generator: of the starting vectors.
        steps: products with the Hessian in each run, >= 1; as many vectors are held.
        runs: starting vectors, >= 1.
    """
    check_ranges({"steps": steps, "runs": runs}, {"steps": "[1, inf)", "runs": "[1, inf)"})
    matvec, n, dtype = _hessian(model, loss)
    found = [lanczos(matvec, n, steps, generator, dtype=dtype) for _ in range(runs)]
    return HessianSpectrum(tuple(Spectrum(run.values, run.weights) for run in found))


def _hessian(model: nn.Module, loss: Loss) -> tuple[MatVec, int, torch.dtype]:
    """Products of flat vectors with the Hessian, their length and type."""
    weights = snapshot(model)
    if not weights:
        raise ValueError("the model has no parameter that trains")
    # the graph is built here once, so the mode matters only now; products with vectors come later
    with evaluating(model):
        matvec = on_vectors(hessian(mean_loss(model, loss), weights), weights)
    flat = flatten(weights)
    return matvec, len(flat), flat.dtype
