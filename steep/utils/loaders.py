"""Loaders around other loaders, and what a loader is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, TensorDataset


class LoaderWrapper:
    """Base of loaders that wrap another one: whatever they do not define is the inner loader's.

    That covers its dataset, samplers and generators, which `fit` saves and restores, and its `step` and `report`. A
    wrapper with a state of its own puts `inner_state` into its `state_dict`.

    Args:
        loader: the inner loader.

    Example:
        >>> import steep, torch
        >>> wrapped = LoaderWrapper(steep.tensor_loader(torch.zeros(10, 1), torch.zeros(10), batch_size=4))
        >>> len(wrapped), len(wrapped.dataset)
        (3, 10)
    """

    def __init__(self, loader: Any):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def inner_state(self) -> dict[str, Any]:
        """The inner loader's state under "loader", or nothing where it has none."""
        return {"loader": self.loader.state_dict()} if hasattr(self.loader, "state_dict") else {}

    def load_inner_state(self, state: dict[str, Any]) -> None:
        """Restore what `inner_state` saved."""
        if "loader" in state:
            self.loader.load_state_dict(state["loader"])

    def __getattr__(self, name: str) -> Any:
        # `loader` is absent while the object is being copied or unpickled: looking it up would never end
        if name == "loader" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.loader, name)


def parts_of(loader: Any) -> Iterator[Any]:
    """A loader, and the samplers from which it takes its order: ``DataLoader, BatchSampler, RandomSampler``."""
    while loader is not None:
        yield loader
        inner = getattr(loader, "batch_sampler", None)  # not by its truth: that asks for a length, which it may lack
        loader = getattr(loader, "sampler", None) if inner is None else inner


def is_all_torch(loader: Any) -> bool:
    """Whether iterating runs no code but torch's, which draws from torch's generators alone: tensors held in memory."""
    if type(loader) is not DataLoader or type(loader.dataset) is not TensorDataset or loader.num_workers:
        return False
    parts = [*(type(part) for part in parts_of(loader)), loader.collate_fn]
    return all(part.__module__.startswith("torch.utils.data.") for part in parts)


def release(loader: Any) -> None:
    """End the worker processes that a `DataLoader` with ``persistent_workers=True`` keeps between two passes."""
    while isinstance(loader, LoaderWrapper):
        loader = loader.loader
    if getattr(loader, "_iterator", None) is not None:
        loader._iterator = None
