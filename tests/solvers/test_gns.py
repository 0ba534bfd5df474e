"""Gradient-regularised Newton against its formula, its guarantee at every step, and its limits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from steep.method import methods
from steep.solvers import gns
from steep.solvers.gns import empirical_fisher, minimize, zero


def randoms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(d: int, seed: int = 0) -> torch.Tensor:
    a = randoms(d, d, seed=seed)
    return a @ a.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


def logistic(n: int = 40, d: int = 4):
    x, y = randoms(n, d), (randoms(n, seed=1) > 0).double()

    def losses(w):
        return F.binary_cross_entropy_with_logits(x @ w, y, reduction="none") + 1e-3 * w.square().sum()

    return losses, x.numpy(), y.numpy()


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def reference(x, y, steps, b, gamma, approximate):
    """Logistic regression with the formula and its derivatives written out, in NumPy."""

    def look(w):
        p = 1 / (1 + np.exp(-x @ w))
        value = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean() + 1e-3 * w @ w
        rows = x * (p - y)[:, None] + 2e-3 * w
        exact = (x * (p * (1 - p))[:, None]).T @ x / len(x) + 2e-3 * np.eye(len(w))
        return value, rows.mean(0), rows.T @ rows / len(x) if approximate else exact

    w = np.zeros(x.shape[1])
    path = []
    for _ in range(steps):
        f, g, h = look(w)
        norm = np.sqrt(g @ np.linalg.inv(b) @ g)
        while True:
            new = w - np.linalg.solve(h + norm / gamma * b, g)
            f_new, g_new, _ = look(new)
            if f - f_new >= g_new @ np.linalg.inv(b) @ g_new / (8 * norm / gamma):
                break
            gamma /= 2
        w, gamma = new, 2 * gamma
        path.append((w, gamma))
    return path


@pytest.mark.parametrize("gamma", [1.0, 100.0])  # 100: the search must first come down
@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("metric", [False, True])
def test_steps_match_the_formula(gamma, approximate, metric):
    losses, x, y = logistic()
    b = positive(4, seed=2) if metric else None
    matrix = torch.eye(4, dtype=torch.float64) if b is None else b
    path = reference(x, y, 3, matrix.numpy(), gamma, approximate)
    hessian = empirical_fisher(losses) if approximate else None
    for steps, (w, last) in enumerate(path, 1):
        start = torch.zeros(4)
        found = minimize(lambda w: losses(w).mean(), start, hessian, gamma=gamma, metric=b, steps=steps, tol=0.0)
        np.testing.assert_allclose(found.x.numpy(), w, rtol=1e-9, atol=1e-12)
        assert found.gamma == last
        assert len(found.trials) == steps


@pytest.mark.parametrize("metric", [False, True])
def test_without_curvature_a_step_has_length_gamma(metric):
    b = positive(5, seed=1) if metric else torch.eye(5, dtype=torch.float64)
    a, start = positive(5), randoms(5)
    g = a @ start
    found = minimize(lambda x: x @ a @ x / 2, start, zero, gamma=1e-3, metric=b, steps=1)
    step = found.x - start
    dual = torch.linalg.solve(b, g)
    torch.testing.assert_close(step, -1e-3 * dual / (g @ dual).sqrt(), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close((step @ b @ step).sqrt(), torch.tensor(1e-3, dtype=torch.float64))


def test_on_a_quadratic_every_trial_is_accepted_and_it_becomes_newtons_method():
    a, start = positive(6), randoms(6)
    found = minimize(lambda x: x @ a @ x / 2, start, tol=1e-10)
    assert found.converged
    assert set(found.trials) == {1}
    assert found.gamma == 2.0 ** len(found.trials)
    assert len(found.trials) < 15
    far = minimize(lambda x: x @ a @ x / 2, start, gamma=1e12, steps=1)
    assert far.x.norm() < 1e-9 * start.norm()


@pytest.mark.parametrize("name", ["exact", "fisher", "zero"])
def test_every_step_keeps_its_promise(name):
    losses, *_ = logistic()
    hessian = {"exact": None, "fisher": empirical_fisher(losses), "zero": zero}[name]
    start, gamma = torch.full((4,), 3.0), 1.0

    def mean(w):
        return losses(w).mean()

    for _ in range(4 if name == "exact" else 12):
        before = minimize(mean, start, steps=0)
        after = minimize(mean, start, hessian, gamma=gamma, steps=1, tol=0.0)
        used = after.gamma / 2
        assert before.losses[0] - after.losses[1] >= used * after.grad_norm**2 / (8 * before.grad_norm)
        assert used == gamma / 2 ** (after.trials[0] - 1)
        start, gamma = after.x, after.gamma


def test_going_on_from_a_result_is_the_same():
    losses, *_ = logistic()
    whole = minimize(lambda w: losses(w).mean(), torch.zeros(4), zero, steps=10)
    half = minimize(lambda w: losses(w).mean(), torch.zeros(4), zero, steps=5)
    rest = minimize(lambda w: losses(w).mean(), half.x, zero, gamma=half.gamma, steps=5)
    assert torch.equal(rest.x, whole.x)
    assert half.losses + rest.losses[1:] == whole.losses
    assert half.trials + rest.trials == whole.trials


def test_better_curvature_needs_fewer_steps():
    losses, *_ = logistic()
    ways = (None, empirical_fisher(losses), zero)
    found = [minimize(lambda w: losses(w).mean(), torch.zeros(4), way, tol=1e-6) for way in ways]
    assert all(f.converged for f in found)
    counts = [len(f.trials) for f in found]
    assert counts[0] < counts[1]
    assert counts[0] < counts[2]


def test_indefinite_hessians_are_got_over():
    """Rosenbrock at (0, 1): its Hessian has an eigenvalue of -398."""
    start = torch.tensor([0.0, 1.0])
    found = minimize(rosenbrock, start)
    assert found.trials[0] > 1
    assert found.converged
    torch.testing.assert_close(found.x, torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert all(a > b for a, b in zip(found.losses, found.losses[1:], strict=False))


def test_trials_outside_the_domain_fail_and_the_search_goes_on():
    found = minimize(lambda x: (x - x.log()).sum(), torch.tensor([1e-3]), zero, gamma=100.0)
    assert found.trials[0] > 1
    torch.testing.assert_close(found.x, torch.ones(1, dtype=torch.float64), rtol=1e-6, atol=0)


def test_where_nothing_is_accepted_it_ends_at_the_best_point():
    """|x| with a slope of 1 at 0, as rounding would have it near a minimum."""
    found = minimize(lambda x: (x.detach().abs() + x - x.detach()).sum(), torch.zeros(1), zero)
    assert not found.converged
    assert found.trials == ()
    assert found.losses == (0.0,)
    assert found.gamma == 1.0
    assert found.x.item() == 0.0


def test_empirical_fisher_is_the_mean_outer_product():
    losses, *_ = logistic()
    w, total = randoms(4), torch.zeros(4, 4, dtype=torch.float64)
    for i in range(40):
        point = w.clone().requires_grad_()
        (g,) = torch.autograd.grad(losses(point)[i], point)
        total += torch.outer(g, g) / 40
    torch.testing.assert_close(empirical_fisher(losses)(w), total, rtol=1e-10, atol=1e-13)


def test_tolerance_and_limits_end_it():
    losses, *_ = logistic()
    loose, tight = (minimize(lambda w: losses(w).mean(), torch.zeros(4), tol=tol) for tol in (1e-2, 1e-9))
    assert loose.grad_norm <= 1e-2
    assert tight.grad_norm <= 1e-9
    assert len(loose.trials) < len(tight.trials)
    assert not minimize(lambda w: losses(w).mean(), torch.zeros(4), steps=1).converged


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"gamma": 0.0}, r"gamma=0.0 must lie in \(0, inf\)"),
        ({"tol": -1.0}, r"tol=-1.0 must lie in \[0, inf\)"),
        ({"steps": -1}, r"steps=-1 must lie in \[0, inf\)"),
        ({"x": torch.ones(2, 2)}, r"x must be a finite vector, got shape \(2, 2\)"),
        ({"x": torch.tensor([torch.nan])}, "x must be a finite vector"),
        ({"metric": -torch.eye(3)}, "metric must be a symmetric positive definite"),
        ({"metric": torch.eye(2)}, r"metric must be .*\(3, 3\), got shape \(2, 2\)"),
        ({"metric": torch.eye(3) + torch.ones(3, 3).triu(1)}, "metric must be a symmetric"),
        ({"hessian": lambda x: x}, r"hessian must return a matrix \(3, 3\), got shape \(3,\)"),
        ({"loss": lambda x: x.square()}, r"loss must return a number, got shape \(3,\)"),
        ({"loss": lambda x: (x - 2).log().sum()}, "loss is nan at the start"),
        ({"loss": lambda x: (x * torch.rand(3)).sum()}, "loss differs between two calls"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_bad_values_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        minimize(**{"loss": lambda x: x.square().sum(), "x": torch.ones(3), **bad})


def test_card():
    method = methods()["gns"]
    assert method is gns.method
    assert not method.is_arm
