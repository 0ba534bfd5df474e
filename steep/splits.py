"""The loaders of one split, which a recipe's `data` factory returns, and functions that make them from tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset

from steep.batches import as_batch
from steep.utils.validation import check_ranges, require_tensors, require_whole


class Loader(Protocol):
    """Anything that can be iterated again and again and knows its number of batches, e.g. a `DataLoader`."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Data:
    """Loaders of one split. Each yields batches that `steep.batches.as_batch` understands, such as ``(x, y)``.

    Args:
        train: the training loader.
        val: for curves and for tuning.
        test: for the final score; `val` where there is none.
        clients: federated training: one training loader per client.
        domains: where each training example is from (site, camera, year), integers, (N,).

    Raises:
        TypeError: a loader that can be read only once, or whose number of batches is unknown.
        ValueError: another number of domains than of training examples.
    """

    train: Loader
    val: Loader
    test: Loader | None = None
    clients: Sequence[Loader] = ()
    domains: Tensor | None = None

    def __post_init__(self) -> None:
        named = {"train": self.train, "val": self.val, **({"test": self.test} if self.test is not None else {})}
        for name, loader in {**named, **{f"clients[{i}]": loader for i, loader in enumerate(self.clients)}}.items():
            _check_loader(name, loader)
        if self.domains is not None and self.domains.shape != (self.num_examples,):
            shape = tuple(self.domains.shape)
            raise ValueError(f"domains must have shape ({self.num_examples},), one for each example, got {shape}")
        for a, b in combinations(("train", "val", "test"), 2):
            shared = _shared(getattr(self, a), getattr(self, b))
            if shared:
                warnings.warn(f"{a} and {b} share {shared}: scores on {b} say little about new examples", stacklevel=3)

    @property
    def num_examples(self) -> int:
        """Number of training examples."""
        return count_examples(self.train)


def _check_loader(name: str, loader: Any) -> None:
    if not hasattr(loader, "__iter__"):
        raise TypeError(
            f"{name} is {loader!r}, which is no loader: give a DataLoader, or steep.tensor_loader(x, y, ...)"
        )
    if hasattr(loader, "__next__"):
        raise TypeError(
            f"{name} is a {type(loader).__name__}, which can be read only once: give a DataLoader, or a list of batches"
        )
    try:
        len(loader)
    except TypeError:
        raise TypeError(
            f"the number of batches of {name} is unknown ({type(getattr(loader, 'dataset', loader)).__name__} has no "
            "length): define __len__ on it, the number of examples in a pass, so that epochs and schedules have an end"
        ) from None


def _shared(a: Any, b: Any) -> str:
    """What two loaders have in common, in words; "" where nothing is known to be."""
    if a is None or b is None:
        return ""
    if a is b:
        return "their loader"
    ours, theirs = getattr(a, "dataset", None), getattr(b, "dataset", None)
    if isinstance(ours, Subset) and isinstance(theirs, Subset) and ours.dataset is theirs.dataset:
        count = len(set(map(int, ours.indices)) & set(map(int, theirs.indices)))
        return f"{count} examples" if count else ""
    own_samplers = (RandomSampler, SequentialSampler)  # any other may divide the data set between them
    whole = all(isinstance(getattr(loader, "sampler", None), own_samplers) for loader in (a, b))
    return "their data set" if ours is theirs is not None and whole else ""


def count_examples(loader: Loader) -> int:
    """Examples behind a loader; batches are counted where it has no dataset of known length."""
    dataset: Any = getattr(loader, "dataset", None)
    return len(dataset) if hasattr(dataset, "__len__") else sum(as_batch(item).size for item in loader)


def tensor_loader(
    x: Tensor, y: Tensor, batch_size: int, *, shuffle: bool = False, drop_last: bool = False
) -> DataLoader:
    """Batches ``(x, y, indices)`` of tensors held in memory, indexed a batch at a time (no per-example collation).

    The order comes from torch's generator at the time of iteration, which `fit` gives the data for itself.

    Args:
        x, y: examples and targets, first dimension N.
        batch_size: in [1, N].
        shuffle: draw a new order for every pass.
        drop_last: leave out the last batch of a pass where it is shorter, for models with BatchNorm.

    Raises:
        TypeError: x or y is no tensor.
        ValueError: no examples, lengths that differ, or a batch larger than the data.

    Example:
        >>> import steep, torch
        >>> [len(x) for x, y, index in steep.tensor_loader(torch.zeros(9, 2), torch.zeros(9), batch_size=4)]
        [4, 4, 1]
    """
    _check_tensors(x, y)
    require_whole("batch_size", batch_size, 1)
    if batch_size > len(x):
        raise ValueError(f"batch_size={batch_size} must lie between 1 and the number of examples, {len(x)}")
    dataset = TensorDataset(x, y, torch.arange(len(x)))
    order = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
    # batch_size=None: the sampler gives whole index lists, and the dataset is indexed once a batch
    return DataLoader(dataset, sampler=BatchSampler(order, batch_size, drop_last), batch_size=None)


def _check_tensors(x: Any, y: Any) -> None:
    require_tensors(x=x, y=y)
    for name, value in (("x", x), ("y", y)):
        if value.ndim == 0:
            raise ValueError(f"{name} has shape (): its first dimension must be the examples'")
    if len(x) != len(y):
        raise ValueError(f"x and y differ in length: {len(x)} and {len(y)}")
    if len(x) == 0:
        raise ValueError("the data are empty: x has no examples")


def split_loaders(
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    *,
    batch_size: int,
    val: float = 0.2,
    test: float = 0.2,
    drop_last: bool = False,
) -> Data:
    """Random train/val/test split of tensors, as loaders.

    Args:
        x, y: all examples, first dimension N.
        generator: draws the split.
        batch_size: of the training loader; evaluation uses batches of up to 1024.
        val, test: fractions of N, each rounded to a number of examples. 0 for `test` leaves the test part out.
        drop_last: leave out the last, shorter batch of each training epoch.

    Raises:
        TypeError: x or y is no tensor.
        ValueError: fractions out of range, or with which a part would have no example.
    """
    _check_tensors(x, y)
    if not (val > 0 and test >= 0 and val + test < 1):
        raise ValueError(f"val={val} and test={test} must give data to validation and leave some for training")
    n_val, n_test = round(len(x) * val), round(len(x) * test)
    sizes = {"train": len(x) - n_val - n_test, "val": n_val} | ({"test": n_test} if test else {})
    empty = [name for name, size in sizes.items() if size < 1]
    if empty:
        raise ValueError(
            f"val={val} and test={test} of {len(x)} examples leave none for {' and '.join(empty)} (sizes {sizes}): "
            "give more examples or other fractions"
        )
    order = torch.randperm(len(x), generator=generator)
    parts = dict(zip(sizes, order.split([sizes["train"], n_val, n_test]), strict=False))
    held_out = {name: tensor_loader(x[i], y[i], min(1024, len(i))) for name, i in parts.items() if name != "train"}
    train = tensor_loader(x[parts["train"]], y[parts["train"]], batch_size, shuffle=True, drop_last=drop_last)
    return Data(train, held_out["val"], held_out.get("test"))


def dirichlet_clients(
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    *,
    clients: int,
    alpha: float,
    batch_size: int,
    smallest: int = 2,
    drop_last: bool = False,
) -> list[DataLoader]:
    """Label-skewed division of labelled data among clients (arXiv 1909.06335).

    For each class, the shares of the clients are drawn from a symmetric Dirichlet distribution of
    concentration `alpha`: large is even, 0.1 gives most clients one or two classes.

    Args:
        x, y: examples and class labels, first dimension N.
        clients: number of clients, at least 1.
        alpha: concentration, positive and finite.
        smallest: every client holds at least this many examples (taken from the largest clients).
        drop_last: leave out the last, shorter batch of each client's pass; its batches are never larger than its data.

    Raises:
        ValueError: fewer examples than ``clients * smallest``, or an argument out of range.
    """
    _check_tensors(x, y)
    check_ranges({"alpha": alpha}, {"alpha": "(0, inf)"})
    require_whole("batch_size", batch_size, 1)
    require_whole("clients", clients, 1)
    require_whole("smallest", smallest, 0)
    if len(x) < clients * smallest:
        raise ValueError(f"{len(x)} examples cannot give {clients} clients {smallest} each: use fewer clients")
    shares: list[list[int]] = [[] for _ in range(clients)]
    for label in y.unique():
        members = (y == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        weights = _dirichlet(float(alpha), clients, generator)
        cuts = (weights.cumsum(0)[:-1] * len(members)).round().long()
        for share, part in zip(shares, members.tensor_split(cuts.tolist()), strict=True):
            share.extend(part.tolist())
    for share in shares:  # a client without data could not train, and small alpha makes such clients
        while len(share) < smallest:
            share.append(max(shares, key=len).pop())
    index = [torch.tensor(sorted(share), dtype=torch.long) for share in shares]
    return [tensor_loader(x[i], y[i], min(batch_size, len(i)), shuffle=True, drop_last=drop_last) for i in index]


def _dirichlet(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """A draw from the symmetric Dirichlet distribution, (count,).

    A gamma variable of shape alpha is one of shape alpha + 1 times a uniform one to the power 1 / alpha. It is taken in
    logarithms, less the largest: for small alpha all of them are 0 as floats, where the shares must be one 1 and zeros.
    """
    concentration = torch.full((count,), alpha, dtype=torch.float64)
    powers = (1 - torch.rand(count, generator=generator, dtype=torch.float64)).log()  # of numbers in (0, 1]
    gamma = torch._standard_gamma(concentration + 1, generator=generator)
    return torch.softmax(gamma.log() + (powers - powers.max()) / alpha, 0)
