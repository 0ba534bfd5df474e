"""Which layers of a model a method changes: the candidates, and the choice among them by name, pattern or predicate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from steep.utils.validation import nearest

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

Layers = str | Callable[[str, nn.Module], bool] | None


def find_layers(model: nn.Module, eligible: Callable[[nn.Module], bool]) -> dict[str, Any]:
    """The eligible layers of a model by name, in the order of ``model.named_modules()``."""
    return {
        name: module
        for name, module in model.named_modules()
        # a layer inside a parametrization makes another layer's weight: its inputs are no examples
        if eligible(module) and "parametrizations" not in name.split(".")
    }


def is_called(module: nn.Module) -> bool:
    """Whether a layer's own forward runs: attention reads the weight of its output projection without calling it."""
    return not isinstance(module, NonDynamicallyQuantizableLinear)


def matching(layers: str | Callable[[str, nn.Module], bool], found: Mapping[str, nn.Module]) -> list[str]:
    """Names of the layers that a pattern or a predicate matches."""
    match = layers if callable(layers) else lambda name, module: fnmatchcase(name, layers)
    return [name for name, module in found.items() if match(name, module)]


def choose_layers(
    layers: Layers, found: Mapping[str, Any], *, default: Sequence[str], description: str
) -> dict[str, Any]:
    """The layers of `found` that an argument `layers` asks for.

    Args:
        layers: a pattern over names, ``layers(name, module)``, or `None` for the default.
        found: the candidates by name.
        default: names of those taken by default.
        description: what the candidates are and which of them are taken by default, for the error.

    Raises:
        ValueError: no layer is chosen.
    """
    chosen = default if layers is None else matching(layers, found)
    if not chosen:
        near = nearest(layers, found) if isinstance(layers, str) else ""
        raise ValueError(f"layers={layers!r} chooses no layer out of {description}{near}")
    return {name: found[name] for name in chosen}
