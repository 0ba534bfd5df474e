"""What is checked of a run's batches: that the third part is an index, and that BatchNorm never meets one example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from steep.batches import Batch, Indexed, as_batch, describe, forward
from steep.recipe import Recipe
from steep.requires import coupling_layers
from steep.splits import Loader
from steep.utils.loaders import parts_of
from steep.utils.validation import check_ranges, require_whole

T = TypeVar("T")


def check_arguments(
    recipe: Any, seed: Any, split_seed: Any, accumulate: Any, evaluate_every: Any, save_every: Any
) -> None:
    """Refuse what `fit` cannot mean, before anything is built."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"fit takes a steep.Recipe, got {recipe!r}")
    least = {"seed": (seed, 0), "split_seed": (split_seed, 0), "accumulate": (accumulate, 1)}
    for name, (value, lowest) in {**least, "evaluate_every": (evaluate_every, 1)}.items():
        if value is not None or name in ("seed", "accumulate"):
            require_whole(name, value, lowest)
    check_ranges({"save_every": save_every}, {"save_every": "[0, inf)"})


def check_part(part: Any, name: str, kind: type[T]) -> T:
    """What a recipe's factory returned, if it is of that kind."""
    if not isinstance(part, kind):
        shown = f"{kind.__module__.replace('.splits', '').replace('.modules.module', '')}.{kind.__name__}"
        raise TypeError(f"Recipe.{name} must return a {shown}, but returned {part!r}")
    return part


class DistinctIndices:
    """Refuses a third part of ``(x, y, third)`` that repeats within an epoch, or lies outside the data set.

    Class labels, lengths and group numbers are integers of shape (B,) too, and with them a method with a memory would
    confuse examples.
    What is said by name, as in `Batch`, is not checked, nor what a sampler draws with replacement.
    """

    def __init__(self, loader: Loader):
        dataset = getattr(loader, "dataset", None)
        known = hasattr(dataset, "__len__") and not any(getattr(p, "replacement", False) for p in parts_of(loader))
        known = known and not _counts(dataset)
        # by index, the place in the batch it came in; -1 before. NumPy: its calls cost a fifth of torch's
        self.places = np.full(len(dataset), -1) if known else None  # type: ignore[arg-type]

    def check(self, item: Any) -> None:
        """Look at one item of the epoch.

        Raises:
            ValueError: an index that has been there before, or is out of range.
        """
        if self.places is None or type(item) not in (tuple, list) or len(item) < 3:
            return
        indices, size = item[2].cpu().numpy(), len(self.places)
        if indices.min() < 0 or indices.max() >= size:
            outside = indices[(indices < 0) | (indices >= size)]
            raise ValueError(
                f"{_LIKE_INDEX}, but {outside[0]} is no index into {size} examples. {_REMEDY}; if it is an index "
                "into a larger data set, wrap the subset: steep.Indexed(Subset(...))"
            )
        again = self.places[indices] >= 0
        self.places[indices] = places = np.arange(len(indices))
        again |= self.places[indices] != places  # twice in this batch: the later place stands
        if again.any():
            raise ValueError(f"{_LIKE_INDEX}, but {indices[again][0]} comes twice in an epoch. {_REMEDY}")


def _counts(dataset: Any) -> bool:
    """Whether the third part is the examples' number, so that there is nothing to check (`tensor_loader`'s is)."""
    third = dataset.tensors[2] if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 3 else None
    return isinstance(dataset, Indexed) or (third is not None and torch.equal(third, torch.arange(len(third))))


_LIKE_INDEX = "the third part of the loader's items is taken for the examples' indices in the training set"
_REMEDY = (
    "If it is something else, say so: steep.adapt(loader, lambda item: steep.Batch(item[0], item[1])), with weights= "
    "or a dict of inputs as x; if examples repeat on purpose, steep.Batch(*item)"
)
_ONE = "more than 1 value per channel"  # torch's words where BatchNorm meets one value


def explained(error: Exception, what: str, *values: Any) -> Exception:
    """The error with a note of what was called on which values; what to do where BatchNorm has met a single example."""
    if isinstance(error, ValueError) and _ONE in str(error):  # a batch whose size could not be known before
        return ValueError(f"a training batch has one example, which BatchNorm cannot normalise: {_DROP}")
    error.add_note(f"while the {what} was called with {' and '.join(map(describe, values))}")
    return error


_DROP = "pass drop_last=True to the loader, choose another batch_size, or use GroupNorm"


def check_batch_norm(model: nn.Module, loaders: Sequence[Loader], accumulate: int, batch: Batch) -> None:
    """Refuse a run in which BatchNorm would meet a single example, before its first step.

    Args:
        model: in the mode of training.
        loaders: what it is trained on.
        accumulate: parts that each batch is split into.
        batch: one of them, of which the first example is tried.

    Raises:
        ValueError: names the layer, and what makes batches so small.
    """
    layers = coupling_layers(model)
    if not layers:
        return
    alone = [size for loader in loaders for size in _sizes(loader) if size // min(accumulate, size) == 1]
    if not alone or not _fails(model, batch):
        return
    cause = (
        f"a batch of {alone[0]} in {accumulate} parts leaves parts of"
        if accumulate > 1 < alone[0]
        else ("the last batch of an epoch has")
    )
    raise ValueError(f"{cause} one example, which {layers[0]} cannot normalise in training mode: {_DROP}")


def _sizes(loader: Loader) -> Iterable[int]:
    """Sizes of the batches of an epoch, as far as they can be known without reading the data."""
    # the innermost: a loader around another may name a batch size of its own
    samplers = [part for part in parts_of(loader) if isinstance(getattr(part, "batch_size", None), int)]
    if samplers and hasattr(samplers[-1], "sampler"):
        sampler = samplers[-1]
        whole, last = divmod(_count(sampler.sampler, loader), sampler.batch_size)
        return {*([sampler.batch_size] if whole else []), *([last] if last and not sampler.drop_last else [])}
    return {as_batch(item).size for item in loader} if isinstance(loader, (list, tuple)) else ()


def _count(sampler: Any, loader: Any) -> int:
    try:
        return len(sampler)
    except TypeError:  # of an iterable data set, which knows its length itself, or is in a loader that does
        return len(loader.dataset) if hasattr(loader.dataset, "__len__") else 0


@torch.no_grad()
def _fails(model: nn.Module, batch: Batch) -> bool:
    """Whether BatchNorm refuses one example: it does not where an example has several positions."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        forward(model, batch.split(batch.size)[0].x)
    except ValueError as error:
        return _ONE in str(error)
    except Exception:  # whatever else is wrong shows in the first step, with its own message
        return False
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
    return False
