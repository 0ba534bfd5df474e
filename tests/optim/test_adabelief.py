"""AdaBelief against its formula, torch's Adam and RAdam, and the functions of its paper."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from steep.method import methods
from steep.optim import adabelief
from steep.optim.adabelief import AdaBelief, _rectification


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randoms(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = generator(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def follow(make: Any, start: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
    """Positions after each of the prescribed gradients, (T + 1, *shape)."""
    p = nn.Parameter(start.clone())
    optimizer, path = make([p]), [start.clone()]
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return torch.stack(path)


def reference(x, grads, lr, b1, b2, eps, wd, decoupled=True, amsgrad=False, rectify=False, sign=1):
    """The formula, in NumPy."""
    m, s, top = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(grads, 1):
        g = sign * g if decoupled else sign * g + wd * x
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps
        top = np.maximum(top, s)
        used, m_hat = top if amsgrad else s, m / (1 - b1**t)
        step = m_hat / (np.sqrt(used / (1 - b2**t)) + eps)
        if rectify:
            rho_inf = 2 / (1 - b2) - 1
            rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
            r2 = (1 - b2**t) * (rho - 4) / (rho_inf - 4) * (rho - 2) / rho * rho_inf / (rho_inf - 2)
            step = m_hat if rho < 5 else np.sqrt(r2) * m_hat / (np.sqrt(used) + eps)
        x = (x * (1 - lr * wd) if decoupled else x) - lr * step
    return x


OPTIONS: list[dict[str, Any]] = [
    {},
    {"decoupled": False},
    {"amsgrad": True},
    {"rectify": True},
    {"rectify": True, "amsgrad": True, "decoupled": False},
    {"maximize": True},
    {"maximize": True, "decoupled": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 9])  # rectification sets in at step 6
def test_steps_match_the_formula(options, steps):
    start, *grads = randoms(*[(4, 3)] * (steps + 1))
    hyper = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.3}
    path = follow(lambda p: AdaBelief(p, **hyper, **options), start, grads)
    formula = {k: v for k, v in options.items() if k != "maximize"}
    sign = -1 if "maximize" in options else 1
    expected = reference(start.numpy(), [g.numpy() for g in grads], 0.02, 0.8, 0.99, 1e-3, 0.3, **formula, sign=sign)
    np.testing.assert_allclose(path[-1].numpy(), expected, rtol=1e-12, atol=1e-14)


def test_eps_accumulates_in_the_state():
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = AdaBelief([p], betas=(0.9, 0.5), eps=1e-4)
    for _ in range(60):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg_var"], torch.full_like(p, 1e-4 / (1 - 0.5)).detach())


def test_constant_gradient_has_a_closed_form_and_lets_the_step_grow():
    b1, b2, g, lr = 0.9, 0.99, 3.0, 0.01
    path = follow(
        lambda p: AdaBelief(p, lr=lr, betas=(b1, b2), eps=0.0, weight_decay=0.0),
        torch.zeros(1, dtype=torch.float64),
        [torch.full((1,), g, dtype=torch.float64)] * 30,
    )
    steps = -path.diff(dim=0).squeeze().numpy()
    for t in range(1, 31):
        s = g**2 * (1 - b2) * sum(b2 ** (t - i) * b1 ** (2 * i) for i in range(1, t + 1))
        assert steps[t - 1] == pytest.approx(lr * g / np.sqrt(s / (1 - b2**t)), rel=1e-11)
    assert (np.diff(steps) > 0).all()
    assert steps[-1] > 2 * lr  # where every step of Adam is lr


def test_slow_mean_is_adam():
    """As beta1 -> 1 the mean m -> 0, hence (g - m)^2 -> g^2: Adam, up to O((1 - beta1) t)."""
    start, *grads = randoms(*[(7,)] * 21)
    betas = (1 - 1e-7, 0.95)
    ours = follow(lambda p: AdaBelief(p, lr=0.01, betas=betas, eps=0.0, weight_decay=0.0), start, grads)
    adam = follow(lambda p: torch.optim.Adam(p, lr=0.01, betas=betas, eps=0.0), start, grads)
    torch.testing.assert_close(ours, adam, rtol=1e-5, atol=1e-7)


def test_first_step_is_adams_over_beta1():
    start, g = randoms((5,), (5,))
    ours = follow(lambda p: AdaBelief(p, lr=0.01, eps=0.0, weight_decay=0.0), start, [g])
    adam = follow(lambda p: torch.optim.Adam(p, lr=0.01, eps=0.0), start, [g])
    torch.testing.assert_close(0.9 * (ours[1] - start), adam[1] - start, rtol=1e-12, atol=1e-15)


def test_rectification_is_radams():
    start, *grads = randoms(*[(3,)] * 6)
    ours = follow(lambda p: AdaBelief(p, lr=0.01, weight_decay=0.0, rectify=True), start, grads[:5])
    radam = follow(lambda p: torch.optim.RAdam(p, lr=0.01), start, grads[:5])
    torch.testing.assert_close(ours, radam, rtol=1e-12, atol=1e-14)  # no variance yet: both are plain momentum
    ones = [torch.ones(1, dtype=torch.float64)] * 40
    path = follow(lambda p: torch.optim.RAdam(p, lr=1.0, eps=0.0), torch.zeros(1, dtype=torch.float64), ones)
    for t in range(6, 41):  # the step of RAdam on a constant gradient is its factor r
        assert _rectification(t, 0.999) == pytest.approx(-path.diff(dim=0)[t - 1].item(), rel=1e-9)
    assert all(_rectification(t, 0.999) is None for t in range(1, 6))
    assert _rectification(1_000_000, 0.999) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**30])
def test_scale_of_the_gradient_does_not_matter_without_eps(scale):
    start, *grads = randoms(*[(6,)] * 11)
    make = lambda p: AdaBelief(p, eps=0.0)  # noqa: E731
    assert torch.equal(follow(make, start, grads), follow(make, start, [scale * g for g in grads]))


def test_every_option_changes_the_path():
    start, *grads = randoms(*[(5,)] * 13)
    grads = [g * (10 if i < 4 else 1) for i, g in enumerate(grads)]  # s falls, so that its maximum matters
    plain = {"lr": 0.02, "betas": (0.9, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    changes = ({"lr": 0.03}, {"betas": (0.8, 0.9)}, {"betas": (0.9, 0.8)}, {"eps": 1e-2}, {"weight_decay": 0.0})
    flags = ({"decoupled": False}, {"rectify": True}, {"amsgrad": True}, {"maximize": True})
    paths = [follow(lambda p, c=c: AdaBelief(p, **{**plain, **c}), start, grads) for c in ({}, *changes, *flags)]
    for i, a in enumerate(paths):
        for b in paths[:i]:
            assert (a[-1] - b[-1]).abs().max() > 1e-4


def test_maximizing_is_minimizing_the_negative():
    start, *grads = randoms(*[(5,)] * 6)
    up = follow(lambda p: AdaBelief(p, maximize=True), start, grads)
    assert torch.equal(up, follow(AdaBelief, start, [-g for g in grads]))


@pytest.mark.parametrize("maximize", [False, True])
def test_weight_decay_leaves_the_gradient_alone(maximize):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 2.0)
    AdaBelief([p], decoupled=False, weight_decay=0.5, maximize=maximize).step()
    assert torch.equal(p.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "rectify": True}, {"foreach": False}], ids=str)
def test_resume_is_exact(options):
    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        return model, AdaBelief(model.parameters(), lr=0.01, **options)

    def train(model, optimizer, steps):
        for t in steps:
            optimizer.zero_grad()
            model(torch.randn(8, 3, generator=generator(t))).square().mean().backward()
            optimizer.step()

    straight, optimizer = fresh()
    train(straight, optimizer, range(12))
    first, optimizer = fresh()
    train(first, optimizer, range(6))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = fresh()
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, range(6, 12))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"lr": -0.1}, r"lr=-0.1 must lie in \[0, inf\)"),
        ({"lr": float("nan")}, r"lr=nan must lie in \[0, inf\)"),
        ({"lr": "fast"}, r"lr='fast' must be a number in \[0, inf\)"),
        ({"betas": (0.0, 0.9)}, r"betas\[0\]=0.0 must lie in \(0, 1\)"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0 must lie in \[0, 1\)"),
        ({"betas": 0.9}, r"betas=0.9 must be 2 numbers in \(0, 1\), \[0, 1\)"),
        ({"eps": -1e-8}, r"eps=-1e-08 must lie in \[0, inf\)"),
        ({"weight_decay": float("inf")}, r"weight_decay=inf must lie in \[0, inf\)"),
    ],
    ids=str,
)
def test_bad_values_are_named(bad, message):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        AdaBelief([p], **bad)
    with pytest.raises(ValueError, match=message):
        AdaBelief([{"params": [p], **bad}])


def quadratic(x, y):
    return (x + y) ** 2 + (x - y) ** 2 / 10


def beale(x, y):
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def rosenbrock(x, y):
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


PAPER = {  # function, start, steps to 0.01 of the minimum at lr 0.01: Adam's and AdaBelief's
    "|x| + |y|": (lambda x, y: x.abs() + y.abs(), (2.0, 1.0), 201, 98),
    "|x + y| + |x - y| / 10": (lambda x, y: (x + y).abs() + (x - y).abs() / 10, (2.0, 1.0), 610, 417),
    "quadratic": (quadratic, (2.0, 1.0), 729, 306),
    "Beale": (beale, (1.0, 1.5), 1415, 851),
    "Rosenbrock": (rosenbrock, (-1.5, 2.0), 1946, 1761),
}


def steps_to_minimum(make, function, starts):
    """Steps until the function is below 0.01, for each row of `starts` (the optimizers are elementwise)."""
    p = nn.Parameter(starts.clone())
    optimizer, found = make([p]), torch.zeros(len(starts), dtype=torch.int64)
    for t in range(4000):
        values = function(p[:, 0], p[:, 1])
        found[(values < 1e-2) & (found == 0)] = t + 1
        if (found > 0).all():
            return found
        (p.grad,) = torch.autograd.grad(values.sum(), p)
        optimizer.step()
    raise AssertionError("no minimum in 4000 steps")


@pytest.mark.parametrize("name", PAPER)
def test_needs_fewer_steps_than_adam_on_the_papers_functions(name):
    function, start, adam_steps, steps = PAPER[name]
    starts = torch.tensor(start, dtype=torch.float64).repeat(8, 1)
    starts[1:] += 0.05 * torch.randn(7, 2, generator=generator(), dtype=torch.float64)  # seven pairs beside the paper's
    adam = steps_to_minimum(lambda p: torch.optim.Adam(p, lr=1e-2), function, starts)
    ours = steps_to_minimum(lambda p: AdaBelief(p, lr=1e-2, weight_decay=0.0), function, starts)
    assert adam[0] == pytest.approx(adam_steps, abs=2)
    assert ours[0] == pytest.approx(steps, abs=2)
    assert (ours < 0.95 * adam).all()


def test_entry():
    method = methods()["adabelief"]
    assert method is adabelief.method
    assert method.hyper["betas"] == (0.9, 0.999)
    assert method.changes == "optim"
