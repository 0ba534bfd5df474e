"""The limit of wide networks: their kernels at infinite width, and networks that tend to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from steep.utils.validation import check_ranges, require

_Activation = Callable[[Tensor], Tensor]
_Dual = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


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
    activation: str | _Activation = "relu",
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


def _dual(activation: str | _Activation, nodes: int) -> _Dual:
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


def _quadrature(activation: _Activation, nodes: int, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """u = √a z and v = √b (ρ z + √(1 - ρ²) z'), with z and z' independent and standard normal."""
    points, weights = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(nodes))
    weights = weights / weights.sum()
    size = (a * b).sqrt()
    rho = torch.where(size > 0, k / size, 0.0).clamp(-1, 1)
    # one node of z at a time: all pairs of nodes at once would be nodes² times the kernel
    second = torch.zeros(2, *k.shape, dtype=torch.float64)
    for z, w in zip(points, weights, strict=True):
        v = b.sqrt()[..., None] * (rho[..., None] * z + (1 - rho.square()).sqrt()[..., None] * points)
        inner = torch.stack(_with_slope(activation, v)) @ weights
        second += w * torch.stack(_with_slope(activation, (a.sqrt() * z).expand(k.shape))) * inner
    return second[0], second[1]


def _with_slope(activation: _Activation, u: Tensor) -> tuple[Tensor, Tensor]:
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
        activation: _Activation = torch.relu,
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
