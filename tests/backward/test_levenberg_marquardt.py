"""Levenberg-Marquardt: against NumPy, its limits (least squares, gradient descent), the gain, bad input, learning."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import steep
from steep.backward.levenberg_marquardt import LEAST, LevenbergMarquardt, method
from steep.requires import UnmetRequirement
from steep.testing import rules


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def net(*widths, dtype=torch.float64):
    layers = [m for k, i in enumerate(widths[:-1]) for m in (nn.Linear(i, widths[k + 1]), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def direction(model, losses, **options):
    model.zero_grad()
    rule = LevenbergMarquardt(model, **options)
    v = losses()
    rule(v, closure=losses)
    return flat(p.grad for p in model.parameters())


class Reference:
    """A tanh network of one hidden layer, its Jacobian by hand, P x P normal equations and the gain, in NumPy."""

    def __init__(self, model, damping, adapt):
        self.theta = flat(model.parameters()).numpy().copy()
        self.shapes = [tuple(p.shape) for p in model.parameters()]
        self.damping, self.adapt = damping, adapt

    def network(self, theta, x):
        sizes = np.cumsum([np.prod(s) for s in self.shapes])
        w, b, v, c = (t.reshape(s) for t, s in zip(np.split(theta, sizes[:-1]), self.shapes, strict=True))
        hidden = np.tanh(x @ w.T + b)
        back = v * (1 - hidden**2)
        rows = [(back[:, :, None] * x[:, None]).reshape(len(x), -1), back, hidden, np.ones((len(x), 1))]
        return (hidden @ v.T + c)[:, 0], np.concatenate(rows, 1)

    def step(self, x, y, lr):
        output, j = self.network(self.theta, x)
        r = output - y
        lam = self.damping * np.mean(np.sum(j**2, 1))
        d = np.linalg.solve(j.T @ j + lam * np.eye(j.shape[1]), j.T @ r)
        moved = -lr * d
        self.theta = self.theta + moved
        now = self.network(self.theta, x)[0] - y
        promise = np.sum(r**2) - np.sum((r + j @ moved) ** 2)
        gain = (np.sum(r**2) - np.sum(now**2)) / promise if promise > 0 else -np.inf
        self.damping *= self.adapt if gain < 0.25 else 1 / self.adapt if gain > 0.75 else 1
        return gain


@pytest.mark.parametrize(("damping", "lr"), [(1.0, 0.3), (1e-3, 1.0), (1e-5, 2.5)])
def test_the_first_steps_equal_the_formula_in_numpy(damping, lr):
    model, x, y = net(3, 6, 1), torch.randn(8, 3).double(), 3 * torch.randn(8).double()
    rule, optimizer = LevenbergMarquardt(model, damping), torch.optim.SGD(model.parameters(), lr=lr)
    reference = Reference(model, damping, 2.0)
    for _ in range(4):
        optimizer.zero_grad()

        def residuals():
            return model(x).squeeze(-1) - y

        rule(residuals(), closure=residuals)
        optimizer.step()
        rule.step()
        gain = reference.step(x.numpy(), y.numpy(), lr)
        assert rule.gain == pytest.approx(gain, rel=1e-6)
        assert rule.damping == pytest.approx(reference.damping)
        np.testing.assert_allclose(flat(model.parameters()).numpy(), reference.theta, rtol=1e-7, atol=1e-9)


def test_both_kinds_of_adaptation_happen():
    gains = []
    for damping, lr in ((10.0, 0.3), (1e-3, 1.8), (1e-3, 2.5)):
        torch.manual_seed(1)
        model, x, y = net(3, 6, 1), torch.randn(8, 3).double(), 3 * torch.randn(8).double()
        rule, optimizer = LevenbergMarquardt(model, damping), torch.optim.SGD(model.parameters(), lr=lr)
        residuals = lambda model=model, x=x, y=y: model(x).squeeze(-1) - y  # noqa: E731
        rule(residuals(), closure=residuals)
        optimizer.step()
        rule.step()
        gains.append((rule.gain, rule.damping))
    assert gains[0][0] > 0.75
    assert gains[0][1] == 5.0
    assert -torch.inf < gains[1][0] < 0.25
    assert gains[1][1] == 2e-3
    assert gains[2] == (-torch.inf, 2e-3)  # the optimizer's step was so long that it promised a rise


def test_little_damping_solves_a_linear_problem_at_once_with_the_smallest_step():
    model, x, y = nn.Linear(7, 1).double(), torch.randn(4, 7).double(), torch.randn(4).double()
    found = direction(model, lambda: model(x).squeeze(-1) - y, damping=1e-12)
    j = torch.cat([x, torch.ones(4, 1)], 1)
    smallest = torch.linalg.lstsq(j, (model(x).squeeze(-1) - y)[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(found, smallest, rtol=1e-8, atol=1e-9)


def test_much_damping_is_gradient_descent():
    model, x, y = net(3, 6, 1), torch.randn(8, 3).double(), torch.randn(8).double()
    found = direction(model, lambda: model(x).squeeze(-1) - y, damping=1e9)
    model.zero_grad()
    (0.5 * (model(x).squeeze(-1) - y).square().sum()).backward()
    plain = flat(p.grad for p in model.parameters())
    torch.testing.assert_close(found / found.norm(), plain / plain.norm(), rtol=1e-6, atol=1e-8)


def test_a_linear_problem_keeps_every_promise():
    model, x, y = nn.Linear(3, 1).double(), torch.randn(9, 3).double(), torch.randn(9).double()
    rule, optimizer = LevenbergMarquardt(model), torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.1)
    residuals = lambda: model(x).squeeze(-1) - y  # noqa: E731
    for _ in range(3):
        optimizer.zero_grad()
        rule(residuals(), closure=residuals)
        optimizer.step()
        rule.step()
        assert rule.gain == pytest.approx(1, abs=1e-6)


def test_several_residuals_of_an_example_in_numpy():
    model, x, y = net(3, 6, 4), torch.randn(5, 3).double(), torch.randn(5, 4).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, x).flatten())(params)
    j = torch.cat([t.flatten(1) for t in found.values()], 1).numpy()
    r = (model(x) - y).detach().flatten().numpy()
    lam = 0.1 * np.mean(np.sum(j**2, 1))
    expected = np.linalg.solve(j.T @ j + lam * np.eye(j.shape[1]), j.T @ r)
    start = flat(model.parameters())
    rule, optimizer = LevenbergMarquardt(model, damping=0.1), torch.optim.SGD(model.parameters(), lr=1.0)
    rule(model(x) - y, closure=lambda: model(x) - y)
    np.testing.assert_allclose(flat(p.grad for p in model.parameters()), expected, rtol=1e-8, atol=1e-10)
    optimizer.step()
    rule.step()
    moved = (flat(model.parameters()) - start).numpy()
    now = (model(x) - y).detach().numpy()
    gain = (np.sum(r**2) - np.sum(now**2)) / (np.sum(r**2) - np.sum((r + j @ moved) ** 2))
    assert rule.gain == pytest.approx(gain, rel=1e-8)


def test_more_dimensions_than_outputs_are_refused():
    model, x = net(3, 4), torch.randn(5, 2, 3).double()
    with pytest.raises(ValueError, match=r"shape \(B,\) or \(B, R\), got \(5, 2, 4\)"):
        LevenbergMarquardt(model, adapt=1.0)(model(x))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.scale = net(3, 6, 1), nn.Parameter(torch.ones(3).double())

    def forward(self, x):
        return self.net(x * self.scale)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.RNN(1, 4, batch_first=True).double(), nn.Linear(4, 1).double()

    def forward(self, x):
        return self.head(self.rnn(x[:, :, None])[0][:, -1])


@pytest.mark.parametrize("build", [Scaled, Recurrent])
@pytest.mark.filterwarnings("ignore:each step takes")
def test_steps_are_judged_also_where_the_engine_has_no_closed_form(build):
    model, x, y = build(), torch.randn(8, 3).double(), torch.randn(8).double()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    residuals = lambda: model(x).squeeze(-1) - y  # noqa: E731
    rule, optimizer = LevenbergMarquardt(model, damping=0.1), torch.optim.SGD(model.parameters(), lr=1.0)
    r = residuals()
    rows = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in r]
    rule(residuals(), closure=residuals)
    optimizer.step()
    rule.step()
    moved = [p.detach() - params[name] for name, p in model.named_parameters()]
    promised = r.detach() + torch.stack([sum((g * d).sum() for g, d in zip(row, moved, strict=True)) for row in rows])
    before, now, linear = (t.detach().square().sum().item() for t in (r, residuals(), promised))
    assert rule.gain == pytest.approx((before - now) / (before - linear), rel=1e-7)


def test_squares_with_kappa_1_and_residuals_with_kappa_2_are_the_same_conditions():
    model, x, y = net(3, 6, 1), torch.randn(8, 3).double(), torch.randn(8).double()
    signed = direction(model, lambda: model(x).squeeze(-1) - y, damping=0.1)
    squared = direction(model, lambda: (model(x).squeeze(-1) - y).square(), damping=0.1, kappa=1.0)
    torch.testing.assert_close(squared, signed, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_the_units_of_the_losses_do_not_matter(factor):
    model, x, y = net(3, 6, 1), torch.randn(8, 3).double(), torch.randn(8).double()
    plain = direction(model, lambda: model(x).squeeze(-1) - y, damping=0.1)
    scaled = direction(model, lambda: factor * (model(x).squeeze(-1) - y), damping=0.1)
    torch.testing.assert_close(scaled, plain, rtol=1e-7, atol=1e-10)


def test_the_damping_stays_in_its_bounds_when_the_problem_is_solved():
    model, x = nn.Linear(2, 1), torch.randn(6, 2)
    y = (x @ torch.tensor([1.0, 2.0])).detach()
    rule, optimizer = LevenbergMarquardt(model), torch.optim.SGD(model.parameters(), lr=1.0)
    residuals = lambda: model(x).squeeze(-1) - y  # noqa: E731
    for _ in range(60):
        optimizer.zero_grad()
        rule(residuals(), closure=residuals)
        optimizer.step()
        rule.step()
    assert rule.damping >= LEAST
    assert residuals().abs().max() < 1e-5


def test_conditions_met_exactly_leave_the_model_alone():
    model = nn.Linear(2, 1)
    x = torch.randn(4, 2)
    found = direction(model, lambda: (model(x) - model(x).detach()).squeeze(-1))
    assert torch.equal(found, torch.zeros_like(found))


def test_a_loss_that_is_not_finite_gives_nan_as_an_ordinary_backward_does():
    model, x = nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [float("inf"), 0.0]])
    assert direction(model, lambda: model(x).squeeze(-1)).isnan().any()


@pytest.mark.parametrize("check", rules.CHECKS)
@pytest.mark.parametrize("settings", [{"adapt": 1.0}], ids=str)
def test_rule_keeps_the_contract_in_every_setting(settings, check):
    check(dataclasses.replace(method, preset={**method.preset, **settings}))


def test_without_adaptation_neither_closure_nor_step_is_needed():
    model, x = nn.Linear(2, 1), torch.randn(4, 2)
    rule = LevenbergMarquardt(model, damping=0.5, adapt=1.0)
    rule(model(x).squeeze(-1))
    rule.step()
    assert (rule.damping, rule.gain) == (0.5, None)


def test_says_what_is_missing():
    model, x = nn.Linear(2, 1), torch.randn(4, 2)
    rule, optimizer = LevenbergMarquardt(model), torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"adapt=2.0 needs the losses again: rule\(losses, closure"):
        rule(model(x).squeeze(-1))
    model.zero_grad()
    rule(model(x).squeeze(-1), closure=lambda: model(x).squeeze(-1))
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"not judged: call rule.step\(\) after optimizer.step\(\)"):
        rule(model(x).squeeze(-1), closure=lambda: model(x).squeeze(-1))
    normed = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    with pytest.raises(UnmetRequirement, match="GroupNorm"):
        LevenbergMarquardt(normed, adapt=1.0)(normed(x).squeeze(-1))


@pytest.mark.parametrize(
    ("name", "value"), [("damping", 0.0), ("damping", float("nan")), ("kappa", -1.0), ("adapt", 0.5), ("adapt", "x")]
)
def test_hyper_parameters_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        LevenbergMarquardt(nn.Linear(1, 1), **{name: value})


def test_repr():
    rule = LevenbergMarquardt(nn.Linear(2, 1), damping=0.3)
    rule.damping = 0.01
    assert repr(rule) == "LevenbergMarquardt(damping=0.01, kappa=2.0, adapt=2.0)"


def sine(generator):
    x = torch.empty(600, 1).uniform_(-1, 1, generator=generator)
    return steep.split_loaders(x, (4 * x).sin(), generator, batch_size=32)


@functools.cache
def final(ours, seed):
    recipe = steep.Recipe(
        data=sine,
        model=lambda: nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)),
        loss=lambda output, target: (output - target).square().squeeze(1),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
        budget=steep.Budget(steps=150 if ours else 450),  # a step costs about twice one of Adam's
    )
    recipe = method(recipe) if ours else recipe
    return steep.fit(recipe, seed=seed, progress=False).test["loss"]


@pytest.mark.parametrize("seed", range(3))
def test_fits_a_function_a_hundred_times_better_than_adam_with_three_times_the_steps(seed):
    assert final(True, seed) < final(False, seed) / 100


@pytest.mark.parametrize(("gain", "end"), [(-1.0, 1e3), (1.0, 1e-6)])
def test_the_damping_stays_between_its_ends(gain, end):
    rule = LevenbergMarquardt(nn.Linear(1, 1))
    for _ in range(60):
        rule._pending = SimpleNamespace(gain=lambda: gain)
        rule.step()
    assert rule.damping == end
