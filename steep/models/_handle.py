"""The handle of layers whose weights are parametrized. A method adds its parametrization, its schedule, its report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class ParametrizedWeights:
    """Layers whose weights are made from latent weights by a parametrization, until `remove` or `merge`.

    The place in the schedule is a buffer, `steps`, of each parametrization, and so in ``model.state_dict()``.

    Args:
        layers: to be changed, by name.
        parametrization: makes that of a weight; `None` leaves the weights as they are.

    Raises:
        ValueError: a layer's weight is parametrized already; no layer has been changed then.
    """

    def __init__(self, layers: Mapping[str, nn.Module], parametrization: Callable[[Tensor], nn.Module] | None):
        for name, module in layers.items():
            if parametrize.is_parametrized(module, "weight"):
                raise ValueError(f"layer {name!r}: its weight is parametrized already; remove that first")
        self.layers: dict[str, Any] = dict(layers)
        self.weights = parametrization is not None
        if parametrization is not None:
            _parametrize(self.layers.values(), parametrization)

    def _latent(self) -> list[Any]:
        """The lists of parametrizations: ``.original`` is the latent weight, ``[0]`` what a weight is made by."""
        return [module.parametrizations.weight for module in self.layers.values()] if self.weights else []

    def _scheduled(self) -> Iterator[Any]:
        """The modules that hold the place in the schedule."""
        return (weight[0] for weight in self._latent())

    @property
    def steps(self) -> int:
        """Optimizer steps taken, or -1 once the method was removed or merged."""
        return next((int(part.steps) for part in self._scheduled()), -1)

    @torch.no_grad()
    def step(self) -> None:
        """Advance the schedule; call once after each optimizer step."""
        self._enter(self.steps + 1)

    def _enter(self, steps: int) -> None:
        """Bring the layers to the place in the schedule after so many steps."""
        for part in self._scheduled():
            part.steps.fill_(steps)

    def remove(self) -> None:
        """Give the layers their latent weights back; the parameters remain those that the optimizer knows."""
        self._leave(merged=False)

    def merge(self) -> None:
        """Write the weights that are in force into the parameters, and leave ordinary layers."""
        self._leave(merged=True)

    def _leave(self, merged: bool) -> None:
        if self.weights:
            _restore(self.layers.values(), merged)
        self.layers.clear()


def _parametrize(layers: Iterable[Any], parametrization: Callable[[Tensor], nn.Module]) -> None:
    changed: list[nn.Module] = []
    try:
        for module in layers:
            parametrize.register_parametrization(module, "weight", parametrization(module.weight))
            changed.append(module)
    except Exception:
        _restore(changed, merged=False)  # torch refuses some layers, such as pruned ones: all layers or none
        raise


def _restore(layers: Iterable[nn.Module], merged: bool) -> None:
    for module in layers:
        # torch deletes a property of the class that a layer shares with its deep copies: give this one its own class
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=merged)
        # the weight comes first again: optimizers' state goes by the order of the parameters
        for name in list(module._parameters)[:-1]:
            module._parameters[name] = module._parameters.pop(name)
