"""Walking the autograd graph back from the losses, and the one backward that collects the parts.

The walk steps over recorded calls. A parameter that it still meets was used in a way that no record describes,
and is left to autograd: nothing can be left out unnoticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from steep.per_example._columns import interleave
from steep.per_example._gradients import filled, for_each, through_broadcast
from steep.per_example._recording import Call
from steep.per_example.parts import Part
from steep.requires import UnmetRequirement

BROADCASTING = ("AddBackward0", "ExpandBackward0")
"""Operations whose gradient has a batch dimension even where the value that they take has none."""


@dataclass(eq=False)
class Broadcast:
    """A value that all examples share, such as position embeddings, at the operation that adds it to a batch."""

    node: Node
    edge: GradientEdge
    shape: torch.Size
    params: tuple[Tensor, ...]
    parts: list[Part] = field(default_factory=list)

    def receive(self, grads: tuple[Tensor, ...]) -> None:
        self.parts = self.parts_of([dict(enumerate(grads))], len(grads[0]))

    def parts_of(self, columns: Sequence[dict[int, Tensor]], batch: int, last: bool = True) -> list[Part]:
        """The part of its parameters, from the gradients of the operation for each of the losses of an example."""
        grad = interleave([column[0] for column in columns], batch)
        shape = (1,) * (grad.ndim - len(self.shape)) + tuple(self.shape)
        summed = [k for k in range(1, grad.ndim) if shape[k] == 1 and grad.shape[k] > 1]
        own = (grad.sum(summed) if summed else grad).reshape(len(grad), *self.shape)
        return [through_broadcast(self.edge, self.params, own)]


@dataclass
class Trace:
    """What the walk found.

    Args:
        calls, broadcasts: where parts will come from.
        edges: of their outputs: whose, and which of them.
        leaves: leaves used outside of them.
        ends: edges where the walk ended otherwise; with the leaves, all that a backward must reach.
        lengths: of the batches that the model was called with.
    """

    calls: list[Call] = field(default_factory=list)
    broadcasts: list[Broadcast] = field(default_factory=list)
    edges: list[tuple[Call | Broadcast, int, GradientEdge]] = field(default_factory=list)
    leaves: dict[Any, None] = field(default_factory=dict)
    ends: list[GradientEdge] = field(default_factory=list)
    lengths: set[int] = field(default_factory=set)

    @property
    def taps(self) -> list[Call | Broadcast]:
        return [*self.calls, *self.broadcasts]

    @property
    def eps(self) -> float:
        """Rounding of the coarsest type that the recorded layers computed in."""
        return max((torch.finfo(call.dtype).eps for call in self.calls), default=0.0)

    def outside(self, names: dict[Tensor, str], left_to_autograd: set[str]) -> set[Tensor]:
        """Parameters for autograd: used outside records, or several times where one use has no closed form."""
        uses = Counter(p for tap in self.taps for p in tap.params)
        known = self.leaves.keys() | {p for p, name in names.items() if name in left_to_autograd or uses[p] > 1}
        unshareable = [call.params for call in self.calls if call.rule is None] + [b.params for b in self.broadcasts]
        together = {p for params in unshareable if known & set(params) for p in params}
        return {p for p in (*self.leaves, *together) if p in names}

    def collect(self, losses: Tensor, *, keep: bool, last: bool) -> list[Part]:
        """One backward with respect to activations; no path to its ends needs a weight gradient.

        Args:
            losses: (B,), or (B, R) for a backward of all columns together.
            keep: the graph, for further backwards.
            last: no other rows will be made from these records.
        """
        if losses.ndim == 2:
            return self._collect_columns(losses, keep, last)
        for call in self.calls:
            call.batch, call.last = len(losses), last
        hooks = [broadcast.node.register_prehook(broadcast.receive) for broadcast in self.broadcasts]
        try:
            # given inputs, autograd skips what does not lead to them: the weight gradients of the recorded layers
            inputs = [*self.ends, *self.leaves]
            torch.autograd.grad(losses, inputs, torch.ones_like(losses), retain_graph=keep, allow_unused=True)
            for call in self.calls:
                call.finish()
            return [part for tap in self.taps for part in tap.parts]
        finally:
            # the hooks stay on the graph, and must sleep in the user's own backward
            for call in self.calls:
                call.batch, call.grads, call.parts = None, {}, []
            for hook in hooks:
                hook.remove()

    def _collect_columns(self, losses: Tensor, keep: bool, last: bool) -> list[Part]:
        """The backward of the last column may let go of the graph, which the others need as a whole."""
        edges, (batch, columns) = [edge for _, _, edge in self.edges], losses.shape
        if not edges:
            return []
        one_hot = torch.eye(columns, dtype=losses.dtype, device=losses.device)[:, None].expand(-1, batch, -1)
        # all but the last column in one batched backward, with the graph kept
        most = for_each(losses, edges, one_hot[:-1]) if columns > 1 else [None] * len(edges)
        final = torch.autograd.grad(losses, edges, one_hot[-1], retain_graph=keep, allow_unused=True)
        found: dict[Call | Broadcast, list[dict[int, Tensor]]] = {tap: [{} for _ in one_hot] for tap in self.taps}
        for (tap, index, _), many, one in zip(self.edges, most, final, strict=True):
            grads = filled([*([None] * (columns - 1) if many is None else many), one])
            for column, grad in zip(found[tap], grads, strict=False):
                column[index] = grad
        return [part for tap, each in found.items() if each[0] for part in tap.parts_of(each, batch, last)]


def trace(losses: Tensor, key: object, accepts: Callable[[Call], bool], names: dict[Tensor, str]) -> Trace:
    """Walk from the losses to leaves and to calls whose inputs need no gradient.

    Args:
        key: of the engine's records in the nodes' metadata.
        accepts: whether a call is to be used; through others the walk goes on as if they had not been recorded.
    """
    found = Trace()
    seen: set[Node] = set()
    verdicts: dict[Call, bool] = {}  # one for all outputs of a call
    todo: list[Any] = [losses.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if _is_leaf(node):
            found.leaves[_leaf(node)] = None
            continue
        seen.add(node)
        call, outputs = node.metadata.get(key, (None, {}))
        if call is not None and call not in verdicts:
            verdicts[call] = accepts(call)
            found.calls += [call] if verdicts[call] else []
            found.lengths |= {call.entry} - {0}
        if verdicts.get(call):
            edges = [GradientEdge(node, output_nr) for output_nr in outputs]
            found.edges += zip(repeat(call), outputs.values(), edges, strict=False)
            # go on below the call's inputs: what lies between them and its outputs is the record's to describe
            todo += call.upstream
            found.ends += [] if call.upstream else edges[:1]
            continue
        _refuse_hidden(node)
        for edge in node.next_functions:
            broadcast = _broadcast(node, edge, len(losses), names)
            if broadcast is None:
                todo.append(edge[0])
            else:
                found.broadcasts.append(broadcast)
                found.edges.append((broadcast, 0, GradientEdge(node, 0)))
                found.ends.append(broadcast.edge)
    return found


def _refuse_hidden(node: Any) -> None:
    if node.name() == "CheckpointFunctionBackward":
        raise UnmetRequirement(
            "per-example gradients need layers that can be watched, but torch.utils.checkpoint runs them in a graph of "
            "its own: give it use_reentrant=False"
        )


def _is_leaf(node: Any) -> bool:
    return isinstance(node, Tensor) or (not node.next_functions and hasattr(node, "variable"))


def _leaf(node: Any) -> Tensor:
    return node if isinstance(node, Tensor) else node.variable


def _broadcast(node: Any, edge: tuple[Any, int], batch: int, names: dict[Tensor, str]) -> Broadcast | None:
    child, nr = edge
    # with another alpha the gradient of the value is not that of the sum
    if child is None or node.name() not in BROADCASTING or getattr(node, "_saved_alpha", 1) != 1:
        return None
    shape, batched = child._input_metadata[nr].shape, node._input_metadata[0].shape
    lacks_batch = len(shape) < len(batched) or shape[0] == 1
    # in a batch of one, a value without a batch dimension cannot be told from one with it
    if batch == 1 or not batched or batched[0] != batch or not lacks_batch:
        return None
    params = tuple(dict.fromkeys(leaf for leaf in _leaves(child) if leaf in names))
    return Broadcast(node, GradientEdge(child, nr), shape, params) if params else None


def _leaves(node: Node) -> Iterator[Tensor]:
    seen: set[Any] = set()
    todo: list[Any] = [node]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _is_leaf(node):
            yield _leaf(node)
        todo += [child for child, _ in node.next_functions]
