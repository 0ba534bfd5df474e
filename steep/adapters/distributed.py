"""Several processes: backward rules over the global batch under DDP, and optimizers on FSDP2's shards.

A rule built on the per-example engine (Sven) needs the Gram matrix of all examples, of which each process holds some.
With J_r the rows of process r, the blocks between processes, ``J_r J_s^T``, follow from what the engine keeps of each
layer: every process is sent the others' factors and forms the whole (B, B) Gram matrix itself. Then it adds
``J_r^T w_r`` with its own slice of w, and DDP sums as it does for any gradient. Exchanged per step and process, in
numbers (times bytes of their type), for B examples in this process:

    Linear         B T (i + o)            layer inputs and output gradients of T positions
    convolution    size of padded input and output gradient
    Embedding      B T (e + 1)            output gradients and tokens
    norm, bias     B p                    the rows themselves, p parameters
    other layers   B p                    their rows, but for at most `CHUNK` numbers of each process at a time

the B losses, and two integers. Never the (B x P) matrix of the model. All of it counts in `GlobalBatch.sent_bytes`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from steep.per_example import Part, Rows
from steep.per_example.parts import CHUNK, height
from steep.recipe import Mean
from steep.requires import REQUIREMENTS, UnmetRequirement

REMEDY = REQUIREMENTS["losses"].remedy


class Exchange:
    """All-gathers along the first dimension, whose length may differ between processes; counts the bytes sent."""

    def __init__(self, group: Any = None):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.sent_bytes = 0

    def equal(self, t: Tensor) -> list[Tensor]:
        found = [torch.empty_like(t) for _ in range(self.size)]
        dist.all_gather(found, t.contiguous(), group=self.group)
        self.sent_bytes += t.numel() * t.element_size()
        return found

    def lengths(self, t: Tensor) -> list[int]:
        return torch.cat(self.equal(torch.tensor([len(t)], device=t.device))).tolist()

    def cat(self, t: Tensor, lengths: list[int]) -> Tensor:
        """The processes' tensors one behind the other; `lengths` are theirs in multiples of this one's share."""
        unit = len(t) // lengths[self.rank]
        longest = max(lengths) * unit
        padded = t if len(t) == longest else torch.cat([t, t.new_zeros(longest - len(t), *t.shape[1:])])
        return torch.cat([g[: n * unit] for g, n in zip(self.equal(padded), lengths, strict=True)])


class GlobalRows:
    """The rows of all processes: their Gram matrix and norms are whole, weighted sums are of the own rows."""

    def __init__(self, rows: Rows, lengths: list[int], exchange: Exchange):
        self.rows, self.lengths, self.exchange = rows, lengths, exchange

    def gram(self) -> Tensor:
        """``J J^T``, (B, B), float64, the same in every process."""
        self._compare()
        return sum(self._gram(part) for part in self.rows.parts)  # type: ignore[return-value]

    def norms(self) -> Tensor:
        return self.exchange.cat(self.rows.norms(), self.lengths)

    def restrict(self, fraction: float, generator: torch.Generator) -> GlobalRows:
        return GlobalRows(self.rows.restrict(fraction, generator), self.lengths, self.exchange)

    def backward(self, w: Tensor) -> None:
        """Add this process's ``J^T w`` to ``.grad``, times the number of processes that DDP is going to divide by."""
        start = sum(self.lengths[: self.exchange.rank])
        self.rows.backward(w[start : start + self.lengths[self.exchange.rank]] * self.exchange.size)

    def _compare(self) -> None:
        """Refuse unlike parts in all processes alike, before one of them waits for what the others never send."""
        own = "; ".join(_describe(part) for part in self.rows.parts)
        numbers = self.exchange.equal(torch.tensor([zlib.crc32(own.encode())], device=self.rows.params[0].device))
        if len({int(n) for n in numbers}) > 1:
            raise ValueError(
                f"the processes' layers saw inputs of unlike shapes (here {own}): pad the batches of all processes to "
                "one length, and run the same layers in each"
            )

    def _gram(self, part: Part) -> Tensor:
        whole = self._whole(part)
        if whole is not None:
            return whole.gram()
        everyones = (self.exchange.cat(j, self.lengths).double() for j in self._slices(part))
        return sum(j @ j.T for j in everyones)  # type: ignore[return-value]

    def _whole(self, part: Any) -> Part | None:
        """The part with all processes' examples, where it is a record of tensors."""
        if not dataclasses.is_dataclass(part):
            return None
        record: Any = part
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(record):
            value = getattr(record, field.name)
            if callable(value):
                return None
            if isinstance(value, Tensor):
                changes[field.name] = self.exchange.cat(value, self.lengths)
            elif field.name == "batch":
                changes["batch"] = sum(self.lengths)
            elif field.name == "uses":
                uses = [self._whole(use) for use in value]
                if None in uses:
                    return None
                changes["uses"] = uses
        return dataclasses.replace(record, **changes)

    def _slices(self, part: Any) -> Iterable[Tensor]:
        """Columns of this process's rows, in pieces that are the same in every process."""
        if not hasattr(part, "block"):
            j = part.rows(slice(0, part.height)).flatten(1)
        else:
            blocks = [
                t.reshape(part.batch, height(p), -1)
                for t, p in zip(part.block(range(part.batch)), part.params, strict=True)
            ]
            masks = part.masks or [None] * len(blocks)
            kept = [t if m is None else t * m.to(t)[:, None] for t, m in zip(blocks, masks, strict=True)]
            j = torch.cat([t.flatten(1) for t in kept], 1)
        return j.split(max(1, CHUNK // max(self.lengths)), 1)


def _describe(part: Any) -> str:
    """What must agree between processes: kind and shapes, but for the number of examples."""
    values = [getattr(part, f.name) for f in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else []
    shapes = [str(list(v.shape[1:])) for v in values if isinstance(v, Tensor)]
    nested = [_describe(use) for use in getattr(part, "uses", ())]
    return f"{type(part).__name__}{''.join(shapes + nested)}"


class _Engine:
    """Stands in for a rule's engine while the rule is given the losses of all processes."""

    def __init__(self, engine: Any, losses: Tensor, lengths: list[int], exchange: Exchange):
        self.engine, self.losses, self.lengths, self.exchange = engine, losses, lengths, exchange

    def rows(self, losses: Tensor) -> GlobalRows:
        return GlobalRows(self.engine.rows(self.losses), self.lengths, self.exchange)


class GlobalBatch:
    """Makes a backward rule see the examples of all processes as one batch, in the order of the processes.

    For a model in `DistributedDataParallel`, whose reducer averages what the processes add to ``.grad``: the result is
    what one process would get from the concatenated batch. The local batches may differ in length.

    Args:
        rule: one on the per-example engine whose class says ``global_batch = True`` as it needs no more than Gram
            matrix and weighted sums (`steep.backward.sven.Sven`), or `steep.Mean`.
        group: process group; the default one where it is `None`.

    Attributes:
        sent_bytes: bytes that this process gave to each other one at the last step.

    Raises:
        TypeError: another rule.
        ValueError: at a step, for inputs whose shapes differ between processes in more than the number of examples.

    Example:
        >>> from steep.recipe import Mean
        >>> backward = GlobalBatch(Mean())  # then: backward(losses)  in every process, instead of loss.backward()
    """

    def __init__(self, rule: Any, group: Any = None):
        if hasattr(rule, "engine") and not getattr(rule, "global_batch", False):
            raise TypeError(
                f"{type(rule).__name__} needs more of the global batch than its Gram matrix: use it in one process"
            )
        if not (hasattr(rule, "engine") or isinstance(rule, Mean)):
            raise TypeError(
                f"{type(rule).__name__} is not built on the per-example engine, so its global batch is unknown: attach "
                "it as it is, and DDP averages the processes' gradients"
            )
        self.rule, self.group, self.sent_bytes = rule, group, 0
        self.requires = frozenset({"losses"}) | getattr(rule, "requires", frozenset())

    def __call__(self, losses: Tensor, *, scale: float = 1.0) -> None:
        if losses.ndim != 1:
            raise ValueError(f"GlobalBatch needs losses of shape (B,), got {tuple(losses.shape)}: {REMEDY}")
        exchange = Exchange(self.group)
        lengths = exchange.lengths(losses)
        if not all(lengths):
            raise ValueError(f"every process needs examples, but they have {lengths}: drop the last, incomplete batch")
        if isinstance(self.rule, Mean):
            self.rule(losses, scale=scale * len(losses) * exchange.size / sum(lengths))
        else:
            self._globally(losses, lengths, exchange, scale)
        self.sent_bytes = exchange.sent_bytes

    def _globally(self, losses: Tensor, lengths: list[int], exchange: Exchange, scale: float) -> None:
        engine, everyones = self.rule.engine, exchange.cat(losses.detach(), lengths)
        self.rule.engine = _Engine(engine, losses, lengths, exchange)
        try:
            self.rule(everyones, scale=scale)
        finally:
            self.rule.engine = engine

    def __getattr__(self, name: str) -> Any:
        """All else is the rule's: its state, its `step`, its settings."""
        if name == "rule" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.rule, name)

    def __repr__(self) -> str:
        return f"GlobalBatch({self.rule!r})"


def check_sharding(params: Iterable[Tensor], *parts: Any) -> None:
    """Refuse methods that need whole parameters where parameters are sharded (FSDP2, tensor parallelism).

    A method says ``sharding = "any"`` on its class where every element is stepped by itself. Torch's own optimizers
    and the mean gradient are taken to work.

    Raises:
        UnmetRequirement: naming the method and the way out.
    """
    if not any(hasattr(p, "to_local") for p in params):
        return
    for part in parts:
        kind = type(part) if not isinstance(part, type) else part
        elementwise = issubclass(kind, Mean) or kind.__module__.startswith("torch.")
        if not elementwise and getattr(part, "sharding", "whole") != "any":
            raise UnmetRequirement(
                f"{kind.__name__} needs whole parameters, but fully_shard has divided them among processes: use "
                "DistributedDataParallel, which keeps them whole, or a method whose class says sharding = 'any'"
            )


def sharded(method: Callable[..., Optimizer], params: Iterable[Tensor], **hyper: Any) -> Optimizer:
    """An elementwise optimizer of steep on the shards of a model that `fully_shard` has divided.

    Every process steps its own part of each parameter, so the result is that of whole parameters. Its `state_dict`
    is of this process's shards: save one file per process.

    Args:
        method: optimizer class that says ``sharding = "any"``.
        params: parameters, after `fully_shard`.
        hyper: keyword arguments of the method.

    Raises:
        UnmetRequirement: the method needs whole parameters.
    """
    params = list(params)
    check_sharding(params, method)
    pairs = [(p, _local(p).detach().requires_grad_()) for p in params]

    def refresh() -> None:
        for p, local in pairs:
            local.grad = None if p.grad is None else _local(p.grad)

    class Sharded(method):  # type: ignore[misc, valid-type]
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            def evaluated() -> Any:
                loss = closure()  # type: ignore[misc]
                refresh()
                return loss

            refresh()
            return super().step(evaluated if closure is not None else None)

        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none)
            for p, _ in pairs:
                p.grad = None

    Sharded.__name__ = Sharded.__qualname__ = f"Sharded{method.__name__}"
    return Sharded([local for _, local in pairs], **hyper)


@torch.no_grad()
def _local(t: Any) -> Tensor:
    return t.to_local() if hasattr(t, "to_local") else t
