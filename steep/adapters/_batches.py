"""What lies between a host's loaders and methods of the data room."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset


class Batches:
    """A host's loader for methods of the data room to wrap: its state is the host's to keep, all else is there."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name in ("loader", "state_dict", "load_state_dict") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.loader, name)


class Positions(Dataset):
    """A dataset of dicts whose examples also hold their position, under "indices"."""

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
    """Number of examples in a batch by name."""
    return len(next(value for value in batch.values() if isinstance(value, Tensor) and value.ndim))
