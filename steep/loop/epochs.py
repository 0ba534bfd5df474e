"""The plain outer loop: one optimizer step per batch, over and over the training loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from steep.batches import Batch, as_batch
from steep.loop.checks import DistinctIndices
from steep.splits import Loader
from steep.utils.loaders import is_all_torch, parts_of, release
from steep.utils.randomness import Stream


class Epochs:
    """Iterator whose every item is one optimizer step: the step's mean loss.

    Data draw from `stream` alone, so their order depends on the seed and on nothing a method does. The state
    holds the stream at the epoch's start and the number of batches since: resuming replays them.

    Args:
        loader: the training loader.
        train_step: does one optimizer step and returns the mean loss.
        stream: random numbers for order and augmentation.
    """

    def __init__(self, loader: Loader, train_step: Callable[[Batch], float], stream: Stream):
        self.loader, self.train_step, self.stream = loader, train_step, stream
        self.distinct: DistinctIndices | None = DistinctIndices(loader)
        self.batches: Iterator[Any] | None = None
        self.drawing = stream.active_in_torch if is_all_torch(loader) else stream.active
        self.start_epoch()

    def start_epoch(self) -> None:
        self.batches, self.position = None, 0
        self.at_start = {"stream": self.stream.state, "loader": [g.get_state() for g in generators(self.loader)]}

    def __iter__(self) -> Epochs:
        return self

    def __next__(self) -> float:
        return self.train_step(self.next_batch())

    def next_batch(self) -> Batch:
        with self.drawing():
            if self.batches is None:
                # workers that persist would go on with random numbers of earlier epochs, which no checkpoint holds
                release(self.loader)
                self.batches = iter(self.loader)
            item = next(self.batches, None)
        if item is None:
            if self.position == 0:  # an endless recursion otherwise
                raise ValueError(
                    "the training loader yields no batch: is batch_size larger than the data with drop_last?"
                )
            self.distinct = None  # one epoch has shown it
            self.start_epoch()
            return self.next_batch()
        self.position += 1
        self.batch = as_batch(item)  # kept until the next is there: memory freed first would be mapped anew each step
        if self.distinct is not None:
            self.distinct.check(item)
        return self.batch

    def close(self) -> None:
        """Drop the epoch's iterator, and with it the worker processes of a `DataLoader`."""
        self.batches = None

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, **self.at_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.state = state["stream"]
        for generator, saved in zip(generators(self.loader), state["loader"], strict=True):
            generator.set_state(saved)
        self.start_epoch()
        self.distinct = DistinctIndices(self.loader)
        for _ in range(state["position"]):  # a loader cannot be moved forward: what it draws on the way must be drawn
            self.next_batch()


def generators(loader: Any) -> list[torch.Generator]:
    """Generators that a user's loader and its samplers draw from, each once."""
    found = (getattr(part, "generator", None) for part in parts_of(loader))
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
