"""`function-1d` and `polynomial`: the problems as their paper states them, recomputed in NumPy."""

from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch

import steep
from steep.tasks import task
from steep.tasks.sven_regression import _exponents, _function_1d, _polynomial


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def monomials(x, degree):
    """All products of up to `degree` columns, with E[m²] for standard normal columns, by counting repetitions."""
    moments = {0: 1.0, 1: 1.0, 2: 3.0, 3: 15.0, 4: 105.0}  # E[x^2p] of N(0, 1)
    columns, squares = [], []
    for total in range(degree + 1):
        for chosen in combinations_with_replacement(range(x.shape[1]), total):
            columns.append(np.prod(x[:, list(chosen)], axis=1))
            squares.append(np.prod([moments[chosen.count(v)] for v in set(chosen)]))
    return np.stack(columns, 1), np.array(squares)


def test_there_are_210_monomials():
    p = _exponents(6, 4)
    assert p.shape == (210, 6)
    assert p.sum(1).max() == 4
    assert len(p.unique(dim=0)) == 210


def test_the_polynomial_is_one_with_coefficients_of_the_stated_size():
    """Least squares on all 210 monomials leaves nothing, and finds N(0, 1) coefficients of m / sqrt(E[m²])."""
    normalised = []
    for seed in range(3):
        x, y = _polynomial(600, generator(seed))
        design, squares = monomials(x.double().numpy(), 4)
        coefficients, *_ = np.linalg.lstsq(design, y.double().numpy()[:, 0], rcond=None)
        np.testing.assert_allclose(design @ coefficients, y[:, 0], atol=1e-3)
        normalised.append(coefficients * np.sqrt(squares))
    z = np.concatenate(normalised)
    # 630 standard normal numbers: mean and mean square within 4 standard errors
    assert abs(z.mean()) < 4 / np.sqrt(630)
    assert abs((z**2).mean() - 1) < 4 * np.sqrt(2 / 630)
    by_degree = normalised[0][[0, 1, 7, 28, 84, 209]]
    assert len(np.unique(by_degree)) == 6


def test_terms_multiply_their_factors():
    """The published generator added them; then nothing of degree 2 in two different variables could occur."""
    x, y = _polynomial(600, generator())
    design, _ = monomials(x.double().numpy(), 4)
    lower = design[:, [i for i in range(210) if i < 7]]  # constant and linear terms
    explained = lower @ np.linalg.lstsq(lower, y.double().numpy(), rcond=None)[0]
    assert np.var(y.numpy() - explained) > 0.5 * np.var(y.numpy())


def test_inputs_are_standard_normal_and_the_polynomial_changes_with_the_seed():
    x, _ = _polynomial(5000, generator())
    assert x.mean(0).abs().max() < 4 / 5000**0.5
    assert (x.std(0) - 1).abs().max() < 4 / 10_000**0.5
    other = _polynomial(5000, generator(1))
    assert not torch.equal(x, other[0])
    small, _ = _polynomial(10, generator(), variables=2, degree=3)
    assert small.shape == (10, 2)


def test_function_1d():
    x, y = _function_1d(1000, generator())
    assert -1 <= x.min() < -0.99
    assert 0.99 < x.max() <= 1
    np.testing.assert_allclose(y, np.exp(-10 * x.numpy() ** 2) * np.sin(2 * x.numpy()), atol=1e-6)


@pytest.mark.parametrize(("name", "parameters", "inputs"), [("function-1d", 593, 1), ("polynomial", 673, 6)])
def test_the_set_up_is_the_papers(name, parameters, inputs):
    recipe = task(name)
    model = recipe.model()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [type(m).__name__ for m in model.layers] == ["Linear", "GELU"] * 3 + ["Linear"]
    data = recipe.data(generator())
    y = data.train.dataset[:][1]
    assert [len(d.dataset) for d in (data.train, data.val, data.test)] == [10_000] * 3
    assert next(iter(data.train))[0].shape == (32, inputs)
    assert recipe.budget == steep.Budget(epochs=20)
    torch.testing.assert_close(y.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(correction=0), torch.tensor(1.0))
    val = data.val.dataset[:][1]
    assert val.mean().abs() > 1e-5, "scaled by its own statistics"
    assert 0.5 < val.std() < 2


def test_a_smaller_task_learns_the_function():
    recipe = task("function-1d", examples=1000, epochs=20)
    losses = [steep.fit(recipe, seed=s, progress=False, evaluate_every=999).test["loss"] for s in (0, 1)]
    assert max(losses) < 0.01, "the variance is 1"
