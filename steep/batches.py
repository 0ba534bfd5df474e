"""Batches: what a loader's item is taken for, and how a batch is counted, split and given to a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from steep.utils.loaders import LoaderWrapper
from steep.utils.signatures import required_arguments

TARGETS = ("labels", "label", "targets", "target", "y")  # the names under which a dict may hold its targets


class Batch(NamedTuple):
    """A batch of B examples, each part said by name.

    Args:
        x: inputs, given to the model as they are; of a dict, each entry by the name of an argument (see `forward`).
        y: targets, given to the loss as they are; `None` where it needs none.
        indices: the examples' positions in the training set, integers, (B,).
        weights: factors of the examples' losses, at least 0, (B,). Weights of mean 1 leave the learning rate as it is.
    """

    x: Any
    y: Any
    indices: Tensor | None = None
    weights: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of examples.

        Raises:
            TypeError: neither inputs nor targets have a length.
        """
        for part in (self.y, self.x):
            if isinstance(part, Tensor):
                return len(part)  # the surest sign; a list may hold fields or examples
        try:
            return _length(self.x if self.y is None else self.y)
        except (TypeError, StopIteration):
            raise TypeError(
                f"cannot tell how many examples a batch of {describe(self.x)} holds: give it targets of known length, "
                "steep.Batch(x, y), or indices"
            ) from None

    def split(self, count: int) -> list[Batch]:
        """At most `count` batches of nearly equal size, whose tensors are views.

        Entries of a dict that are no tensors, such as flags, are the same in all of them.

        Raises:
            ValueError: a part does not have one entry per example.
        """
        count = min(count, self.size)
        short, longer = divmod(self.size, count)
        ends = [(i + 1) * short + min(i + 1, longer) for i in range(count)]
        parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        names = ("inputs", "targets", "indices", "weights")
        return [
            Batch(*(_cut(value, part, self.size, name) for value, name in zip(self, names, strict=True)))
            for part in parts
        ]


def tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch's inputs and targets, with its place in words: ``("inputs['mask']", tensor)``."""
    yield from _named(batch.x, "inputs")
    yield from _named(batch.y, "targets")


def _named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (Mapping, tuple, list)):
        for key, entry in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _named(entry, f"{name}[{key!r}]")


def _length(values: Any) -> int:
    """Examples in one part of a batch: the first dimension of its first tensor, or the length of a list without any.

    A tuple or list of tensors of equal length holds fields of all examples (torch collates pairs so); a list of
    anything else, such as the boxes of each image or sequences of unlike length, holds one entry per example.
    """
    if isinstance(values, Mapping):
        return _length(next(iter(values.values())))
    return len(values[0]) if _are_fields(values) else len(values)


def _are_fields(values: Any) -> bool:
    if not (isinstance(values, (tuple, list)) and values):
        return False
    return all(isinstance(v, Tensor) and v.ndim for v in values) and len({len(v) for v in values}) == 1


def _are_images(values: Any) -> bool:
    """Whether a list of as many tensors as channels holds images of unlike size, one per example."""
    return len({value.shape for value in values}) > 1 and all(value.ndim > 1 for value in values)


def _cut(value: Any, part: slice, size: int, name: str) -> Any:
    """The entries of some examples of one part of a batch."""
    if isinstance(value, Mapping):
        return {key: _cut(entry, part, size, f"{name}[{key!r}]") for key, entry in value.items()}
    if value is None or isinstance(value, (str, bool, int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
        return value
    if isinstance(value, (tuple, list)) and len(value) != size:
        return type(value)(_cut(entry, part, size, f"{name}[{i}]") for i, entry in enumerate(value))
    if _are_fields(value) and len(value[0]) == size and not _are_images(value):
        return type(value)(entry[part] for entry in value)
    if not isinstance(value, (Tensor, tuple, list)) or len(value) != size:
        raise ValueError(
            f"the {name} of a batch of {size} cannot be split for gradient accumulation: {describe(value)} does not "
            f"have {size} entries. Put its batch dimension first, or use accumulate=1"
        )
    return value[part]


def as_batch(item: Any) -> Batch:
    """What a loader's item is taken for.

    ===============================  =================================================================================
    item                             taken for
    ===============================  =================================================================================
    ``(x, y)``                       inputs and targets; each a tensor, or tensors in tuples, lists and dicts
    ``(x, y, indices)``              the same, and positions in the training set: integers of shape (B,)
    a dict or named tuple            targets under "labels", "label", "targets", "target" or "y"; "indices" and
                                     "weights" under these names; the rest are the inputs
    `Batch`                          itself
    ===============================  =================================================================================

    Inputs of several names are given to the model by name, as the batches of a Hugging Face collator are; those of one
    name are given to it alone. For every other item, `adapt` says which part is which.

    Raises:
        TypeError: any other item; names what was found and the line to write.

    Example:
        >>> import torch
        >>> as_batch({"image": torch.zeros(3, 1, 8, 8), "label": torch.zeros(3)}).size
        3
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Mapping):
        return _by_name(item)
    if isinstance(item, tuple) and set(getattr(item, "_fields", ())) & set(TARGETS):
        return _by_name(item._asdict())  # type: ignore[attr-defined]
    if isinstance(item, (tuple, list)) and len(item) in (2, 3) and not _is_uncollated(item):
        return _checked(Batch(*item))
    raise TypeError(_not_understood(item))


def _by_name(item: Mapping[str, Any]) -> Batch:
    found = [name for name in TARGETS if name in item]
    if len(found) != 1:
        problem = f"several that could be the targets: {', '.join(found)}" if found else "no targets"
        raise TypeError(
            f"the loader yields a dict of {', '.join(map(str, item))}, with {problem}. Say which part is which: "
            "steep.adapt(loader, lambda item: steep.Batch(x=..., y=...)), with y=None for a loss without targets"
        )
    inputs = {name: value for name, value in item.items() if name not in (found[0], "indices", "weights")}
    if not inputs:
        raise TypeError(f"the loader yields a dict of {', '.join(item)}, with no inputs beside its targets")
    x = next(iter(inputs.values())) if len(inputs) == 1 else inputs
    return _checked(Batch(x, item[found[0]], item.get("indices"), item.get("weights")))


def _checked(batch: Batch) -> Batch:
    """The batch, if its parts can be what their places say."""
    for name, part in (("inputs", batch.x), ("targets", batch.y)):
        if isinstance(part, Tensor) and part.ndim == 0:
            raise TypeError(
                f"the {name} of a batch are a tensor of shape (), with no batch dimension: give the DataLoader a "
                "batch_size, or the data set's items one dimension more"
            )
        if isinstance(part, (np.ndarray, np.generic)):
            raise TypeError(
                f"the {name} are a NumPy array of shape {part.shape}, where steep expects tensors: let the loader "
                "collate (torch's DataLoader does), or use steep.adapt(loader, lambda item: ...) with torch.as_tensor"
            )
    if batch.indices is not None and not is_indices(batch.indices, batch.size):
        raise TypeError(
            f"the third part of a batch, {describe(batch.indices)}, cannot be the examples' indices (integers of shape"
            f" ({batch.size},)). Say what it is: steep.adapt(loader, lambda item: steep.Batch(item[0], item[1], "
            "weights=item[2])) for weights, or x={'tokens': item[0], 'lengths': item[1]}, y=item[2] for inputs"
        )
    return batch


def is_indices(value: Any, size: int) -> bool:
    """Whether a value can be the positions of so many examples: integers, one each."""
    return (
        isinstance(value, Tensor)
        and value.shape == (size,)
        and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    )


def _is_uncollated(item: tuple[Any, ...] | list[Any]) -> bool:
    """Whether a list holds whole examples, ``[(x, y), (x, y)]``, as with ``collate_fn=list``."""
    return isinstance(item, list) and all(isinstance(example, (tuple, dict)) for example in item)


def _not_understood(item: Any) -> str:
    if isinstance(item, Tensor) or (isinstance(item, (tuple, list)) and len(item) == 1):
        one = "item" if isinstance(item, Tensor) else "item[0]"
        return (
            f"the loader yields inputs without targets ({describe(item)}): use steep.adapt(loader, lambda item: "
            f"({one}, {one})) to reconstruct them, or lambda item: steep.Batch({one}, None) for a loss without targets"
        )
    if isinstance(item, list) and item and _is_uncollated(item):
        return (
            f"the loader yields a list of {len(item)} examples that are not joined to one batch: leave out collate_fn, "
            "or let it return (x, y) with a batch dimension in front"
        )
    return (
        f"the loader yields {describe(item)}; steep understands (x, y), (x, y, indices), dicts with 'labels', and "
        "steep.Batch. Say which part is which: steep.adapt(loader, lambda item: steep.Batch(x=..., y=..., "
        "weights=...)), where a dict as x is given to the model by name"
    )


def describe(value: Any) -> str:
    """A value's kind and shape in words, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array {value.dtype} {value.shape}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        parts = ", ".join(describe(part) for part in value[:4]) + (", ..." if len(value) > 4 else "")
        return f"a {type(value).__name__} of {len(value)} ({parts})"
    return "None" if value is None else f"an object of type {type(value).__name__}"


class _Adapted(LoaderWrapper):
    """See `adapt`."""

    def __init__(self, loader: Any, function: Callable[[Any], Any]):
        super().__init__(loader)
        self.function = function

    def __iter__(self) -> Iterator[Batch]:
        return (as_batch(self.function(item)) for item in self.loader)


def adapt(loader: Iterable[Any], function: Callable[[Any], Any]) -> Any:
    """A loader whose items are first passed through a function, for those that `as_batch` does not understand.

    Args:
        loader: any loader; the result still has its dataset, samplers, generators and state.
        function: ``function(item)`` returns ``(x, y)``, ``(x, y, indices)`` or a `Batch`. It runs in the main process.

    Raises:
        TypeError: no loader, or no function.

    Example:
        >>> import torch
        >>> items = [(torch.zeros(2, 5), torch.tensor([5, 3]), torch.ones(2))]  # tokens, lengths, targets
        >>> loader = adapt(items, lambda item: Batch(x={"tokens": item[0], "lengths": item[1]}, y=item[2]))
        >>> next(iter(loader)).size
        2
    """
    if not isinstance(loader, Iterable) or not callable(function):
        raise TypeError(f"adapt(loader, function) got {describe(loader)} and {describe(function)}")
    return _Adapted(loader, function)


class Indexed(Dataset):
    """A dataset that also returns each example's index: ``(x, y)`` becomes ``(x, y, index)``, a dict gets "indices"."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        example = self.dataset[index]
        return {**example, "indices": index} if isinstance(example, Mapping) else (*example, index)


def with_inputs(item: Any, x: Any) -> Any:
    """A loader's item, in the form it came in, with other inputs."""
    if isinstance(item, Batch):
        return item._replace(x=x)
    if not isinstance(item, Mapping):
        return (x, *item[1:])
    name = next(name for name in item if name not in (*TARGETS, "indices", "weights"))
    return {**item, name: x}


def forward(model: nn.Module, x: Any) -> Any:
    """The model's output for the inputs of a batch: a dict is given by name where the model has arguments of its names.

    Raises:
        TypeError: it has arguments of some of the names, but not of all.
    """
    if not isinstance(x, Mapping):
        return model(x)
    plain: Any = getattr(model, "_orig_mod", model)  # a compiled model takes anything
    return model(**x) if _takes_names(plain.__class__, tuple(x)) else model(x)


def logits(output: Any) -> Tensor:
    """The scores of classes in a model's output: itself, or its "logits" where it has several parts (transformers).

    Raises:
        TypeError: neither.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model returns {describe(output)}, where scores of classes are needed: let it return a tensor (B, K) "
            "or an object with `logits`"
        )
    return found


@cache
def _takes_names(kind: Any, names: tuple[str, ...]) -> bool:
    parameters = inspect.signature(kind.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return all(name in names for name in required_arguments(kind.forward) if name != "self")
    unknown = sorted(set(names) - {p.name for p in parameters})
    if unknown and len(unknown) < len(names):
        raise TypeError(
            f"{kind.__name__} takes no argument {', '.join(unknown)}, which its batches hold: leave it out, with "
            "steep.adapt(loader, lambda item: ...)"
        )
    return not unknown
