"""What a loader's item is taken for, and what a split must not share."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

import steep
from steep.batches import Batch

X, Y = torch.zeros(12, 3), torch.zeros(12)


@pytest.mark.parametrize(
    ("x", "y", "size"),
    [
        (torch.zeros(192, 2), torch.zeros(192), 192),
        (torch.zeros(192, 2), (torch.zeros(192), torch.zeros(192, 3)), 192),
        (torch.zeros(192, 2), [torch.zeros(192), torch.zeros(192)], 192),
        (torch.zeros(4, 2), {"start": torch.zeros(4), "end": torch.zeros(4)}, 4),
        (torch.zeros(3, 1, 8, 8), [{"boxes": torch.zeros(5, 4)}, {"boxes": torch.zeros(0, 4)}, {}], 3),
        (torch.zeros(7, 2), None, 7),
        ({"ids": torch.zeros(6, 9)}, None, 6),
    ],
)
def test_examples_are_counted_in_nested_batches(x, y, size):
    assert Batch(x, y).size == size


def test_examples_with_two_targets_are_counted_once_each(regression):
    """A mean over 12 examples instead of 40 would weigh the last, shorter batch too much."""

    def data(g):
        def loader(n):
            x = torch.randn(n, 3, generator=g)
            return DataLoader([(row, (row.sum(), row.prod())) for row in x], batch_size=8)

        return steep.Data(loader(40), loader(9))

    def loss(output, target):
        return (output.squeeze(-1) - target[0]).square() + target[1].square()

    result = steep.fit(regression.replace(data=data, loss=loss, budget=steep.Budget(epochs=2)), progress=False)
    assert result.examples == 80
    inputs, targets = zip(*((x, (a, b)) for x, (a, b) in data(torch.Generator().manual_seed(0)).val), strict=True)
    assert [len(x) for x in inputs] == [8, 1]
    assert all(len(t[0]) == len(x) for t, x in zip(targets, inputs, strict=True))


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


@pytest.mark.parametrize("name", ["loss", "step", "seconds"])
def test_a_metric_cannot_take_the_place_of_the_loss(name):
    with pytest.raises(ValueError, match=f"must not be called '{name}'"):
        steep.Metric(name, lambda output, target: output)


def test_a_metric_is_a_metric_and_one_number_per_example(regression):
    def error(output, target):
        return (output.squeeze(-1) - target).abs()

    with pytest.raises(TypeError, match=r"must be a steep.Metric, got .*metric=steep.Metric\('name', function\)"):
        regression.replace(metric=error)
    averaged = regression.replace(metric=steep.Metric("error", lambda output, target: error(output, target).mean()))
    with pytest.raises(ValueError, match=r"'error' must return one number per example, shape \(10,\), .* \(\)"):
        steep.fit(averaged, progress=False)
