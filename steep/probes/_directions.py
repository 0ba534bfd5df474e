"""Directions in the space of a model's weights: random ones, those of Adam, and those of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steep.linalg import flatten, unflatten
from steep.probes._weights import Direction, snapshot
from steep.utils.validation import check_ranges, require

_NORMALIZATIONS = ("none", "model", "layer", "filter", "weight")
_TINY = 1e-10  # keeps a direction that is zero somewhere from becoming NaN there


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
    require("normalize", how, how in _NORMALIZATIONS, f"one of {', '.join(_NORMALIZATIONS)}")
    check_ranges({"order": order}, {"order": "[1, inf)"})
    if how == "none":
        return dict(direction)
    if how == "weight":
        return {name: d * weights[name] for name, d in direction.items()}
    if how == "model":
        used = {name: weights[name] for name in direction}
        factor = flatten(used).norm(order) / (flatten(direction).norm(order) + _TINY)
        return {name: d * factor for name, d in direction.items()}
    return {name: d * _factor(d, weights[name], how, order) for name, d in direction.items()}


def _factor(d: Tensor, weight: Tensor, how: str, order: float) -> Tensor:
    over = tuple(range(1, d.ndim)) if how == "filter" and d.ndim > 1 else tuple(range(d.ndim))
    sizes = [torch.linalg.vector_norm(t, order, dim=over, keepdim=True) for t in (weight, d)]
    return sizes[0] / (sizes[1] + _TINY)


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
        # drawn where the generator lives, then moved: the same seed gives the same directions on every device
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
    """Where a training run went, in the plane that holds most of its movement.

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
    # the T x T matrix has the same eigenvalues as the P x P one, and T is small
    squares, u = torch.linalg.eigh(moves @ moves.T)  # ascending
    squares, u = squares.flip(0).clamp(min=0), u.flip(1)
    if not squares[count - 1] > 1e-12 * squares[0]:
        raise ValueError(f"the snapshots span fewer than count={count} directions")
    points = u[:, :count] * squares[:count].sqrt()
    basis = (moves.T @ u[:, :count] / squares[:count].sqrt()).T
    directions = tuple(unflatten(row, snapshots[-1]) for row in basis)
    return Trajectory(directions, points, squares[:count] / squares.sum())
