"""diffGrad against its formula, torch's Adam, and the functions of its paper."""

import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from steep.method import methods
from steep.optim import diffgrad
from steep.optim.diffgrad import DiffGrad


def randoms(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def follow(make: Any, start: torch.Tensor, grads: list[torch.Tensor | None]) -> torch.Tensor:
    """Positions after each of the prescribed gradients, (T + 1, *shape)."""
    p = nn.Parameter(start.clone())
    optimizer, path = make([p]), [start.clone()]
    for g in grads:
        p.grad = None if g is None else g.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return torch.stack(path)


def reference(x, grads, lr, b1, b2, eps, wd):
    """The formula, in NumPy: the path of x."""
    m, v, last, path = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x), [x]
    for t, g in enumerate(grads, 1):
        g = g + wd * x
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        xi, last = 1 / (1 + np.exp(-np.abs(last - g))), g
        x = x - lr * np.sqrt(1 - b2**t) / (1 - b1**t) * xi * m / (np.sqrt(v) + eps)
        path.append(x)
    return np.stack(path)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("maximize", [False, True])
def test_steps_match_the_formula(weight_decay, maximize):
    start, *grads = randoms(*[(4, 3)] * 6)
    hyper = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": weight_decay}
    path = follow(lambda p: DiffGrad(p, maximize=maximize, **hyper), start, grads)
    signed = [-g.numpy() if maximize else g.numpy() for g in grads]
    expected = reference(start.numpy(), signed, 0.02, 0.8, 0.99, 1e-3, weight_decay)
    np.testing.assert_allclose(path.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_constant_gradient_is_adam_at_half_the_rate_from_the_second_step_on():
    start, g = randoms((6,), (6,))
    ours = follow(lambda p: DiffGrad(p, lr=0.1, eps=0.0), start, [g] * 8).diff(dim=0)
    adam = follow(lambda p: torch.optim.Adam(p, lr=0.05, eps=0.0), start, [g] * 8).diff(dim=0)
    torch.testing.assert_close(ours[1:], adam[1:], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(ours[0], 2 * adam[0] * g.abs().sigmoid(), rtol=1e-11, atol=1e-14)  # g' = 0 at first


def test_friction_is_the_ratio_to_adams_step_and_between_a_half_and_one():
    start, *grads = randoms(*[(40,)] * 13)
    ours = follow(lambda p: DiffGrad(p, lr=0.1, eps=0.0), start, grads).diff(dim=0)
    adam = follow(lambda p: torch.optim.Adam(p, lr=0.1, eps=0.0), start, grads).diff(dim=0)
    friction = ours / adam
    changes = torch.stack([grads[0], *[b - a for a, b in pairwise(grads)]]).abs()
    torch.testing.assert_close(friction, 1 / (1 + (-changes).exp()), rtol=1e-9, atol=0)
    assert 0.5 <= friction.min() < 0.52
    assert 0.95 < friction.max() < 1


def test_violently_changing_gradients_make_it_adam():
    start, *grads = randoms(*[(9,)] * 21)
    grads = [1e6 * g for g in grads]
    ours = follow(lambda p: DiffGrad(p, lr=0.01, eps=0.0), start, grads)
    adam = follow(lambda p: torch.optim.Adam(p, lr=0.01, eps=0.0), start, grads)
    torch.testing.assert_close(ours, adam, rtol=1e-12, atol=1e-13)


def test_previous_gradient_is_not_the_tensor_the_next_backward_pass_overwrites():
    start, *grads = randoms(*[(5,)] * 6)
    expected = follow(DiffGrad, start, grads)[-1]
    p = nn.Parameter(start.clone())
    optimizer = DiffGrad([p])
    p.grad = torch.empty_like(p)
    for g in grads:
        p.grad.copy_(g)  # as zero_grad(set_to_none=False) and backward do
        optimizer.step()
    assert torch.equal(p.detach(), expected)


def test_step_without_gradient_keeps_the_previous_one():
    start, a, b = randoms((5,), (5,), (5,))
    assert torch.equal(follow(DiffGrad, start, [a, None, b])[-1], follow(DiffGrad, start, [a, b])[-1])


@pytest.mark.parametrize("maximize", [False, True])
def test_weight_decay_leaves_the_gradient_alone(maximize):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 2.0)
    DiffGrad([p], weight_decay=0.5, maximize=maximize).step()
    assert torch.equal(p.grad, torch.full((3,), 2.0))


def test_every_option_changes_the_path():
    start, *grads = randoms(*[(5,)] * 7)
    changes = ({"lr": 0.03}, {"betas": (0.5, 0.9)}, {"betas": (0.9, 0.5)}, {"eps": 0.1}, {"weight_decay": 0.1})
    plain = {"lr": 0.02, "betas": (0.9, 0.9)}
    options = ({}, *changes, {"maximize": True})
    paths = [follow(lambda p, o=o: DiffGrad(p, **{**plain, **o}), start, grads) for o in options]
    for i, a in enumerate(paths):
        for b in paths[:i]:
            assert (a[-1] - b[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("foreach", [None, False])
def test_resume_is_exact(foreach):
    def fresh():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        return model, DiffGrad(model.parameters(), lr=0.01, weight_decay=0.01, foreach=foreach)

    def train(model, optimizer, steps):
        for t in steps:
            optimizer.zero_grad()
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(t))
            model(x).square().mean().backward()
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
        ({"lr": -1}, r"lr=-1 must lie in \[0, inf\)"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0 must lie in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]=-0.1 must lie in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\) must be 2 numbers"),
        ({"eps": None}, r"eps=None must be a number in \[0, inf\)"),
        ({"weight_decay": -1e-3}, r"weight_decay=-0.001 must lie in \[0, inf\)"),
    ],
    ids=str,
)
def test_bad_values_are_named(bad, message):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        DiffGrad([p], **bad)
    with pytest.raises(ValueError, match=message):
        DiffGrad([{"params": [p], **bad}])


def slope_1(x):
    """F1': minima at -0.3 (global) and 0.2."""
    return torch.where(x <= 0, 2 * x + 0.6, 2 * x - 0.4)


def slope_2(x):
    """F2': a steep wall on the left, minima near -0.85 and at 0, the left one lower."""
    return torch.where(x <= -0.9, -40.0, x * (8 * x).cos() + (8 * x).sin() + 3 * x**2)


def minimize(make, slope):
    """Where 300 steps lead from 41 starts around the paper's -1, at its lr 0.1 and betas (0.95, 0.999)."""
    p = nn.Parameter(torch.linspace(-1.2, -0.8, 41, dtype=torch.float64))
    optimizer = make([p], lr=0.1, betas=(0.95, 0.999))
    for _ in range(300):
        p.grad = slope(p.detach())
        optimizer.step()
    return p.detach()


def test_finds_the_better_minima_of_the_papers_functions():
    adam, ours = minimize(torch.optim.Adam, slope_1), minimize(DiffGrad, slope_1)
    assert adam[20] == pytest.approx(0.2001, abs=1e-4)  # index 20 is the paper's start
    assert ours[20] == pytest.approx(-0.3001, abs=1e-4)
    assert (adam < 0).sum() <= 20
    assert (ours < 0).all()
    adam, ours = minimize(torch.optim.Adam, slope_2), minimize(DiffGrad, slope_2)
    assert adam[20] == pytest.approx(0.0002, abs=1e-4)
    assert ours[20] == pytest.approx(-0.8121, abs=1e-3)
    assert (adam < -0.7).sum() <= 20
    assert (ours < -0.7).sum() >= 32


def test_entry():
    method = methods()["diffgrad"]
    assert method is diffgrad.method
    assert method.hyper["weight_decay"] == 0.0
    assert method.changes == "optim"
