"""Several processes: backward rules over the global batch under DDP, and optimizers on FSDP2's shards.

`_global_rows.py` says what the processes exchange, and how much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from steep.adapters._global_rows import Exchange, GlobalRows
from steep.adapters._sharding import check_sharding
from steep.recipe import Mean
from steep.requires import REQUIREMENTS


class _Engine:
    """Replaces a rule's engine while the rule is given the losses of all processes."""

    def __init__(self, engine: Any, losses: Tensor, lengths: list[int], exchange: Exchange):
        self.engine, self.losses, self.lengths, self.exchange = engine, losses, lengths, exchange

    def rows(self, losses: Tensor) -> GlobalRows:
        return GlobalRows(self.engine.rows(self.losses), self.lengths, self.exchange)


class GlobalBatch:
    """Makes a backward rule see the examples of all processes as one batch, in the order of the processes.

    For a model in `DistributedDataParallel`, whose reducer averages what the processes add to ``.grad``: the result is
    what one process would get from the concatenated batch. The local batches may differ in length.

    Args:
        rule: one on the per-example engine whose class says ``global_batch = True``, because it uses only the Gram
            matrix and weighted sums (`steep.backward.sven.Sven`), or `steep.Mean`.
        group: process group; the default one where it is `None`.

    Attributes:
        sent_bytes: bytes that this process sent to each other one at the last step.

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
            remedy = REQUIREMENTS["losses"].remedy
            raise ValueError(f"GlobalBatch needs losses of shape (B,), got {tuple(losses.shape)}: {remedy}")
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
        """Everything else is the rule's: its state, its `step`, its settings."""
        if name == "rule" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.rule, name)

    def __repr__(self) -> str:
        return f"GlobalBatch({self.rule!r})"


def sharded(method: Callable[..., Optimizer], params: Iterable[Tensor], **hyper: Any) -> Optimizer:
    """An elementwise optimizer of steep on the shards of a model that `fully_shard` has divided.

    Every process steps its own part of each parameter, so the result is that of whole parameters. Its `state_dict`
    is of this process's shards: save one file per process.

    Args:
        method: optimizer class that says ``sharding = "any"``.
        params: parameters, after `fully_shard`.
        hyper: keyword arguments of the method.

    Raises:
        UnmetRequirement: the method works on whole parameters only.
    """
    params = list(params)
    check_sharding(params, method)
    pairs = [(p, _local(p).detach().requires_grad_()) for p in params]

    def refresh() -> None:
        # the gradients are set on the sharded parameters, which the optimizer does not know
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
