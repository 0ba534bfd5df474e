"""The two regression problems of Sven (arXiv 2604.01279, section on numerical experiments), as its authors set them up.

Both: 10 000 examples each for training, validation and testing, targets standardised by the training targets'
statistics, a GELU network with 3 hidden layers of width 16, batches of 32, 20 epochs.

- `function-1d`: exp(-10 x²) sin(2x) for x uniform in [-1, 1].
- `polynomial`: x ~ N(0, I) in 6 variables; all 210 monomials m of total degree at most 4, with coefficients
  N(0, 1) / sqrt(E[m²]), where E[x^(2p)] = (2p - 1)!!. Every monomial thus contributes variance 1 on average.
  This is the corrected generator: the one published first adds a monomial's factors instead of multiplying them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from steep.recipe import Budget, Recipe
from steep.splits import Data
from steep.tasks import Task
from steep.tasks._parts import adamw, loaders, squared_error, standardise
from steep.tasks.networks import MLP

_Problem = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def _function_1d(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (count, 1) each."""
    x = torch.empty(count, 1).uniform_(-1, 1, generator=generator)
    return x, (-10 * x**2).exp() * (2 * x).sin()


def _exponents(variables: int, degree: int) -> Tensor:
    """Exponents of all monomials of total degree at most `degree`, (monomials, variables)."""
    return torch.tensor([p for p in product(range(degree + 1), repeat=variables) if sum(p) <= degree])


def _polynomial(
    count: int, generator: torch.Generator, *, variables: int = 6, degree: int = 4
) -> tuple[Tensor, Tensor]:
    """Inputs (count, variables) and values (count, 1) of a random polynomial, drawn with them."""
    p = _exponents(variables, degree)
    double_factorial = torch.tensor([1.0, *torch.arange(1, 2 * degree, 2).cumprod(0)])  # (2p - 1)!! for p = 0, 1, ...
    coefficients = torch.randn(len(p), generator=generator) / double_factorial[p].prod(1).sqrt()
    x = torch.randn(count, variables, generator=generator)
    powers = torch.stack([x**k for k in range(degree + 1)])  # (degree + 1, count, variables)
    monomials = torch.ones(count, len(p))
    for variable in range(variables):
        monomials *= powers[p[:, variable], :, variable].T
    return x, (monomials @ coefficients).unsqueeze(1)


def _data(generator: torch.Generator, problem: _Problem, examples: int, batch_size: int) -> Data:
    x, y = problem(3 * examples, generator)
    y = standardise(y, y[:examples])
    return loaders(*zip(x.split(examples), y.split(examples), strict=True), batch_size=batch_size)


def _recipe(
    name: str, problem: _Problem, variables: int, *, examples: int = 10_000, batch_size: int = 32, epochs: int = 20
) -> Recipe:
    return Recipe(
        data=partial(_data, problem=problem, examples=examples, batch_size=batch_size),
        model=partial(MLP, variables, 16, 16, 16, 1, activation=nn.GELU),
        loss=squared_error,
        **adamw(1e-2),
        budget=Budget(epochs=epochs),
        name=name,
    )


FUNCTION_1D = Task(
    "function-1d",
    "exp(-10 x²) sin(2x) on [-1, 1], 10 000 examples; MLP 1-16-16-16-1; squared error.",
    partial(_recipe, "function-1d", _function_1d, 1),
)
POLYNOMIAL = Task(
    "polynomial",
    "A random polynomial of degree 4 in 6 variables, 10 000 examples; MLP 6-16-16-16-1; squared error.",
    partial(_recipe, "polynomial", _polynomial, 6),
)
