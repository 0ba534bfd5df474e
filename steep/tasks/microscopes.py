"""Two functions whose minimum and curvature are known exactly, as training runs: to study a method closely.

Both are sums of squared residuals that all vanish at the minimum. An example is a residual, so the mean loss is the
function up to a factor, and nothing is held out: validation uses the training examples.

- `quadratic`: residuals aᵢᵀ(θ - θ*). The Hessian of the mean loss has `dimension` eigenvalues, spaced evenly in the
  logarithm from 1 down to 1 / `condition`.
- `rosenbrock`: residuals 10 (θⱼ₊₁ - θⱼ²) and 1 - θⱼ; the minimum is at (1, ..., 1). Starts near (-1.2, 1, ...).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from steep.recipe import Budget, Recipe
from steep.splits import Data
from steep.tasks import Task
from steep.tasks._parts import adamw, loaders, squared_error


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix with orthonormal columns, in float64."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def _least_squares(
    examples: int, dimension: int, condition: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows aᵢ (examples, dimension) and targets aᵢᵀθ* (examples, 1), θ* drawn from N(0, I)."""
    eigenvalues = torch.logspace(0, -1, dimension, base=condition, dtype=torch.float64)
    left, right = _orthonormal(examples, dimension, generator), _orthonormal(dimension, dimension, generator)
    # the Hessian of the mean of squares is 2 AᵀA / examples
    a = left * (eigenvalues * examples / 2).sqrt() @ right.T
    minimum = torch.randn(dimension, 1, generator=generator, dtype=torch.float64)
    return a.float(), (a @ minimum).float()


def _quadratic_data(
    generator: torch.Generator, examples: int, dimension: int, condition: float, batch_size: int
) -> Data:
    part = _least_squares(examples, dimension, condition, generator)
    return loaders(part, part, batch_size=batch_size)


class _Rosenbrock(nn.Module):
    """The function's argument θ as a module: x, (B, 2 * dimension - 2), selects residuals by its rows; to (B, 1)."""

    def __init__(self, dimension: int):
        super().__init__()
        start = torch.ones(dimension)
        start[0] = -1.2
        self.theta = nn.Parameter(start + 0.1 * torch.randn(dimension))

    def forward(self, x: Tensor) -> Tensor:
        here, following = self.theta[:-1], self.theta[1:]
        return x @ torch.cat([10 * (following - here**2), 1 - here]).unsqueeze(1)


def _rosenbrock_data(generator: torch.Generator, dimension: int) -> Data:
    part = torch.eye(2 * dimension - 2), torch.zeros(2 * dimension - 2, 1)
    return loaders(part, part, batch_size=2 * dimension - 2)


def _quadratic(
    *, examples: int = 64, dimension: int = 16, condition: float = 1e3, batch_size: int = 64, steps: int = 1000
) -> Recipe:
    if not (dimension <= examples and condition >= 1):
        raise ValueError(f"dimension={dimension} must be at most examples={examples}, condition={condition} at least 1")
    return Recipe(
        data=partial(
            _quadratic_data, examples=examples, dimension=dimension, condition=condition, batch_size=batch_size
        ),
        model=partial(nn.Linear, dimension, 1, bias=False),
        loss=squared_error,
        **adamw(0.1, weight_decay=0.0),
        budget=Budget(steps=steps),
        name="quadratic",
    )


def _rosenbrock(*, dimension: int = 2, steps: int = 2000) -> Recipe:
    if dimension < 2:
        raise ValueError(f"dimension={dimension} must be at least 2")
    return Recipe(
        data=partial(_rosenbrock_data, dimension=dimension),
        model=partial(_Rosenbrock, dimension),
        loss=squared_error,
        **adamw(0.05, weight_decay=0.0),
        budget=Budget(steps=steps),
        name="rosenbrock",
    )


QUADRATIC = Task(
    "quadratic",
    "A quadratic of known spectrum as 64 squared residuals; linear model of 16 weights; minimum 0.",
    _quadratic,
)
ROSENBROCK = Task(
    "rosenbrock", "Rosenbrock's function as squared residuals; a vector of 2 parameters; minimum 0.", _rosenbrock
)
