"""`quadratic` and `rosenbrock`: spectrum, minimum and rates of convergence are known exactly."""

import numpy as np
import pytest
import torch

import steep
from steep.tasks import task
from steep.tasks.microscopes import _least_squares


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def full(recipe, seed=0):
    """Model, and the mean loss over all examples as a function of nothing."""
    torch.manual_seed(seed)
    model, (x, y, _) = recipe.model(), recipe.data(generator(seed)).train.dataset[:]
    return model, lambda: recipe.loss(model(x), y).mean()


def test_the_hessian_has_the_stated_spectrum():
    a, _ = _least_squares(64, 16, 1e3, generator())
    hessian = 2 / 64 * a.double().T @ a.double()
    eigenvalues = np.linalg.eigvalsh(hessian.numpy())[::-1]
    np.testing.assert_allclose(eigenvalues, 10 ** -np.linspace(0, 3, 16), rtol=1e-4, atol=1e-7)


def test_the_minimum_is_zero():
    a, b = _least_squares(64, 16, 10.0, generator())
    theta = np.linalg.lstsq(a.double().numpy(), b.double().numpy(), rcond=None)[0]
    assert np.abs(a.numpy() @ theta - b.numpy()).max() < 1e-5
    assert 0.3 < np.var(theta) < 3


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
def test_gradient_descent_contracts_at_the_exact_rate(condition):
    """With step 2 / (λmax + λmin) the slowest directions shrink by (κ - 1) / (κ + 1) a step."""
    model = task("quadratic").model().double()
    x, y, _ = task("quadratic", condition=condition).data(generator()).train.dataset[:]
    optimizer = torch.optim.SGD(model.parameters(), lr=2 / (1 + 1 / condition))
    values = []
    for _ in range(400 if condition > 1 else 2):
        optimizer.zero_grad()
        value = (model(x.double()) - y.double()).square().mean()
        value.backward()
        optimizer.step()
        values.append(value.item())
    if condition == 1:
        assert values[1] < 1e-8 * values[0], "one step solves a quadratic whose curvature is the same everywhere"
    else:
        rate = ((condition - 1) / (condition + 1)) ** 2
        assert values[60] / values[59] == pytest.approx(rate, rel=0.02)


def test_quadratic_options():
    recipe = task("quadratic", examples=30, dimension=5, batch_size=10, steps=8)
    data = recipe.data(generator())
    assert [b[0].shape for b in data.train] == [(10, 5)] * 3
    assert len(data.val.dataset) == 30
    assert recipe.budget.steps == 8
    assert sum(p.numel() for p in recipe.model().parameters()) == 5


@pytest.mark.parametrize("wrong", [{"dimension": 65}, {"condition": 0.5}])
def test_impossible_quadratics_are_refused(wrong):
    with pytest.raises(ValueError, match=r"dimension=\d+ must be at most examples=64, condition=.* at least 1"):
        task("quadratic", **wrong)


@pytest.mark.parametrize("dimension", [2, 5])
def test_rosenbrock_is_its_formula(dimension):
    from scipy.optimize import rosen, rosen_der

    model, loss = full(task("rosenbrock", dimension=dimension))
    residuals = 2 * dimension - 2
    theta = model.theta.detach().double().numpy()
    assert loss().item() * residuals == pytest.approx(rosen(theta), rel=1e-5)
    loss().backward()
    np.testing.assert_allclose(model.theta.grad * residuals, rosen_der(theta), rtol=1e-4, atol=1e-3)


def test_rosenbrock_starts_near_the_classical_point_and_ends_at_one():
    starts = torch.stack([full(task("rosenbrock"), seed)[0].theta.detach() for seed in range(50)])
    assert starts.mean(0).tolist() == pytest.approx([-1.2, 1.0], abs=0.06)
    assert starts.std(0).tolist() == pytest.approx([0.1, 0.1], rel=0.35)
    model, loss = full(task("rosenbrock", dimension=7))
    torch.nn.init.ones_(model.theta)
    assert loss().item() == 0


def test_gauss_newton_solves_rosenbrock_in_two_steps():
    """A known property: of two residuals one is linear, so that the second step is exact."""
    recipe = task("rosenbrock")
    model, _ = full(recipe)
    model.double()
    x, _, _ = recipe.data(generator()).train.dataset[:]
    for _ in range(2):
        theta = model.theta.detach()
        jacobian = torch.autograd.functional.jacobian(
            lambda t: torch.func.functional_call(model, {"theta": t}, x.double()).squeeze(1), theta
        )
        residuals = model(x.double()).detach().squeeze(1)
        model.theta.data = theta - torch.linalg.solve(jacobian, residuals)
    np.testing.assert_allclose(model.theta.detach(), [1, 1], atol=1e-9)


def test_one_dimension_is_refused():
    with pytest.raises(ValueError, match="dimension=1 must be at least 2"):
        task("rosenbrock", dimension=1)


def test_the_recipes_approach_their_minima():
    """Both start between 1 and 7."""
    for name in ("quadratic", "rosenbrock"):
        assert steep.fit(task(name), progress=False, evaluate_every=9999).val["loss"] < 2e-3
