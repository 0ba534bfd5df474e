"""`two-bit`: the probabilities are met exactly, domains are told apart, and the mean loss learns the wrong bit."""

import pytest
import torch

import steep
from steep.tasks import task
from steep.tasks.two_bit import _domain


@pytest.mark.parametrize("flip", [0.1, 0.2, 0.5, 0.9])
def test_a_domain_has_the_very_probabilities(flip):
    x, y = _domain(flip)
    right = (x > 0) == (y > 0)[:, None]
    assert x.shape == (80, 2)
    assert x.abs().unique().tolist() == [1]
    assert y.double().mean() == 0.5
    for label in (0, 1):  # the bits are independent, given the label
        first, second = right[y == label].T
        assert first.double().mean() == 0.75
        assert second.double().mean().item() == pytest.approx(1 - flip)
        assert (first & second).double().mean().item() == pytest.approx(0.75 * (1 - flip))


def test_domains_go_with_their_examples():
    data = task("two-bit").data(torch.Generator().manual_seed(0))
    x, y, indices = next(iter(data.train))
    second = (x[:, 1] > 0) == (y > 0)
    shares = [second[data.domains[indices] == d].double().mean().item() for d in (0, 1)]
    assert shares == pytest.approx([0.8, 0.9])
    for loader, share in ((data.val, 0.5), (data.test, 0.1)):
        x, y, _ = loader.dataset[:]
        assert ((x[:, 1] > 0) == (y > 0)).double().mean().item() == pytest.approx(share)


def test_the_mean_loss_learns_the_bit_that_fails():
    result = steep.fit(task("two-bit", steps=300), progress=False, evaluate_every=300)
    assert result.val["accuracy"] == pytest.approx(0.5)
    assert result.test["accuracy"] == pytest.approx(0.1)
