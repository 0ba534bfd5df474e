"""Loaders between those of a host trainer and methods of the data package, which expect tuples and positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from steep.utils.loaders import LoaderWrapper


class Batches(LoaderWrapper):
    """A host's loader, for methods of the data package to wrap: all but its state, which the host saves itself."""

    def __getattr__(self, name: str) -> Any:
        if name in ("state_dict", "load_state_dict"):
            raise AttributeError(name)
        return super().__getattr__(name)


class Positions(Dataset):
    """A dataset of dicts, each of which also holds its position, under "indices"."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "indices": index}


class Tuples(Batches):
    """A loader of dicts as one of (x, labels, the rest)."""

    def __init__(self, loader: Any, name: str):
        super().__init__(loader)
        self.name = name

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            rest = {k: v for k, v in batch.items() if k not in (self.name, "labels")}
            yield batch[self.name], batch["labels"], rest


class Dicts(Tuples):
    """The reverse of `Tuples`."""

    def __iter__(self) -> Iterator[Any]:
        for x, labels, rest in self.loader:
            yield {self.name: x, "labels": labels, **rest}


def size_of(batch: dict[str, Any]) -> int:
    """Number of examples in a batch of named tensors."""
    return len(next(value for value in batch.values() if isinstance(value, Tensor) and value.ndim))
