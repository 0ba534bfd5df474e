"""The Poisson equation on the unit square, solved by a network: a loss that is a list of conditions.

    -Δu = f inside, u = 0 on the boundary;   f = 2 π² sin(π x) sin(π y), so that u = sin(π x) sin(π y)

In training the network returns the equation's left side at each point, ``-Δu / π²`` inside and ``u`` on the boundary,
and the targets are ``f / π²`` and 0; in evaluation it returns u, and the targets are the solution. Held-out loss is
thus the squared error of the solution itself.

Derivatives run forward through the layers beside the values (the forward Laplacian of arXiv 2307.08214), four
positions per point: u, u_x, u_y and Δu. Every layer stays an ordinary linear layer, for which per-example gradients
have a closed form.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from steep.recipe import Budget, Recipe
from steep.splits import Data
from steep.tasks import Task
from steep.tasks._parts import Part, absolute_error, adamw, loaders, squared_error


class _ForwardLaplacian(nn.Module):
    """A tanh network of two variables that carries its derivatives along: (B, 2) to (B, 4), u, u_x, u_y and Δu.

    Args:
        widths: of the hidden layers.
    """

    def __init__(self, *widths: int):
        super().__init__()
        linear = [nn.Linear(i + 1, o, bias=False) for i, o in pairwise((2, *widths, 1))]  # + 1: the bias
        with torch.no_grad():
            for layer in linear:
                nn.init.xavier_normal_(layer.weight[:, :-1])
                layer.weight[:, -1] = 0
        self.layers = nn.ModuleList(linear)

    def forward(self, x: Tensor) -> Tensor:
        directions = torch.eye(2).to(x)
        h = torch.stack([x, directions[0].expand_as(x), directions[1].expand_as(x), torch.zeros_like(x)], 1)
        one = torch.tensor([1.0, 0.0, 0.0, 0.0]).to(x).expand(len(x), 4)[..., None]  # a constant has no derivatives
        for i, layer in enumerate(self.layers):
            h = layer(torch.cat([_tanh(h) if i else h, one], -1))
        return h.squeeze(-1)


def _tanh(h: Tensor) -> Tensor:
    """tanh of values, with its chain rule for gradient and Laplacian; (B, 4, width) to the same."""
    z, zx, zy, laplacian = h.unbind(1)
    y = z.tanh()
    first = 1 - y**2
    return torch.stack([y, first * zx, first * zy, first * laplacian - 2 * y * first * (zx**2 + zy**2)], 1)


class _Residual(nn.Module):
    """(B, 3) to (B, 1): points and whether they are on the boundary, to the equation's left side or (evaluated) u."""

    def __init__(self, *widths: int):
        super().__init__()
        self.network = _ForwardLaplacian(*widths)

    def forward(self, x: Tensor) -> Tensor:
        u, _, _, laplacian = self.network(x[:, :2]).unbind(1)
        inside = -laplacian / math.pi**2 if self.training else u
        return torch.where(x[:, 2] > 0, u, inside)[:, None]


def _solution(points: Tensor) -> Tensor:
    """u at points (B, 2); (B, 1)."""
    return (math.pi * points).sin().prod(1, keepdim=True)


def _interior(count: int, generator: torch.Generator) -> Part:
    """Uniform points with flag 0, and f / π² there."""
    points = torch.rand(count, 2, generator=generator)
    return torch.cat([points, torch.zeros(count, 1)], 1), 2 * _solution(points)


def _boundary(count: int, generator: torch.Generator) -> Part:
    """Uniform points of the four sides with flag 1, and 0."""
    points = torch.rand(count, 2, generator=generator)
    sides = torch.randint(4, (count,), generator=generator)
    points[torch.arange(count), sides % 2] = (sides // 2).float()
    return torch.cat([points, torch.ones(count, 1)], 1), torch.zeros(count, 1)


def _data(generator: torch.Generator, points: int, batch_size: int) -> Data:
    (x, y), (xb, yb) = _interior(4 * points // 5, generator), _boundary(points - 4 * points // 5, generator)
    held_out = [_interior(1000, generator)[0] for _ in range(2)]
    val, test = ((p, _solution(p[:, :2])) for p in held_out)
    return loaders((torch.cat([x, xb]), torch.cat([y, yb])), val, test, batch_size=batch_size)


def _poisson(*, points: int = 4000, batch_size: int = 100, steps: int = 2000) -> Recipe:
    return Recipe(
        data=partial(_data, points=points, batch_size=batch_size),
        model=partial(_Residual, 32, 32),
        loss=squared_error,
        **adamw(1e-2),
        metric=absolute_error,
        budget=Budget(steps=steps),
        name="poisson",
    )


POISSON = Task(
    "poisson",
    "-Δu = f on the unit square as residuals inside and on the boundary; tanh MLP 32-32; squared error of u.",
    _poisson,
)
