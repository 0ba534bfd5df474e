"""What a split's loaders must be, and must not share."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

import steep

X, Y = torch.zeros(12, 3), torch.zeros(12)

WHOLE = TensorDataset(X, Y)


def subset(indices):
    return DataLoader(Subset(WHOLE, indices), batch_size=2)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ("same loader", "train and val share their loader"),
        ("same data set", "train and val share their data set"),
        ("overlap", "train and val share 2 examples"),
        ("val is test", "val and test share their loader"),
    ],
)
def test_splits_that_overlap_are_named(parts, says):
    a, b, c = subset(range(8)), subset(range(8, 10)), subset(range(10, 12))
    given = {
        "same loader": (a, a),
        "same data set": (DataLoader(WHOLE, shuffle=True), DataLoader(WHOLE)),
        "overlap": (a, subset(range(6, 12))),
        "val is test": (a, b, b),
    }[parts]
    with pytest.warns(UserWarning, match=says):
        steep.Data(*given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steep.Data(a, b, c)
        steep.Data(
            DataLoader(WHOLE, sampler=SubsetRandomSampler(range(6))),
            DataLoader(WHOLE, sampler=SubsetRandomSampler(range(6, 12))),
        )


class Stream(IterableDataset):
    def __iter__(self):
        return ((torch.ones(3), torch.ones(())) for _ in range(10))


class Counted(Stream):
    def __len__(self):
        return 10


GOOD = DataLoader(WHOLE, batch_size=4)


@pytest.mark.parametrize(
    ("loaders", "says"),
    [
        ({"train": iter(GOOD), "val": GOOD}, "train is a _SingleProcessDataLoaderIter, which can be read only once"),
        ({"train": GOOD, "val": (item for item in GOOD)}, "val is a generator, which can be read only once"),
        ({"train": GOOD, "val": 3}, "val is 3, which is no loader"),
        (
            {"train": DataLoader(Stream()), "val": GOOD},
            r"batches of train is unknown \(Stream has no length\): define __len",
        ),
        (
            {"train": GOOD, "val": GOOD, "clients": [GOOD, map(len, [])]},
            r"clients\[1\] is a map, which can be read only",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:train and val share")
def test_loaders_that_cannot_be_read_again_are_refused(loaders, says):
    with pytest.raises(TypeError, match=says):
        steep.Data(**loaders)


def test_an_iterable_data_set_of_known_length_trains(regression):
    def data(generator):
        return steep.Data(DataLoader(Counted(), batch_size=4), DataLoader(Counted(), batch_size=5))

    result = steep.fit(regression.replace(data=data, budget=steep.Budget(epochs=2)), progress=False)
    assert (result.steps, result.examples) == (6, 20)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (np.zeros((9, 2)), Y[:9], r"x is a ndarray, not a tensor: use torch.as_tensor\(x\)"),
        (X, [0.0] * 12, "y is a list, not a tensor"),
        (torch.tensor(1.0), Y, r"x has shape \(\): its first dimension must be the examples'"),
    ],
)
def test_arrays_are_refused_where_tensors_are_meant(x, y, says):
    g = torch.Generator()
    for build in (
        lambda: steep.tensor_loader(x, y, 2),
        lambda: steep.split_loaders(x, y, g, batch_size=2),
        lambda: steep.dirichlet_clients(x, y, g, clients=2, alpha=1.0, batch_size=2),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            build()


def test_the_last_shorter_batch_can_be_left_out():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 2), torch.arange(60) % 3
    data = steep.split_loaders(x, y, g, batch_size=8, drop_last=True)
    clients = steep.dirichlet_clients(x, y, g, clients=4, alpha=1.0, batch_size=8, drop_last=True)
    assert [len(item[0]) for item in data.train] == [8] * 4
    assert sum(len(item[0]) for item in data.val) == 12  # every held-out example counts
    for client in clients:
        size = len(client.dataset)
        assert [len(item[0]) for item in client] == [min(8, size)] * max(1, size // 8)
