"""Losses, standardisation and splits that the tasks share."""

import numpy as np
import pytest
import torch

from steep.tasks._parts import absolute_error, adamw, cross_entropy, loaders, split, squared_error, standardise
from steep.tasks._parts import standardised as standardised_parts


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_cross_entropy_of_classes():
    output, target = torch.randn(4, 3, generator=generator()), torch.tensor([0, 2, 1, 1])
    z = output.double().numpy()
    expected = np.log(np.exp(z).sum(1)) - z[np.arange(4), target.numpy()]
    np.testing.assert_allclose(cross_entropy(output, target), expected, atol=1e-6)


def test_cross_entropy_of_positions_is_their_mean():
    output, target = torch.randn(4, 5, 3, generator=generator()), torch.randint(3, (4, 5), generator=generator())
    each = torch.stack([cross_entropy(output[:, t], target[:, t]) for t in range(5)], 1)
    torch.testing.assert_close(cross_entropy(output, target), each.mean(1))


def test_errors_average_over_outputs():
    output, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, -3.0]])
    assert squared_error(output, target).tolist() == [2.5, 4.5]
    assert absolute_error.function(output, target).tolist() == [1.5, 1.5]
    assert not absolute_error.higher_is_better


def test_standardise_uses_the_training_data_only():
    x = 5 + 3 * torch.randn(100, 2, generator=generator())
    parts = [(x[:60], x[:60, :1]), (x[60:], x[60:, :1])]
    (tx, ty), (vx, vy) = standardised_parts(parts)
    for value in (tx, ty):
        torch.testing.assert_close(value.mean(0), torch.zeros(value.shape[1]), atol=1e-6, rtol=0)
        torch.testing.assert_close(value.std(0, correction=0), torch.ones(value.shape[1]))
    torch.testing.assert_close(vx * x[:60].std(0, correction=0) + x[:60].mean(0), x[60:])
    assert vy.mean().abs() > 1e-4


def test_constant_columns_become_zero():
    x = torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 3.0]])
    scaled = standardise(x, x)
    assert scaled[:, 0].tolist() == [0, 0, 0]
    assert scaled[:, 1].std(correction=0) == pytest.approx(1)
    assert standardise(torch.tensor([[0.7, 2.0]]), x)[0, 0] == 0, "a column unseen in training carries nothing"


def test_classes_are_left_alone():
    y = torch.tensor([0, 1, 2])
    assert standardised_parts([(torch.randn(3, 2), y)])[0][1] is y


def test_split_is_a_partition():
    x = torch.arange(101.0).unsqueeze(1)
    parts = split(x, x.squeeze(1).long(), generator())
    assert [len(a) for a, _ in parts] == [61, 20, 20]
    assert torch.equal(torch.cat([a for a, _ in parts]).sort(0).values, x)
    assert all(torch.equal(a.squeeze(1).long(), b) for a, b in parts)
    assert not torch.equal(parts[0][0], x[:61]), "the split must be random"


def test_split_is_uniform():
    """Each example is held out for testing in a fifth of the splits: 400 draws, within 4 standard errors."""
    x, g = torch.arange(20.0).unsqueeze(1), generator()
    counts = torch.zeros(20)
    for _ in range(400):
        counts[split(x, x, g)[2][0].squeeze(1).long()] += 1
    assert ((counts / 400 - 0.2).abs() < 4 * np.sqrt(0.2 * 0.8 / 400)).all()


def test_loaders_shuffle_training_only_and_shrink_to_the_data():
    part = torch.arange(6.0).unsqueeze(1), torch.zeros(6)
    data = loaders(part, part, batch_size=64)
    assert data.test is None
    torch.manual_seed(0)
    orders = {tuple(next(iter(data.train))[2].tolist()) for _ in range(5)}
    assert len(orders) > 1
    assert next(iter(data.val))[2].tolist() == list(range(6))


def test_adamw_takes_what_it_is_given():
    made = adamw(0.3, weight_decay=0.2)["optimizer"]([torch.zeros(1, requires_grad=True)])
    group = made.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["fused"]) == (0.3, 0.2, True)
