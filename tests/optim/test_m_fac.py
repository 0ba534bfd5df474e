"""M-FAC against the dense inverse of its Fisher matrix, the paper's own recursions, and its limits."""

import io
import warnings
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from steep.method import methods
from steep.optim import m_fac
from steep.optim.m_fac import MFAC, EmpiricalFisherInverse

SHAPES = ((2, 3), (), (4,))


def randoms(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def flat(tensors: Any) -> np.ndarray:
    return np.concatenate([t.detach().numpy().reshape(-1) for t in tensors])


def dense(grads: np.ndarray, damping: float) -> np.ndarray:
    """F, formed."""
    return damping * np.eye(grads.shape[1]) + grads.T @ grads / len(grads)


def reference(x, grads, *, lr, ngrads, damping, momentum=0.0, weight_decay=0.0, sign=1):
    """The formula, in NumPy, with the dense matrix and a window that forgets by itself."""
    window = deque([np.zeros_like(x)] * ngrads, maxlen=ngrads)
    v, path = np.zeros_like(x), [x]
    for g in grads:
        g = sign * g + weight_decay * x
        window.append(g)
        v = momentum * v + (1 - momentum) * np.linalg.solve(dense(np.stack(window), damping), g)
        x = x - lr * v
        path.append(x)
    return np.stack(path)


def follow(start: list[torch.Tensor], grads: list[list[torch.Tensor | None]], groups: Any = list, **hyper: Any) -> Any:
    """All parameters as one vector, after each step; and the optimizer."""
    params = [nn.Parameter(t.clone()) for t in start]
    optimizer = MFAC(groups(params), **hyper)
    path = [flat(params)]
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
        path.append(flat(params))
    return np.stack(path), optimizer


def problem(steps: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    numbers = randoms(*SHAPES * (steps + 1), seed=seed, dtype=dtype)
    rows = [numbers[i : i + 3] for i in range(0, len(numbers), 3)]
    return rows[0], rows[1:]


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"weight_decay": 0.3}, {"maximize": True}, {"maximize": True, "weight_decay": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("ngrads", [1, 4, 40])  # one gradient; three times around; a window that never fills
def test_steps_match_the_dense_inverse(options, ngrads):
    start, grads = problem(13)
    hyper = {"lr": 0.02, "ngrads": ngrads, "damping": 1e-2}
    path, _ = follow(start, grads, **hyper, **options)
    formula = {k: v for k, v in options.items() if k != "maximize"}
    sign = -1 if "maximize" in options else 1
    expected = reference(flat(start), [flat(g) for g in grads], **hyper, **formula, sign=sign)
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("damping", [1e-5, 1.0])
def test_steps_match_the_papers_dynamic_algorithm(damping):
    """LU of K / λ + m I without pivots; D its upper part, B the coefficients of the v_i in the gradients."""
    m, (start, grads) = 5, problem(12)
    path, _ = follow(start, grads, lr=1.0, ngrads=m, damping=damping)
    for t in (3, 5, 12):
        g_rows = np.zeros((m, path.shape[1]))
        for i in range(t):
            g_rows[i % m] = flat(grads[i])
        upper = g_rows @ g_rows.T / damping + m * np.eye(m)
        for i in range(m):
            for k in range(i + 1, m):
                upper[k] -= upper[k, i] / upper[i, i] * upper[i]
        q, d = np.diag(upper).copy(), np.triu(upper) - m * np.eye(m)
        b = np.eye(m) / damping
        for i in range(m):
            b[i, :i] = -sum((d[k, i] / q[k] * b[k, :i] for k in range(i)), np.zeros(i))
        x = flat(grads[t - 1])
        u = g_rows @ x / damping
        for i in range(1, m):
            u[i:] -= d[i - 1, i:] * u[i - 1] / q[i - 1]
        expected = x / damping - ((u / q) @ b) @ g_rows
        np.testing.assert_allclose(path[t - 1] - path[t], expected, rtol=1e-6, atol=1e-8)


def test_gradients_take_turns_in_the_ring():
    start, grads = problem(11)
    _, optimizer = follow(start, grads, ngrads=4)
    newest_last = [10 - 3, 10 - 2, 10 - 1, 10]  # counted from 0; gradient i lies in row i mod 4
    params = optimizer.param_groups[0]["params"]
    for k, p in enumerate(params):
        rows = optimizer.state[p]["grads"]
        assert rows.shape == (4, p.numel())
        for i in newest_last:
            assert torch.equal(rows[i % 4], grads[i][k].reshape(-1))
    shared, g = optimizer.state[params[0]], torch.cat([optimizer.state[p]["grads"] for p in params], 1)
    torch.testing.assert_close(shared["gram"], g @ g.T, rtol=1e-13, atol=1e-13)
    assert shared["step"] == 11


def test_first_step_is_a_normalized_gradient():
    start, grads = problem(1)
    path, _ = follow(start, grads, lr=0.1, ngrads=64, damping=1e-3)
    g = flat(grads[0])
    np.testing.assert_allclose(path[0] - path[1], 0.1 * 64 * g / (64 * 1e-3 + g @ g), rtol=1e-12)


def test_large_damping_is_sgd():
    start, grads = problem(9)
    path, _ = follow(start, grads, lr=0.05e9, damping=1e9, ngrads=4, weight_decay=0.1)
    params = [nn.Parameter(t.clone()) for t in start]
    sgd = torch.optim.SGD(params, lr=0.05, weight_decay=0.1)
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = g
        sgd.step()
    np.testing.assert_allclose(path[-1], flat(params), rtol=1e-6)


def test_turning_the_parameters_turns_the_path():
    """The whole matrix is inverted, not its diagonal or blocks."""
    start, *grads = randoms(*[(6,)] * 10)
    turn = torch.linalg.qr(randoms((6, 6), seed=1)[0])[0]
    path, _ = follow([start], [[g] for g in grads], lr=0.1, ngrads=4)
    turned, _ = follow([turn @ start], [[turn @ g] for g in grads], lr=0.1, ngrads=4)
    np.testing.assert_allclose(turned, path @ turn.numpy().T, rtol=1e-6, atol=1e-8)


def test_groups_share_one_matrix_and_have_their_own_lr():
    start, grads = problem(9)
    hyper = {"lr": 0.1, "ngrads": 4, "damping": 1e-2}
    one, _ = follow(start, grads, **hyper)
    two, _ = follow(start, grads, lambda p: [{"params": p[:1]}, {"params": p[1:], "lr": 0.3}], **hyper)
    steps = np.diff(one, axis=0)
    np.testing.assert_allclose(np.diff(two, axis=0)[:, :6], steps[:, :6], rtol=1e-12)
    np.testing.assert_allclose(np.diff(two, axis=0)[:, 6:], 3 * steps[:, 6:], rtol=1e-9)


def test_a_missing_gradient_counts_as_zeros_and_moves_nothing():
    start, grads = problem(9)
    grads = [[g if (t + k) % 3 else None for k, g in enumerate(row)] for t, row in enumerate(grads)]
    path, _ = follow(start, grads, lr=0.1, ngrads=4, damping=1e-2)
    filled = [[torch.zeros(s) if g is None else g for g, s in zip(row, SHAPES, strict=True)] for row in grads]
    there = [np.concatenate([np.full(s.numel(), g is not None) for g, s in zip(r, start, strict=True)]) for r in grads]
    whole = reference(np.zeros(11), [flat(row) for row in filled], lr=0.1, ngrads=4, damping=1e-2)
    np.testing.assert_allclose(np.diff(path, axis=0), np.diff(whole, axis=0) * np.stack(there), rtol=1e-8, atol=1e-11)


def test_a_group_added_later_starts_with_an_empty_window():
    (a, b), grads = randoms((3,), (2,)), randoms(*[(5,)] * 8, seed=1)
    p, q = nn.Parameter(a.clone()), nn.Parameter(b.clone())
    optimizer = MFAC([p], lr=0.1, ngrads=4, damping=1e-2)
    for t, g in enumerate(grads):
        if t == 3:
            optimizer.add_param_group({"params": [q]})
        p.grad, q.grad = g[:3].clone(), g[3:].clone()
        optimizer.step()
    early = [np.concatenate([g[:3].numpy(), np.zeros(2)]) if t < 3 else g.numpy() for t, g in enumerate(grads)]
    expected = reference(flat([a, b]), early, lr=0.1, ngrads=4, damping=1e-2)
    np.testing.assert_allclose(flat([p, q]), expected[-1], rtol=1e-9)


@pytest.mark.parametrize("pieces", [1, 56, 2**17])  # a column, seven, all at once
def test_single_precision_is_accurate_at_small_damping(pieces, monkeypatch):
    """Similar gradients and a λ far below their rounding times their length: K in float32 would not do."""
    monkeypatch.setattr(m_fac, "_PIECE", pieces)
    base, *noises = randoms(*[(300,)] * 9)
    grads = [(3 * base + 0.01 * n).float() for n in noises]
    path, _ = follow([torch.zeros(300)], [[g] for g in grads], lr=1.0, ngrads=8, damping=1e-7)
    exact = reference(np.zeros(300), [g.double().numpy() for g in grads], lr=1.0, ngrads=8, damping=1e-7)
    step, expected = path[-2] - path[-1], exact[-2] - exact[-1]
    assert np.linalg.norm(step - expected) < 1e-3 * np.linalg.norm(expected)


def test_half_precision_keeps_its_state_in_single():
    start, grads = problem(6)
    half = [[g.bfloat16() for g in row] for row in grads]
    params = [nn.Parameter(t.bfloat16()) for t in start]
    optimizer = MFAC(params, lr=1e-2, ngrads=4, damping=1e-2, momentum=0.5)
    for row in half:
        for p, g in zip(params, row, strict=True):
            p.grad = g
        optimizer.step()
    clone = MFAC(params, ngrads=4)
    clone.load_state_dict(optimizer.state_dict())
    for p in params:
        for own in (optimizer.state[p], clone.state[p]):
            assert own["grads"].dtype == own["momentum_buffer"].dtype == torch.float32
    assert torch.equal(clone.state[params[0]]["gram"], optimizer.state[params[0]]["gram"])
    assert clone.state[params[0]]["gram"].dtype == torch.float64


@pytest.mark.parametrize("stop", [0, 3, 7])  # before the first step, with the window half full, after it wrapped
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_resume_is_exact(stop, dtype):
    hyper = {"lr": 0.01, "ngrads": 5, "damping": 1e-3, "momentum": 0.9, "weight_decay": 0.01}

    def train(model, optimizer, steps):
        for t in steps:
            optimizer.zero_grad()
            (x,) = randoms((8, 3), seed=t, dtype=dtype)
            model(x).square().mean().backward()
            optimizer.step()

    def fresh():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
        return model, MFAC(model.parameters(), **hyper)

    straight, optimizer = fresh()
    train(straight, optimizer, range(12))
    first, optimizer = fresh()
    train(first, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = fresh()
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, range(stop, 12))
    train(first, MFAC(first.parameters(), **hyper), range(stop, 12))  # with its window lost it goes elsewhere
    assert all(map(torch.equal, straight.parameters(), second.parameters()))
    assert stop == 0 or not all(map(torch.equal, straight.parameters(), first.parameters()))


def test_loading_copies_the_state():
    start, grads = problem(3)
    _, optimizer = follow(start, grads, ngrads=4)
    saved = optimizer.state_dict()
    clone = MFAC([nn.Parameter(t.clone()) for t in start], ngrads=4)
    clone.load_state_dict(saved)
    clone.state[clone.param_groups[0]["params"][0]]["gram"].zero_()
    assert saved["state"][0]["gram"].any()


def test_every_option_changes_the_path():
    start, grads = problem(9)
    plain = {"lr": 0.02, "ngrads": 4, "damping": 1e-2, "momentum": 0.5, "weight_decay": 0.1}
    changes = ({"lr": 0.03}, {"ngrads": 5}, {"damping": 0.1}, {"momentum": 0.0}, {"weight_decay": 0.0})
    paths = [follow(start, grads, **{**plain, **c})[0][-1] for c in ({}, *changes, {"maximize": True})]
    for i, a in enumerate(paths):
        for b in paths[:i]:
            assert np.abs(a - b).max() > 1e-4


def test_damping_and_lr_may_follow_a_schedule():
    (start,), grads = randoms((5,)), randoms(*[(5,)] * 2, seed=1)
    p = nn.Parameter(start.clone())
    optimizer = MFAC([p], lr=torch.tensor(0.1, dtype=torch.float64), ngrads=2, damping=1.0)
    for g, damping in zip(grads, (1.0, 0.5), strict=True):
        optimizer.param_groups[0]["damping"] = damping
        before, p.grad = p.detach().clone(), g.clone()
        optimizer.step()
    expected = np.linalg.solve(dense(np.stack([g.numpy() for g in grads]), 0.5), grads[1].numpy())
    np.testing.assert_allclose((before - p.detach()).numpy(), 0.1 * expected, rtol=1e-10)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_shows_at_once(bad):
    start, grads = problem(2)
    grads[1][2][0] = bad
    path, _ = follow(start, grads, ngrads=4)
    assert np.isfinite(path[1]).all()
    assert np.isnan(path[2]).all()


def test_empty_parameters_and_unusual_layouts():
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, empty, plain = nn.Parameter(w.clone().t()), nn.Parameter(w.new_zeros(0, 2)), nn.Parameter(w.t().contiguous())
    for parameters in ([p, empty], [plain]):
        optimizer = MFAC(parameters, ngrads=3)
        for g in randoms(*[(4, 3)] * 4, seed=1):
            for q in parameters:
                q.grad = g.t() if q.numel() else torch.zeros_like(q)
            optimizer.step()
    torch.testing.assert_close(p, plain, rtol=1e-12, atol=1e-14)


def test_gradients_are_left_alone():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 2.0)
    MFAC([p], weight_decay=0.5, maximize=True).step()
    assert torch.equal(p.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"lr": -0.1}, r"lr=-0.1 must lie in \[0, inf\)"),
        ({"ngrads": 0}, r"ngrads=0 must lie in \[1, inf\)"),
        ({"ngrads": 2.5}, r"ngrads=2.5 must be an integer"),
        ({"damping": 0.0}, r"damping=0.0 must lie in \(0, inf\)"),
        ({"damping": float("nan")}, r"damping=nan must lie in \(0, inf\)"),
        ({"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\)"),
        ({"weight_decay": -1.0}, r"weight_decay=-1.0 must lie in \[0, inf\)"),
    ],
    ids=str,
)
def test_bad_values_are_named(bad, message):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        MFAC([p], **bad)
    with pytest.raises(ValueError, match=message):
        MFAC([{"params": [p], **bad}])


@pytest.mark.parametrize("unlike", [{"damping": 1.0}, {"ngrads": 7}], ids=str)
def test_groups_must_agree_on_the_matrix(unlike):
    (name,) = unlike
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=rf"{name}={unlike[name]} must be .*, as in the other groups"):
        MFAC([{"params": [p]}, {"params": [q], **unlike}])


def test_complex_parameters_are_refused_before_anything_changes():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad, q.grad = torch.ones(2), torch.ones(2, dtype=torch.complex64)
    optimizer = MFAC([p, q])
    with pytest.raises(RuntimeError, match=r"MFAC needs real parameters.*view_as_real"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(2))
    assert not optimizer.state


def test_a_large_window_is_announced_once(monkeypatch):
    start, grads = problem(2)
    monkeypatch.setattr(m_fac, "_LARGE", 5 * 11 * 8)
    with pytest.warns(UserWarning, match="MFAC keeps 0 GiB of gradients: lower ngrads") as found:
        follow(start, grads, ngrads=6)
    assert [warning.filename for warning in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        follow(start, grads, ngrads=5)


def losses_on_a_badly_scaled_regression(make: Any, seed: int) -> float:
    """Excess loss after 600 steps of batches of 8 on 20 features whose scales span a factor of 100."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, 20, dtype=torch.float64)
    truth = torch.randn(20, generator=g, dtype=torch.float64) / scales
    p = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = make([p])
    for _ in range(600):
        x = scales * torch.randn(8, 20, generator=g, dtype=torch.float64)
        noise = 0.1 * torch.randn(8, generator=g, dtype=torch.float64)
        p.grad = x.T @ (x @ (p.detach() - truth) - noise) / 8
        optimizer.step()
    return float((scales * (p.detach() - truth)).square().sum())


def test_learns_a_badly_scaled_regression_where_sgd_crawls():
    def losses(make):
        return np.log([losses_on_a_badly_scaled_regression(make, seed) for seed in range(4)])

    ours = losses(lambda p: MFAC(p, lr=0.1, ngrads=64, damping=1e-3))
    for lr in (0.1, 0.3, 1.0):
        sgd = losses(lambda p, lr=lr: torch.optim.SGD(p, lr=lr))
        assert (sgd - ours).mean() > np.log(3)


# ---- static


def matrix(m: int = 6, d: int = 10, seed: int = 0) -> torch.Tensor:
    return randoms((m, d), seed=seed)[0]


@pytest.mark.parametrize("damping", [1e-5, 1e-2, 3.0])
@pytest.mark.parametrize("shape", [(6, 10), (12, 5), (1, 4), (3, 1)], ids=str)
def test_static_matches_the_dense_inverse(damping, shape):
    g, (x,) = matrix(*shape), randoms((shape[1],), seed=1)
    inverse, f = EmpiricalFisherInverse(g, damping), dense(g.numpy(), damping)
    np.testing.assert_allclose(inverse.mul(x).numpy(), np.linalg.solve(f, x.numpy()), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(inverse.diag().numpy(), np.diag(np.linalg.inv(f)), rtol=1e-7, atol=1e-9)


def test_static_follows_the_dense_woodbury_recursion():
    """After i gradients the first i terms of the sum are the inverse of damping I + the sum of i outer products / m."""
    g, damping = matrix().numpy(), 0.1
    inverse, h = EmpiricalFisherInverse(torch.from_numpy(g), damping), np.eye(10) / damping
    for i, row in enumerate(g):
        h = h - np.outer(h @ row, h @ row) / (len(g) + row @ h @ row)
        w = inverse.w[: i + 1, 0].numpy()
        np.testing.assert_allclose(np.eye(10) / damping - w.T @ w, h, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("block_size", [1, 3, 5, 10])  # 3: the last block is smaller
def test_blocks_are_a_block_diagonal_matrix(block_size):
    g, (x,) = matrix(), randoms((10,), seed=1)
    blocks = np.arange(10) // block_size
    f = dense(g.numpy(), 1e-2) * (blocks[:, None] == blocks)
    inverse = EmpiricalFisherInverse(g, 1e-2, block_size)
    np.testing.assert_allclose(inverse.mul(x).numpy(), np.linalg.solve(f, x.numpy()), rtol=1e-9)
    np.testing.assert_allclose(inverse.diag().numpy(), np.diag(np.linalg.inv(f)), rtol=1e-9)


def test_order_of_the_gradients_does_not_matter():
    g, (x,) = matrix(), randoms((10,), seed=1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        EmpiricalFisherInverse(g).mul(x), EmpiricalFisherInverse(g[order]).mul(x), rtol=1e-7, atol=1e-8
    )


def test_static_is_dynamic():
    start, grads = problem(9)
    path, optimizer = follow(start, grads, lr=1.0, ngrads=4, damping=1e-2)
    rows = torch.cat([optimizer.state[p]["grads"] for p in optimizer.param_groups[0]["params"]], 1)
    product = EmpiricalFisherInverse(rows, 1e-2).mul(torch.from_numpy(flat(grads[-1])))
    np.testing.assert_allclose(path[-2] - path[-1], product.numpy(), rtol=1e-10)


def test_pruning_one_weight_costs_what_the_diagonal_says():
    """On a quadratic with Hessian F the best weights with w_i = 0 are w - F^-1 e_i w_i / [F^-1]_ii."""
    g, (w,) = matrix(), randoms((10,), seed=1)
    inverse, f = EmpiricalFisherInverse(g, 0.1), torch.from_numpy(dense(matrix().numpy(), 0.1))
    for i in range(10):
        unit = torch.eye(10, dtype=torch.float64)[i]
        change = -w[i] / inverse.diag()[i] * inverse.mul(unit)
        rest = [k for k in range(10) if k != i]
        best = -torch.linalg.solve(f[rest][:, rest], f[rest, i] * -w[i])
        torch.testing.assert_close(w[i] + change[i], torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
        torch.testing.assert_close(change[rest], best, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(change @ f @ change / 2, w[i] ** 2 / (2 * inverse.diag()[i]), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"grads": torch.ones(3)}, r"grads must be a matrix .*got shape \(3,\)"),
        ({"grads": torch.ones(0, 3)}, r"grads must be a matrix .*got shape \(0, 3\)"),
        ({"grads": torch.tensor([[torch.nan]])}, "grads must be finite"),
        ({"damping": 0.0}, r"damping=0.0 must lie in \(0, inf\)"),
        ({"block_size": 0}, r"block_size=0 must lie in \[1, inf\)"),
        ({"block_size": 1.5}, r"block_size=1.5 must be an integer"),
    ],
    ids=str,
)
def test_static_refuses_bad_values(bad, message):
    with pytest.raises(ValueError, match=message):
        EmpiricalFisherInverse(**{"grads": torch.ones(2, 3), **bad})


def test_static_refuses_vectors_of_another_length():
    with pytest.raises(ValueError, match=r"x must have shape \(10,\), got \(9,\)"):
        EmpiricalFisherInverse(matrix()).mul(torch.ones(9))


def test_entry():
    method = methods()["m-fac"]
    assert method is m_fac.method
    assert method.hyper["damping"] == 1e-5
    assert method.changes == "optim"
