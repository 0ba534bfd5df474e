"""Batches that grow during a training run, and time that is counted in examples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from steep.batches import as_batch
from steep.splits import Loader
from steep.utils.loaders import LoaderWrapper
from steep.utils.validation import require, require_whole


class GrowingBatches(LoaderWrapper):
    """A loader whose batch size may be set between batches, by a test of the gradients or by hand.

    It drives the batch sampler of the loader it is given, which is left as it was. Workers of a `DataLoader` fetch
    ahead, so that with them a new size comes some batches later. Time is counted in examples: `elapsed` counts batches
    of the size the loader came with, so that ``LambdaLR(optimizer, lambda _: 1 - batches.elapsed / total_steps)`` is a
    schedule by examples. `fit` steps its schedules by that count, and its budget is the same number of examples.

    Args:
        loader: a `DataLoader`, or whatever iterates over one, with a `BatchSampler` that keeps the last short batch.
        initial: batch size to start with, at least 2; by default the loader's own.
        maximum: batch size to end with, at least `initial`; the number of examples if that is less, or by default.
        total_steps: batches, of the size that the loader came with, of the whole training run: the last one is cut
            where their examples end. Without it every epoch is whole.

    Attributes:
        batch_size: of the next batch.

    Raises:
        ValueError: sizes out of range, or a loader whose batch size cannot be set.

    Example:
        >>> import steep, torch
        >>> batches = GrowingBatches(steep.tensor_loader(torch.zeros(10, 1), torch.zeros(10), batch_size=2))
        >>> sizes = []
        >>> for x, y, index in batches:
        ...     sizes.append(len(x))
        ...     batches.grow(len(sizes) + 1.2)
        >>> sizes, batches.elapsed
        ([2, 3, 4, 1], 5)
    """

    def __init__(
        self,
        loader: Loader,
        *,
        initial: int | None = None,
        maximum: int | None = None,
        total_steps: int | None = None,
    ):
        super().__init__(loader)
        self._sampler, self.total_steps = _batch_sampler(loader), total_steps
        self.unit, self.length, self.examples = self._sampler.batch_size, len(loader), len(self._sampler.sampler)
        self.batch_size = self.unit if initial is None else initial
        self.maximum = self.examples if maximum is None else maximum
        require_whole("initial", self.batch_size, 2)
        require_whole("maximum", self.maximum, self.batch_size)
        self.maximum = min(self.maximum, self.examples)
        self.batch_size = min(self.batch_size, self.maximum)
        self.epochs = self.given = 0
        self._sizes: list[int] = []  # of the batches given in the current epoch
        self._again: list[int] = []  # sizes to give first, after loading in mid-epoch, so that the same examples come

    def __len__(self) -> int:
        """Batches in an epoch, of the size that the loader came with."""
        return self.length

    def __iter__(self) -> Iterator[Any]:
        again, self._again = self._again, []  # of the first epoch after loading only
        self.given, self._sizes = 0, []
        batches = None
        while True:
            size = again.pop(0) if again else min(self.batch_size, self._left())
            self._sampler.batch_size = size
            try:
                batches = iter(self.loader) if batches is None else batches  # workers fetch at once
                batch = next(batches, None)
            finally:  # others may iterate over the loader, or ask for its length, between our batches
                self._sampler.batch_size = self.unit
            if batch is None:
                break
            self._sizes.append(size)
            self.given += as_batch(batch).size
            yield batch
        self.epochs, self.given, self._sizes = self.epochs + 1, 0, []

    def _left(self) -> int:
        """Examples until the training run ends; an epoch's, where that is not known or has passed."""
        if self.total_steps is None:
            return self.examples
        epochs, steps = divmod(self.total_steps, self.length)
        left = (epochs - self.epochs) * self.examples + steps * self.unit - self.given
        return left if left > 0 else self.examples

    @property
    def elapsed(self) -> int:
        """Batches so far, had they the size that the loader came with."""
        return self.length * self.epochs + self.length * self.given // self.examples

    def grow(self, size: float) -> None:
        """Make the next batches as large as `size`, rounded up, unless they are larger or that is over the maximum."""
        if math.isfinite(size):
            self.batch_size = min(max(self.batch_size, math.ceil(size)), self.maximum)

    def state_dict(self) -> dict[str, Any]:
        """Batch size, epochs, and the sizes in the current epoch (size, count), which come again after loading."""
        sizes = [[size, len([*same])] for size, same in groupby(self._sizes + self._again)]
        return {"batch_size": self.batch_size, "epochs": self.epochs, "sizes": sizes, **self.inner_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch_size, self.epochs, self.given = state["batch_size"], state["epochs"], 0
        self._sizes = []
        self._again = [size for size, count in state["sizes"] for _ in range(count)]
        self.load_inner_state(state)


def _batch_sampler(loader: Any) -> Any:
    for name in ("batch_sampler", "sampler"):
        found = getattr(loader, name, None)
        if hasattr(found, "batch_size") and hasattr(found, "sampler"):
            drops = getattr(found, "drop_last", False)
            require("drop_last", drops, not drops, "False, for the batch size to be set at any time")
            return found
    raise ValueError(
        f"the batch size of {type(loader).__name__} cannot be set: use a DataLoader with batch_size or a BatchSampler"
    )
