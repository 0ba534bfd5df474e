"""`poisson`: derivatives against autograd, the equation and its solution, the engine's closed forms, learning."""

import math
import warnings

import torch
from torch import nn

import steep
from steep.per_example import PerExample
from steep.tasks import task
from steep.tasks.poisson import _boundary, _ForwardLaplacian, _interior, _Residual, _solution


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def plain(network):
    """The same function of a point (2,) as an ordinary network."""

    def u(point):
        h = point
        for i, layer in enumerate(network.layers):
            h = layer.weight[:, :-1] @ (h.tanh() if i else h) + layer.weight[:, -1]
        return h[0]

    return u


def test_values_gradient_and_laplacian_equal_autograds():
    torch.manual_seed(0)
    network = _ForwardLaplacian(7, 5).double()
    for layer in network.layers:
        nn.init.normal_(layer.weight)
    x, u = torch.rand(6, 2).double(), plain(network)
    expected = [torch.stack([u(p), *torch.func.grad(u)(p), torch.func.hessian(u)(p).trace()]) for p in x]
    torch.testing.assert_close(network(x), torch.stack(expected))


def test_the_solution_solves_the_equation():
    x, target = _interior(5, generator())
    for point, value in zip(x[:, :2].double(), target, strict=True):
        laplacian = torch.func.hessian(lambda p: _solution(p[None])[0, 0])(point).trace()
        torch.testing.assert_close(-laplacian / math.pi**2, value[0].double(), rtol=1e-5, atol=1e-5)
    x, target = _boundary(200, generator())
    torch.testing.assert_close(_solution(x[:, :2]), target, rtol=0, atol=1e-6)
    assert {tuple(side) for side in (x[:, :2] == 1).int().tolist()} | {
        tuple(side) for side in (x[:, :2] == 0).int().tolist()
    } == {(0, 0), (0, 1), (1, 0)}


def test_training_returns_residuals_and_evaluation_the_solution():
    torch.manual_seed(0)
    model, x = _Residual(4), torch.tensor([[0.3, 0.4, 0.0], [0.0, 0.4, 1.0]])
    u, _, _, laplacian = model.network(x[:, :2]).unbind(1)
    torch.testing.assert_close(model.train()(x)[:, 0], torch.stack([-laplacian[0] / math.pi**2, u[1]]))
    torch.testing.assert_close(model.eval()(x)[:, 0], u)


def test_per_example_gradients_have_closed_forms():
    model, x = _Residual(8, 8), _interior(6, generator())[0]
    engine = PerExample(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = engine.rows(model(x).squeeze(1))
    assert not engine.left_to_autograd
    assert rows.gram().shape == (6, 6)


def test_learns_the_solution():
    recipe = task("poisson", points=400, batch_size=50, steps=300)
    result = steep.fit(recipe, progress=False)
    assert result.test["loss"] < 0.01  # the solution's mean square is 1/4
