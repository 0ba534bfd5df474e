"""SPRING: against NumPy, Kaczmarz's projection, the damped solve, its momentum, state, bad input."""

import numpy as np
import pytest
import torch
from torch import nn

from steep.backward.levenberg_marquardt import LevenbergMarquardt
from steep.backward.spring import Spring


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def net():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def grads(model, rule, losses):
    model.zero_grad()
    rule(losses)
    return flat(p.grad for p in model.parameters())


def jacobian(model, x):
    params = dict(model.named_parameters())
    found = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)).squeeze(-1))(
        {k: p.detach() for k, p in params.items()}
    )
    return torch.cat([found[k].flatten(1) for k in params], 1).numpy()


@pytest.mark.parametrize(("damping", "momentum"), [(1e-3, 0.99), (0.1, 0.5)])
def test_the_first_steps_equal_the_least_squares_problem_in_numpy(damping, momentum):
    model = net()
    rule, optimizer, lr = Spring(model, damping, momentum), torch.optim.SGD(model.parameters(), lr=0.05), 0.05
    phi = np.zeros(sum(p.numel() for p in model.parameters()))
    for _ in range(4):
        x, y = torch.randn(6, 3).double(), torch.randn(6).double()
        j, r = jacobian(model, x) / 6**0.5, (model(x).squeeze(-1) - y).detach().numpy() / 6**0.5
        lhs = j.T @ j + damping * np.eye(len(phi))  # the normal equations of the P x P problem
        phi = np.linalg.solve(lhs, j.T @ r + damping * momentum * phi)
        before = flat(model.parameters())
        np.testing.assert_allclose(grads(model, rule, model(x).squeeze(-1) - y).numpy(), phi, rtol=1e-7, atol=1e-9)
        optimizer.step()
        np.testing.assert_allclose(flat(model.parameters()), before - lr * phi, rtol=1e-9, atol=1e-12)


def test_several_residuals_of_an_example_are_conditions_of_their_own():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double(), torch.randn(6, 3).double()
    y, rule, phi = torch.randn(6, 4).double(), Spring(model, 0.1, 0.5), 0.0
    for _ in range(3):
        params = {k: p.detach() for k, p in model.named_parameters()}
        found = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)).flatten())(params)
        j = torch.cat([t.flatten(1) for t in found.values()], 1).numpy() / 24**0.5
        r = (model(x) - y).detach().flatten().numpy() / 24**0.5
        phi = np.linalg.solve(j.T @ j + 0.1 * np.eye(j.shape[1]), j.T @ r + 0.1 * 0.5 * phi)
        np.testing.assert_allclose(grads(model, rule, model(x) - y).numpy(), phi, rtol=1e-7, atol=1e-9)


def test_one_example_and_no_damping_is_kaczmarzs_projection():
    """The new direction is the point of the hyperplane a φ = r that is nearest to μ φ."""
    model = nn.Linear(4, 1, bias=False).double()
    rule, phi = Spring(model, damping=1e-14, momentum=0.9), torch.zeros(4).double()
    for _ in range(5):
        a, r = torch.randn(1, 4).double(), torch.randn(1).double()
        found = grads(model, rule, model(a).squeeze(-1) - model(a).detach().squeeze(-1) + r)
        phi = 0.9 * phi + a[0] * (r - 0.9 * a[0] @ phi) / a[0].square().sum()
        torch.testing.assert_close(found, phi, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(a @ found, r, rtol=1e-6, atol=1e-8)


def test_without_momentum_it_is_the_damped_solve():
    model, x = net(), torch.randn(6, 3).double()
    mean = float((jacobian(model, x) ** 2).sum(1).mean())
    found = grads(model, Spring(model, damping=0.1 * mean / 6, momentum=0.0), model(x).squeeze(-1))
    damped = grads(model, LevenbergMarquardt(model, damping=0.1, adapt=1.0), model(x).squeeze(-1))
    torch.testing.assert_close(found, damped, rtol=1e-7, atol=1e-10)


def test_the_constraint_shortens_the_gradient_and_not_the_memory():
    model, x = net(), torch.randn(6, 3).double()
    free, bound = Spring(model), Spring(model, constraint=1e-4)
    long, short = (grads(model, rule, model(x).squeeze(-1)) for rule in (free, bound))
    assert short.norm() == pytest.approx(0.01)
    torch.testing.assert_close(short / short.norm(), long / long.norm())
    torch.testing.assert_close(flat(bound.direction.values()), long)


def test_squares_with_kappa_1_are_the_same_conditions():
    model, x, y = net(), torch.randn(6, 3).double(), torch.randn(6).double()
    signed = grads(model, Spring(model), model(x).squeeze(-1) - y)
    squares = grads(model, Spring(model, kappa=1.0), (model(x).squeeze(-1) - y).square())
    torch.testing.assert_close(squares, signed, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "value"), [("damping", 0.0), ("momentum", 1.0), ("kappa", 0.0), ("constraint", 0.0), ("momentum", "x")]
)
def test_hyper_parameters_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Spring(nn.Linear(1, 1), **{name: value})


def test_the_constraint_leaves_a_shorter_gradient_as_it_is():
    model = net()
    x = torch.randn(6, 3, dtype=torch.float64)
    free, bound = Spring(model), Spring(model, constraint=1e6)
    g = grads(model, free, model(x).squeeze(1))
    assert 0 < g.norm() < 1e3
    assert torch.equal(grads(model, bound, model(x).squeeze(1)), g)
