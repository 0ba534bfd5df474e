"""AdamP and SGDP against their formulas, torch's AdamW and SGD, and the exact identities of scale-invariant weights."""

import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from steep.method import methods
from steep.optim import adamp
from steep.optim.adamp import SGDP, AdamP


def randoms(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def follow(make: Any, start: torch.Tensor, gradient: Any, steps: int) -> tuple[torch.Tensor, Any]:
    """Positions (steps + 1, *shape) with gradients ``gradient(t, p)``, and the optimizer."""
    p = nn.Parameter(start.clone())
    optimizer, path = make([p]), [start.clone()]
    for t in range(steps):
        p.grad = gradient(t, p.detach()).clone()
        optimizer.step()
        path.append(p.detach().clone())
    return torch.stack(path), optimizer


def project(u, w, g, delta, eps):
    """The paper's projection in NumPy, row by row: (u, projected)."""
    if w.ndim < 2:
        return u, False
    for rows in (w.shape[0], 1):
        W, G, U = (x.reshape(rows, -1) for x in (w, g, u))
        norms = [np.linalg.norm(x, axis=1) for x in (G, W)]
        cosine = np.abs((G * W).sum(1)) / (np.maximum(norms[0], eps) * np.maximum(norms[1], eps))
        if cosine.max() < delta / np.sqrt(W.shape[1]):
            unit = W / (norms[1] + eps)[:, None]
            return (U - unit * (unit * U).sum(1, keepdims=True)).reshape(w.shape), True
    return u, False


def adamp_reference(w, gradient, steps, lr, b1, b2, eps, wd, delta, ratio, nesterov=False, sign=1):
    m, v, path, projections = np.zeros_like(w), np.zeros_like(w), [w], []
    for t in range(1, steps + 1):
        g = sign * gradient(t - 1, w)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        u = (b1 * m + (1 - b1) * g if nesterov else m) / (np.sqrt(v) / np.sqrt(1 - b2**t) + eps)
        u, projected = project(u, w, g, delta, eps)
        w = w * (1 - lr * wd * (ratio if projected else 1)) - lr / (1 - b1**t) * u
        path.append(w)
        projections.append(projected)
    return np.stack(path), projections


def sgdp_reference(w, gradient, steps, lr, momentum, dampening, eps, wd, delta, ratio, nesterov=False, sign=1):
    buffer, path, projections = np.zeros_like(w), [w], []
    for t in range(steps):
        g = sign * gradient(t, w)
        buffer = momentum * buffer + (1 - dampening) * g
        u, projected = project(g + momentum * buffer if nesterov else buffer, w, g, delta, eps)
        w = w * (1 - lr * wd / (1 - momentum) * (ratio if projected else 1)) - lr * u
        path.append(w)
        projections.append(projected)
    return np.stack(path), projections


def any_gradient(shape):
    grads = randoms(*[shape] * 4, seed=5)
    return lambda t, w: grads[t] if isinstance(w, torch.Tensor) else grads[t].numpy()


def orthogonal(shape, rows):
    """Gradients orthogonal to each row of w, or to w as a whole where `rows` is 1."""
    raw = any_gradient(shape)

    def gradient(t, w):
        g, flat = raw(t, w).reshape(rows, -1), w.reshape(rows, -1)
        along = (g * flat).sum(1)[:, None] / (flat * flat).sum(1)[:, None]
        return (g - along * flat).reshape(shape)

    return gradient


CASES = {  # shape, gradient, whether it must be projected; delta is 0.02
    "rows": ((4, 3, 2, 2), orthogonal((4, 3, 2, 2), 4), True),
    "layer only": ((5, 6), orthogonal((5, 6), 1), True),
    "neither": ((4, 3, 2, 2), any_gradient((4, 3, 2, 2)), False),
    "vector": ((6,), orthogonal((6,), 1), False),
    "number": ((), any_gradient(()), False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"maximize": True}], ids=str)
def test_adamp_matches_the_formula(case, options):
    shape, gradient, must = CASES[case]
    (start,) = randoms(shape)
    hyper = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.3, "delta": 0.02, "wd_ratio": 0.25}
    path, optimizer = follow(lambda p: AdamP(p, **hyper, **options), start, gradient, 4)
    signs = {"sign": -1 if options.get("maximize") else 1, "nesterov": options.get("nesterov", False)}
    expected, projected = adamp_reference(start.numpy(), gradient, 4, 0.02, 0.8, 0.99, 1e-3, 0.3, 0.02, 0.25, **signs)
    np.testing.assert_allclose(path.numpy(), expected, rtol=1e-11, atol=1e-13)
    assert projected == [must] * 4
    assert optimizer.projected_fraction() == float(must)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{"nesterov": False}, {"nesterov": True}, {"maximize": True}], ids=str)
def test_sgdp_matches_the_formula(case, options):
    shape, gradient, must = CASES[case]
    (start,) = randoms(shape)
    hyper = {"lr": 0.02, "momentum": 0.8, "dampening": 0.3, "eps": 1e-3, "weight_decay": 0.3, "delta": 0.02}
    path, optimizer = follow(lambda p: SGDP(p, **hyper, wd_ratio=0.25, **options), start, gradient, 4)
    signs = {"sign": -1 if options.get("maximize") else 1, "nesterov": options.get("nesterov", True)}
    expected, projected = sgdp_reference(start.numpy(), gradient, 4, 0.02, 0.8, 0.3, 1e-3, 0.3, 0.02, 0.25, **signs)
    np.testing.assert_allclose(path.numpy(), expected, rtol=1e-11, atol=1e-13)
    assert projected == [must] * 4
    assert optimizer.projected_fraction() == float(must)


def test_without_threshold_adamp_is_adamw():
    grads = randoms(*[(6, 4)] * 20, seed=3)
    (start,) = randoms((6, 4))
    ours, optimizer = follow(lambda p: AdamP(p, lr=0.01, weight_decay=0.1, delta=0), start, lambda t, w: grads[t], 20)
    adamw, _ = follow(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), start, lambda t, w: grads[t], 20)
    torch.testing.assert_close(ours, adamw, rtol=1e-12, atol=1e-13)
    assert optimizer.projected_fraction() == 0.0


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_threshold_sgdp_is_sgd_with_decoupled_decay(nesterov):
    grads = randoms(*[(6, 4)] * 20, seed=3)
    (start,) = randoms((6, 4))
    plain = {"lr": 0.01, "momentum": 0.9, "nesterov": nesterov}
    ours, _ = follow(lambda p: SGDP(p, **plain, weight_decay=0.0, delta=0), start, lambda t, w: grads[t], 20)
    sgd, _ = follow(lambda p: torch.optim.SGD(p, **plain), start, lambda t, w: grads[t], 20)
    torch.testing.assert_close(ours, sgd, rtol=1e-12, atol=1e-13)
    decayed, _ = follow(lambda p: SGDP(p, **plain, weight_decay=0.5, delta=0), start, lambda t, w: grads[t], 20)
    kept = 1 - 0.01 * 0.5 / (1 - 0.9)
    for t in range(20):  # the same steps, each after the decay
        torch.testing.assert_close(decayed[t + 1], kept * decayed[t] + sgd[t + 1] - sgd[t], rtol=1e-11, atol=1e-12)


def scale_invariant(rows):
    """The gradient of a function of the directions of w's rows (or of the direction of w as a whole)."""
    targets = randoms((3, 8), seed=7)[0]

    def gradient(t, w):
        w = w.detach().requires_grad_()
        flat = w.reshape(rows, -1)
        unit = (flat / flat.norm(dim=1, keepdim=True)).reshape(3, 8)
        return torch.autograd.grad((unit * targets).sin().sum() + (unit**3 * targets).sum(), w)[0]

    return gradient


@pytest.mark.parametrize("rows", [3, 1])
def test_sgdp_steps_are_tangential_and_add_only_their_own_square_to_the_norm(rows):
    (start,) = randoms((3, 8))
    lr = 0.05
    make = lambda p: SGDP(p, lr=lr, nesterov=False, weight_decay=0.0, eps=0.0, delta=1e-6)  # noqa: E731
    path, optimizer = follow(make, start, scale_invariant(rows), 30)
    assert optimizer.projected_fraction() == 1.0
    for w, after in pairwise(path):
        q = ((w - after) / lr).reshape(rows, -1)
        w, after = w.reshape(rows, -1), after.reshape(rows, -1)
        assert (w * q).sum(1).abs().max() < 1e-12
        norms = (w * w).sum(1) + lr**2 * (q * q).sum(1)
        torch.testing.assert_close((after * after).sum(1), norms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [3, 1])
def test_adamp_steps_are_tangential(rows):
    (start,) = randoms((3, 8))
    make = lambda p: AdamP(p, lr=0.05, weight_decay=0.0, eps=1e-30, delta=1e-6)  # noqa: E731
    path, _ = follow(make, start, scale_invariant(rows), 30)
    along = ((path[1:] - path[:-1]) * path[:-1]).reshape(30, rows, -1).sum(2)
    assert along.abs().max() < 1e-14


def test_unprojected_momentum_lengthens_the_weight_by_the_papers_sum():
    """||w||^2 grows by lr^2 ||p_t||^2 + 2 lr^2 sum_{k<t} beta^(t-k) ||p_k||^2, p_k the momentum: SGDP with delta 0."""
    (start,) = randoms((3, 8))
    lr, beta = 0.05, 0.9
    make = lambda p: SGDP(p, lr=lr, momentum=beta, nesterov=False, weight_decay=0.0, delta=0)  # noqa: E731
    path, _ = follow(make, start, scale_invariant(1), 30)
    p = ((path[:-1] - path[1:]) / lr).flatten(1).square().sum(1)
    for t in range(30):
        grown = lr**2 * p[t] + 2 * lr**2 * sum(beta ** (t - k) * p[k] for k in range(t))
        assert (path[t + 1] ** 2).sum() == pytest.approx(float((path[t] ** 2).sum() + grown), rel=1e-11)


@pytest.mark.parametrize("make", [AdamP, SGDP])
def test_large_threshold_projects_every_matrix(make):
    params = [nn.Parameter(w) for w in randoms((3, 4), (3, 4), (2, 3, 2, 2), (1, 5), (7,), ())]
    optimizer = make(params, delta=100.0)
    assert optimizer.projected_fraction() == 0.0
    for p, g in zip(params, randoms(*[p.shape for p in params], seed=1), strict=True):
        p.grad = g
    optimizer.step()
    assert optimizer.projected_fraction() == 1.0
    assert "projected" not in optimizer.state[params[4]]


@pytest.mark.parametrize("make", [AdamP, SGDP])
@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize("side", [0.99, 1.01])
def test_threshold_is_delta_over_the_root_of_the_rows_length(make, rows, side):
    """A gradient whose cosine with each row (or with the whole of w) is on one side of delta / sqrt(length)."""
    w, raw = randoms((4, 9), (4, 9))
    flat, g, length = w.reshape(rows, -1), raw.reshape(rows, -1), 36 // rows
    unit = flat / flat.norm(dim=1, keepdim=True)
    g = g - unit * (unit * g).sum(1, keepdim=True)
    g = g / g.norm(dim=1, keepdim=True)
    cosine = side * 0.3 / length**0.5
    p = nn.Parameter(w.clone())
    p.grad = (cosine * unit + (1 - cosine**2) ** 0.5 * g).reshape(4, 9)
    optimizer = make([p], delta=0.3)
    optimizer.step()
    assert optimizer.projected_fraction() == (1.0 if side < 1 else 0.0)


def test_equal_shapes_are_decided_one_by_one():
    """Tensors that share a call share no decision: the first is scale-invariant, the second is not."""
    starts = randoms((5, 6), (5, 6))
    invariant, plain = orthogonal((5, 6), 1), any_gradient((5, 6))
    params = [nn.Parameter(w.clone()) for w in starts]
    optimizer = AdamP(params, delta=0.02)
    for t in range(3):
        params[0].grad, params[1].grad = invariant(t, params[0].detach()), plain(t, params[1].detach())
        optimizer.step()
    assert [optimizer.state[p]["projected"].item() for p in params] == [1.0, 0.0]
    assert optimizer.projected_fraction() == 0.5
    for p, start, gradient in zip(params, starts, (invariant, plain), strict=True):
        alone, _ = follow(lambda p: AdamP(p, delta=0.02), start, gradient, 3)
        torch.testing.assert_close(p.detach(), alone[-1], rtol=1e-13, atol=0)


def test_zero_weights_and_gradients_stay_finite():
    params = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.ones(3, 4))]
    optimizer = AdamP(params)
    params[0].grad, params[1].grad = torch.ones(3, 4), torch.zeros(3, 4)
    optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert torch.equal(params[0], torch.full((3, 4), params[0][0, 0].item()))


@pytest.mark.parametrize("make", [AdamP, SGDP])
def test_every_option_changes_the_path(make):
    (start,), invariant = randoms((5, 6)), orthogonal((5, 6), 5)
    plain: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.5, "nesterov": False}
    common = ({"lr": 0.03}, {"weight_decay": 0.0}, {"wd_ratio": 0.5}, {"delta": 0}, {"eps": 0.1}, {"nesterov": True})
    own = {AdamP: ({"betas": (0.5, 0.999)}, {"betas": (0.9, 0.5)}), SGDP: ({"momentum": 0.5}, {"dampening": 0.5})}[make]
    options = ({}, *common, *own, {"maximize": True})
    paths = [follow(lambda p, o=o: make(p, **{**plain, **o}), start, invariant, 4)[0] for o in options]
    for i, a in enumerate(paths):
        for b in paths[:i]:
            assert (a[-1] - b[-1]).abs().max() > 1e-5


@pytest.mark.parametrize("make", [AdamP, SGDP])
def test_resume_is_exact(make):
    def fresh():
        torch.manual_seed(0)
        layers = nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)
        model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(6, 1))
        return model, make(model.parameters(), lr=0.01)

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
    second, resumed = fresh()
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.projected_fraction() == optimizer.projected_fraction() == pytest.approx(2 / 3)
    train(second, resumed, range(6, 12))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "bad", "message"),
    [
        (AdamP, {"lr": -1}, r"lr=-1 must lie in \[0, inf\)"),
        (AdamP, {"betas": (0.9, 1)}, r"betas\[1\]=1 must lie in \[0, 1\)"),
        (AdamP, {"delta": -0.1}, r"delta=-0.1 must lie in \[0, inf\)"),
        (AdamP, {"wd_ratio": 1.5}, r"wd_ratio=1.5 must lie in \[0, 1\]"),
        (AdamP, {"eps": "tiny"}, r"eps='tiny' must be a number in \[0, inf\)"),
        (SGDP, {"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\)"),
        (SGDP, {"dampening": -0.5}, r"dampening=-0.5 must lie in \[0, 1\)"),
        (SGDP, {"weight_decay": -1e-3}, r"weight_decay=-0.001 must lie in \[0, inf\)"),
    ],
    ids=str,
)
def test_bad_values_are_named(make, bad, message):
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=message):
        make([p], **bad)
    with pytest.raises(ValueError, match=message):
        make([{"params": [p], **bad}])


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16 - 0.5, dtype=torch.float32), torch.tensor(y)


def train_digits(make, digits, seed):
    """Growth of the two normalized layers' weights, training loss and validation accuracy; 160 steps, cosine decay."""
    x, y = digits
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden = [nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
        model = nn.Sequential(*hidden, nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    g = torch.Generator().manual_seed(seed)
    train, val = torch.randperm(len(x), generator=g).split([1280, len(x) - 1280])
    optimizer, before = make(model.parameters()), [model[i].weight.norm().item() for i in (0, 3)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 160)
    for batch in torch.cat([train[torch.randperm(1280, generator=g)] for _ in range(8)]).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        growth = [model[i].weight.norm().item() / b for i, b in zip((0, 3), before, strict=True)]
        loss = F.cross_entropy(model(x[train]), y[train]).item()
        return max(growth), min(growth), loss, (model(x[val]).argmax(1) == y[val]).double().mean().item(), optimizer


@pytest.mark.parametrize(
    ("make", "baseline"),
    [
        (
            lambda p: AdamP(p, lr=1e-2, weight_decay=0.0),
            lambda p: torch.optim.Adam(p, lr=1e-2),
        ),
        (
            lambda p: SGDP(p, lr=0.1, nesterov=False, weight_decay=0.0),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        ),
    ],
    ids=["adamp", "sgdp"],
)
def test_keeps_weights_short_and_learns_as_well_on_digits(make, baseline, digits):
    """The paper's claim at small scale: normalized weights grow far less, losses and accuracies are no worse."""
    losses, accuracies = [], []
    for seed in range(3):
        longest, _, loss, accuracy, optimizer = train_digits(make, digits, seed)
        _, shortest, base_loss, base_accuracy, _ = train_digits(baseline, digits, seed)
        assert longest < 1.1  # 1.04 measured
        assert shortest > 1.25  # 1.3 to 1.5 measured
        assert optimizer.projected_fraction() == pytest.approx(2 / 3)  # never the head
        losses.append(loss / base_loss)
        accuracies.append(accuracy - base_accuracy)
    assert np.mean(losses) < 1
    assert np.mean(accuracies) > -0.002


def test_entries():
    found = methods()
    assert found["adamp"] is adamp.method
    assert found["sgdp"] is adamp.sgdp_method
    assert found["adamp"].paper == found["sgdp"].paper
    assert found["sgdp"].hyper["momentum"] == 0.9


def test_defaults_are_the_authors():
    shared = {"eps": 1e-8, "delta": 0.1, "wd_ratio": 0.1, "maximize": False, "foreach": None, "compile": False}
    adam = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-2, "nesterov": False}
    sgd = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 1e-5, "nesterov": True}
    assert AdamP([torch.zeros(1)]).defaults == {**shared, **adam}
    assert SGDP([torch.zeros(1)]).defaults == {**shared, **sgd}
