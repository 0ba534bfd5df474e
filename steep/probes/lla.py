"""Pictures of the loss around a model, along lines or planes through its weights, and the density of the Hessian's
eigenvalues, from which two criteria of the model's fit to the data are computed.

    landscape     L(θ + a d₁ + b d₂) on a grid; d: random, eigenvectors of the Hessian, moments of Adam, or the plane
                  in which a training run moved
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

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from steep.loop.modes import evaluating
from steep.method import Method, Paper
from steep.probes._directions import (
    Trajectory,
    adam_moments,
    adam_step,
    normalized,
    random_directions,
    trajectory,
)
from steep.probes._hessian import (
    Criteria,
    Eigenpairs,
    HessianSpectrum,
    hessian_spectrum,
    hessian_trace,
    top_eigenpairs,
)
from steep.probes._pictures import contours, figure
from steep.probes._weights import Direction, Loss, mean_loss, snapshot
from steep.utils.validation import check_ranges, require, require_tensors

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
            points: of a training run, (T, 2), as in `Trajectory`; drawn as its path.
            levels: number of contours.
        """
        # contours have no colour for NaN or infinity: such points are drawn as the worst finite loss
        if not self.losses.isfinite().any():
            raise ValueError("no loss of this landscape is finite, so there is nothing to draw: choose a smaller span")
        worst = float(self.losses[self.losses.isfinite()].max())
        losses = self.losses.nan_to_num(nan=worst, posinf=worst)
        losses = losses if cap is None else losses.clamp(max=cap)
        if len(self.axes) == 1:
            axis.plot(*self.axes, losses)
        else:
            contours(axis, self.axes, losses, levels)
        if points is not None:
            axis.plot(*points.T, color="white", marker=".", markersize=4, linewidth=1)
        axis.plot(*([0.0] * len(self.axes)), *([self.center] if len(self.axes) == 1 else []), "+", color="C3")

    def picture(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """A matplotlib figure, written to `path` (by its ending: png, svg, pdf) if given; options as of `draw`."""
        return figure(lambda axis: self.draw(axis, **options), path)


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
    if len(directions) == 2:
        _check_plane(*directions)
    spans = [(-span / 2, span / 2)] * len(directions) if isinstance(span, (int, float)) else list(span)
    _check_spans(spans, len(directions))
    axes = tuple(torch.linspace(low, high, steps, dtype=torch.float64) for low, high in spans)
    evaluate = mean_loss(model, loss)

    def at(*factors: float) -> float:
        moved = dict(weights)  # the model's own weights stay, so that nothing can be left half restored
        for factor, direction in zip(factors, directions, strict=True):
            moved |= {name: moved[name] + factor * d.to(moved[name]) for name, d in direction.items()}
        return float(evaluate(moved))

    with evaluating(model):
        losses = torch.tensor([at(*map(float, point)) for point in product(*axes)], dtype=torch.float64)
        return Landscape(losses.view(*map(len, axes)), axes, at(*[0.0] * len(axes)))


def _check_direction(direction: Direction, weights: Direction) -> None:
    for name, d in direction.items():
        require_tensors(**{name: d})
        if name not in weights or weights[name].shape != d.shape:
            there = tuple(weights[name].shape) if name in weights else "no such parameter"
            raise ValueError(f"direction has {name!r} of shape {tuple(d.shape)}, but the model has {there}")
    if not direction:
        raise ValueError("a direction must name at least one parameter")


def _check_plane(first: Direction, second: Direction) -> None:
    """Refuse two directions on one line."""
    dots = [sum(float((a[n].double() * b[n].double()).sum()) for n in a.keys() & b.keys())
            for a, b in ((first, first), (second, second), (first, second))]  # fmt: skip
    if not dots[0] * dots[1] - dots[2] ** 2 > 1e-10 * dots[0] * dots[1]:
        raise ValueError("the two directions lie on one line (or one is zero), so they span no plane: give one of them")


def _check_spans(spans: Iterable[tuple[float, float]], count: int) -> None:
    given = [tuple(pair) for pair in spans]
    fits = len(given) == count and all(len(p) == 2 and -math.inf < p[0] < p[1] < math.inf for p in given)
    require("span", given, fits, f"a positive number, or {count} (low, high) with low < high")


method = Method(
    id="lla",
    paper=Paper(
        "Investigating generalization capabilities of neural networks by means of loss landscapes and Hessian analysis",
        arxiv="2412.10146",
        year=2024,
    ),
    changes="probes",
    good_for={"insight"},
    make=landscape,
    formula="L(theta + a d1 + b d2);  r_e = |l_min / l_max|;  K_h = sum_{l<0} |l w|^n / sum_{l>0} (l w)^n",
)
