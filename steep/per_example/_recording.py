"""Recording layer calls during the forward: each record hangs on the node of the autograd graph that the call made.

The engine itself keeps nothing between forward and backward: records die with the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from inspect import Signature, signature
from typing import Any

import torch
from torch import Tensor, nn

from steep.per_example._columns import interleave, interleaved
from steep.per_example._gradients import first, local
from steep.per_example._layers import Rule, rule_of
from steep.per_example.parts import Part


@dataclass(slots=True, eq=False)
class Call:
    """One use of a layer; its parts are made when the gradients of its outputs have arrived.

    Args:
        name: of the layer in the model.
        weights: all parameters of the layer, those included that do not train.
        rule: closed form, or `None`.
        inputs: by position or name; `versions` count in-place modifications of them and of the weights.
        upstream: nodes (or leaves) of the graph that the inputs come from.
        shapes, dtype: of the outputs that are watched; all of them if the rule is for the whole call.
        couples: the layer mixes examples.
        entry: length of the batch that the model was called with, if an input is that batch; else 0.
    """

    name: str
    layer: nn.Module
    weights: list[nn.Parameter]
    rule: Rule | None
    inputs: dict[Any, Any]
    versions: tuple[list[int], list[int]]
    upstream: list[Any]
    shapes: list[torch.Size]
    dtype: torch.dtype
    couples: bool
    entry: int = 0
    batch: int | None = None
    last: bool = True
    grads: dict[int, Tensor] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)

    @property
    def params(self) -> tuple[nn.Parameter, ...]:
        return tuple(p for p in self.weights if p.requires_grad)

    def holds(self, batch: int) -> bool:
        """Whether a dimension of the (first) output can be that of the examples."""
        shape, rule = self.shapes[0], self.rule
        # these are run once more to make the parts, and would draw other numbers
        if (rule is None or rule.whole) and _draws(self.layer):
            return False
        if rule is None:
            return len(shape) > 0 and shape[0] == batch
        samples = shape[rule.batch_dim(self.layer)] if len(shape) > rule.sample_dims(self.layer) else 1
        return samples % batch == 0

    def receive(self, index: int, grad: Tensor | None) -> None:
        """Tensor hook on an output; asleep unless `batch` says that rows are being collected."""
        if self.batch is None or grad is None:
            return
        self.grads[index] = grad
        if len(self.shapes) == 1:
            self.finish()

    def finish(self) -> None:
        """Make the parts of the gradients that were received, if there are some."""
        if self.batch is not None and self.grads:
            self.parts, self.grads = self.parts_of([self.grads], self.batch, self.last), {}

    def parts_of(self, columns: Sequence[dict[int, Tensor]], batch: int, last: bool) -> list[Part]:
        """Parts of the layer, from the gradients of its outputs for each of the losses of an example.

        Args:
            last: no other rows will be made from this record.
        """
        self._refuse_changes()
        dtype = self.params[0].dtype  # under autocast, inputs and gradients come in other types
        inputs = {k: _plain(v, dtype) for k, v in self.inputs.items()}
        given = [{k: grad.reshape(self.shapes[k]).to(dtype) for k, grad in grads.items()} for grads in columns]
        with torch.no_grad():
            parts = list(self._make_parts(inputs, given, batch))
        if last:
            self.inputs = {}  # the record lives as long as the graph: let go of the activations now
        return parts

    def _refuse_changes(self) -> None:
        inputs, weights = versions(tensors(self.inputs)), versions(self.weights)
        if self.versions[0] != inputs:
            raise RuntimeError(f"an input of layer {self.name!r} was modified in place after the layer had used it")
        if self.versions[1] != weights and not getattr(self.layer, "max_norm", None):  # which is its own doing
            raise RuntimeError(
                f"a parameter of layer {self.name!r} was changed between the forward and its rows (by an optimizer's "
                "step, say): make the rows first"
            )

    def _make_parts(self, inputs: dict[Any, Any], columns: Sequence[dict[int, Tensor]], batch: int) -> Iterable[Part]:
        if self.rule is None:
            return [local(self.layer, inputs, interleave([grads[0] for grads in columns], batch), batch)]
        by_column = [self._by_rule(self.rule, inputs, grads, batch) for grads in columns]
        if len(columns) == 1:
            return by_column[0]
        return [part for pieces in zip(*by_column, strict=True) for part in interleaved(pieces[0], pieces)]

    def _by_rule(self, rule: Rule, inputs: dict[Any, Any], grads: dict[int, Tensor], batch: int) -> Iterable[Part]:
        if not rule.whole:
            return rule.parts(self.layer, next(iter(inputs.values())), grads[0], batch)
        outputs = [grads.get(k) for k in range(len(self.shapes))]
        return rule.parts(self.layer, arguments(self.layer, inputs), outputs, batch)


def _draws(layer: nn.Module) -> bool:
    """Whether running the layer again would draw another dropout mask."""
    # torch's dropout layers and others keep the rate in `p`, attention and recurrent layers in `dropout`
    rates = (rate for m in layer.modules() if m.training for rate in (getattr(m, "p", 0), getattr(m, "dropout", 0)))
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def _plain(value: Any, dtype: torch.dtype) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_plain(one, dtype) for one in value)
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(dtype) if value.is_floating_point() else value


def arguments(layer: nn.Module, inputs: dict[Any, Any]) -> dict[str, Any]:
    """Inputs (by position or name) under the names that the layer's `forward` has for them, with its defaults."""
    positional = (v for k, v in inputs.items() if isinstance(k, int))
    named = {k: v for k, v in inputs.items() if isinstance(k, str)}
    bound = _signature(type(layer).forward).bind(layer, *positional, **named)
    bound.apply_defaults()
    return bound.arguments


@cache
def _signature(forward: Callable[..., Any]) -> Signature:
    return signature(forward)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors(one)
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))


def versions(values: Iterable[Tensor]) -> list[int]:
    return [t._version for t in values]


class Watcher:
    """A hook on one model. A copy or pickle of the model gets a hook that does nothing."""

    def __reduce__(self) -> Any:
        return _Silent, ()


class Entrance(Watcher):
    """Before and after a forward of the whole model: notes which memory holds the batch that it was given."""

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        # called before the forward without an output, and after it with one: then the batch is forgotten
        given = () if output or torch.compiler.is_compiling() else tensors((args, kwargs))
        self.lengths = {memory: len(t) for t in given if t.ndim and (memory := _memory(t))}

    def length(self, given: list[Tensor]) -> int:
        """Length of the batch, if one of these is (a view of) it; else 0."""
        return next((n for t in given if (n := self.lengths.get(_memory(t), 0))), 0) if self.lengths else 0


def _memory(t: Tensor) -> int:
    try:
        return t.untyped_storage().data_ptr()
    except RuntimeError:  # sparse, or inside a transformation of `torch.func`
        return 0


class Recorder(Watcher):
    """Forward hook of one layer."""

    def __init__(self, name: str, key: object, entrance: Entrance):
        self.name, self.key, self.entrance = name, key, entrance

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        out = first(output)
        if not isinstance(out, Tensor) or out.grad_fn is None or torch.compiler.is_compiling():
            return
        couples = isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or layer.running_mean is None)
        weights = list(layer.parameters())
        if couples or _train(weights):
            self._record(layer, weights, {**dict(enumerate(args)), **kwargs}, output, couples)

    def _record(
        self, layer: nn.Module, weights: list[nn.Parameter], inputs: dict[Any, Any], output: Any, couples: bool
    ) -> None:
        rule = rule_of(layer)
        outputs = [t for t in tensors(output) if t.grad_fn] if rule and rule.whole else [first(output)]
        taps: list[Any] = [_base(outputs[0]), *outputs[1:]]  # what is below another output may be used by the first
        if self.key in taps[0].grad_fn.metadata:  # the layer handed on what another layer gave it
            return
        given = list(tensors(inputs))
        upstream = [t.grad_fn or t for t in given if t.requires_grad]
        # hangs on the graph: it dies with it, and the engine holds nothing of a forward
        call = Call(
            name=self.name,
            layer=layer,
            weights=weights,
            rule=rule,
            inputs=inputs,
            versions=(versions(given), versions(weights)),
            upstream=upstream,
            shapes=[out.shape for out in outputs],
            dtype=outputs[0].dtype,
            couples=couples,
            entry=0 if upstream else self.entrance.length(given),
        )
        for index, tap in enumerate(taps):
            tap.grad_fn.metadata.setdefault(self.key, (call, {}))[1][tap.output_nr] = index
            tap.register_hook(partial(call.receive, index))


class _Silent:
    def __call__(self, *args: Any) -> None:
        pass


def _train(weights: list[nn.Parameter]) -> bool:
    """Whether some train, and none is another tensor that `functional_call` or `vmap` has put in its place."""
    return all(isinstance(p, nn.Parameter) for p in weights) and any(p.requires_grad for p in weights)


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
