"""Rules: from a layer's inputs and output gradients to the parts of its parameters.

`closed_form(type)` registers a rule; third parties register theirs the same way. A rule is called as
``rule(layer, x, grad, batch)`` with the layer's first input and the gradient of its output (of the summed
losses), whose leading dimension is the batch or a multiple of it, and yields parts of the parameters that
require a gradient. A rule for the `whole` call gets all inputs by name, and the gradients of all outputs instead:
``rule(layer, inputs, grads, batch)``. A layer without a rule is left to `_gradients.local`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep.per_example.parts import CHUNK, Dense, Outer, Part


@dataclass(frozen=True)
class Rule:
    """A closed form; the rest is as in `closed_form`."""

    parts: Callable[..., Iterator[Part]]
    sample_dims: Callable[[Any], int]
    batch_dim: Callable[[Any], int]
    covers: Callable[[Any], bool]
    whole: bool


RULES: dict[type[nn.Module], Rule] = {}
ALL_BUT_FIRST = lambda layer: -1  # noqa: E731  (a sample is whatever follows the first dimension)


def closed_form(
    *layers: type[nn.Module],
    sample_dims: Callable[[Any], int] = lambda layer: 1,
    batch_dim: Callable[[Any], int] = lambda layer: 0,
    covers: Callable[[Any], bool] = lambda layer: True,
    whole: bool = False,
) -> Callable[[Any], Any]:
    """Register a rule for layers of these types.

    Args:
        layers: types whose own `forward` the rule describes; a subclass that overrides it is left alone.
        sample_dims: ``sample_dims(layer)``: output dimensions that belong to one sample.
        batch_dim: ``batch_dim(layer)``: the output's dimension that holds the samples.
        covers: ``covers(layer)``: whether the rule describes this layer as it was configured.
        whole: the rule takes all inputs by name and the gradients of all outputs (`None` for unused ones). It may run
            the layer again, so one that draws random numbers is left alone.
    """

    def register(parts: Any) -> Any:
        RULES.update(dict.fromkeys(layers, Rule(parts, sample_dims, batch_dim, covers, whole)))
        return parts

    return register


def rule_of(layer: nn.Module) -> Rule | None:
    """The closed form of a layer, or `None`: no rule, an overridden `forward`, or weights that are computed."""
    for kind in type(layer).__mro__:
        if kind in RULES:
            # a subclass with a forward of its own may do anything with the weights
            described = type(layer).forward is kind.forward and not _computes_weights(layer)
            return RULES[kind] if described and RULES[kind].covers(layer) else None
    return None


def _computes_weights(layer: nn.Module) -> bool:
    """By a parametrization, or by a hook that leaves a tensor in the parameter's place (`nn.utils.weight_norm`)."""
    return "parametrizations" in layer._modules or any(
        isinstance(vars(layer).get(name), Tensor) for name in ("weight", "bias")
    )


def trains(parameter: Tensor | None) -> TypeGuard[Tensor]:
    return parameter is not None and parameter.requires_grad


@closed_form(nn.Linear)
def linear(layer: nn.Linear, x: Tensor, grad: Tensor, batch: int) -> Iterator[Part]:
    d, a = grad.reshape(batch, -1, layer.out_features), x.reshape(batch, -1, layer.in_features)
    yield from affine(layer.weight, layer.bias, d, a)


def affine(weight: Tensor, bias: Tensor | None, d: Tensor, a: Tensor) -> Iterator[Part]:
    """Parts of ``weight @ a + bias``, of those two that train; `d` (B, T, o) and `a` (B, T, i) as in `Outer`."""
    if trains(weight):
        yield Outer((weight, bias) if trains(bias) else (weight,), d, a)
    elif trains(bias):
        yield Dense((bias,), d.sum(1))


Map = Callable[[Tensor], Tensor]


def scale_and_shift(layer: Any, normalize: Map, sums: Map, x: Tensor, grad: Tensor, batch: int) -> Iterator[Part]:
    """Gradients of ``y = weight * normalize(x) + bias``; `sums` adds up the dimensions that the parameters lack."""
    step = max(1, CHUNK // x[0].numel())
    if trains(layer.weight):
        pieces = [sums(grad[k : k + step] * normalize(x[k : k + step])) for k in range(0, len(x), step)]
        yield Dense((layer.weight,), torch.cat(pieces).reshape(batch, -1, *layer.weight.shape).sum(1))
    if trains(getattr(layer, "bias", None)):
        yield Dense((layer.bias,), sums(grad).reshape(batch, -1, *layer.bias.shape).sum(1))


def over_space(t: Tensor) -> Tensor:
    return t.reshape(*t.shape[:2], -1).sum(2)


@closed_form(nn.LayerNorm, nn.RMSNorm, sample_dims=lambda layer: len(layer.normalized_shape))
def layer_norm(layer: nn.LayerNorm | nn.RMSNorm, x: Tensor, grad: Tensor, batch: int) -> Iterator[Part]:
    shape = layer.normalized_shape
    function: Any = F.rms_norm if isinstance(layer, nn.RMSNorm) else F.layer_norm
    normalize = partial(function, normalized_shape=shape, eps=layer.eps)
    yield from scale_and_shift(layer, normalize, lambda t: t, x.reshape(-1, *shape), grad.reshape(-1, *shape), batch)


@closed_form(nn.GroupNorm, sample_dims=ALL_BUT_FIRST)
def group_norm(layer: nn.GroupNorm, x: Tensor, grad: Tensor, batch: int) -> Iterator[Part]:
    normalize = partial(F.group_norm, num_groups=layer.num_groups, eps=layer.eps)
    yield from scale_and_shift(layer, normalize, over_space, x, grad, batch)


@closed_form(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, sample_dims=ALL_BUT_FIRST)
def batch_norm(layer: nn.BatchNorm2d, x: Tensor, grad: Tensor, batch: int) -> Iterator[Part]:
    """Evaluation mode only: in training mode the engine refuses the layer."""
    mean, var = layer.running_mean, layer.running_var
    normalize = partial(F.batch_norm, running_mean=mean, running_var=var, eps=layer.eps)
    yield from scale_and_shift(layer, normalize, over_space, x, grad, batch)


@closed_form(
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, sample_dims=lambda layer: layer._get_no_batch_dim()
)
def instance_norm(layer: nn.InstanceNorm2d, x: Tensor, grad: Tensor, batch: int) -> Iterator[Part]:
    x, grad = (t.reshape(-1, *t.shape[-layer._get_no_batch_dim() :]) for t in (x, grad))
    if layer.training or not layer.track_running_stats:
        normalize = partial(F.instance_norm, eps=layer.eps)
        yield from scale_and_shift(layer, normalize, over_space, x, grad, batch)
    else:
        yield from batch_norm(layer, x, grad, batch)
