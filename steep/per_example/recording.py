"""Recording layer calls during the forward: each record hangs on the node of the autograd graph that the call made.

The engine itself keeps nothing between forward and backward: records die with the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steep.per_example.autodiff import first, local
from steep.per_example.columns import interleave, interleaved
from steep.per_example.layers import Rule, rule_of
from steep.per_example.parts import Part


@dataclass(slots=True, eq=False)
class Call:
    """One use of a layer; its parts are made when the gradient of its output arrives.

    Args:
        name: of the layer in the model.
        rule: closed form, or `None`.
        inputs: by position or name; `versions` count their in-place modifications.
        upstream: nodes (or leaves) of the graph that the inputs come from.
        shape, dtype: of the output, which is output `output_nr` of its node.
        couples: the layer mixes examples.
    """

    name: str
    layer: nn.Module
    rule: Rule | None
    inputs: dict[Any, Any]
    versions: list[int]
    upstream: list[Any]
    shape: torch.Size
    dtype: torch.dtype
    output_nr: int
    couples: bool
    batch: int | None = None
    last: bool = True
    parts: list[Part] = field(default_factory=list)

    @property
    def params(self) -> tuple[nn.Parameter, ...]:
        return tuple(p for p in self.layer.parameters() if p.requires_grad)

    def holds(self, batch: int) -> bool:
        """Whether the output's leading dimension can be that of the examples."""
        if self.rule is None:
            return len(self.shape) > 0 and self.shape[0] == batch and not _draws(self.layer)
        leading = self.shape[0] if len(self.shape) > self.rule.sample_dims(self.layer) else 1
        return leading % batch == 0

    def receive(self, grad: Tensor) -> None:
        """Tensor hook on the output; asleep unless `batch` says that rows are being collected, for the `last` time."""
        if self.batch is not None:
            self.parts = self.parts_of([grad], self.batch, self.last)

    def parts_of(self, grads: Sequence[Tensor], batch: int, last: bool) -> list[Part]:
        """Parts of the layer, from the gradients of its output for each of the losses of an example."""
        if self.versions != versions(self.inputs):
            raise RuntimeError(f"an input of layer {self.name!r} was modified in place after the layer had used it")
        dtype = self.params[0].dtype  # under autocast, inputs and gradients come in other types
        inputs = {k: _plain(v, dtype) for k, v in self.inputs.items()}
        with torch.no_grad():
            parts = list(self._make_parts(inputs, [grad.reshape(self.shape).to(dtype) for grad in grads], batch))
        if last:
            self.inputs = {}
        return parts

    def _make_parts(self, inputs: dict[Any, Any], grads: Sequence[Tensor], batch: int) -> Iterable[Part]:
        if self.rule is None:
            return [local(self.layer, inputs, interleave(grads, batch), batch)]
        x = next(iter(inputs.values()))
        columns = [self.rule.parts(self.layer, x, grad, batch) for grad in grads]
        if len(grads) == 1:
            return columns[0]
        return [part for pieces in zip(*columns, strict=True) for part in interleaved(pieces[0], pieces)]


def _draws(layer: nn.Module) -> bool:
    """Whether running the layer again would draw another dropout mask."""
    return any(m.training and (getattr(m, "p", 0) or getattr(m, "dropout", 0)) for m in layer.modules())


def _plain(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(dtype) if value.is_floating_point() else value


def versions(inputs: dict[Any, Any]) -> list[int]:
    return [t._version for t in inputs.values() if isinstance(t, Tensor)]


class Recorder:
    """Forward hook of one layer. A copy or pickle of the model gets a hook that does nothing."""

    def __init__(self, name: str, key: object):
        self.name, self.key = name, key

    def __reduce__(self) -> Any:
        return _Silent, ()

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        out = first(output)
        if not isinstance(out, Tensor) or out.grad_fn is None or torch.compiler.is_compiling():
            return
        couples = isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or layer.running_mean is None)
        if couples or _trains_own(layer):
            self._record(layer, {**dict(enumerate(args)), **kwargs}, out, couples)

    def _record(self, layer: nn.Module, inputs: dict[Any, Any], out: Tensor, couples: bool) -> None:
        tap = _base(out)
        metadata: Any = tap.grad_fn.metadata  # type: ignore[union-attr]
        if self.key in metadata:  # the layer handed on what another layer gave it
            return
        upstream = [t.grad_fn or t for t in inputs.values() if isinstance(t, Tensor) and t.requires_grad]
        metadata[self.key] = call = Call(
            name=self.name,
            layer=layer,
            rule=rule_of(layer),
            inputs=inputs,
            versions=versions(inputs),
            upstream=upstream,
            shape=out.shape,
            dtype=out.dtype,
            output_nr=tap.output_nr,
            couples=couples,
        )
        tap.register_hook(call.receive)


class _Silent:
    def __call__(self, *args: Any) -> None:
        pass


def _trains_own(layer: nn.Module) -> bool:
    """Whether the layer trains parameters; `functional_call` and `vmap` put other tensors in their place."""
    params = list(layer.parameters())
    return all(isinstance(p, nn.Parameter) for p in params) and any(p.requires_grad for p in params)


def _base(out: Tensor) -> Tensor:
    """Where to take the gradient: below a reshaping view, whose node an in-place operation would replace."""
    base = out._base if out._is_view() else None
    if base is None or base.grad_fn is None or base.numel() != out.numel():
        return out
    return base if base.is_contiguous() and out.is_contiguous() else out


def recorded_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with parameters of their own and none in submodules, and BatchNorm.

    Attention owns its output projection but does not call it; a parametrized layer's weights are in a submodule.
    """
    for name, layer in model.named_modules():
        children = dict(layer.named_children())
        parametrized = children.pop("parametrizations", None) is not None
        leaf = isinstance(layer, nn.MultiheadAttention) or not any(list(c.parameters()) for c in children.values())
        inside = "parametrizations" in name.split(".")
        if (leaf and (layer._parameters or parametrized) and not inside) or isinstance(
            layer, nn.modules.batchnorm._BatchNorm
        ):
            yield name or type(layer).__name__, layer
