"""Where examples begin to influence each other's losses: found from the autograd graph, and named.

Rows are asked for where each loss depends on its own example. A value between model and losses that takes a gradient
from the loss of one example and from those of others is shared by them. That is in order for what does not depend on
the batch (weights, position embeddings), so only values that come from the batch the model was called with are
tested, as far as its first layers show it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from steep.per_example._recording import Call
from steep.requires import REQUIREMENTS, UnmetRequirement

Edge = tuple[Any, int]
"""A value: a node of the graph and which of its outputs."""


def refuse_mixing(losses: Tensor, key: object) -> None:
    """Raise `UnmetRequirement`, naming the operation, if the losses of some examples depend on other examples."""
    if len(losses) == 1:
        return
    below = _below(losses.grad_fn)
    fed = _fed(below, key, len(losses))
    edges = list(dict.fromkeys(edge for children in below.values() for edge in children if edge[0] in fed))
    # two examples and not all: an operation over the batch mixes nearly any of them, and each costs two backwards
    for example in (0, -1) if edges else ():
        shared = _shared(losses, edges, example)
        if shared:
            raise UnmetRequirement(_message(losses, key, below, shared))


def _below(node: Any) -> dict[Any, list[Edge]]:
    """Nodes of the graph, from the losses down, with the values that each was made of."""
    below: dict[Any, list[Edge]] = {}
    todo = [node]
    while todo:
        node = todo.pop()
        if node not in below:
            below[node] = [(child, nr) for child, nr in node.next_functions if child is not None]
            todo += [child for child, _ in below[node]]
    return below


def _fed(below: dict[Any, list[Edge]], key: object, batch: int) -> set[Any]:
    """Nodes whose values depend on the batch: the first layers that were given it, and all above them."""
    above = defaultdict(list)
    for node, children in below.items():
        for child, _ in children:
            above[child].append(node)
    todo = [node for node in below if (call := _call(node, key)) is not None and call.entry == batch]
    fed = set()
    while todo:
        node = todo.pop()
        if node not in fed:
            fed.add(node)
            todo += above[node]
    return fed


def _shared(losses: Tensor, edges: list[Edge], example: int) -> set[Edge]:
    """Values with elements that count both for the loss of `example` and for others."""
    own = torch.zeros_like(losses)
    own[example] = 1
    inputs = [GradientEdge(*edge) for edge in edges]
    of_one, of_others = (
        torch.autograd.grad(losses, inputs, w, retain_graph=True, allow_unused=True) for w in (own, 1 - own)
    )
    # not reached is None: only what both backwards reach can be shared
    both = (
        (edge, a, b) for edge, a, b in zip(edges, of_one, of_others, strict=True) if a is not None and b is not None
    )
    return {edge for edge, a, b in both if ((a != 0) & (b != 0)).any()}


def _message(losses: Tensor, key: object, below: dict[Any, list[Edge]], shared: set[Edge]) -> str:
    node = _culprit(losses, below, shared)
    name = re.sub(r"Backward\d*$", "", node.name())
    calls = [(n._sequence_nr(), call) for n in _below(node) if n is not node and (call := _call(n, key)) is not None]
    last = max(calls, key=lambda pair: pair[0])[1] if calls else None  # none where it comes before every layer
    place = f", after layer {last.name!r} ({type(last.layer).__name__})" if last is not None else ""
    return (
        "per-example gradients need losses that depend on their own example only, but examples influence each other "
        f"through {name!r}{place}: compute it within each example "
        f"(for normalization, {REQUIREMENTS['independent_examples'].remedy}), or set the engine's independent=False, "
        "which takes one backward per example for all that is mixed"
    )


def _culprit(losses: Tensor, below: dict[Any, list[Edge]], shared: set[Edge]) -> Any:
    """The last operation that makes one example's value of several examples' values.

    Above it no value is shared. Where it merely uses what was reduced over the batch, it is the reduction itself.
    """
    mixed = {node for node, _ in shared}
    users = [node for node, children in below.items() if node not in mixed and shared & set(children)]
    reductions = (_reduction(node, len(losses), below, shared) for node in users)
    return next((node for node in reductions if node is not None), users[0])


def _reduction(node: Any, batch: int, below: dict[Any, list[Edge]], shared: set[Edge]) -> Any:
    """Follow values that have no entry per example down to where they were made of such that have."""
    found = None
    while reduced := [c for c, nr in below[node] if (c, nr) in shared and not _batched(c, nr, batch)]:
        node = reduced[0]
        found = node if _shrinks(node, below) else found
    return found


def _batched(node: Any, nr: int, batch: int) -> bool:
    shape = node._input_metadata[nr].shape
    return len(shape) > 0 and shape[0] % batch == 0


def _shrinks(node: Any, below: dict[Any, list[Edge]]) -> bool:
    size, *others = (prod(n._input_metadata[nr].shape) for n, nr in [(node, 0), *below[node]])
    return bool(others) and size < max(others)


def _call(node: Any, key: object) -> Call | None:
    call: Call | None = node.metadata.get(key, (None, 0))[0]
    return call
