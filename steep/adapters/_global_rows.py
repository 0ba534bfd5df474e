"""The rows of all processes' examples: their Gram matrix from what each process keeps of its layers.

A rule built on the per-example engine (Sven) needs the Gram matrix of all examples, of which each process holds some.
With J_r the rows of process r, the blocks between processes, ``J_r J_s^T``, follow from what the engine keeps of each
layer: every process receives the others' factors and forms the whole (B, B) Gram matrix itself. Then it adds
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
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from steep.per_example import Part, Rows
from steep.per_example.parts import CHUNK, height


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
