"""A host trainer's loader and batches, as methods of the data package and rules see them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steep.utils.loaders import LoaderWrapper


class Batches(LoaderWrapper):
    """A host's loader, for methods of the data package to wrap: all but its state, which the host saves itself."""

    def __getattr__(self, name: str) -> Any:
        if name in ("state_dict", "load_state_dict"):
            raise AttributeError(name)
        return super().__getattr__(name)


def size_of(batch: dict[str, Any]) -> int:
    """Number of examples in a batch of named tensors."""
    return len(next(value for value in batch.values() if isinstance(value, Tensor) and value.ndim))
