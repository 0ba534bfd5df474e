"""Parameters as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Product = Callable[[Mapping[str, Tensor]], Tensors]
MatVec = Callable[[Tensor], Tensor]


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """All entries, in the order of the names, as one vector."""
    return torch.cat([t.flatten() for t in tensors.values()])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> Tensors:
    """The inverse of `flatten`: tensors named and shaped as in `like`.

    Raises:
        ValueError: a vector of another length.
    """
    sizes = [t.numel() for t in like.values()]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"expected a vector of {sum(sizes)} entries, got shape {tuple(vector.shape)}")
    pieces = vector.split(sizes)
    return {name: piece.view(t.shape).to(t.dtype) for (name, t), piece in zip(like.items(), pieces, strict=True)}


def on_vectors(product: Product, params: Mapping[str, Tensor]) -> MatVec:
    """A product of dicts as a product of flat vectors, for `cg`, `lanczos` and the estimators.

    Example:
        >>> import torch
        >>> params = {"a": torch.ones(2), "b": torch.ones(1)}
        >>> double = on_vectors(lambda v: {name: 2 * t for name, t in v.items()}, params)
        >>> double(torch.tensor([1.0, 2.0, 3.0]))
        tensor([2., 4., 6.])
    """
    return lambda vector: flatten(product(unflatten(vector, params))).to(vector.dtype)
