"""Pictures of the loss around a model, along lines or planes through its weights; and the shape of the Hessian's
spectrum, of which two numbers tell how well the model fits the data it is looked at with.

    landscape     L(θ + a d₁ + b d₂) on a grid; d: random, eigenvectors of the Hessian, moments of Adam, or the plane
                  in which a training moved
    filter norm   d_i <- d_i |θ_i| / |d_i| for every row i of a weight (one filter, one output), and every other tensor
    spectrum      nodes λ_i and weights w_i of the Hessian's density, by Lanczos from random signs, for each run
    criteria      r_e = |λ_min / λ_max|,    K_h^n = sum_{λ<0} |λ w|^n / sum_{λ>0} (λ w)^n,    means over the runs

Gabdullin: Investigating generalization capabilities of neural networks by means of loss landscapes and Hessian
analysis (arXiv 2412.10146); n = 0.5, 100 Lanczos steps, one run and a width of 1 are the defaults of its code. Both
criteria grow where the accuracy falls, as long as the spectrum is mainly positive (arXiv 2504.17618). Filter
normalisation and trajectories: Li et al. (arXiv 1712.09913).

What differs, and why:
- Eigenvectors come from Lanczos with a full basis, not from power iteration, which needs more products and does not
  separate eigenvalues λ and -λ. All vectors are kept orthogonal; the authors' code keeps ten, and finds ghosts.
- 41 points instead of 40 on each axis, so that the model itself is one of them.
- Random directions are normal (Li et al.), where the authors' code draws from [0, 1): `distribution` has both.
- "model" normalisation uses one factor, where the authors' code changes the norm while it rescales with it.
- The axes "adameq" of the code, θ + 1e-3 k m / (√v + 1e-6) with k a function of two numbers, are one line: `adam_step`.
- The plane of a trajectory goes through its end, as the landscape does; a PCA's would go through its mean.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from steep.linalg import Estimate, Spectrum, density, flatten, hessian, hutchinson_trace, lanczos, on_vectors, unflatten
from steep.linalg.vectors import MatVec
from steep.loop.modes import evaluating
from steep.method import Method, Paper
from steep.utils.files import write_atomic
from steep.utils.validation import check_ranges, require

__all__ = [
    "Criteria",
    "Eigenpairs",
    "HessianSpectrum",
    "Landscape",
    "Trajectory",
    "adam_moments",
    "adam_step",
    "hessian_spectrum",
    "hessian_trace",
    "landscape",
    "normalized",
    "random_directions",
    "snapshot",
    "top_eigenpairs",
    "trajectory",
]

Direction = Mapping[str, Tensor]
Loss = Callable[[Any], Tensor]

NORMALIZATIONS = ("none", "model", "layer", "filter", "weight")
TINY = 1e-10


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters that train, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class _Evaluated(nn.Module):
    """A model's loss as a module, so that `functional_call` can put other weights in."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self) -> Tensor:
        value = self.loss(self.model)
        return value.mean() if value.ndim else value


def _function(model: nn.Module, loss: Loss) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The mean loss as a function of parameters by name; the model's own are never written to."""
    whole = _Evaluated(model, loss)
    return lambda params: functional_call(whole, {f"model.{name}": p for name, p in params.items()}, ())


# ---- directions


def normalized(direction: Direction, weights: Direction, how: str = "filter", order: float = 2) -> dict[str, Tensor]:
    """A direction rescaled to the size of the weights, so that a step of 1 means the same in every network.

    Args:
        direction, weights: tensors by name.
        how: "filter" for each row of a matrix or convolution (tensors of one dimension as a whole), "layer" for each
            tensor, "model" for all at once; "weight" multiplies by the weights themselves; "none".
        order: of the norms, >= 1.

    Raises:
        ValueError: an unknown way, or an order out of range.

    Example:
        >>> d = normalized({"w": torch.ones(2, 2)}, {"w": torch.tensor([[3.0, 4.0], [0.0, 0.0]])})
        >>> d["w"].norm(dim=1)
        tensor([5., 0.])
    """
    require("normalize", how, how in NORMALIZATIONS, f"one of {', '.join(NORMALIZATIONS)}")
    check_ranges({"order": order}, {"order": "[1, inf)"})
    if how == "none":
        return dict(direction)
    if how == "weight":
        return {name: d * weights[name] for name, d in direction.items()}
    if how == "model":
        used = {name: weights[name] for name in direction}
        factor = flatten(used).norm(order) / (flatten(direction).norm(order) + TINY)
        return {name: d * factor for name, d in direction.items()}
    return {name: d * _factor(d, weights[name], how, order) for name, d in direction.items()}


def _factor(d: Tensor, weight: Tensor, how: str, order: float) -> Tensor:
    over = tuple(range(1, d.ndim)) if how == "filter" and d.ndim > 1 else tuple(range(d.ndim))
    sizes = [torch.linalg.vector_norm(t, order, dim=over, keepdim=True) for t in (weight, d)]
    return sizes[0] / (sizes[1] + TINY)


def random_directions(
    model: nn.Module,
    generator: torch.Generator,
    *,
    count: int = 2,
    normalize: str = "filter",
    order: float = 2,
    distribution: str = "normal",
) -> tuple[dict[str, Tensor], ...]:
    """Random directions for `landscape`: drawn, made orthogonal to those before, then normalized.

    Args:
        model: its trainable parameters give shapes and sizes.
        generator: of the numbers.
        count: how many, >= 1.
        normalize, order: see `normalized`.
        distribution: "normal" or "uniform" in [0, 1).
    """
    check_ranges({"count": count}, {"count": "[1, inf)"})
    require("distribution", distribution, distribution in ("normal", "uniform"), "'normal' or 'uniform'")
    draw = torch.randn if distribution == "normal" else torch.rand
    weights, drawn = snapshot(model), list[Tensor]()
    for _ in range(count):
        parts = [draw(w.shape, generator=generator, device=generator.device, dtype=w.dtype) for w in weights.values()]
        d = torch.cat([part.to(w.device).flatten() for part, w in zip(parts, weights.values(), strict=True)])
        for other in drawn:
            d = d - (d @ other) / (other @ other) * other
        drawn.append(d)
    return tuple(normalized(unflatten(d, weights), weights, normalize, order) for d in drawn)


def adam_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The averages of gradient and squared gradient that Adam keeps, as two directions.

    Raises:
        ValueError: an optimizer without them, or that has not stepped.
    """
    state = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters() if p.requires_grad}
    lacking = [name for name, entry in state.items() if "exp_avg_sq" not in entry or "exp_avg" not in entry]
    if lacking:
        raise ValueError(
            f"{type(optimizer).__name__} holds no exp_avg and exp_avg_sq of {', '.join(lacking[:3])}: "
            "give an Adam that has stepped"
        )
    first, second = ({name: entry[key].clone() for name, entry in state.items()} for key in ("exp_avg", "exp_avg_sq"))
    return first, second


def adam_step(model: nn.Module, optimizer: torch.optim.Optimizer, eps: float = 1e-6) -> dict[str, Tensor]:
    """The direction ``m / (√v + eps)`` in which Adam moves (against it)."""
    check_ranges({"eps": eps}, {"eps": "(0, inf)"})
    first, second = adam_moments(model, optimizer)
    return {name: m / (second[name].sqrt() + eps) for name, m in first.items()}


@dataclass(frozen=True)
class Trajectory:
    """Where a training went, in the plane that holds most of it.

    Args:
        directions: orthonormal, by falling share.
        points: coordinates of each snapshot, (T, count); the last is the origin.
        explained: share of the squared distances from the end along each direction, (count,).
    """

    directions: tuple[dict[str, Tensor], ...]
    points: Tensor
    explained: Tensor


def trajectory(snapshots: Sequence[Direction], count: int = 2) -> Trajectory:
    """Principal directions of the weights' differences from the last snapshot.

    Args:
        snapshots: weights by name, in order; at least `count` + 1 (see `snapshot`).
        count: directions, >= 1.

    Raises:
        ValueError: too few snapshots, or they span fewer directions.
    """
    check_ranges({"count": count}, {"count": "[1, inf)"})
    require("number of snapshots", len(snapshots), len(snapshots) > count, f"more than count={count}")
    end = flatten(snapshots[-1]).double()
    moves = torch.stack([flatten({name: s[name] for name in snapshots[-1]}).double() - end for s in snapshots])
    squares, u = torch.linalg.eigh(moves @ moves.T)  # T x T, ascending
    squares, u = squares.flip(0).clamp(min=0), u.flip(1)
    if not squares[count - 1] > 1e-12 * squares[0]:
        raise ValueError(f"the snapshots span fewer than count={count} directions")
    points = u[:, :count] * squares[:count].sqrt()
    basis = (moves.T @ u[:, :count] / squares[:count].sqrt()).T
    directions = tuple(unflatten(row, snapshots[-1]) for row in basis)
    return Trajectory(directions, points, squares[:count] / squares.sum())


# ---- the landscape


@dataclass(frozen=True)
class Landscape:
    """The loss on a line or plane.

    Args:
        losses: (steps,) or (steps, steps), float64; the first index goes along the first direction.
        axes: the factors of each direction, (steps,).
        center: the loss of the model itself.
    """

    losses: Tensor
    axes: tuple[Tensor, ...]
    center: float

    def draw(self, axis: Any, *, cap: float | None = None, points: Tensor | None = None, levels: int = 20) -> None:
        """Draw on a matplotlib axis: a curve, or contours that are even in the logarithm where all losses are positive.

        Args:
            cap: larger losses are drawn as this.
            points: of a training, (T, 2), as in `Trajectory`; drawn as its path.
            levels: number of contours.
        """
        worst = float(self.losses[self.losses.isfinite()].max())
        losses = self.losses.nan_to_num(nan=worst, posinf=worst)
        losses = losses if cap is None else losses.clamp(max=cap)
        if len(self.axes) == 1:
            axis.plot(*self.axes, losses)
        else:
            _contours(axis, self.axes, losses, levels)
        if points is not None:
            axis.plot(*points.T, color="white", marker=".", markersize=4, linewidth=1)
        axis.plot(*([0.0] * len(self.axes)), *([self.center] if len(self.axes) == 1 else []), "+", color="C3")

    def picture(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """A matplotlib figure, written to `path` (by its ending: png, svg, pdf) if given; options as of `draw`."""
        return _figure(lambda axis: self.draw(axis, **options), path)


def _contours(axis: Any, axes: tuple[Tensor, ...], losses: Tensor, levels: int) -> None:
    from matplotlib.colors import LogNorm

    low, high = float(losses.min()), float(losses.max())
    high = high if high > low else low + 1
    log = low > 0
    between = np.geomspace(low, high, levels) if log else np.linspace(low, high, levels)
    norm = LogNorm(low, high) if log else None
    found = axis.contourf(*axes, losses.T, levels=between, cmap="viridis", norm=norm, extend="both")
    axis.figure.colorbar(found, ax=axis, format="%.2g")


def _figure(draw: Callable[[Any], None], path: str | os.PathLike[str] | None) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    draw(figure.subplots())
    if path is not None:
        file = io.BytesIO()
        figure.savefig(file, format=os.fspath(path).rpartition(".")[2], dpi=150)
        write_atomic(path, file.getvalue())
    return figure


def landscape(
    model: nn.Module,
    loss: Loss,
    directions: Sequence[Direction],
    *,
    steps: int = 41,
    span: float | Sequence[tuple[float, float]] = 1.0,
) -> Landscape:
    """The loss on the line or plane through a model's weights along one or two directions.

    Weights, buffers, modes and gradients stay as they are: the loss is evaluated with other weights put in their place,
    in evaluation mode.

    Args:
        model: the model.
        loss: ``loss(model)``: its loss on fixed data, a number or one for each example (their mean is taken).
        directions: one or two, tensors by the names of parameters; parameters that are not named stay.
        steps: points along each, >= 2. An odd number has the model itself in the middle; 41.
        span: each factor goes from -span/2 to span/2; or (low, high) for each direction.

    Raises:
        ValueError: arguments out of range, or a direction that does not fit the model.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> model.weight.data.fill_(3.0)
        tensor([[3.]])
        >>> line = landscape(model, lambda m: m.weight.square().sum(), [{"weight": torch.ones(1, 1)}], steps=3, span=2)
        >>> line.losses
        tensor([ 4.,  9., 16.], dtype=torch.float64)
    """
    check_ranges({"steps": steps}, {"steps": "[2, inf)"})
    require("number of directions", len(directions), len(directions) in (1, 2), "1 or 2")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for direction in directions:
        _check_direction(direction, weights)
    spans = [(-span / 2, span / 2)] * len(directions) if isinstance(span, (int, float)) else list(span)
    _check_spans(spans, len(directions))
    axes = tuple(torch.linspace(low, high, steps, dtype=torch.float64) for low, high in spans)
    evaluate = _function(model, loss)

    def at(*factors: float) -> float:
        moved = dict(weights)
        for factor, direction in zip(factors, directions, strict=True):
            moved |= {name: moved[name] + factor * d.to(moved[name]) for name, d in direction.items()}
        return float(evaluate(moved))

    with evaluating(model):
        losses = torch.tensor([at(*map(float, point)) for point in product(*axes)], dtype=torch.float64)
        return Landscape(losses.view(*map(len, axes)), axes, at(*[0.0] * len(axes)))


def _check_direction(direction: Direction, weights: Direction) -> None:
    for name, d in direction.items():
        if name not in weights or weights[name].shape != d.shape:
            there = tuple(weights[name].shape) if name in weights else "no such parameter"
            raise ValueError(f"direction has {name!r} of shape {tuple(d.shape)}, but the model has {there}")
    if not direction:
        raise ValueError("a direction must name at least one parameter")


def _check_spans(spans: Iterable[tuple[float, float]], count: int) -> None:
    given = [tuple(pair) for pair in spans]
    fits = len(given) == count and all(len(p) == 2 and -math.inf < p[0] < p[1] < math.inf for p in given)
    require("span", given, fits, f"a positive number, or {count} (low, high) with low < high")


# ---- the Hessian


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
    """The k outermost eigenvalues of the Hessian, and directions for `landscape`.

    Args:
        model, loss: as for `landscape`; all parameters that train count.
        generator: of the starting vector.
        k: pairs, >= 1.
        steps: products with the Hessian, >= k; as many vectors are held.
    """
    check_ranges({"k": k, "steps": steps}, {"k": "[1, inf)", "steps": f"[{k}, inf)"})
    weights = snapshot(model)
    matvec, n, dtype = _hessian(model, loss)
    require("k", k, k <= n, f"at most the number of parameters, {n}")
    found = lanczos(matvec, n, steps, generator, dtype=dtype)
    top = found.values.abs().argsort(descending=True)[:k]
    directions = tuple(unflatten(found.vectors[:, i], weights) for i in top.tolist())
    return Eigenpairs(found.values[top], directions, found.residuals[top])


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
        axis.semilogy(grid, density(self.mean, grid, width) + TINY)
        axis.set(xlabel="eigenvalue", ylabel="density", ylim=(1e-6, None))

    def picture(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """A matplotlib figure, written to `path` if given; options as of `draw`."""
        return _figure(lambda axis: self.draw(axis, **options), path)


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
    with evaluating(model):
        matvec = on_vectors(hessian(_function(model, loss), weights), weights)
    flat = flatten(weights)
    return matvec, len(flat), flat.dtype


method = Method(
    id="lla",
    paper=Paper(
        "Investigating generalization capabilities of neural networks by means of loss landscapes and Hessian analysis",
        arxiv="2412.10146",
        year=2024,
    ),
    changes="probes",
    make=landscape,
    formula="L(theta + a d1 + b d2);  r_e = |l_min / l_max|;  K_h = sum_{l<0} |l w|^n / sum_{l>0} (l w)^n",
)
